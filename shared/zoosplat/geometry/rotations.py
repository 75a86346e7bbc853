"""Unit vectors, rotation matrices, quaternions and level cameras, in NumPy. Quaternions are (w, x, y, z)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Length of the sum of two unit vectors below which they count as opposite. It lies far above rounding (1e-16).
OPPOSITE = 1e-9


def unit(v: FloatArray) -> FloatArray:
    """Vectors [..., n] float64 scaled to length 1."""
    return np.asarray(v / np.linalg.norm(v, axis=-1, keepdims=True), float)


def axis_angle(axis: Sequence[float], angle_rad: float) -> FloatArray:
    """Rotation [3, 3] float64 by an angle about an axis of any length (Rodrigues' formula)."""
    x, y, z = unit(np.asarray(axis, float))
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle_rad) * k + (1 - np.cos(angle_rad)) * k @ k, float)


def rotation_about_z(angle_rad: npt.ArrayLike) -> FloatArray:
    """Rotation matrices [..., 3, 3] float64 that turn x towards y by `angle_rad` [...]."""
    angle = np.asarray(angle_rad, dtype=np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    zero, one = np.zeros_like(angle), np.ones_like(angle)
    entries = np.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], axis=-1)
    return entries.reshape(*angle.shape, 3, 3)


def rotation_between(
    a: npt.ArrayLike,  # [3], not zero
    b: npt.ArrayLike,  # [3], not zero
) -> FloatArray:
    """The rotation [3, 3] float64 by the smallest angle that takes the direction of `a` to that of `b`.

    Opposite directions: half a turn about an axis perpendicular to `a` (which one is arbitrary but fixed).
    """
    start = np.asarray(a, dtype=np.float64) / np.linalg.norm(a)
    end = np.asarray(b, dtype=np.float64) / np.linalg.norm(b)
    middle = start + end
    if np.linalg.norm(middle) < OPPOSITE:
        middle = np.eye(3)[np.argmin(np.abs(start))]
        middle = middle - start * (start @ middle)
    middle = middle / np.linalg.norm(middle)
    # The product of half a turn about a and half a turn about the bisector is orthonormal. Rodrigues' formula would
    # divide by 1 + cos and lose digits.
    rotation: FloatArray = (2 * np.outer(middle, middle) - np.eye(3)) @ (2 * np.outer(start, start) - np.eye(3))
    return rotation


def matrix_from_quaternion(quaternion: npt.ArrayLike) -> FloatArray:
    """Rotation matrices [..., 3, 3] float64 of (w, x, y, z) quaternions [..., 4] of any length but 0."""
    q = np.asarray(quaternion, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    entries = np.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ],
        axis=-1,
    )
    return entries.reshape(*q.shape[:-1], 3, 3)


def level_camera(forward: npt.ArrayLike) -> FloatArray:
    """World-to-camera rotations [..., 3, 3] float64 of cameras that look along `forward` and are not rolled.

    Args:
        forward: [..., 3] viewing directions of any length, not vertical, in a world whose +z is up.

    Rows are the camera's OpenCV axes: right, which is horizontal, down and forward.
    """
    ahead = unit(np.asarray(forward, dtype=np.float64))
    right = unit(np.stack([ahead[..., 1], -ahead[..., 0], np.zeros(ahead.shape[:-1])], axis=-1))
    return np.stack([right, np.cross(ahead, right), ahead], axis=-2)


def look_at(
    eye: FloatArray,  # [3]
    target: FloatArray,  # [3]
) -> FloatArray:
    """World-to-camera matrix [4, 4] float64 of a level camera at `eye` that sees `target` in its middle.

    The camera must not be straight above or below the target, in a world whose +z is up.
    """
    rotation = level_camera(target - eye)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ eye
    return pose
