"""What the other views say of a view: soft masks carve a hull, and the hull is looked at from each camera.

Every voxel is given the masks' values at its places in the pictures. Where the animal is, all views are high; where any
view is low there is no animal, unless that view is wrong. For view c the hull is that of the other views, so that its
own errors do not confirm themselves: each voxel has the mean of the two lowest values among the others. 1 means that
all agree, 0.5 that one view says no, and 0 that two or more do. The largest value along a pixel's ray is the prior.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEWEST_VIEWS = 2  # views that must see a voxel of the hull
LOWEST = 2  # lowest values of a voxel that are averaged, where there are more views than that


def sample_views(masks: Tensor, pixels: Tensor, seen: Tensor, footprint: int) -> Tensor:
    """Values of soft masks at the places of voxels.

    Args:
        masks: [C, h, w] 0 to 1, of whole pictures or of windows of them.
        pixels: [C, N, 2] x, y of the voxels in the pixels of the masks.
        seen: [C, N] bool, whether the voxel lies in the whole picture; outside the window it is not animal.
        footprint: pixels that a voxel covers; a voxel has the largest value there, so that thin parts stay.

    Returns:
        [C, N]; NaN where a view does not see the voxel.
    """
    height, width = masks.shape[1:]
    if footprint > 1:
        odd = footprint | 1
        rows = F.max_pool2d(masks[:, None], (odd, 1), 1, (odd // 2, 0))
        masks = F.max_pool2d(rows, (1, odd), 1, (0, odd // 2))[:, 0]
    size = torch.tensor([width, height], dtype=pixels.dtype, device=pixels.device)
    grid = ((2 * pixels + 1) / size - 1).nan_to_num(-9.0)
    values = F.grid_sample(masks[:, None], grid[:, :, None], padding_mode="zeros", align_corners=False)[:, 0, :, 0]
    return torch.where(seen, values, torch.nan)


def leave_one_out(values: Tensor, trusted: Tensor) -> Tensor:
    """How sure the other views are of each voxel.

    Args:
        values: [C, N] of `sample_views`.
        trusted: [C] or [C, N] bool, the views that take part; the others get what all of these say.

    Returns:
        [C, N] 0 to 1; row c does not depend on values[c].
    """
    trusted = trusted if trusted.ndim == 2 else trusted[:, None]
    known = torch.where(trusted & ~values.isnan(), values, torch.inf)
    n_known = known.isfinite().sum(0)
    # The two lowest values of the others are found among the three lowest of all.
    first, second, third = (torch.full_like(values[0], torch.inf) for _ in range(3))
    for row in known:
        middle = torch.maximum(first, row)
        first = torch.minimum(first, row)
        high = torch.maximum(second, middle)
        second = torch.minimum(second, middle)
        third = torch.minimum(third, high)
    out = []
    for row in known:
        lowest = torch.where(row <= first, second, first)
        next_lowest = torch.where(row <= second, third, second)
        others = n_known - row.isfinite().to(n_known.dtype)
        sure = torch.where(others > LOWEST, (lowest + next_lowest) / 2, lowest)
        out.append(torch.where(others >= FEWEST_VIEWS, sure, torch.zeros_like(sure)))
    return torch.stack(out)


def all_views(values: Tensor, trusted: Tensor) -> Tensor:
    """[N] how sure the trusted views are together; see `leave_one_out`."""
    padded = torch.cat([values, torch.full_like(values[:1], torch.nan)])
    flag = torch.cat([trusted, torch.zeros_like(trusted[:1])])  # a view that does not take part hears all others
    return leave_one_out(padded, flag)[-1]


def look(volumes: Tensor, points: Tensor) -> Tensor:
    """The largest value of volumes along rays.

    Args:
        volumes: [C, D, H, W] over z, y, x, one a view.
        points: [C, h, w, S, 3] S places on every ray of a view, in the volume's own coordinates: x, y, z from -1 to 1
            between the centres of the outermost voxels; 0 is read outside.

    Returns:
        [C, h, w].
    """
    views, height, width, samples, _ = points.shape
    flat = points.view(views, 1, height * width, samples, 3)
    values = F.grid_sample(volumes[:, None], flat, padding_mode="zeros", align_corners=True)
    return values.amax(-1).view(views, height, width)


def ray_points(origin: Tensor, directions: Tensor, center: Tensor, half: float | Tensor, samples: int) -> Tensor:
    """Places along rays through a cube, in the cube's coordinates.

    Args:
        origin: [..., 3] of the rays, metres.
        directions: [..., 3] unit vectors.
        center: [..., 3] of the cube, metres.
        half: half the edge of the cube, metres; a number, or [..., 1].
        samples: places on every ray, from the nearest to the farthest depth at which the cube may be.

    Returns:
        [..., samples, 3] from -1 to 1 inside the cube.
    """
    from_center = origin - center
    middle = -(directions * from_center).sum(-1, keepdim=True)
    steps = torch.linspace(-1, 1, samples, device=directions.device, dtype=directions.dtype) * (3**0.5 * half)
    depth = middle + steps
    edge = half[..., None] if isinstance(half, Tensor) else half
    return (from_center[..., None, :] + depth[..., None] * directions[..., None, :]) / edge


def cube_voxels(grid: int, device: torch.device) -> Tensor:
    """[grid**3, 3] x, y, z from -1 to 1 of the voxels of a cube, in the order of a volume over z, y, x."""
    line = torch.linspace(-1, 1, grid, device=device)
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return torch.stack([x, y, z], -1).reshape(-1, 3)
