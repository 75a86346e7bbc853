"""The training itself: a step, a validation, and what decides their order; no files, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoosplat.config import Experiment, Train
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.losses import Losses, frame_losses, soft_iou
from zoosplat_model.rasterize import Pairs, Rendering
from zoosplat_model.splatter import Gaussians, PoseSplatter

MIRROR = 0.5  # share of frames that the network sees mirrored
LAST_RATE = 0.05  # of the learning rate, at the end of the cosine
AVERAGING = 8.0  # weights are averaged with a share of this over the number of steps
HEAD_RATE = 3.0  # the head's learning rate over that of the U-Nets
MAX_GRADIENT = 1.0  # norm
DRAWN = 0.02  # opacity from which on a Gaussian counts as drawn
ROOM = 3  # for pairs of Gaussians and tiles in a recorded step, over those of the first steps
N_TENSORS = 6  # of a frame, in a step
TRAIN_FIGURES = ("train_loss", "train_soft_iou_loss", "train_color_loss", "train_ssim_loss", "train_gradient")
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

    Carving and Gaussians both go by them, so the truth stays the same while the network sees another volume. Without
    it, a few dozen training frames are learned by heart.
    """
    rng = np.random.default_rng([settings.seed, epoch, 2, frame.t])
    shift = frame.center.new_tensor(rng.uniform(-1, 1, 3) * settings.jitter_voxels * voxel_size_m)
    turn = rng.uniform(-1, 1) * settings.jitter_radians
    return replace(frame, center=frame.center + shift, angle=frame.angle + turn)


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


class Trainer:
    """The network, its optimiser, and one step of training.

    On a GPU a step is one CUDA graph: launched one by one, its thousands of small kernels keep the GPU waiting.

    Attributes:
        model, optimizer: Adam, with a higher rate for the head than for the U-Nets.
        record: whether a GPU replays recorded steps; else it runs them as a CPU does.
        averaged: the model with weights averaged over about the last tenth of the steps: what is validated and used.
    """

    def __init__(self, reader: FrameReader, experiment: Experiment, device: torch.device) -> None:
        self.reader, self.settings = reader, experiment.train
        torch.manual_seed(experiment.train.seed)
        self.model = PoseSplatter.of(reader, experiment).on(device)
        refine = list(self.model.refine.parameters())
        inside = {id(p) for p in refine}
        rest = [p for p in self.model.parameters() if id(p) not in inside]
        groups: list[dict[str, Any]] = [{"params": refine, "factor": 1.0}, {"params": rest, "factor": HEAD_RATE}]
        gpu = device.type == "cuda"
        for group in groups:  # a recorded step reads its rate from the device
            group["lr"] = torch.zeros((), device=device) if gpu else 0.0
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=gpu)
        self.averaged = PoseSplatter.of(reader, experiment).on(device).requires_grad_(False)
        self.averaged.load_state_dict(self.model.state_dict())
        # gsplat waits for the GPU amid the gradients of surfels, which cannot be recorded.
        self.record = experiment.model.gaussian_mode == "3d"
        self._recorded: dict[str, _Recorded] = {}
        self._warm: set[str] = set()
        self._pool: Any = None
        self._needed_pairs = torch.zeros((), dtype=torch.int64, device=device)
        self._pairs = Pairs(0, self._needed_pairs)

    def step(
        self,
        frames: Sequence[Frame],
        views: Sequence[Sequence[int]],
        mirrored: Sequence[bool],
        rate: float,
        done: int,
    ) -> Tensor:
        """One step of Adam on the mean loss of the frames, carved from `views`, over all their observed views.

        Args:
            frames: any number.
            views: of each frame, the cameras that it is carved from.
            mirrored: of each frame, whether the network sees its mirror image.
            rate: learning rate of the U-Nets.
            done: steps done before.

        Returns:
            [5] float64 sums over the frames, named by `TRAIN_FIGURES`, not yet read back from the device.
        """
        used = torch.tensor([[camera in chosen for camera in self.reader.observed] for chosen in views])
        inputs = [*(value for frame in frames for value in _tensors(frame)), used]
        inputs.append(torch.tensor(mirrored))
        # A power-law average (Karras 2024, arXiv 2312.02696): its length is a constant share of the steps.
        inputs.append(torch.tensor([rate, min(1.0, AVERAGING / (done + 1))]))
        return self._run(f"step of {len(frames)}", self._step, inputs)

    def _run(self, name: str, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """The function, recorded at its second call on a GPU; at the first, libraries choose their kernels."""
        device = self.reader.device
        if device.type == "cpu" or not self.record:
            return function(*(value.to(device) for value in inputs))
        if name not in self._recorded:
            if name not in self._warm:
                self._warm.add(name)
                return function(*(value.to(device) for value in inputs))
            if not self._recorded:
                most = ROOM * int(self._needed_pairs)
                self._pairs = Pairs(-(-most // 4096) * 4096, self._needed_pairs)
                self._pool = torch.cuda.graph_pool_handle()
            self._recorded[name] = _Recorded(function, inputs, device, self._pool)
        return self._recorded[name](inputs)

    def check_room(self) -> None:
        """Record anew where the Gaussians have come to cover more tiles than the recorded step has room for."""
        if self._recorded and int(self._needed_pairs) > self._pairs.most:
            self._recorded.clear()

    def _step(self, *inputs: Tensor) -> Tensor:
        *values, used, mirrored, (rate, share) = inputs
        frames = [_frame(values[i : i + N_TENSORS]) for i in range(0, len(values), N_TENSORS)]
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate * group["factor"])
            else:
                group["lr"] = float(rate) * group["factor"]
        self.optimizer.zero_grad()
        predicted = self.model(frames, used, mirrored)
        losses = [self._losses(frame, self._render(frame, g)) for frame, g in zip(frames, predicted, strict=True)]
        total = torch.stack([loss.total for loss in losses]).mean()
        if self.settings.opacity_lambda > 0:
            opaque = [g.opacities.sum() / (g.opacities.detach() > DRAWN).sum().clamp_min(1) for g in predicted]
            total = total + self.settings.opacity_lambda * torch.stack(opaque).mean()
        torch.autograd.backward(total)
        gradient = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT)
        self.optimizer.step()
        with torch.no_grad():
            averages = [p.detach() for p in self.averaged.parameters()]
            steps = list(torch._foreach_sub([p.detach() for p in self.model.parameters()], averages))
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(averages, steps)
        figures = torch.stack([torch.stack([*loss, gradient]) for loss in losses])
        return figures.detach().double().sum(0)

    @torch.no_grad()
    def validate(self, frames: Iterable[Frame]) -> dict[str, float]:
        """Means over frames, named by `VALID_FIGURES`: loss, IoU at alpha > 0.5 and PSNR of windows, and IoU of a view.

        Each frame is carved twice: from all observed views, and, where three remain, without one of them. The loss is
        the mean of that of all views in the first case and of the left-out one in the second: so the checkpoint with
        the least of it is good in observed views and in new ones, of which training sees nothing.
        """
        self.averaged.eval()
        n = len(self.reader.observed)
        rows = []
        for frame in frames:
            out = torch.arange(n) == view_to_predict(frame.t, n)
            rows.append(self._run("validate", self._validate, [*_tensors(frame), out]).clone())
        figures = dict(zip(VALID_FIGURES, torch.stack(rows).double().mean(0).tolist(), strict=True))
        if n < 4:
            del figures["valid_left_out_iou"]
        return figures

    @torch.no_grad()
    def _validate(self, *inputs: Tensor) -> Tensor:
        *values, out = inputs
        frame = _frame(values)
        mask = frame.mask[self.model.seen]

        def rendered(used: Tensor | None) -> Rendering:
            return self._render(frame, self.averaged([frame], used)[0])

        def iou(rendering: Rendering) -> Tensor:
            return soft_iou((rendering.alpha > 0.5).to(mask.dtype), mask)

        whole = rendered(None)
        squared = (whole.rgb - frame.on_white()[self.model.seen]).square().mean((1, 2, 3))
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
        return frame.on_white()[self.model.seen].cpu().numpy(), rendering.rgb.cpu().numpy()

    def _render(self, frame: Frame, gaussians: Gaussians) -> Rendering:
        seen = self.model.seen
        placed = gaussians.to_world(frame.center, frame.angle)
        return self.model.render(
            placed,
            frame.world_to_camera[seen],
            frame.intrinsics[seen],
            self.reader.width,
            self.reader.height,
            self.reader.observed,
            self._pairs,
        )

    def _losses(self, frame: Frame, rendering: Rendering, counted: Tensor | None = None) -> Losses:
        """Means over the observed views, or over those `counted` ([V] bool)."""
        truth, mask = frame.on_white()[self.model.seen], frame.mask[self.model.seen]
        return frame_losses(*rendering, truth, mask, self.settings.img_lambda, self.settings.ssim_lambda, counted)


def _tensors(frame: Frame) -> list[Tensor]:
    """What a step needs of a frame."""
    return [frame.rgb, frame.mask, frame.intrinsics, frame.world_to_camera, frame.center, frame.angle]


def _frame(values: Sequence[Tensor]) -> Frame:
    """The frame again; time and place in the picture play no part."""
    rgb, mask, intrinsics, world_to_camera, center, angle = values
    return Frame(-1, rgb, mask, intrinsics, world_to_camera, torch.empty(0), center, angle)


class _Recorded:
    """A function of tensors as a CUDA graph. Recording it does not run it.

    Graphs of one `pool` share their memory: each result has to be used up before another of them runs.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        device: torch.device,
        pool: Any,
    ) -> None:
        self.inputs = [value.to(device, copy=True) for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # Other threads read frames meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.output
