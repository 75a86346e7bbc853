"""Frames of all cameras of a recording, an instant at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2

from zoosplat.recording import video
from zoosplat.recording.video import Planes, VideoInfo

# Frames between two that are wanted above which seeking is quicker than decoding what lies between. Encoders set a
# keyframe every 250 frames or so, and on average half of that is decoded after seeking.
SEEK_FRAMES = 125


class InstantReader:
    """Reads kept frames of all cameras together. While one instant is worked on, the next one is decoded.

    Args:
        videos: C videos of equal length, in the order of the cameras.
        frame_jump: every how many video frames one is kept.
    """

    def __init__(self, videos: Sequence[VideoInfo], frame_jump: int) -> None:
        self._videos, self._jump = videos, frame_jump

    def read(self, instants: Sequence[int]) -> Iterator[list[Planes]]:
        """The kept frames of these numbers, which ascend, each as C whole frames at full resolution.

        Raises:
            UserError: a frame that is missing or cannot be decoded.
        """
        wanted = [self._jump * t for t in instants]
        readers = [_read_frames(info, wanted) for info in self._videos]
        with ThreadPoolExecutor(min(len(readers), cv2.getNumberOfCPUs())) as pool:
            pending = [pool.submit(next, reader) for reader in readers]
            for i in range(len(wanted)):
                instant = [future.result() for future in pending]
                if i + 1 < len(wanted):
                    pending = [pool.submit(next, reader) for reader in readers]
                yield instant


def _read_frames(info: VideoInfo, wanted: Sequence[int]) -> Iterator[Planes]:
    """Frames of one video by their ascending numbers. Those that lie close together are decoded in one pass."""
    passes: list[list[int]] = []
    for frame in wanted:
        if passes and frame - passes[-1][-1] <= SEEK_FRAMES:
            passes[-1].append(frame)
        else:
            passes.append([frame])
    for frames in passes:
        chosen = set(frames)
        decoded = video.read_frames(info, frames[0], frames[-1] + 1)
        for number, frame_data in enumerate(decoded, frames[0]):
            if number in chosen:
                yield video.planes(frame_data)
