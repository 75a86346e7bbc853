"""Recordings whose masks stage segment makes from the raw videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.errors import Problems
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording import video
from zoosplat.recording.facts import MaskGeometry, RecordingFacts
from zoosplat.recording.keypoints import can_read_keypoints, keypoints_label, read_keypoints
from zoosplat.recording.source import Bool
from zoosplat.recording.video import VideoInfo
from zoosplat.recording.video_source import VideoSource, undistort_maps
from zoosplat.storage import schema

MASK_THRESHOLD = 128  # The probability, of 255, from which a pixel of segments.zarr is animal.


class SegmentedSource(VideoSource):
    """Raw videos, one a camera, a calibration of cameras that stand, and masks of segments.zarr.

    Args:
        experiment: the configuration.
        segments: the finished segments.zarr; None before stage segment is done: the masks can then not be read.
    """

    kinds = ("video",)

    def __init__(self, experiment: Experiment, segments: zarr.Group | None) -> None:
        super().__init__(experiment)
        self._segments = segments

    def check(self) -> RecordingFacts:
        facts, data, problems = super().check(), self.experiment.data, Problems()
        # What this machine cannot read is read where stage segment runs, before it does anything else.
        for c, file in enumerate(data.keypoints or ()):
            if can_read_keypoints(file):
                with problems.collect():
                    info = facts.videos[c]
                    read_keypoints(data.url(file), keypoints_label(c, file), info.n_frames, info.n_declared)
        problems.report()
        return facts

    def mask_geometry(self, facts: RecordingFacts, frames: npt.NDArray[np.int64]) -> MaskGeometry:
        return replace(super().mask_geometry(facts, frames), seen=schema.read(self._group(), "seen"))

    def read_masks(
        self, infos: Sequence[VideoInfo], cameras: Cameras, start: int, stop: int, block: int
    ) -> Iterator[Bool]:
        """As of any source, from the probabilities of segments.zarr; `infos` is empty."""
        downsample = self.experiment.ingest.image_downsample
        probability = schema.FrameArray(self._group(), "probability")
        _, n_cameras, height, width = probability.shape
        maps = undistort_maps(cameras, [(width, height)] * n_cameras)

        def read(t: int) -> Bool:
            frame = np.where(probability[t] >= MASK_THRESHOLD, np.uint8(255), np.uint8(0))
            whole = [video.Planes(mask, None, None, full_range=True, matrix=601) for mask in frame]
            return np.stack([video.luma_mask(p, downsample, m) for p, m in zip(whole, maps, strict=True)])

        with ThreadPoolExecutor(min(block, cv2.getNumberOfCPUs())) as pool:
            for first in range(start, stop, block):
                yield np.stack(list(pool.map(read, range(first, min(first + block, stop)))))

    def _group(self) -> zarr.Group:
        assert self._segments is not None, "masks are read before stage segment is done"
        return self._segments
