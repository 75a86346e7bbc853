"""Bounding boxes of masks, and the version of the decoder."""

from __future__ import annotations

import av
import cv2
import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]


def boxes(masks: Bool) -> npt.NDArray[np.int32]:
    """Bounding boxes of masks [n, C, h, w]: [n, C, 4] int32 x0, y0, x1, y1 (exclusive), zeros where empty."""
    out = np.zeros((*masks.shape[:2], 4), np.int32)
    for index in np.ndindex(*masks.shape[:2]):
        x, y, w, h = cv2.boundingRect(masks[index].view(np.uint8))
        out[index] = (x, y, x + w, y + h)
    return out


def decoder_version() -> str:
    """Version of FFmpeg's libavcodec, which decodes the videos."""
    return ".".join(str(v) for v in av.library_versions["libavcodec"])
