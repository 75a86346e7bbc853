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
from zoosplat.recording.source import Bool
from zoosplat.recording.video import VideoInfo, probe
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
        problems, facts = Problems(), None
        with problems.collect():
            facts = super().check()
        scenes = _find_backgrounds(self.experiment, problems)
        if facts is not None:
            size = facts.width, facts.height
            problems.lines += [
                f"{scene.label}: {scene.width} x {scene.height} pixels, but the videos have {size[0]} x {size[1]}; "
                "give a video or picture of the same camera, not scaled"
                for scene in scenes
                if (scene.width, scene.height) != size
            ]
        problems.report()
        assert facts is not None
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


def probe_backgrounds(experiment: Experiment) -> list[VideoInfo]:
    """The videos of `data.backgrounds`, one a camera; a picture is a video of one frame. Without any the list is empty.

    Raises:
        UserError: a line for each that is missing or cannot be read.
    """
    problems = Problems()
    found = _find_backgrounds(experiment, problems)
    problems.report()
    return found


def _find_backgrounds(experiment: Experiment, problems: Problems) -> list[VideoInfo]:
    """The videos of `data.backgrounds` that can be read; a line of `problems` for each other one."""
    data, found = experiment.data, []
    names = data.camera_names or tuple(str(i) for i in range(len(data.videos)))
    for camera, file in zip(names, data.backgrounds or (), strict=data.backgrounds is not None):
        with problems.collect():
            found.append(probe(data.url(file), f"{file} (background of camera {camera})"))
    return found
