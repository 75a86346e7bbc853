"""Masks of all cameras in lockstep: arrays and videos in, arrays out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import av
import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.errors import UserError
from zoosplat.recording import video

Bool = npt.NDArray[np.bool_]
Maps = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None

GREY_TOLERANCE = 12  # mean deviation of chroma from neutral, of 255
MAX_MID_GREY = 0.05  # share of pixels that are neither black nor white


def check_is_mask(frame: video.Planes, label: str, index: int) -> None:
    """Raise UserError unless a frame is grey and (but for compression) black and white."""
    for chroma in (frame.u, frame.v):
        if chroma is not None and np.abs(chroma[::8, ::8].astype(np.int16) - 128).mean() > GREY_TOLERANCE:
            raise UserError(f"{label}: frame {index} is coloured; a mask is white on black (is it the RGB video?)")
    span = frame.white - frame.black
    grey = cv2.inRange(frame.y[::8, ::8], frame.black + 0.2 * span, frame.white - 0.2 * span)
    if cv2.countNonZero(grey) > MAX_MID_GREY * grey.size:
        raise UserError(f"{label}: frame {index} is not black and white; a mask is 255 on the animal, 0 elsewhere")


def mask_blocks(
    infos: Sequence[video.VideoInfo],
    maps: Sequence[Maps],
    start: int,
    stop: int,
    jump: int,
    downsample: int,
    block: int,
) -> Iterator[Bool]:
    """Masks of all cameras, a block of kept frames at a time, each video decoded in one pass.

    Args:
        infos: C mask videos of equal size.
        maps: C pairs of undistortion maps at full resolution, or None.
        start, stop: kept frames (video frame = kept frame x jump).
        jump: every how many-th frame is kept.
        downsample: integer factor.
        block: kept frames at a time.

    Yields:
        [n, C, h, w] bool with n = block, less at the end.
    """
    readers = [video.read_frames(info, start * jump, (stop - 1) * jump + 1, jump) for info in infos]

    def read(camera: int, first: int, count: int) -> Bool:
        taken = []
        for i in range(count):
            frame = video.planes(next(readers[camera]))
            check_is_mask(frame, infos[camera].label, (first + i) * jump)
            taken.append(video.luma_mask(frame, downsample, maps[camera]))
        return np.stack(taken)

    with ThreadPoolExecutor(min(len(infos), cv2.getNumberOfCPUs())) as pool:
        for first in range(start, stop, block):
            count = min(block, stop - first)
            yield np.stack(list(pool.map(lambda c, f=first, n=count: read(c, f, n), range(len(infos)))), axis=1)


def boxes(masks: Bool) -> npt.NDArray[np.int32]:
    """Bounding boxes of masks [n, C, h, w]: [n, C, 4] int32 x0, y0, x1, y1 (exclusive), zeros where empty."""
    out = np.zeros((*masks.shape[:2], 4), np.int32)
    for index in np.ndindex(*masks.shape[:2]):
        x, y, w, h = cv2.boundingRect(masks[index].view(np.uint8))
        out[index] = (x, y, x + w, y + h)
    return out


def decoder_version() -> str:
    return ".".join(str(v) for v in av.library_versions["libavcodec"])
