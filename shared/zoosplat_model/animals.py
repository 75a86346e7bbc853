"""Random animals as frames, for networks to learn from, and for descriptors to be measured on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.config.training import ANIMALS_NETWORK, RANDOM
from zoosplat.machine import usable_cores
from zoosplat.synthetic import random_animals
from zoosplat.synthetic.random_animals import HEIGHT, VIEWS, WIDTH, Film
from zoosplat_model.frames import Frame, FrameReader, send
from zoosplat_model.network.splatter import Gaussians, Observed, PoseSplatter

RIGS = 32  # each films an equal share of the animals
SHOWN = 6  # views of a frame
CARVED = (3, 4, 4, 5)  # of these, each as often
FEWEST = 4  # cameras that a rig has: with three views one is left out
WIDEST_GAP = {3: 6, 4: 5, 5: 5}  # between neighbours of the carved views, in cameras of the rig
SCALES = 0.9, 1.9  # of the animal, in a volume that stays as it is
ELL_M, GRID, CROP = 0.22, 112, ((8, 104), (16, 96), (24, 88))
TESTED = 200  # animals that are never trained on
LEARNING_RATE = 5e-4


def films(animals: int, first: int = 0) -> list[Film]:
    """At least so many animals, of rigs from number `first` on, on all CPU cores: minutes for thousands."""
    each = -(-animals // RIGS)
    with multiprocessing.get_context("spawn").Pool(min(RIGS, usable_cores())) as pool:
        return pool.starmap(random_animals.film, [(first + rig, each) for rig in range(RIGS)], chunksize=1)


def experiment(*, device: str, filters: int = 16, start_from: str = RANDOM) -> Experiment:
    """Settings that a network for `Animals` is made with, and trained."""
    names = [f"{c}.mp4" for c in range(SHOWN)]
    return Experiment.model_validate(
        {
            "data": {"directory": "/none", "videos": names, "masks": names, "calibration": "none.h5"},
            "center_rotation": {"ell": ELL_M},
            "crop": {"ell": ELL_M, "grid_size": GRID},
            "model": {**ANIMALS_NETWORK, "base_filters": filters},
            "train": {"lr": LEARNING_RATE, "opacity_lambda": 0.03, "start_from": start_from, "device": device},
        }
    )


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


class OfRigs(PoseSplatter):
    """A network that takes the views it is carved from for the whole rig."""

    @torch.no_grad()
    def carve(self, views: Observed, used: Tensor | None = None) -> Tensor:
        volume = super().carve(views, used)
        if used is not None:
            volume[7:] *= len(used) / used.sum().clamp_min(FEWEST)  # the share of the views that see a voxel
        return volume


@torch.no_grad()
def reconstruct(model: PoseSplatter, frame: Frame, carved: Sequence[int]) -> Gaussians:
    """Gaussians in the animal's frame, carved from these of its views."""
    used = send(torch.tensor([[c in carved for c in range(SHOWN)]]), frame.rgb.device)
    gaussians: Gaussians = model.eval()([frame], used)[0]
    return gaussians
