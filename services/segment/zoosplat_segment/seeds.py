"""Keypoints as seeds of masks: round a confident keypoint there is animal."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zoosplat_segment.windows import Window

CONFIDENT = 0.6  # confidence from which a keypoint counts; `pcutoff` of DeepLabCut
DISC = 0.015  # diameter of the disc round a keypoint, of the picture's longer edge


def seed(mask: Tensor, keypoints: npt.NDArray[np.float32], window: Window, size: tuple[int, int]) -> Tensor:
    """A mask that is 1 in discs round the confident keypoints of its view, and as it was elsewhere.

    Args:
        mask: [h, w] 0 to 1, a soft mask, or what the other views tell, in a window.
        keypoints: [K, 3] x, y in pixels of the whole picture as the camera saw it, and confidence; NaN: not told.
        window: where the mask lies in the picture.
        size: width and height of the picture, pixels.

    Returns:
        [h, w].
    """
    with np.errstate(invalid="ignore"):
        chosen = keypoints[np.isfinite(keypoints).all(-1) & (keypoints[:, 2] >= CONFIDENT)]
    if not len(chosen):
        return mask
    discs = np.zeros((window.height, window.width), np.uint8)
    radius = max(1, round(DISC * max(size) / 2 / window.scale))
    places = (chosen[:, :2] - (window.x, window.y) + 0.5) / window.scale - 0.5
    # OpenCV draws at 32-bit integers only; what is far outside the window is not drawn.
    near = (np.abs(places) < 2 * max(discs.shape) + radius).all(-1)
    for x, y in np.rint(places[near]).astype(int).tolist():
        cv2.circle(discs, (x, y), radius, 1, cv2.FILLED)
    return torch.maximum(mask, torch.from_numpy(discs).to(mask))
