"""Which voxels of a refined volume become Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from zoosplat_model.carving.window_minimum import window_minimum

MIN_OCCUPANCY = 0.25  # occupancy above which a voxel is selected
SOLID_OCCUPANCY = 0.75  # occupancy above which a voxel hides what is behind it
SURFACE_DEPTH = 2  # voxels; nobody sees a voxel that has this many solid ones on every side
INTERIOR_OCCUPANCY = MIN_OCCUPANCY * 1.001  # a little above the limit, so that interior voxels are selected last


def select_voxels(occupancy: Tensor, fewest: int, most: int) -> tuple[Tensor, Tensor]:
    """Choose the voxels that become Gaussians: those with an occupancy above 0.25.

    If these are fewer than `fewest` or more than `most`, that many of the highest occupancy are chosen instead (all,
    where the volume has fewer). On a GPU the indices are always `most`, so that nothing waits for the device and shapes
    never change; elsewhere they are only those that are drawn.

    Args:
        occupancy: [N] any real numbers.

    Returns:
        Indices [M] by falling occupancy, and which of them [M] bool are drawn.
    """
    most = min(most, occupancy.numel())
    if not occupancy.is_cuda:
        most = min(max(int((occupancy > MIN_OCCUPANCY).sum()), fewest), most)
    values, indices = torch.topk(occupancy, most)
    return indices, (values > MIN_OCCUPANCY) | (torch.arange(most, device=values.device) < fewest)


def suppress_interior(occupancy: Tensor) -> Tensor:
    """Occupancy [n1, n2, n3], flattened to [N], in which voxels deep inside the animal are at the limit of selection.

    Where there are more voxels than Gaussians, `select_voxels` then leaves out the voxels that nobody sees.
    """
    deep = window_minimum(occupancy, 2 * SURFACE_DEPTH + 1, (-1, -2, -3)) > SOLID_OCCUPANCY
    return torch.where(deep, INTERIOR_OCCUPANCY, occupancy).flatten()
