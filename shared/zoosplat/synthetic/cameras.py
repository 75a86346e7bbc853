"""Rigs of synthetic cameras."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zoosplat.geometry.rotations import level_camera
from zoosplat.synthetic.solids import Floats


def ring_of_cameras(
    n: int,
    radius_m: float,
    height_m: float | Sequence[float],
    *,
    focal_px: float = 400.0,
    width: int = 288,
    height: int = 256,
    target: Sequence[float] = (0.0, 0.0, 0.0),
) -> tuple[Floats, Floats, Floats]:
    """Level cameras that stand evenly on a circle about the vertical through `target` and look at it.

    Args:
        n: number of cameras. Camera i stands at azimuth 2 pi i / n.
        radius_m: radius of the circle.
        height_m: height above the target, one number or one of each camera.
        focal_px: focal length.
        width: of the pictures, pixels.
        height: of the pictures, pixels.
        target: [3] metres. It projects to ((width - 1) / 2, (height - 1) / 2), the centre of the picture.

    Returns:
        K [n, 3, 3], R [n, 3, 3] and t [n, 3] float64: x_cam = R x_world + t with OpenCV axes, calibration pixels.
    """
    azimuth = 2 * np.pi * np.arange(n) / n
    offset = np.stack(
        [radius_m * np.cos(azimuth), radius_m * np.sin(azimuth), np.broadcast_to(np.asarray(height_m, float), (n,))], 1
    )
    rotation = level_camera(-offset)
    translation = -np.einsum("cij,cj->ci", rotation, offset + np.asarray(target, float))
    intrinsic = np.array([[focal_px, 0, (width - 1) / 2], [0, focal_px, (height - 1) / 2], [0, 0, 1]])
    return np.tile(intrinsic, (n, 1, 1)), rotation, translation
