"""Windows round the animal: arrays and videos in, arrays out."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.recording import video

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
    frames: Iterable[video.Planes],
    masks: Bool,
    origins: I32,
    downsample: int,
    maps: Maps,
    rgb: npt.NDArray[np.uint8],
    mask: Bool,
) -> None:
    """Fill the windows of one camera.

    Args:
        frames: n frames at full resolution.
        masks: [n, H, W] whole masks at working resolution.
        origins: [n, 2].
        downsample: integer factor.
        maps: undistortion maps at full resolution, or None.
        rgb: [n, h, w, 3], out: the window, white farther than the margin from the mask.
        mask: [n, h, w], out.
    """
    height, width = mask.shape[1:]
    near = np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8)
    rgb[...] = 255
    for i, frame in enumerate(frames):
        x, y = (int(v) for v in origins[i])
        mask[i] = masks[i, y : y + height, x : x + width]
        u, v, w, h = cv2.boundingRect(mask[i].view(np.uint8))
        if not w:
            continue
        # Only the animal's box and its margin are converted: the rest stays white.
        u0, v0, u1, v1 = max(0, u - MARGIN), max(0, v - MARGIN), min(width, u + w + MARGIN), min(height, v + h + MARGIN)
        keep = cv2.dilate(mask[i, v0:v1, u0:u1].view(np.uint8), near)
        colour = video.window_rgb(frame, (x + u0, y + v0), (u1 - u0, v1 - v0), downsample, maps)
        cv2.copyTo(colour, keep, rgb[i, v0:v1, u0:u1])
