"""Windows round the animal: their size, their places and their pictures."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.recording.background import fit_gain
from zoosplat.recording.source import Picture

I32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

# Width in pixels of the strip round the mask whose colours are kept.
MARGIN = 8
# Windows have sides that are multiples of this number of pixels.
MULTIPLE = 16


def window_size(boxes: I32, full: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a window that holds every mask box and its margin: multiples of 16, at most the frame.

    Args:
        boxes: [..., 4] x0, y0, x1, y1 of the masks of views that are there.
        full: width and height of the whole frame.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).reshape(-1, 2).max(axis=0, initial=0) + 2 * MARGIN
    width, height = (min(-(-int(s) // MULTIPLE) * MULTIPLE, f) for s, f in zip(sides, full, strict=True))
    return width, height


def window_origins(boxes: I32, size: tuple[int, int], full: tuple[int, int]) -> I32:
    """Corner [..., 2] int32 (x, y) of a window centred on each box and shifted inside the frame.

    For an empty box it is 0.
    """
    center = (boxes[..., :2] + boxes[..., 2:]) // 2
    limit = np.maximum(np.array(full) - np.array(size), 0)
    corners: I32 = np.clip(center - np.array(size) // 2, 0, limit).astype(np.int32)
    return corners


def fill_empty_boxes(boxes: I32, full: tuple[int, int]) -> I32:
    """Boxes [T, C, 4] with a point in place of every empty one, so that its window holds where the animal may be.

    The point is interpolated over time from the centres of the camera's other boxes. It is the centre of the frame,
    whose width and height are `full`, where all boxes of the camera are empty.
    """
    filled = boxes.copy()
    times = np.arange(len(boxes))
    for c in range(boxes.shape[1]):
        empty = boxes[:, c, 2] <= boxes[:, c, 0]
        known = times[~empty]
        for axis in range(2):
            centers = (boxes[known, c, axis] + boxes[known, c, axis + 2]) / 2
            places = np.interp(times[empty], known, centers) if len(known) else full[axis] / 2
            filled[empty, c, axis] = filled[empty, c, axis + 2] = np.rint(places)
    return filled


def fit_light(
    plate: npt.NDArray[np.uint8],  # [H, W, 3]
    rgb: npt.NDArray[np.uint8],  # [n, h, w, 3]
    mask: Bool,  # [n, h, w]
    origins: I32,  # [n, 2]
) -> npt.NDArray[np.float32]:
    """The light [n, 3, 4] on a camera's plate in its windows, fitted farther than the margin from the masks."""
    height, width = mask.shape[1:]
    near = np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8)
    fitted = []
    for picture, animal, (x, y) in zip(rgb, mask, origins, strict=True):
        away = cv2.dilate(animal.view(np.uint8), near) == 0
        fitted.append(fit_gain(plate[y : y + height, x : x + width], picture, away))
    return np.stack(fitted)


def read_windows(
    pictures: Iterable[Picture | None],
    masks: Bool,
    origins: I32,
    rgb: npt.NDArray[np.uint8],
    mask: Bool,
    whole: bool = False,
) -> None:
    """Fill the windows of one camera.

    Args:
        pictures: n pictures; None only where the mask is empty or the view is absent.
        masks: [n, H, W] whole masks at working resolution.
        origins: [n, 2].
        rgb: [n, h, w, 3], out: the window, white farther than the margin from the mask unless it is `whole`.
        mask: [n, h, w], out.
        whole: whether the windows show the picture everywhere.

    Raises:
        ValueError: there are not n pictures.
    """
    height, width = mask.shape[1:]
    near = np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8)
    rgb[...] = 255
    for i, picture in zip(range(len(masks)), pictures, strict=True):
        x, y = (int(v) for v in origins[i])
        mask[i] = masks[i, y : y + height, x : x + width]
        if whole and picture is not None:
            rgb[i] = picture.window((x, y), (width, height))
            continue
        u, v, w, h = cv2.boundingRect(mask[i].view(np.uint8))
        if not w or picture is None:
            continue
        # Only the animal's box and its margin are converted. The rest stays white.
        u0, v0, u1, v1 = max(0, u - MARGIN), max(0, v - MARGIN), min(width, u + w + MARGIN), min(height, v + h + MARGIN)
        keep = cv2.dilate(mask[i, v0:v1, u0:u1].view(np.uint8), near)
        colour = picture.window((x + u0, y + v0), (u1 - u0, v1 - v0))
        cv2.copyTo(colour, keep, rgb[i, v0:v1, u0:u1])
