"""Views round the animal, paths drawn into pictures, and Gaussians as PLY files."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.formats import media, ply
from zoosplat.geometry.rotations import look_at
from zoosplat.geometry.spherical_harmonics import SH_C0

Values = npt.NDArray[np.float64]

FILL = 0.6  # share of the picture's shorter side that the animal's sphere takes
ELEVATION_RAD = math.radians(25)  # elevation of an orbit's cameras above the sphere's centre
SPHERE_OPACITY = 0.98  # share of the opacity inside the animal's sphere
PLY_PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)


def bounding_sphere(
    means: Values,  # [N, 3] metres
    opacities: Values,  # [N]
) -> tuple[Values, float]:
    """Centre [3] and radius (metres) of a sphere that holds 98% of the opacity, about the opacity's mean position."""
    weights = opacities / opacities.sum()
    center = weights @ means
    distances = np.linalg.norm(means - center, axis=1)
    order = np.argsort(distances, kind="stable")
    # Rounding may leave the sum of all weights below any share close to 1.
    last = min(int(np.searchsorted(np.cumsum(weights[order]), SPHERE_OPACITY)), len(order) - 1)
    return center, max(float(distances[order[last]]), 1e-6)


def orbit(
    center: Values, radius_m: float, distance_m: float, first_rad: float, count: int, width: int, height: int
) -> tuple[Values, Values]:
    """Views of one turn about the vertical through a sphere's centre, from 25 degrees above.

    Args:
        center: [3] metres.
        radius_m: of the sphere; its outline takes 60% of the picture's shorter side.
        distance_m: of the cameras from the centre; at least 1.5 radii are kept.
        first_rad: direction from the centre to the first camera, about +z.
        count: views, evenly spaced; the turn is counter-clockwise from above.
        width: of the pictures, pixels.
        height: likewise.

    Returns:
        World-to-camera [count, 4, 4], and intrinsics [3, 3] that all share, centre of the top-left pixel at (0, 0).
    """
    distance = max(distance_m, 1.5 * radius_m)
    azimuths = first_rad + 2 * np.pi * np.arange(count) / count
    level, up = math.cos(ELEVATION_RAD), math.sin(ELEVATION_RAD)
    directions = np.stack([level * np.cos(azimuths), level * np.sin(azimuths), np.full(count, up)], axis=1)
    poses = np.stack([look_at(center + distance * d, center) for d in directions])
    # A sphere's outline is seen under asin(r / D), whose tangent is r / sqrt(D^2 - r^2).
    focal = FILL * min(width, height) / 2 * math.sqrt(distance**2 - radius_m**2) / radius_m
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    return poses, intrinsics


def to_ply(
    means: Values,  # [N, 3]
    quats: Values,  # [N, 4]
    scales: Values,  # [N, 3]
    opacities: Values,  # [N]
    colors: Values,  # [N, 3]
) -> bytes:
    """Gaussians as the PLY file of 3DGS (Kerbl 2023), which common viewers open.

    Binary, little endian, float32: position, normal (0), colour as the constant spherical harmonic
    `(c - 0.5) / 0.28209`, opacity as logit, scales as natural logarithms, orientation as unit (w, x, y, z).
    """
    opacity = np.clip(opacities, 1e-6, 1 - 1e-6)
    columns = [
        means,
        np.zeros_like(means),
        (colors - 0.5) / SH_C0,
        np.log(opacity / (1 - opacity))[:, None],
        np.log(np.maximum(scales, 1e-12)),
        quats / np.linalg.norm(quats, axis=1, keepdims=True),
    ]
    return ply.encode(dict(zip(PLY_PROPERTIES, np.concatenate(columns, axis=1).T, strict=True)))


def on_mask(pixels: Values, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Indices of the `pixels` [n, 2] (x, y; NaN: nowhere) that lie on a mask [h, w]."""
    x, y = np.rint(np.nan_to_num(pixels, nan=-1)).astype(int).T
    inside = (x >= 0) & (x < mask.shape[1]) & (y >= 0) & (y < mask.shape[0])
    found: npt.NDArray[np.intp] = np.flatnonzero(inside)[mask[y[inside], x[inside]]]
    return found


def draw_tracks(picture: media.Picture, pixels: Values) -> media.Picture:
    """A picture [h, w, 3] with the paths of n points over F times, from blue (first) to red (last), their ends dotted.

    Args:
        pixels: [F, n, 2] x, y; NaN where a point is not in front of the camera.
    """
    shift = 4  # OpenCV takes coordinates in fractions of 2^-4 pixels
    drawn = np.array(picture, order="C")
    colors = cv2.applyColorMap(np.linspace(0, 255, len(pixels)).astype(np.uint8)[:, None], cv2.COLORMAP_TURBO)[
        :, 0, ::-1
    ]
    fixed = np.rint(np.nan_to_num(pixels, nan=-1e4).clip(-1e4, 1e4) * 2**shift).astype(int)
    for before, after, color in zip(fixed[:-1], fixed[1:], colors[1:].tolist(), strict=True):
        for a, b in zip(before.tolist(), after.tolist(), strict=True):
            cv2.line(drawn, a, b, color, 1, cv2.LINE_AA, shift)
    for place in fixed[-1].tolist():
        cv2.circle(drawn, place, 2 << shift, colors[-1].tolist(), -1, cv2.LINE_AA, shift)
    return drawn
