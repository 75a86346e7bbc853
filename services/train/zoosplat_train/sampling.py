"""What a training sees in which step: the order of frames and their augmentation, by seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch

from zoosplat.config.training import Train
from zoosplat.stages.memory import MAX_VALIDATION_FRAMES
from zoosplat_model.frames import Frame, FrameReader, Split, copy_to_device

MIRRORED_SHARE = 0.5  # share of frames that the network sees mirrored: an animal has two sides
FINAL_RATE = 0.05  # the learning rate at the end of the cosine, over that at its beginning


def choose_frames(reader: FrameReader, settings: Train) -> tuple[list[int], list[int]]:
    """Indices of the kept frames to train on, and of those to validate with; no frame is in both."""
    valid = spread(reader.split("valid"), MAX_VALIDATION_FRAMES)
    if settings.fit_to == "third":
        return reader.split("train"), valid
    every = {t for split in get_args(Split) for t in reader.split(split)}
    return sorted(every - set(valid)), valid


def epoch_order(frames: Sequence[int], seed: int, epoch: int) -> list[int]:
    """The frames in the random order of an epoch, which is the same at every call."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(frames))
    return [frames[i] for i in order]


def carving_views(seen: Sequence[int], settings: Train, epoch: int, t: int) -> list[int]:
    """Views that frame t is carved from in this epoch: all, or in a share `leave_out` all but one if three remain.

    `seen` are the observed views of this frame that are there. All of them still count in the loss. So the view that
    was left out teaches the network what the hull of too few views has too much of, as a held-out view would show it.
    The published tool always carves from all views.
    """
    rng = np.random.default_rng([settings.seed, epoch, 1, t])
    if len(seen) < 4 or rng.random() >= settings.leave_out:
        return list(seen)
    left_out = int(rng.integers(len(seen)))
    return [c for i, c in enumerate(seen) if i != left_out]


def jitter(frame: Frame, settings: Train, epoch: int, voxel_size_m: float) -> Frame:
    """The frame with the animal's centre off by up to `jitter_voxels` on each axis and its heading by `jitter_radians`.

    The frame is also tilted by up to `jitter_tilt` radians about a horizontal axis. Carving and Gaussians both go by
    this pose, so the truth stays the same while the network sees another volume. Without the jitter the network learns
    a few dozen training frames by heart.
    """
    rng = np.random.default_rng([settings.seed, epoch, 2, frame.t])
    shift = torch.tensor(rng.uniform(-1, 1, 3) * settings.jitter_voxels * voxel_size_m, dtype=frame.center.dtype)
    turn = rng.uniform(-1, 1) * settings.jitter_radians
    moved = replace(frame, center=frame.center + copy_to_device(shift, frame.center.device), angle=frame.angle + turn)
    if settings.jitter_tilt == 0:
        return moved
    towards, half = rng.uniform(0, 2 * math.pi), rng.uniform(0, settings.jitter_tilt) / 2
    axis = np.array([math.cos(towards), math.sin(towards), 0])
    tilt = torch.tensor([math.cos(half), *(math.sin(half) * axis)], dtype=frame.center.dtype)
    return replace(moved, tilt=copy_to_device(tilt, frame.center.device))


def is_mirrored(seed: int, epoch: int, t: int) -> bool:
    """Whether the network sees the mirror image of frame t in this epoch."""
    return bool(np.random.default_rng([seed, epoch, 3, t]).random() < MIRRORED_SHARE)


def learning_rate(base: float, done: float) -> float:
    """A cosine from `base` to 5% of it; `done` is the part of the training that is over, 0 to 1."""
    return base * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))))


def view_to_predict(t: int, n_seen: int) -> int:
    """Which of the observed views that are there validation leaves out of frame t: a random one, the same each time."""
    return int(np.random.default_rng(t).integers(n_seen))


def spread(frames: Sequence[int], most: int) -> list[int]:
    """At most `most` of the frames, evenly spread."""
    n = min(len(frames), most)
    return [frames[(2 * i + 1) * len(frames) // (2 * n)] for i in range(n)]
