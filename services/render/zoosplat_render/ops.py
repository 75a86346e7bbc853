"""Views round the animal and Gaussians as PLY: arrays in, arrays or bytes out."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

FILL = 0.6  # of the picture's shorter side that the animal's sphere takes
ELEVATION_RAD = math.radians(25)
SEEN = 0.98  # share of the opacity inside the animal's sphere
SH_C0 = 0.28209479177387814  # the constant spherical harmonic: 1 / (2 sqrt(pi))
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
    last = min(int(np.searchsorted(np.cumsum(weights[order]), SEEN)), len(order) - 1)
    return center, max(float(distances[order[last]]), 1e-6)


def look_at(eye: Values, target: Values) -> Values:
    """World-to-camera [4, 4] of an upright camera at `eye` [3] that sees `target` [3] in its middle, +z upwards."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ eye
    return pose


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
    properties = "".join(f"property float {name}\n" for name in PLY_PROPERTIES)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(means)}\n{properties}end_header\n"
    return header.encode() + np.concatenate(columns, axis=1).astype("<f4").tobytes()
