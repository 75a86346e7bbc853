"""Cameras on a circle that look at the origin from a little above."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from zoosplat.geometry.cameras import Cameras

DISTANCE = 0.6  # metres
HEIGHT = 0.2  # metres
FOCAL = 1.2  # of the picture's width


def make_cameras(n: int, size: tuple[int, int], distortion: npt.NDArray[np.float64] | None = None) -> Cameras:
    """n cameras with pictures of so many pixels."""
    width, height = size
    rotation, translation = np.zeros((n, 3, 3)), np.zeros((n, 3))
    for c in range(n):
        angle = 2 * np.pi * c / n + 0.3
        center = np.array([DISTANCE * np.cos(angle), DISTANCE * np.sin(angle), HEIGHT])
        forward = -center / np.linalg.norm(center)
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        rotation[c] = right, np.cross(forward, right), forward
        translation[c] = -rotation[c] @ center
    focal = FOCAL * width
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    lenses = np.zeros((n, 5)) if distortion is None else distortion
    names = tuple(f"camera{c}" for c in range(n))
    return Cameras(names, np.tile(intrinsics, (n, 1, 1)), rotation, translation, lenses)
