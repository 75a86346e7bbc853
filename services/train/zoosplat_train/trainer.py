"""One step of training the network, and its validation, without files and without a clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat_model import checkpoints
from zoosplat_model.cuda_graph import CudaGraphPool
from zoosplat_model.frames import Frame, FrameReader, copy_to_device
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.losses import Losses, frame_losses, soft_iou
from zoosplat_model.network.splatter import PoseSplatter
from zoosplat_model.rasterize import Rendering
from zoosplat_model.registry import build_splatter
from zoosplat_train.ranks import Ranks
from zoosplat_train.sampling import view_to_predict

AVERAGING = 8.0  # after n steps the current weights enter the average with a share of this over n
HEAD_RATE = 3.0  # the head's learning rate over that of the U-Nets
MAX_GRADIENT_NORM = 1.0  # gradients of a larger norm are scaled down to it
DRAWN_OPACITY = 0.02  # opacity above which a Gaussian counts as drawn in the loss of opacity
PAIR_ROOM = 3  # room for pairs of Gaussians and tiles in a CUDA graph, over those of the first steps
N_LOSSES = len(Losses._fields)
TRAIN_FIGURES = (
    "train_loss",
    "train_soft_iou_loss",
    "train_color_loss",
    "train_square_loss",
    "train_ssim_loss",
    "train_plate_loss",
    "train_gradient",
)
VALID_FIGURES = ("valid_loss", "valid_iou", "valid_psnr", "valid_left_out_iou")


class NetworkTrainer:
    """The network, its optimiser, and one step of training.

    On a GPU a step is one CUDA graph. Of several ranks it is two, between which the ranks' gradients are summed.

    Attributes:
        model, optimizer: Adam, with a higher rate for the head than for the U-Nets.
        averaged: the model with weights averaged over about the last tenth of the steps, which is validated and used.
        graphs: runs steps as CUDA graphs, and knows how many pairs of Gaussians and tiles they needed.
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
        for group in groups:  # a CUDA graph reads its learning rate from the device
            group["lr"] = torch.zeros((), device=device) if gpu else 0.0
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=gpu)
        self.averaged = build_splatter(reader, experiment, self.network).move_to(device).requires_grad_(False)
        self.averaged.load_state_dict(self.model.state_dict())
        self.graphs = CudaGraphPool(device, PAIR_ROOM)
        # gsplat waits for the GPU within the gradients of surfels, so they cannot be part of a CUDA graph.
        self.graphs.capture &= experiment.model.gaussian_mode == "3d"
        if self.ranks.size > 1:
            # Gradients and losses lie in one piece, so that one message carries them to the other ranks.
            sizes = [p.numel() for p in self.model.parameters()]
            self._shared = torch.zeros(sum(sizes) + N_LOSSES, device=device)
            *parts, self._losses_shared = torch.split_with_sizes(self._shared, [*sizes, N_LOSSES])
            self._gradients = [
                part.as_strided(p.shape, p.stride()) for part, p in zip(parts, self.model.parameters(), strict=True)
            ]

    def state(self) -> list[Tensor]:
        """All tensors that a step changes, in the same order in every rank."""
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
        """Do one step of Adam on the frames' mean loss over all their observed views that are there.

        Args:
            frames: this rank's frames of the step, any number of them.
            views: of each frame, the cameras that it is carved from.
            mirrored: of each frame, whether the network sees its mirror image.
            rate: learning rate of the U-Nets.
            done: steps done before.
            total: number of frames of all ranks; default: as many as here.

        Returns:
            [7] float64 sums over the frames of all ranks, named by `TRAIN_FIGURES`, still on the device.
        """
        # This is a power-law average (Karras 2024, arXiv 2312.02696): its length is a constant share of the steps.
        numbers = torch.tensor([rate, min(1.0, AVERAGING / (done + 1)), 1 / (total or len(frames))])
        numbers = copy_to_device(numbers, self.reader.device)
        inputs = [*self._inputs(frames, views, mirrored), numbers]
        if self.ranks.size == 1:
            return self.graphs(f"step of {len(frames)}", self._step, inputs)
        if frames:
            self.graphs(f"gradients of {len(frames)}", self._store_gradients, inputs)
        else:  # the last step of an epoch may have fewer than there are ranks
            self._shared.zero_()
        self.ranks.all_reduce(self._shared)
        return self.graphs("update", self._update_from_shared, [numbers])

    def warm_up(self, frames: Sequence[Frame], views: Sequence[Sequence[int]], mirrored: Sequence[bool]) -> None:
        """Compute the gradients of a step, discard them, and wait for the GPU; arguments as of `step`.

        In this first pass libraries choose their kernels, and Triton compiles its own where no run on the machine has.
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
        seen = torch.tensor([self._seen(frame).tolist() for frame in frames])
        flags = (copy_to_device(value, self.reader.device) for value in (used, seen, torch.tensor(mirrored)))
        return [*(value for frame in frames for value in self._tensors(frame)), *flags]

    def _seen(self, frame: Frame) -> NDArray[np.bool_]:
        """Which of the observed views of a frame are there, [V]."""
        return self.reader.seen[frame.t, self.reader.observed]

    def _step(self, *inputs: Tensor) -> Tensor:
        losses = self._backward(*inputs)
        return self._update(losses, inputs[-1])

    def _store_gradients(self, *inputs: Tensor) -> Tensor:
        losses = self._backward(*inputs)
        pairs = zip(self._gradients, self.model.parameters(), strict=True)
        given = [(_with_strides_of(p.grad, stored), p.grad) for stored, p in pairs if p.grad is not None]
        torch._foreach_copy_([stored for stored, _ in given], [gradient for _, gradient in given])
        self._losses_shared.copy_(losses)
        return losses

    def _update_from_shared(self, numbers: Tensor) -> Tensor:
        for p, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            p.grad = gradient
        return self._update(self._losses_shared, numbers)

    def _backward(self, *inputs: Tensor) -> Tensor:
        """Compute the gradients of this rank's part of the mean loss; returns [6] sums of its frames' losses."""
        *values, used, seen, mirrored, numbers = inputs
        each = len(values) // len(used)
        frames = [self._frame(values[i : i + each]) for i in range(0, len(values), each)]
        self.optimizer.zero_grad()
        supervision: float | Tensor = 0.0
        if self.settings.deep_lambda > 0:
            predicted, supervision = self.model.forward_deep_supervision(frames, used, mirrored)
        else:
            predicted = self.model(frames, used, mirrored)
        triples = zip(frames, predicted, seen, strict=True)
        losses = [self._losses(frame, self._render(frame, g), counted) for frame, g, counted in triples]
        total = torch.stack([loss.total for loss in losses]).sum()
        if self.settings.opacity_lambda > 0:
            opaque = [g.opacities.sum() / (g.opacities.detach() > DRAWN_OPACITY).sum().clamp_min(1) for g in predicted]
            total = total + self.settings.opacity_lambda * torch.stack(opaque).sum()
        total = total + self.settings.deep_lambda * len(frames) * supervision
        torch.autograd.backward(total * numbers[2])
        return torch.stack([torch.stack([*loss]) for loss in losses]).detach().double().sum(0)

    def _update(self, losses: Tensor, numbers: Tensor) -> Tensor:
        """Apply Adam and update the averaged weights; returns [7] figures, named by `TRAIN_FIGURES`."""
        rate, share, weight = numbers
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate * group["factor"])
            else:
                group["lr"] = float(rate) * group["factor"]
        gradient = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        with torch.no_grad():
            averages = [p.detach() for p in self.averaged.parameters()]
            steps = list(torch._foreach_sub([p.detach() for p in self.model.parameters()], averages))
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(averages, steps)
        return torch.cat([losses.double(), (gradient / weight).double()[None]])

    @torch.no_grad()
    def validate(self, frames: Iterable[Frame], total: int) -> tuple[dict[str, float], list[float]]:
        """Validate the averaged weights.

        Each frame is carved from all observed views that are there and, where three remain, once more without one of
        them. Its loss is the mean of two: that of all views in the first case, and that of the left-out view in the
        second. So the weights of the least loss are good in observed views and in new ones, of which training sees
        nothing.

        Args:
            frames: this rank's frames, as `Ranks.share` gives them.
            total: number of frames of all ranks.

        Returns:
            Means over all ranks' frames, named by `VALID_FIGURES`: the loss, the IoU of alpha > 0.5 and the PSNR (dB)
            of the windows, and the IoU of the view that was left out; and the loss of each frame.
        """
        self.averaged.eval()
        table = torch.zeros(total, len(VALID_FIGURES), dtype=torch.float64, device=self.reader.device)
        for i, frame in enumerate(frames):
            seen = self._seen(frame)
            there, out = np.flatnonzero(seen), np.zeros_like(seen)
            if len(there) > 3:
                out[there[view_to_predict(frame.t, len(there))]] = True
            flags = torch.from_numpy(np.stack([seen, out]))
            inputs = [*self._tensors(frame), copy_to_device(flags, self.reader.device)]
            figures = self.graphs("validate", self._validate, inputs)
            table[self.ranks.rank + i * self.ranks.size] = figures.double()
        self.ranks.all_reduce(table)
        means = dict(zip(VALID_FIGURES, table.nanmean(0).tolist(), strict=True))
        if math.isnan(means["valid_left_out_iou"]):  # no frame has four views
            del means["valid_left_out_iou"]
        return means, table[:, 0].tolist()

    @torch.no_grad()
    def _validate(self, *inputs: Tensor) -> Tensor:
        *values, (seen, out) = inputs
        frame = self._frame(values)
        mask = frame.mask[self.model.observed_index]

        def rendered(used: Tensor) -> Rendering:
            return self._render(frame, self.averaged([frame], used[None])[0])

        def mean(of_views: Tensor) -> Tensor:
            found: Tensor = torch.where(seen, of_views, 0).sum() / seen.sum()
            return found

        def iou(rendering: Rendering) -> Tensor:
            return soft_iou((rendering.alpha > 0.5).to(mask.dtype), mask)

        whole = rendered(seen)
        squared = (whole.rgb - frame.composite_on_white()[self.model.observed_index]).square().mean((1, 2, 3))
        psnr = mean(-10 * torch.log10(squared.clamp_min(1e-10)))
        loss, left_out_iou = self._losses(frame, whole, seen).total, psnr.new_full((), math.nan)
        if len(mask) > 3:
            part, leaves_out = rendered(seen & ~out), out.any()
            loss = torch.where(leaves_out, (loss + self._losses(frame, part, out).total) / 2, loss)
            left_out_iou = torch.where(leaves_out, (iou(part) * out).sum(), torch.nan)
        return torch.stack([loss, mean(iou(whole)), psnr, left_out_iou])

    @torch.no_grad()
    def compare(self, frame: Frame) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Truth and rendering of the observed views that are there on white, [n, h, w, 3] float32 each, 0 to 1."""
        rendering, seen = self._render(frame, self.averaged.eval()([frame])[0]), self._seen(frame)
        truth = frame.composite_on_white()[self.model.observed_index].cpu().numpy()
        return truth[seen], rendering.rgb.cpu().numpy()[seen]

    def _render(self, frame: Frame, gaussians: Gaussians) -> Rendering:
        observed = self.model.observed_index
        placed = gaussians.to_world(frame.center, frame.angle, frame.tilt)
        return self.model.render(
            placed,
            frame.world_to_camera[observed],
            frame.intrinsics[observed],
            self.reader.width,
            self.reader.height,
            self.reader.observed,
            self.graphs.pair_buffer,
        )

    def _losses(self, frame: Frame, rendering: Rendering, counted: Tensor) -> Losses:
        """Means of the losses over the observed views that are `counted` ([V] bool)."""
        observed, s = self.model.observed_index, self.settings
        truth, mask = frame.composite_on_white()[observed], frame.mask[observed]
        photo = background = None
        if frame.background is not None:
            photo, background = frame.rgb[observed], frame.background[observed]
        return frame_losses(
            *rendering,
            truth,
            mask,
            s.img_lambda,
            s.ssim_lambda,
            counted,
            s.square_lambda,
            s.plate_lambda,
            photo,
            background,
        )

    def _tensors(self, frame: Frame) -> list[Tensor]:
        """The tensors of a frame that a step needs."""
        background = [self.reader.background(frame.t)] if self.settings.plate_lambda > 0 else []
        tilt = [] if frame.tilt is None else [frame.tilt]
        views = frame.rgb, frame.mask, frame.intrinsics, frame.world_to_camera
        return [*background, *views, frame.center, frame.angle, *tilt]

    def _frame(self, values: Sequence[Tensor]) -> Frame:
        """The frame of such tensors. Its time and its place in the picture play no part in a step and are made up.

        Which of its views are there is told beside it, for all frames of a step in one piece.
        """
        background = values[0] if self.settings.plate_lambda > 0 else None
        rgb, mask, intrinsics, world_to_camera, center, angle, *tilt = values if background is None else values[1:]
        frame = Frame(-1, rgb, mask, intrinsics, world_to_camera, torch.empty(0), center, angle, *tilt)
        return replace(frame, background=background)


def _with_strides_of(value: Tensor, stored: Tensor) -> Tensor:
    """`stored` with the strides of `value`, if these differ in axes of length 1 only.

    Gradients of convolutions of 1 x 1 x 1 have such strides. Copying tensors whose strides differ would split one copy
    of all tensors into a copy of each.
    """
    long = [i for i, n in enumerate(value.shape) if n > 1]
    same = all(stored.stride(i) == value.stride(i) for i in long)
    return stored.as_strided(value.shape, value.stride()) if same else stored
