"""Random animals as frames, on which networks are pretrained and descriptors are measured."""

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
from zoosplat_model.carving import ObservedViews
from zoosplat_model.frames import Frame, FrameReader, copy_to_device
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.network.splatter import PoseSplatter

RIGS = 32  # number of rigs; each films an equal share of the animals
VIEWS_PER_FRAME = 6  # number of views of a frame
CARVED_COUNTS = (3, 4, 4, 5)  # numbers of views that a frame is carved from, each equally often
MIN_CAMERAS = 4  # cameras that a real rig has; where three views are carved from, one has been left out
WIDEST_GAP = {3: 6, 4: 5, 5: 5}  # by number of carved views: the widest gap between neighbours, in cameras of the rig
SCALES = 0.9, 1.9  # range of the animal's scale, in a volume that stays as it is
MIN_LARGEST_SCALE = 0.8  # smallest upper limit of the scale, for animals that the volume hardly holds
ELL_M = 0.22  # metres; edge of the cubic grid
GRID_SIZE = 112  # grid points along its edge
CROP = ((8, 104), (16, 96), (24, 88))  # (start, stop) of the kept grid points along x, y, z
MAX_TESTED = 200  # animals that are never trained on, at most
LEARNING_RATE = 5e-4  # learning rate of Adam in pretraining


def film_rigs(animals: int, first: int = 0) -> list[Film]:
    """Film at least so many animals with the rigs from number `first` on; thousands take minutes on all CPU cores."""
    each = -(-animals // RIGS)
    with multiprocessing.get_context("spawn").Pool(min(RIGS, usable_cores())) as pool:
        return pool.starmap(random_animals.film, [(first + rig, each) for rig in range(RIGS)], chunksize=1)


def build_experiment(*, device: str, filters: int = 16, start_from: str = RANDOM) -> Experiment:
    """The settings with which a network for a `RandomAnimalReader` is built and trained."""
    names = [f"{c}.mp4" for c in range(VIEWS_PER_FRAME)]
    return Experiment.model_validate(
        {
            "data": {"directory": "/none", "videos": names, "masks": names, "calibration": "none.h5"},
            "center_rotation": {"ell": ELL_M},
            "crop": {"ell": ELL_M, "grid_size": GRID_SIZE},
            "model": {**ANIMALS_NETWORK, "base_filters": filters},
            "train": {"lr": LEARNING_RATE, "opacity_lambda": 0.03, "start_from": start_from, "device": device},
        }
    )


class RandomAnimalReader(FrameReader):
    """Random animals as frames of six views; it has those parts of a `FrameReader` that a `Trainer` uses."""

    def __init__(self, films: Sequence[Film], device: torch.device) -> None:
        def tensor(values: NDArray[np.floating]) -> Tensor:
            return torch.as_tensor(values.astype(np.float32), device=device)

        self.device, self.width, self.height = device, WIDTH, HEIGHT
        self.n_cameras, self.observed, self.held_out = VIEWS_PER_FRAME, list(range(VIEWS_PER_FRAME)), []
        self.ell_m, self.grid_size, self.volume_idx = ELL_M, GRID_SIZE, CROP
        self.voxel_size_m = ELL_M / (GRID_SIZE - 1)
        self.n_frames = sum(len(film.centers) for film in films)
        self.seen = np.ones((self.n_frames, self.n_cameras), bool)
        self.tested = min(MAX_TESTED, self.n_frames // 8)
        self.pictures = [
            torch.cat([torch.from_numpy(film.rgb), torch.from_numpy(film.mask)[..., None]], -1).to(device)
            for film in films
        ]
        self.intrinsics = [tensor(film.intrinsics) for film in films]
        self.poses = [tensor(film.world_to_camera) for film in films]
        self.centers = [tensor(film.centers) for film in films]
        self.headings = [tensor(film.headings) for film in films]
        size = np.array([stop - first for first, stop in CROP]) * self.voxel_size_m
        self.largest = [(size / 2 / film.reach).min(1) for film in films]  # largest scales that the volume can hold
        self.world_to_camera = self.poses[0][:VIEWS_PER_FRAME]

    def footprint_px(self) -> int:
        """3 pixels; a voxel of 2 mm covers 2 pixels, and with the scales of the animals between 1 and 2.3."""
        return 3

    def draw_views(self, t: int, rng: np.random.Generator) -> tuple[Frame, list[int]]:
        """Animal t at a random scale in six random views, and the indices of the views that it is carved from."""
        film, i = t % len(self.pictures), t // len(self.pictures)
        n = int(rng.choice(CARVED_COUNTS))
        while True:
            views = rng.permutation(VIEWS)[:VIEWS_PER_FRAME]
            around = np.sort(views[:n])
            if np.diff(np.append(around, around[0] + VIEWS)).max() <= WIDEST_GAP[n]:
                break
        scale = min(rng.uniform(*SCALES), max(float(self.largest[film][i]), MIN_LARGEST_SCALE))
        chosen = copy_to_device(torch.from_numpy(views), self.device)
        picture = self.pictures[film][i][chosen]
        pose = self.poses[film][chosen]
        pose[:, :3, 3] *= scale  # the world is larger, and its pictures stay the same
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


class PartialRigSplatter(PoseSplatter):
    """A network for which the views that a frame is carved from are the whole rig."""

    @torch.no_grad()
    def carve(self, views: ObservedViews, used: Tensor | None = None) -> Tensor:
        volume = super().carve(views, used)
        if used is not None:
            volume[7:] *= len(used) / used.sum().clamp_min(
                MIN_CAMERAS
            )  # the last channel is the share of the views that see a voxel
        return volume


@torch.no_grad()
def reconstruct(model: PoseSplatter, frame: Frame, carved: Sequence[int]) -> Gaussians:
    """Reconstruct the Gaussians of a frame in the animal's frame, from the views of these indices."""
    used = copy_to_device(torch.tensor([[c in carved for c in range(VIEWS_PER_FRAME)]]), frame.rgb.device)
    gaussians: Gaussians = model.eval()([frame], used)[0]
    return gaussians
