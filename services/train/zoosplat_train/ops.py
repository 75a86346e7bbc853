"""The training itself: a step, a validation, and what decides their order; no files, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoosplat.config import Experiment
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.losses import Losses, frame_losses, soft_iou
from zoosplat_model.rasterize import Rendering
from zoosplat_model.splatter import Gaussians, PoseSplatter

DROP_VIEW = 0.5  # share of frames that are carved without one of their views
JITTER_VOXELS, JITTER_RAD = 2.0, 0.3  # of the carved grid, at most
LAST_RATE = 0.05  # of the learning rate, at the end of the cosine
HEAD_RATE = 3.0  # the head's learning rate over that of the U-Nets
MAX_GRADIENT = 1.0  # norm
TRAIN_FIGURES = ("train_loss", "train_soft_iou_loss", "train_color_loss", "train_ssim_loss", "train_gradient")
VALID_FIGURES = ("valid_loss", "valid_iou", "valid_psnr")


def epoch_order(frames: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Frames of an epoch in random order, the same whenever it is asked for."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(frames))
    return [frames[i] for i in order]


def carving_views(observed: Sequence[int], seed: int, epoch: int, t: int) -> list[int]:
    """Views that frame t is carved from in this epoch: at times one is left out, if three remain.

    All observed views still count in the loss. So the network learns from the view that was left out what a hull of
    too few views has too much of: the same that a held-out view shows. The published tool carves from all, always.
    """
    rng = np.random.default_rng([seed, epoch, 1, t])
    if len(observed) < 4 or rng.random() >= DROP_VIEW:
        return list(observed)
    left_out = int(rng.integers(len(observed)))
    return [c for i, c in enumerate(observed) if i != left_out]


def jitter(frame: Frame, seed: int, epoch: int, voxel_size_m: float) -> Frame:
    """The frame with the animal's centre and heading a little off: up to 2 voxels along each axis and 0.3 rad.

    Carving and Gaussians both go by them, so the truth stays the same while the network sees another volume. Without
    it, a few dozen training frames are learned by heart.
    """
    rng = np.random.default_rng([seed, epoch, 2, frame.t])
    shift = frame.center.new_tensor(rng.uniform(-1, 1, 3) * JITTER_VOXELS * voxel_size_m)
    return replace(frame, center=frame.center + shift, angle=frame.angle + rng.uniform(-1, 1) * JITTER_RAD)


def learning_rate(base: float, done: float) -> float:
    """Cosine from `base` to 5% of it; `done` is the part of the training that is over, 0 to 1."""
    return base * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))))


def spread(frames: Sequence[int], most: int) -> list[int]:
    """At most `most` of the frames, evenly spread."""
    n = min(len(frames), most)
    return [frames[(2 * i + 1) * len(frames) // (2 * n)] for i in range(n)]


class Trainer:
    """The network, its optimiser, and one step of training.

    Attributes:
        model, optimizer: Adam, with a higher rate for the head than for the U-Nets.
    """

    def __init__(self, reader: FrameReader, experiment: Experiment, device: torch.device) -> None:
        self.reader, self.settings = reader, experiment.train
        torch.manual_seed(experiment.train.seed)
        self.model = PoseSplatter.of(reader, experiment).to(device)
        refine = list(self.model.refine.parameters())
        inside = {id(p) for p in refine}
        rest = [p for p in self.model.parameters() if id(p) not in inside]
        groups = [{"params": refine, "factor": 1.0}, {"params": rest, "factor": HEAD_RATE}]
        self.optimizer = torch.optim.Adam(groups, lr=experiment.train.lr, fused=True)

    def step(self, frames: Sequence[Frame], views: Sequence[Sequence[int]], rate: float) -> Tensor:
        """One step of Adam on the mean loss of the frames, carved from `views`, over all their observed views.

        Returns:
            [5] float64 sums over the frames, named by `TRAIN_FIGURES`, not yet read back from the device.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad()
        losses = []
        for frame, gaussians in zip(frames, self.model(frames, views), strict=True):
            rendering = self._render(frame, gaussians)
            losses.append(self._losses(frame, rendering))
        total = torch.stack([loss.total for loss in losses]).mean()
        torch.autograd.backward(total)
        gradient = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT)
        self.optimizer.step()
        figures = torch.stack([torch.stack([*loss, gradient]) for loss in losses])
        return figures.detach().double().sum(0)

    @torch.no_grad()
    def validate(self, frames: Iterable[Frame]) -> dict[str, float]:
        """Means over frames and observed views, named by `VALID_FIGURES`: loss, IoU at alpha > 0.5, PSNR of windows."""
        self.model.eval()
        rows = []
        for frame in frames:
            rendering = self._render(frame, self.model([frame])[0])
            observed = self.reader.observed
            mask = frame.mask[observed]
            squared = (rendering.rgb - frame.on_white()[observed]).square().mean((1, 2, 3))
            figures = (
                self._losses(frame, rendering).total,
                soft_iou((rendering.alpha > 0.5).to(mask.dtype), mask).mean(),
                (-10 * torch.log10(squared.clamp_min(1e-10))).mean(),
            )
            rows.append(torch.stack(figures))
        means = torch.stack(rows).double().mean(0).tolist()
        return dict(zip(VALID_FIGURES, means, strict=True))

    @torch.no_grad()
    def compare(self, frame: Frame) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Truth and rendering of the observed views, [V, h, w, 3] each, 0 to 1."""
        self.model.eval()
        rendering = self._render(frame, self.model([frame])[0])
        return frame.on_white()[self.reader.observed].cpu().numpy(), rendering.rgb.cpu().numpy()

    def _render(self, frame: Frame, gaussians: Gaussians) -> Rendering:
        observed = self.reader.observed
        placed = gaussians.to_world(frame.center, frame.angle)
        cameras, intrinsics = frame.world_to_camera[observed], frame.intrinsics[observed]
        return self.model.render(placed, cameras, intrinsics, self.reader.width, self.reader.height, observed)

    def _losses(self, frame: Frame, rendering: Rendering) -> Losses:
        observed = self.reader.observed
        truth, mask = frame.on_white()[observed], frame.mask[observed]
        return frame_losses(*rendering, truth, mask, self.settings.img_lambda, self.settings.ssim_lambda)
