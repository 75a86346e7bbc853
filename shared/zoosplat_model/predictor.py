"""A trained model, ready to reconstruct any kept frame and to render it from anywhere."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoosplat.errors import UserError
from zoosplat.stages.runs import Run
from zoosplat_model import checkpoints
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.network.cuda_graph import Recorded
from zoosplat_model.network.splatter import Gaussians, PoseSplatter
from zoosplat_model.rasterize import Rendering

LANES = 4  # frames that a GPU works on at a time where one frame's kernels are too small to fill it
FEW_VOXELS = 1 << 21


def pick_device(name: str) -> torch.device:
    """`auto` (CUDA where there is a usable GPU, else CPU), `cpu`, `cuda` or `cuda:<i>`.

    Raises:
        UserError: CUDA is asked for and there is none, or the name is unknown.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name}: unknown; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name}: not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: no such CUDA GPU here ({torch.cuda.device_count()} found); use auto or cpu")
    return device


class Predictor:
    """The best checkpoint of a run and the frames that it reconstructs.

    Attributes:
        reader: the project's frames.
        model: the network, in evaluation mode.
        step: optimiser steps behind the checkpoint.
        recordable: whether the Gaussians of a frame follow from its tensors alone, so that a CUDA graph can make them.
    """

    recordable = True

    def __init__(self, reader: FrameReader, model: PoseSplatter, step: int) -> None:
        self.reader, self.model, self.step = reader, model.eval(), step

    @classmethod
    def open(cls, run: Run, device: str = "auto", *, finished: bool = True) -> Predictor:
        """Load the best checkpoint of a run whose stages pack, center_rotation, crop and train are done.

        Args:
            run: whose results are read.
            device: see `pick_device`.
            finished: False takes the best checkpoint so far of a training that has not ended (dynamic: the newest).

        Raises:
            UserError: a stage is missing, the checkpoint is damaged, or the device does not exist.
        """
        chosen = pick_device(device)
        if finished:
            run.input_url("train")
        reader = open_reader(run, chosen)
        if run.experiment.train.method == "dynamic":
            from zoosplat_model.dynamic.predictor import DynamicPredictor

            return DynamicPredictor(reader, run, finished=finished)
        model = PoseSplatter.of(reader, run.experiment).on(chosen)
        checkpoint = checkpoints.load(run.output_url("train"), "best")
        if checkpoint is None:
            raise UserError(f"{run.output_url('train')}: no checkpoint; run stage train again with --force")
        try:
            model.load_state_dict(checkpoint.average)
        except RuntimeError:  # names or shapes differ
            url = run.output_url("train")
            why = "does not fit the configuration, or is another version's; run stage train again with --force"
            raise UserError(f"{url}: the checkpoint {why}") from None
        return cls(reader, model.only_applied(), checkpoint.step)

    @torch.no_grad()
    def gaussians(self, t: int) -> Gaussians:
        """Gaussians of kept frame t in the world, from its observed views only."""
        frame = self.reader.frame(t)
        gaussians: Gaussians = self.model([frame])[0]
        return gaussians.to_world(frame.center, frame.angle)

    def tracks(self, frames: Sequence[int], count: int) -> Tensor | None:
        """Where some Gaussians are over time; None: those of one frame are not those of another."""
        return None

    def each(
        self, frames: Iterable[int], function: Callable[[Gaussians], Tensor], *, record: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """A function of the Gaussians of many kept frames, in their order; fast, for stages that go through all.

        Args:
            frames: indices t; the next ones are read while some are worked on.
            function: of Gaussians in the animal's frame (origin at its centre, x along its heading), to a tensor.
            record: whether the function can be part of a CUDA graph: no shapes that depend on values, no waiting.

        Yields:
            t and the function's tensor, on the model's device.
        """
        voxels = math.prod(stop - start for start, stop in self.reader.volume_idx)
        count = LANES if self.reader.device.type == "cuda" and voxels <= FEW_VOXELS else 1
        record = record and self.recordable
        lanes = [_Lane(self._animal, function, self.reader.device, record) for _ in range(count)]
        waiting: deque[tuple[Frame, _Lane, Tensor]] = deque()
        for frame, lane in zip(self.reader.prefetch(frames), itertools.cycle(lanes), strict=False):
            if len(waiting) == len(lanes):
                yield _ended(*waiting.popleft())
            with torch.no_grad():
                waiting.append((frame, lane, lane(frame)))
        while waiting:
            yield _ended(*waiting.popleft())

    def _animal(self, frame: Frame) -> Gaussians:
        """Gaussians in the animal's frame."""
        gaussians: Gaussians = self.model([frame])[0]
        return gaussians

    @torch.no_grad()
    def render(
        self,
        gaussians: Gaussians,
        world_to_camera: Tensor,  # [C, 4, 4]
        intrinsics: Tensor,  # [C, 3, 3] calibration pixels
        width: int,
        height: int,
        cameras: Sequence[int | None] | None = None,  # [C]
    ) -> Rendering:
        """Render on white.

        Args:
            gaussians: in the world.
            world_to_camera, intrinsics, width, height: the views; any pixels, any number.
            cameras: the recording's camera that each view belongs to, for its learned colour; None (for a view or for
                all) and held-out cameras: the colour of the average camera.
        """
        return self.model.render(gaussians, world_to_camera, intrinsics, width, height, cameras=cameras)


def open_reader(run: Run, device: torch.device) -> FrameReader:
    """Frames of a run whose stages pack, center_rotation and crop are done. Raises UserError otherwise."""
    return FrameReader(
        run.open_input("pack"),
        run.open_input("center_rotation"),
        run.open_input("crop"),
        run.experiment,
        device,
    )


class _Lane:
    """Frames one after the other; on a GPU in a stream of its own, the first as it is, then as a recorded graph."""

    def __init__(
        self,
        gaussians_of: Callable[[Frame], Gaussians],
        function: Callable[[Gaussians], Tensor],
        device: torch.device,
        record: bool,
    ) -> None:
        self.gaussians_of, self.function, self.record = gaussians_of, function, record
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.warm = False
        self.recorded: Recorded | None = None

    def __call__(self, frame: Frame) -> Tensor:
        if self.stream is None:
            return self._compute(frame)
        # After what made the frame, and what used earlier results, on the caller's stream.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if not self.record or not self.warm:
                self.warm = True  # libraries choose their kernels at the first call
                return self._compute(frame)
            inputs = [getattr(frame, name) for name in INPUTS]
            if self.recorded is None:
                # Lanes run at the same time, so each has memory of its own.
                self.recorded = Recorded(self._compute_from(frame), inputs, inputs[0].device, stream=self.stream)
            return self.recorded(inputs).clone()

    def _compute(self, frame: Frame) -> Tensor:
        return self.function(self.gaussians_of(frame))

    def _compute_from(self, frame: Frame) -> Callable[..., Tensor]:
        """As a function of the frame's tensors."""
        return lambda *tensors: self._compute(replace(frame, **dict(zip(INPUTS, tensors, strict=True))))


def _ended(frame: Frame, lane: _Lane, result: Tensor) -> tuple[int, Tensor]:
    """Wait for a frame's result; until then its tensors are in use."""
    if lane.stream is not None:
        lane.stream.synchronize()
    return frame.t, result


INPUTS = ("rgb", "mask", "intrinsics", "world_to_camera", "center", "angle")  # tensors of a frame on the device
