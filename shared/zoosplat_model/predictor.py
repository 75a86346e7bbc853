"""A trained model, ready to reconstruct any kept frame and to render it from anywhere."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoosplat.config import Experiment
from zoosplat.errors import UserError
from zoosplat.project import Project
from zoosplat_model import checkpoints
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.rasterize import Rendering
from zoosplat_model.splatter import Gaussians, PoseSplatter

LANES = 4  # frames that a GPU works on at a time: one frame's kernels are too small to fill it


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
    """The best checkpoint of a project and the frames that it reconstructs.

    Attributes:
        reader: the project's frames.
        model: the network, in evaluation mode.
        step: optimiser steps behind the checkpoint.
    """

    def __init__(self, reader: FrameReader, model: PoseSplatter, step: int) -> None:
        self.reader, self.model, self.step = reader, model.eval(), step

    @classmethod
    def open(cls, project: Project, experiment: Experiment, device: str = "auto") -> Predictor:
        """Load the best checkpoint of a project whose stages pack, center_rotation, crop and train are done.

        Raises:
            UserError: a stage is missing or was made with another configuration, or the device does not exist.
        """
        chosen = pick_device(device)
        project.input_url("train", experiment)
        reader = open_reader(project, experiment, chosen)
        model = PoseSplatter.of(reader, experiment).on(chosen)
        checkpoint = checkpoints.load(project, "best")
        if checkpoint is None:
            raise UserError(f"{project.output_url('train')}: no checkpoint; run stage train again with --force")
        model.load_state_dict(checkpoint.average)
        return cls(reader, model, checkpoint.step)

    @torch.no_grad()
    def gaussians(self, t: int) -> Gaussians:
        """Gaussians of kept frame t in the world, from its observed views only."""
        frame = self.reader.frame(t)
        gaussians: Gaussians = self.model([frame])[0]
        return gaussians.to_world(frame.center, frame.angle)

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
        lanes = [_Lane(self._animal, function, self.reader.device, record) for _ in range(self._lanes)]
        waiting: deque[tuple[int, _Lane, Tensor]] = deque()
        source = self.reader.prefetch(frames)
        for lane in itertools.cycle(lanes):
            if len(waiting) == len(lanes):
                t, first, result = waiting.popleft()
                first.wait()
                yield t, result
            with torch.no_grad(), lane.stream:
                frame = next(source, None)
                if frame is None:
                    break
                waiting.append((frame.t, lane, lane(frame)))
        for t, lane, result in waiting:
            lane.wait()
            yield t, result

    @property
    def _lanes(self) -> int:
        return LANES if self.reader.device.type == "cuda" else 1

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


def open_reader(project: Project, experiment: Experiment, device: torch.device) -> FrameReader:
    """Frames of a project whose stages pack, center_rotation and crop are done. Raises UserError otherwise."""
    return FrameReader(
        project.open_input("pack", experiment),
        project.open_input("center_rotation", experiment),
        project.open_input("crop", experiment),
        experiment,
        device,
    )


class _Lane:
    """A stream of a GPU with frames one after the other on it: the first as it is, then a recorded graph. On a CPU just
    the function."""

    def __init__(
        self,
        gaussians_of: Callable[[Frame], Gaussians],
        function: Callable[[Gaussians], Tensor],
        device: torch.device,
        record: bool,
    ) -> None:
        self.function: Callable[[Frame], Tensor] = lambda frame: function(gaussians_of(frame))
        self.device, self.record = device, record and device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False
        self.input: Frame | None = None
        self.output: Tensor | None = None

    @property
    def stream(self) -> Any:
        """A context in which work goes to this lane."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def __call__(self, frame: Frame) -> Tensor:
        if not self.record or not self.warm:
            self.warm = True  # libraries choose their kernels at the first call
            return self.function(frame)
        if self.graph is None or self.input is None:
            self.input = replace(frame, **{name: getattr(frame, name).clone() for name in _INPUTS})
            self.graph = torch.cuda.CUDAGraph()
            # Other threads read frames meanwhile.
            with torch.cuda.graph(self.graph, stream=self._stream, capture_error_mode="thread_local"):
                self.output = self.function(self.input)
        for name in _INPUTS:
            getattr(self.input, name).copy_(getattr(frame, name))
        self.graph.replay()
        assert self.output is not None
        return self.output.clone()

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


_INPUTS = ("rgb", "mask", "intrinsics", "world_to_camera", "center", "angle")
