"""What a trained model can do, whichever method trained it: reconstruct any kept frame and render it from anywhere."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoosplat_model.cuda_graph import CudaGraph
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize import Rendering
from zoosplat_model.rasterize.types import Cameras

CONCURRENT_FRAMES = 4  # frames that a GPU computes at a time where the kernels of one are too small to fill it
SMALL_VOLUME = 1 << 21  # voxels; the kernels of a volume up to this size do not fill a GPU
# Those of a frame that lie on the device; `seen` is None in all frames of a recording or in none.
FRAME_TENSORS = ("rgb", "mask", "intrinsics", "world_to_camera", "center", "angle", "seen")


class Predictor(ABC):
    """A trained model and the frames that it reconstructs.

    Attributes:
        reader: the project's frames.
        step: optimiser steps behind the model.
        capturable: whether the Gaussians of a frame follow from its tensors alone, so that a CUDA graph can make them.
    """

    capturable = True

    def __init__(self, reader: FrameReader, step: int) -> None:
        self.reader, self.step = reader, step

    @abstractmethod
    def animal_gaussians(self, frame: Frame) -> Gaussians:
        """The Gaussians of a frame in the animal's frame (origin at its centre, x along its heading), metres."""

    @torch.no_grad()
    def gaussians(self, t: int) -> Gaussians:
        """The Gaussians of kept frame t in the world, from its observed views only."""
        frame = self.reader.frame(t)
        return self.animal_gaussians(frame).to_world(frame.center, frame.angle)

    def tracks(self, frames: Sequence[int], count: int) -> Tensor | None:
        """Where at most `count` Gaussians are in the world in each frame, [len(frames), count, 3] metres.

        None means that the Gaussians of one frame are not those of another.
        """
        return None

    @torch.no_grad()
    def render(
        self,
        gaussians: Gaussians,
        world_to_camera: Tensor,
        intrinsics: Tensor,
        width: int,
        height: int,
        cameras: Sequence[int | None] | None = None,
    ) -> Rendering:
        """Render Gaussians on white.

        Args:
            gaussians: in the world.
            world_to_camera: [C, 4, 4] of any number of views.
            intrinsics: [C, 3, 3] calibration pixels.
            width: of the pictures, pixels.
            height: of the pictures, pixels.
            cameras: [C] the recording's camera to which each view belongs, for its learned colour. None (for a view or
                for all) and held-out cameras mean the colour of the average camera.
        """
        return self._render(gaussians, Cameras(world_to_camera, intrinsics, width, height), cameras)

    @abstractmethod
    def _render(self, gaussians: Gaussians, views: Cameras, cameras: Sequence[int | None] | None) -> Rendering:
        """As `render`, with the views in one piece."""

    def map_frames(
        self, frames: Iterable[int], function: Callable[[Gaussians], Tensor], *, capture: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """Compute a function of the Gaussians of many kept frames, in their order.

        This is the fast way for stages that go through all frames. The next frames are read while some are computed.

        Args:
            frames: indices t.
            function: of Gaussians in the animal's frame, to a tensor.
            capture: whether the function can be part of a CUDA graph: no shape depends on a value, nothing waits.

        Yields:
            t and the function's tensor, on the model's device.
        """
        voxels = math.prod(stop - start for start, stop in self.reader.volume_idx)
        count = CONCURRENT_FRAMES if self.reader.device.type == "cuda" and voxels <= SMALL_VOLUME else 1
        capture = capture and self.capturable
        lanes = [_Lane(self.animal_gaussians, function, self.reader.device, capture) for _ in range(count)]
        waiting: deque[tuple[Frame, _Lane, Tensor]] = deque()
        for frame, lane in zip(self.reader.prefetch(frames), itertools.cycle(lanes), strict=False):
            if len(waiting) == len(lanes):
                yield _finish(*waiting.popleft())
            with torch.no_grad():
                waiting.append((frame, lane, lane(frame)))
        while waiting:
            yield _finish(*waiting.popleft())


class _Lane:
    """Computes frames one after the other; on a GPU in its own stream, the first as it is, then as a CUDA graph."""

    def __init__(
        self,
        reconstruct: Callable[[Frame], Gaussians],
        function: Callable[[Gaussians], Tensor],
        device: torch.device,
        capture: bool,
    ) -> None:
        self.reconstruct, self.function, self.capture = reconstruct, function, capture
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.warm = False
        self.graph: CudaGraph | None = None

    def __call__(self, frame: Frame) -> Tensor:
        if self.stream is None:
            return self._compute(frame)
        # The lane starts after what made the frame, and what used earlier results, on the caller's stream.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if not self.capture or not self.warm:
                self.warm = True  # libraries choose their kernels at the first call
                return self._compute(frame)
            inputs = [value for name in FRAME_TENSORS if (value := getattr(frame, name)) is not None]
            if self.graph is None:
                # Lanes run at the same time, so each graph has a memory pool of its own.
                self.graph = CudaGraph(self._compute_from(frame), inputs, inputs[0].device, stream=self.stream)
            return self.graph(inputs).clone()

    def _compute(self, frame: Frame) -> Tensor:
        return self.function(self.reconstruct(frame))

    def _compute_from(self, frame: Frame) -> Callable[..., Tensor]:
        """The same as a function of the frame's tensors."""
        names = [name for name in FRAME_TENSORS if getattr(frame, name) is not None]
        return lambda *tensors: self._compute(replace(frame, **dict(zip(names, tensors, strict=True))))


def _finish(frame: Frame, lane: _Lane, result: Tensor) -> tuple[int, Tensor]:
    """Wait for the result of a frame; the frame is an argument because its tensors are in use until then."""
    if lane.stream is not None:
        lane.stream.synchronize()
    return frame.t, result
