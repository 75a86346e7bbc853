"""The training itself: a step, a validation, and what decides their order; no files, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.config.training import Train
from zoosplat_model import checkpoints
from zoosplat_model.cuda_graph import CudaGraphPool
from zoosplat_model.frames import Frame, FrameReader, copy_to_device
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.losses import Losses, frame_losses, soft_iou
from zoosplat_model.network.splatter import PoseSplatter
from zoosplat_model.rasterize import Rendering
from zoosplat_model.registry import build_splatter
from zoosplat_train.parallel import Ranks

MIRROR = 0.5  # share of frames that the network sees mirrored
LAST_RATE = 0.05  # of the learning rate, at the end of the cosine
AVERAGING = 8.0  # weights are averaged with a share of this over the number of steps
HEAD_RATE = 3.0  # the head's learning rate over that of the U-Nets
MAX_GRADIENT = 1.0  # norm
DRAWN = 0.02  # opacity from which on a Gaussian counts as drawn
ROOM = 3  # for pairs of Gaussians and tiles in a recorded step, over those of the first steps
N_LOSSES = len(Losses._fields)
TRAIN_FIGURES = (
    "train_loss",
    "train_soft_iou_loss",
    "train_color_loss",
    "train_square_loss",
    "train_ssim_loss",
    "train_gradient",
)
VALID_FIGURES = ("valid_loss", "valid_iou", "valid_psnr", "valid_left_out_iou")


def epoch_order(frames: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Frames of an epoch in random order, the same whenever it is asked for."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(frames))
    return [frames[i] for i in order]


def carving_views(observed: Sequence[int], settings: Train, epoch: int, t: int) -> list[int]:
    """Views that frame t is carved from in this epoch: in a share `leave_out` one less, if three remain.

    All observed views still count in the loss. So the network learns from the view that was left out what a hull of
    too few views has too much of: the same that a held-out view shows. The published tool carves from all, always.
    """
    rng = np.random.default_rng([settings.seed, epoch, 1, t])
    if len(observed) < 4 or rng.random() >= settings.leave_out:
        return list(observed)
    left_out = int(rng.integers(len(observed)))
    return [c for i, c in enumerate(observed) if i != left_out]


def jitter(frame: Frame, settings: Train, epoch: int, voxel_size_m: float) -> Frame:
    """The frame with the animal's centre and heading off by up to `jitter_voxels` (each axis) and `jitter_radians`.

    And tilted, about any horizontal axis, by up to `jitter_tilt`. Carving and Gaussians both go by them, so the truth
    stays the same while the network sees another volume. Without it, a few dozen training frames are learned by heart.
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
    """Whether the network sees the mirror image of frame t in this epoch: animals have two sides."""
    return bool(np.random.default_rng([seed, epoch, 3, t]).random() < MIRROR)


def learning_rate(base: float, done: float) -> float:
    """Cosine from `base` to 5% of it; `done` is the part of the training that is over, 0 to 1."""
    return base * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))))


def view_to_predict(t: int, n_observed: int) -> int:
    """Which of the observed views validation leaves out of frame t: any, but always the same."""
    return int(np.random.default_rng(t).integers(n_observed))


def spread(frames: Sequence[int], most: int) -> list[int]:
    """At most `most` of the frames, evenly spread."""
    n = min(len(frames), most)
    return [frames[(2 * i + 1) * len(frames) // (2 * n)] for i in range(n)]


def significantly_worse(losses: Sequence[float], least: Sequence[float]) -> bool:
    """Whether the mean of frames' losses is above that of `least`, of the same frames, by more than its standard error.

    The one-standard-error rule (Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 7.10), of the
    frames' differences.
    """
    differences = np.subtract(losses, least)
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return bool(differences.mean() > deviation / math.sqrt(len(differences)))


def blend(early: Mapping[str, Tensor], late: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights of one network at two times of its training, blended; `share` is that of the late ones, as are counts.

    Late weights know poses like those of the training frames better, early ones still know others; what is between has
    much of both (Wortsman et al. 2022, Robust fine-tuning of zero-shot models, arXiv 2109.01903, eq. 1).
    """
    return {k: torch.lerp(early[k], v, share) if v.is_floating_point() else v.clone() for k, v in late.items()}


class Trainer:
    """The network, its optimiser, and one step of training.

    On a GPU a step is one CUDA graph, of several ranks two, between which their gradients are added up.

    Attributes:
        model, optimizer: Adam, with a higher rate for the head than for the U-Nets.
        averaged: the model with weights averaged over about the last tenth of the steps: what is validated and used.
        graphs: runs steps, and knows how many pairs of Gaussians and tiles they needed.
        network: class of the model.
    """

    network: ClassVar[type[PoseSplatter]] = PoseSplatter

    def __init__(
        self, reader: FrameReader, experiment: Experiment, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.reader, self.settings, self.ranks = reader, experiment.train, ranks or Ranks()
        torch.manual_seed(experiment.train.seed)
        self.model = build_splatter(reader, experiment, self.network).move_to(device)
        refine = list(self.model.refine.parameters())
        inside = {id(p) for p in refine}
        rest = [p for p in self.model.parameters() if id(p) not in inside]
        groups: list[dict[str, Any]] = [{"params": refine, "factor": 1.0}, {"params": rest, "factor": HEAD_RATE}]
        gpu = device.type == "cuda"
        for group in groups:  # a recorded step reads its rate from the device
            group["lr"] = torch.zeros((), device=device) if gpu else 0.0
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=gpu)
        self.averaged = build_splatter(reader, experiment, self.network).move_to(device).requires_grad_(False)
        self.averaged.load_state_dict(self.model.state_dict())
        self.graphs = CudaGraphPool(device, ROOM)
        # gsplat waits for the GPU amid the gradients of surfels, which cannot be recorded.
        self.graphs.capture &= experiment.model.gaussian_mode == "3d"
        if self.ranks.size > 1:
            # Gradients, then losses, in one piece: one message to the other ranks.
            sizes = [p.numel() for p in self.model.parameters()]
            self._shared = torch.zeros(sum(sizes) + N_LOSSES, device=device)
            *parts, self._losses_shared = torch.split_with_sizes(self._shared, [*sizes, N_LOSSES])
            self._gradients = [
                part.as_strided(p.shape, p.stride()) for part, p in zip(parts, self.model.parameters(), strict=True)
            ]

    def state(self) -> list[Tensor]:
        """All that changes with a step, in the same order in each of the ranks."""
        of_adam = checkpoints.named_state(self.model, self.optimizer)
        state = [*self.model.state_dict().values(), *self.averaged.state_dict().values()]
        return state + [of_adam[name][key] for name in sorted(of_adam) for key in sorted(of_adam[name])]

    def step(
        self,
        frames: Sequence[Frame],
        views: Sequence[Sequence[int]],
        mirrored: Sequence[bool],
        rate: float,
        done: int,
        total: int | None = None,
    ) -> Tensor:
        """One step of Adam on the mean loss of the frames, carved from `views`, over all their observed views.

        Args:
            frames: any number, of several ranks those of this one.
            views: of each frame, the cameras that it is carved from.
            mirrored: of each frame, whether the network sees its mirror image.
            rate: learning rate of the U-Nets.
            done: steps done before.
            total: frames of all ranks; default: as many as here.

        Returns:
            [6] float64 sums over the frames of all ranks, named by `TRAIN_FIGURES`, not yet read back from the device.
        """
        # A power-law average (Karras 2024, arXiv 2312.02696): its length is a constant share of the steps.
        numbers = torch.tensor([rate, min(1.0, AVERAGING / (done + 1)), 1 / (total or len(frames))])
        numbers = copy_to_device(numbers, self.reader.device)
        inputs = [*self._inputs(frames, views, mirrored), numbers]
        if self.ranks.size == 1:
            return self.graphs(f"step of {len(frames)}", self._step, inputs)
        if frames:
            self.graphs(f"gradients of {len(frames)}", self._share, inputs)
        else:  # the last step of an epoch may have fewer than there are ranks
            self._shared.zero_()
        self.ranks.add_up(self._shared)
        return self.graphs("update", self._update_from_shared, [numbers])

    def rehearse(self, frames: Sequence[Frame], views: Sequence[Sequence[int]], mirrored: Sequence[bool]) -> None:
        """All of a step (see there) but Adam's part, which changes nothing, and waits for its end.

        At the first step libraries choose their kernels, and Triton compiles its own where no run on the machine has.
        """
        if frames:
            numbers = torch.ones(3, device=self.reader.device)
            self._backward(*self._inputs(frames, views, mirrored), numbers)
            self.optimizer.zero_grad()
        if self.reader.device.type == "cuda":
            torch.cuda.synchronize(self.reader.device)

    def _inputs(
        self, frames: Sequence[Frame], views: Sequence[Sequence[int]], mirrored: Sequence[bool]
    ) -> list[Tensor]:
        used = torch.tensor([[camera in chosen for camera in self.reader.observed] for chosen in views])
        on = (copy_to_device(value, self.reader.device) for value in (used, torch.tensor(mirrored)))
        return [*(value for frame in frames for value in _tensors(frame)), *on]

    def _step(self, *inputs: Tensor) -> Tensor:
        losses = self._backward(*inputs)
        return self._update(losses, inputs[-1])

    def _share(self, *inputs: Tensor) -> Tensor:
        losses = self._backward(*inputs)
        pairs = zip(self._gradients, self.model.parameters(), strict=True)
        given = [(_as_laid_out(there, p.grad), p.grad) for there, p in pairs if p.grad is not None]
        torch._foreach_copy_([there for there, _ in given], [gradient for _, gradient in given])
        self._losses_shared.copy_(losses)
        return losses

    def _update_from_shared(self, numbers: Tensor) -> Tensor:
        for p, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            p.grad = gradient
        return self._update(self._losses_shared, numbers)

    def _backward(self, *inputs: Tensor) -> Tensor:
        """Gradients of this rank's part of the mean loss; [5] sums of its losses."""
        *values, used, mirrored, numbers = inputs
        each = len(values) // len(used)
        frames = [_frame(values[i : i + each]) for i in range(0, len(values), each)]
        self.optimizer.zero_grad()
        supervision: float | Tensor = 0.0
        if self.settings.deep_lambda > 0:
            predicted, supervision = self.model.forward_deep_supervision(frames, used, mirrored)
        else:
            predicted = self.model(frames, used, mirrored)
        losses = [self._losses(frame, self._render(frame, g)) for frame, g in zip(frames, predicted, strict=True)]
        total = torch.stack([loss.total for loss in losses]).sum()
        if self.settings.opacity_lambda > 0:
            opaque = [g.opacities.sum() / (g.opacities.detach() > DRAWN).sum().clamp_min(1) for g in predicted]
            total = total + self.settings.opacity_lambda * torch.stack(opaque).sum()
        total = total + self.settings.deep_lambda * len(frames) * supervision
        torch.autograd.backward(total * numbers[2])
        return torch.stack([torch.stack([*loss]) for loss in losses]).detach().double().sum(0)

    def _update(self, losses: Tensor, numbers: Tensor) -> Tensor:
        """Adam and the average; [6] figures."""
        rate, share, weight = numbers
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate * group["factor"])
            else:
                group["lr"] = float(rate) * group["factor"]
        gradient = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT)
        self.optimizer.step()
        with torch.no_grad():
            averages = [p.detach() for p in self.averaged.parameters()]
            steps = list(torch._foreach_sub([p.detach() for p in self.model.parameters()], averages))
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(averages, steps)
        return torch.cat([losses.double(), (gradient / weight).double()[None]])

    @torch.no_grad()
    def validate(self, frames: Iterable[Frame], total: int) -> tuple[dict[str, float], list[float]]:
        """Means over frames, named by `VALID_FIGURES`: loss, IoU at alpha > 0.5 and PSNR of windows, and IoU of a view.

        Each frame is carved twice: from all observed views, and, where three remain, without one of them. The loss is
        the mean of that of all views in the first case and of the left-out one in the second: so the checkpoint with
        the least of it is good in observed views and in new ones, of which training sees nothing.

        Args:
            frames: of several ranks those of this one, as `Ranks.share` gives them.
            total: frames of all ranks.

        Returns:
            The means, and each frame's loss, over all ranks.
        """
        self.averaged.eval()
        n = len(self.reader.observed)
        table = torch.zeros(total, len(VALID_FIGURES), dtype=torch.float64, device=self.reader.device)
        for i, frame in enumerate(frames):
            out = copy_to_device(torch.arange(n) == view_to_predict(frame.t, n), self.reader.device)
            figures = self.graphs("validate", self._validate, [*_tensors(frame), out])
            table[self.ranks.rank + i * self.ranks.size] = figures.double()
        self.ranks.add_up(table)
        means = dict(zip(VALID_FIGURES, table.mean(0).tolist(), strict=True))
        if n < 4:
            del means["valid_left_out_iou"]
        return means, table[:, 0].tolist()

    @torch.no_grad()
    def _validate(self, *inputs: Tensor) -> Tensor:
        *values, out = inputs
        frame = _frame(values)
        mask = frame.mask[self.model.observed_index]

        def rendered(used: Tensor | None) -> Rendering:
            return self._render(frame, self.averaged([frame], used)[0])

        def iou(rendering: Rendering) -> Tensor:
            return soft_iou((rendering.alpha > 0.5).to(mask.dtype), mask)

        whole = rendered(None)
        squared = (whole.rgb - frame.composite_on_white()[self.model.observed_index]).square().mean((1, 2, 3))
        psnr = (-10 * torch.log10(squared.clamp_min(1e-10))).mean()
        loss, left_out_iou = self._losses(frame, whole).total, psnr.new_full((), math.nan)
        if len(mask) > 3:
            part = rendered(~out[None])
            loss = (loss + self._losses(frame, part, out).total) / 2
            left_out_iou = (iou(part) * out).sum()
        return torch.stack([loss, iou(whole).mean(), psnr, left_out_iou])

    @torch.no_grad()
    def compare(self, frame: Frame) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Truth and rendering of the observed views, [V, h, w, 3] each, 0 to 1."""
        rendering = self._render(frame, self.averaged.eval()([frame])[0])
        return frame.composite_on_white()[self.model.observed_index].cpu().numpy(), rendering.rgb.cpu().numpy()

    def _render(self, frame: Frame, gaussians: Gaussians) -> Rendering:
        seen = self.model.observed_index
        placed = gaussians.to_world(frame.center, frame.angle, frame.tilt)
        return self.model.render(
            placed,
            frame.world_to_camera[seen],
            frame.intrinsics[seen],
            self.reader.width,
            self.reader.height,
            self.reader.observed,
            self.graphs.pair_buffer,
        )

    def _losses(self, frame: Frame, rendering: Rendering, counted: Tensor | None = None) -> Losses:
        """Means over the observed views, or over those `counted` ([V] bool)."""
        truth, mask = frame.composite_on_white()[self.model.observed_index], frame.mask[self.model.observed_index]
        s = self.settings
        return frame_losses(*rendering, truth, mask, s.img_lambda, s.ssim_lambda, counted, s.square_lambda)


def _tensors(frame: Frame) -> list[Tensor]:
    """What a step needs of a frame."""
    tilt = [] if frame.tilt is None else [frame.tilt]
    return [frame.rgb, frame.mask, frame.intrinsics, frame.world_to_camera, frame.center, frame.angle, *tilt]


def _frame(values: Sequence[Tensor]) -> Frame:
    """The frame again; time and place in the picture play no part."""
    rgb, mask, intrinsics, world_to_camera, center, angle, *tilt = values
    return Frame(-1, rgb, mask, intrinsics, world_to_camera, torch.empty(0), center, angle, *tilt)


def _as_laid_out(there: Tensor, value: Tensor) -> Tensor:
    """The same memory with the strides of `value`, if they differ in axes of length 1 only.

    A convolution of 1 x 1 x 1 has such; for one of them, all would be copied one by one.
    """
    long = [i for i, n in enumerate(value.shape) if n > 1]
    same = all(there.stride(i) == value.stride(i) for i in long)
    return there.as_strided(value.shape, value.stride()) if same else there
