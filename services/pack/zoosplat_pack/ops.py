"""Windows round the animal: arrays and videos in, arrays out."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat import video

I32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Maps = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None

MARGIN = 8  # pixels kept round the mask
MULTIPLE = 16


def window_size(boxes: I32, full: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a window that holds every mask box and its margin: multiples of 16, at most the frame.

    Args:
        boxes: [..., 4] x0, y0, x1, y1 of the masks.
        full: width and height of the whole frame.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).reshape(-1, 2).max(axis=0) + 2 * MARGIN
    width, height = (min(-(-int(s) // MULTIPLE) * MULTIPLE, f) for s, f in zip(sides, full, strict=True))
    return width, height


def window_origins(boxes: I32, size: tuple[int, int], full: tuple[int, int]) -> I32:
    """Corner [..., 2] int32 (x, y) of a window centred on each box and shifted inside the frame; empty boxes: 0."""
    center = (boxes[..., :2] + boxes[..., 2:]) // 2
    limit = np.maximum(np.array(full) - np.array(size), 0)
    corners: I32 = np.clip(center - np.array(size) // 2, 0, limit).astype(np.int32)
    return corners


def read_windows(
    reader: Iterable[video.Planes],
    masks: Bool,
    origins: I32,
    size: tuple[int, int],
    downsample: int,
    maps: Maps,
) -> tuple[npt.NDArray[np.uint8], Bool]:
    """Windows of one camera's frames: rgb [n, h, w, 3] uint8, white beyond the margin, and mask [n, h, w] bool.

    Args:
        reader: n frames at full resolution.
        masks: [n, H, W] whole masks at working resolution.
        origins: [n, 2].
        size: width and height of the window.
        downsample: integer factor.
        maps: undistortion maps at full resolution, or None.
    """
    width, height = size
    rgb = np.full((len(masks), height, width, 3), 255, np.uint8)
    mask = np.zeros((len(masks), height, width), bool)
    near = np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8)
    for i, frame in enumerate(reader):
        x, y = (int(v) for v in origins[i])
        mask[i] = masks[i, y : y + height, x : x + width]
        if mask[i].any():
            keep = cv2.dilate(mask[i].view(np.uint8), near)[..., None] > 0
            np.copyto(rgb[i], video.window_rgb(frame, (x, y), size, downsample, maps), where=keep)
    return rgb, mask
