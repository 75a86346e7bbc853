"""The views of a frame, the voxel grid in the animal's frame, and the projection of points into the views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN_WEIGHT = 0.25  # weight in a voxel's colour of a view in which another voxel is in front of it

OCCLUDED_WEIGHT = 0.02  # weight in a Gaussian's sampled colour of a view in which something is in front of it


class ObservedViews(NamedTuple):
    """The V observed views of a frame.

    Attributes:
        rgb: [V, h, w, 3] 0 to 1.
        mask: [V, h, w] 0 or 1.
        world_to_camera: [V, 4, 4] from the frame of reference of the points, which is the animal's for a network.
        intrinsics: [V, 3, 3] calibration pixels.
    """

    rgb: Tensor
    mask: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor


def grid_points(ell_m: float, grid_size: int, volume_idx: Sequence[tuple[int, int]]) -> Tensor:
    """The cropped grid in the animal's frame, [n1, n2, n3, 3] float32 metres.

    Args:
        ell_m: edge of the cubic grid, whose points are `linspace(-ell / 2, ell / 2, grid_size)` on each axis.
        grid_size: points along an edge.
        volume_idx: (start, stop) of the points that are kept along x, y, z.
    """
    axis = torch.linspace(-ell_m / 2, ell_m / 2, grid_size, dtype=torch.float64)
    kept = [axis[start:stop] for start, stop in volume_idx]
    return torch.stack(torch.meshgrid(*kept, indexing="ij"), -1).float()


def project(points: Tensor, world_to_camera: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project world points into V views.

    Args:
        points: [3, N] metres.
        world_to_camera: [V, 4, 4].
        intrinsics: [V, 3, 3] calibration pixels.

    Returns:
        x and y (calibration pixels) and depth (metres), [V, N] each. Where the depth is not above 0, x and y mean
        nothing.
    """
    matrices = intrinsics @ world_to_camera[:, :3]
    rows = matrices.reshape(-1, 4)
    if points.is_cuda:  # cuBLAS takes a millisecond for a product of this shape
        in_image = rows[:, 0, None] * points[0] + rows[:, 3, None]
        in_image = torch.addcmul(torch.addcmul(in_image, rows[:, 1, None], points[1]), rows[:, 2, None], points[2])
    else:
        in_image = rows[:, :3] @ points + rows[:, 3:]
    in_image = in_image.view(len(matrices), 3, -1)
    depth = in_image[:, 2]
    inverse = depth.clamp_min(1e-9).reciprocal()
    return in_image[:, 0] * inverse, in_image[:, 1] * inverse, depth


def projection_matrices(views: ObservedViews) -> Tensor:
    """The [V, 3, 4] matrices from the world to homogeneous pixels, without cuBLAS, which takes longer."""
    return (views.intrinsics[:, :, :, None] * views.world_to_camera[:, None, :3]).sum(2)
