"""Learn what animals look like from random ones: how `animals.safetensors` was made, and how to make another.

    python -m zoosplat_train.pretrain OUT.safetensors [--animals 6400] [--minutes 7.2] [--start-from animals]

The network is a recording's own, and so is a step of its training; but every step shows another animal, in six views
of a random rig. It is carved from three to five of them, and all six count in the loss: so the network learns what
hulls of few views have too much of, on any side. `train.start_from` names what it has learned.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from zoosplat import random_animals
from zoosplat.config import OF_ANIMALS, RANDOM, Experiment
from zoosplat.random_animals import HEIGHT, VIEWS, WIDTH, Film
from zoosplat_model.frames import Frame, FrameReader, send
from zoosplat_model.losses import soft_iou
from zoosplat_model.predictor import pick_device
from zoosplat_model.splatter import PoseSplatter
from zoosplat_train import ops, start

RIGS = 32  # each films an equal share of the animals
SHOWN = 6  # views of a step
CARVED = (3, 4, 4, 5)  # of these, each as often
FEWEST = 4  # cameras that a rig has: with three views one is left out
WIDEST_GAP = {3: 6, 4: 5, 5: 5}  # between neighbours of the carved views, in cameras of the rig
SCALES = 0.9, 1.9  # of the animal, in a volume that stays as it is
ELL_M, GRID, CROP = 0.22, 112, ((8, 104), (16, 96), (24, 88))
JITTER_VOXELS, JITTER_RADIANS = 4.0, 0.6
TESTED = 200  # animals that are never trained on
LOOK_STEPS = 500
LEARNING_RATE = 5e-4


class Animals(FrameReader):
    """Random animals as frames of six views; what a `Trainer` asks of a recording."""

    def __init__(self, films: Sequence[Film], device: torch.device) -> None:
        def tensor(values: NDArray[np.floating]) -> Tensor:
            return torch.as_tensor(values.astype(np.float32), device=device)

        self.device, self.width, self.height = device, WIDTH, HEIGHT
        self.n_cameras, self.observed, self.held_out = SHOWN, list(range(SHOWN)), []
        self.ell_m, self.grid_size, self.volume_idx = ELL_M, GRID, CROP
        self.voxel_size_m = ELL_M / (GRID - 1)
        self.n_frames = sum(len(film.centers) for film in films)
        self.tested = min(TESTED, self.n_frames // 8)
        self.pictures = [
            torch.cat([torch.from_numpy(film.rgb), torch.from_numpy(film.mask)[..., None]], -1).to(device)
            for film in films
        ]
        self.intrinsics = [tensor(film.intrinsics) for film in films]
        self.poses = [tensor(film.world_to_camera) for film in films]
        self.centers = [tensor(film.centers) for film in films]
        self.headings = [tensor(film.headings) for film in films]
        size = np.array([stop - first for first, stop in CROP]) * self.voxel_size_m
        self.largest = [(size / 2 / film.reach).min(1) for film in films]  # scales that the volume can hold
        self.world_to_camera = self.poses[0][:SHOWN]

    def footprint_px(self) -> int:
        """3 for all scales: a voxel of 2 mm covers 2 pixels, and between 1 and 2.3 with them."""
        return 3

    def shown(self, t: int, rng: np.random.Generator) -> tuple[Frame, list[int]]:
        """Animal t at a random scale in six random views, and those of them that it is carved from."""
        film, i = t % len(self.pictures), t // len(self.pictures)
        n = int(rng.choice(CARVED))
        while True:
            views = rng.permutation(VIEWS)[:SHOWN]
            around = np.sort(views[:n])
            if np.diff(np.append(around, around[0] + VIEWS)).max() <= WIDEST_GAP[n]:
                break
        scale = min(rng.uniform(*SCALES), max(float(self.largest[film][i]), 0.8))
        chosen = send(torch.from_numpy(views), self.device)
        picture = self.pictures[film][i][chosen]
        pose = self.poses[film][chosen]
        pose[:, :3, 3] *= scale  # the world is larger, its pictures are the same
        frame = Frame(
            t=t,
            rgb=picture[..., :3].float() / 255,
            mask=picture[..., 3].float(),
            intrinsics=self.intrinsics[film][chosen],
            world_to_camera=pose,
            origin=torch.empty(0),
            center=self.centers[film][i] * scale,
            angle=self.headings[film][i],
        )
        return frame, list(range(n))


class _OfRigs(PoseSplatter):
    """A network that takes the views it is carved from for the whole rig."""

    @torch.no_grad()
    def carve(self, frame: Frame, used: Tensor | None = None) -> Tensor:
        volume = super().carve(frame, used)
        if used is not None:
            volume[7:] *= len(used) / used.sum().clamp_min(FEWEST)  # the share of the views that see a voxel
        return volume


class _Trainer(ops.Trainer):
    network = _OfRigs


def test(trainer: ops.Trainer, animals: Animals) -> tuple[float, float]:
    """Mean IoU of animals that were not trained on: in views that they are carved from, and in others."""
    rng, figures = np.random.default_rng(1), []
    for t in range(animals.tested):
        frame, carved = animals.shown(t, rng)
        used = send(torch.tensor([[c in carved for c in range(SHOWN)]]), animals.device)
        with torch.no_grad():
            gaussians = trainer.averaged.eval()([frame], used)[0].to_world(frame.center, frame.angle)
            alpha = trainer.averaged.render(gaussians, frame.world_to_camera, frame.intrinsics, WIDTH, HEIGHT).alpha
        iou = soft_iou((alpha > 0.5).to(frame.mask.dtype), frame.mask)
        figures.append((iou[: len(carved)].mean(), iou[len(carved) :].mean()))
    first, second = torch.tensor(figures).mean(0).tolist()
    return first, second


def pretrain(animals: Animals, experiment: Experiment, seconds: float) -> PoseSplatter:
    """Train for some seconds; the network with averaged weights."""
    trainer, rng = _Trainer(animals, experiment, animals.device), np.random.default_rng(0)
    start.begin(trainer.model, experiment.train.start_from)
    trainer.averaged.load_state_dict(trainer.model.state_dict())
    settings = experiment.train.model_copy(update={"jitter_voxels": JITTER_VOXELS, "jitter_radians": JITTER_RADIANS})
    sums, step, began = (
        torch.zeros(len(ops.TRAIN_FIGURES), dtype=torch.float64, device=animals.device),
        0,
        time.monotonic(),
    )
    with Progress() as progress:
        bar = progress.add_task("pretraining", total=seconds)
        while (spent := time.monotonic() - began) < seconds:
            frame, carved = animals.shown(int(rng.integers(animals.tested, animals.n_frames)), rng)
            frame = ops.jitter(frame, settings, step, animals.voxel_size_m)
            rate = ops.learning_rate(experiment.train.lr, spent / seconds)
            sums += trainer.step([frame], [carved], [bool(rng.random() < ops.MIRROR)], rate, step)
            step += 1
            if step % LOOK_STEPS == 0:
                trainer.recorder.make_room(int(trainer.recorder.pairs.needed))
                progress.update(bar, completed=spent, description=f"step {step} loss {sums[0] / LOOK_STEPS:.3f}")
                sums.zero_()
    carved_iou, other_iou = test(trainer, animals)
    figures = {"animals": animals.n_frames, "steps": step, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps({**figures, "carved_iou": round(carved_iou, 4), "other_iou": round(other_iou, 4)}))
    return trainer.averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", metavar="OUT.safetensors")
    parser.add_argument("--animals", type=int, default=6400)
    parser.add_argument("--minutes", type=float, default=7.2)
    parser.add_argument("--filters", type=int, default=16, help="model.base_filters")
    parser.add_argument("--start-from", default=RANDOM, help="weights to go on from, as train.start_from")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    names = [f"{c}.mp4" for c in range(SHOWN)]
    experiment = Experiment.model_validate(
        {
            "data": {"directory": "/none", "videos": names, "masks": names, "calibration": "none.h5"},
            "center_rotation": {"ell": ELL_M},
            "crop": {"ell": ELL_M, "grid_size": GRID},
            "model": {**OF_ANIMALS, "base_filters": args.filters},
            "train": {
                "lr": LEARNING_RATE,
                "opacity_lambda": 0.03,
                "start_from": args.start_from,
                "device": args.device,
            },
        }
    )
    began, each = time.monotonic(), -(-args.animals // RIGS)
    # Forked processes must not inherit a GPU, so that it is picked after they are done.
    with multiprocessing.get_context("fork").Pool(min(RIGS, len(os.sched_getaffinity(0)))) as pool:
        films = pool.starmap(random_animals.film, [(rig, each) for rig in range(RIGS)], chunksize=1)
    print(f"{RIGS * each} animals in {time.monotonic() - began:.0f} s", flush=True)
    animals = Animals(films, pick_device(args.device))
    start.write(args.output, pretrain(animals, experiment, 60 * args.minutes))


if __name__ == "__main__":
    main()
