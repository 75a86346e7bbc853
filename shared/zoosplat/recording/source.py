"""The contract of a source of a recording, which both kinds of recordings fulfil: videos and D-NeRF scenes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from zoosplat.config.experiment import Experiment
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.facts import Footage, MaskGeometry, RecordingFacts
from zoosplat.recording.mask_files import MaskInfo
from zoosplat.recording.video import VideoInfo

Bool = npt.NDArray[np.bool_]


class Picture(Protocol):
    """One picture, of which windows can be read."""

    def window(self, origin: tuple[int, int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """RGB [height, width, 3] uint8 of a window: its corner x, y and its size, both in working pixels."""


class RecordingSource(ABC):
    """Where the masks and the pictures of a recording come from.

    Attributes:
        cameras_move: whether the cameras move, so that a time is seen by at most one training camera.
    """

    cameras_move: bool

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    @abstractmethod
    def check(self) -> RecordingFacts:
        """Check all files of the recording against each other and against the configuration.

        Raises:
            UserError: a line for each problem.
        """

    @abstractmethod
    def check_pictures(self) -> Footage:
        """Check the videos or pictures alone, as for packing a recording whose masks have been read.

        Raises:
            UserError: a line for each problem.
        """

    @abstractmethod
    def list_files(self) -> list[str]:
        """URLs of the files that the configuration names only by their folder. Raises UserError."""

    @abstractmethod
    def mask_geometry(self, facts: RecordingFacts, frames: npt.NDArray[np.int64]) -> MaskGeometry:
        """Cameras and world of masks.zarr for the video frames [T] that are kept."""

    @abstractmethod
    def read_masks(
        self, infos: Sequence[MaskInfo], cameras: Cameras, start: int, stop: int, block: int
    ) -> Iterator[Bool]:
        """Masks of all cameras for kept frames `start` to `stop - 1`, a block of frames at a time.

        Args:
            infos: C masks; empty where the masks have no files of their own.
            cameras: C cameras at full resolution, whose distortion is removed.
            start: first kept frame (video frame = kept frame x frame_jump).
            stop: end of the kept frames.
            block: kept frames at a time.

        Yields:
            [n, C, h, w] bool with n = block, less at the end.

        Raises:
            UserError: a frame cannot be read or is no mask.
        """

    @abstractmethod
    def read_pictures(
        self, infos: Sequence[VideoInfo], cameras: Cameras, start: int, stop: int
    ) -> list[Iterator[Picture | None]]:
        """For each camera the pictures of kept frames `start` to `stop - 1`; None where there is no picture.

        Args:
            infos: C videos; empty where the pictures are no videos.
            cameras: C cameras at full resolution, whose distortion is removed.
            start: first kept frame.
            stop: end of the kept frames.
        """
