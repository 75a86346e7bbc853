"""Rotations as matrices and quaternions; every quaternion is (w, x, y, z), as in gsplat and 3D Gaussian Splatting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotation_about_z(angle: Tensor) -> Tensor:
    """The [3, 3] rotation by `angle` ([] radians) about +z, which takes the animal's frame to the world's axes."""
    c, s, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1]).reshape(3, 3)


def animal_to_world(angle: Tensor, tilt: Tensor | None) -> Tensor:
    """The [3, 3] rotation from the animal's frame to the world's axes: first the tilt, then the turn about +z.

    Args:
        angle: [] radians, the heading.
        tilt: [4] quaternion; None means no tilt.
    """
    turn = rotation_about_z(angle)
    return turn if tilt is None else turn @ rotation_matrices(tilt[None])[0]


def rotation_matrices(quats: Tensor) -> Tensor:
    """Rotation matrices [N, 3, 3] of quaternions [N, 4] of any length but zero."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, -1).view(-1, 3, 3)


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """The Hamilton product [..., 4] of quaternions, which is the rotation `b` followed by the rotation `a`."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


def rotate_vectors(quats: Tensor, vectors: Tensor) -> Tensor:
    """Vectors [N, 3] rotated by quaternions [N, 4] of any length but zero."""
    unit = F.normalize(quats, dim=-1)
    zero = torch.zeros_like(vectors[:, :1])
    conjugate = unit * unit.new_tensor([1.0, -1, -1, -1])
    return quaternion_product(quaternion_product(unit, torch.cat([zero, vectors], 1)), conjugate)[:, 1:]
