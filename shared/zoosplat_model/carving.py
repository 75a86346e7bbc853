"""Space carving: a frame's masks and pictures to a coloured volume in the animal's frame (arXiv 2505.18342).

All cameras here are in calibration pixels: the centre of the top-left pixel is (0, 0), as in the rasteriser.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN_WEIGHT = 0.25  # in a voxel's colour, of a view in which another voxel is in front of it


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


def rotation_about_z(angle: Tensor) -> Tensor:
    """[3, 3] rotation by `angle` [] radians about +z: from the animal's frame to the world's axes."""
    c, s, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1]).reshape(3, 3)


def project(points: Tensor, world_to_camera: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project [3, N] world points into V views: x, y (pixels) and depth, [V, N] each; no x, y at depth <= 0."""
    matrices = intrinsics @ world_to_camera[:, :3]
    in_image = (matrices[:, :, :3].reshape(-1, 3) @ points).view(len(matrices), 3, -1) + matrices[:, :, 3:]
    depth = in_image[:, 2]
    inverse = depth.clamp_min(1e-9).reciprocal()
    return in_image[:, 0] * inverse, in_image[:, 1] * inverse, depth


def carve(
    rgb: Tensor,  # [V, h, w, 3] float32, 0 to 1
    mask: Tensor,  # [V, h, w] float32, 0 or 1
    world_to_camera: Tensor,  # [V, 4, 4]
    intrinsics: Tensor,  # [V, 3, 3]
    points: Tensor,  # [n1, n2, n3, 3] world, metres
    voxel_size_m: float,
    footprint_px: int,
    fill_color: float,
) -> Tensor:
    """Carve the V given views. The mean of two coloured hulls: of the voxels inside all masks, and inside all but one.

    A voxel is inside a mask if the mask is set at the pixel nearest to its projection. A view sees an occupied voxel
    if no occupied voxel is more than one voxel nearer there; each covers `footprint_px` x `footprint_px` pixels, so
    that nothing shows through between voxels that are coarser than pixels. A voxel's colour is the weighted mean of
    the pictures at its projection, bilinear and within the mask only, with weight 1 where it is seen and 0.25 where
    it is hidden. Unlike in the paper, a view that has the voxel outside its mask has no weight: it shows background.

    Returns:
        [4, n1, n2, n3] float32: occupancy (0, 0.5 or 1), red, green, blue (`fill_color` where empty).
    """
    n_views, h, w = mask.shape
    shape = points.shape[:3]
    x, y, depth = project(points.reshape(-1, 3).T, world_to_camera, intrinsics)
    in_window = (depth > 0) & (x >= -0.5) & (x < w - 0.5) & (y >= -0.5) & (y < h - 0.5)
    column, row = (x + 0.5).clamp_(0, w - 1).int(), (y + 0.5).clamp_(0, h - 1).int()
    nearest = (row * w + column).long()
    inside = in_window & (mask.flatten(1).gather(1, nearest) > 0.5)
    votes = inside.sum(0)
    fewest = max(1, n_views - 1)

    # From here on only voxels of the larger hull matter: a few percent of the grid.
    kept = torch.nonzero(votes >= fewest)[:, 0]
    votes = votes[kept]
    depth, nearest, inside, in_window = depth[:, kept], nearest[:, kept], inside[:, kept], in_window[:, kept]
    samples, weight = _sample(rgb, mask, torch.stack([x[:, kept], y[:, kept]], -1))

    volume = points.new_zeros(4, votes.shape[0])
    for least in (n_views, fewest):
        occupied = votes >= least
        buffer = points.new_full((n_views, h * w), torch.inf)
        buffer.scatter_reduce_(1, nearest, torch.where(in_window & occupied, depth, torch.inf), "amin")
        front = -F.max_pool2d(-buffer.view(n_views, 1, h, w), footprint_px, stride=1, padding=footprint_px // 2)
        seen = depth <= front.flatten(1).gather(1, nearest) + voxel_size_m
        w_view = torch.where(seen, 1.0, HIDDEN_WEIGHT) * inside
        color = (w_view[..., None] * samples).sum(0) / (w_view * weight).sum(0).clamp_min(1e-6)[..., None]
        hull = torch.cat([points.new_ones(votes.shape[0], 1), color], 1).T
        empty = points.new_tensor([0.0, fill_color, fill_color, fill_color])[:, None]
        volume += 0.5 * torch.where(occupied, hull, empty)

    whole = points.new_full((4, shape.numel()), fill_color)
    whole[0] = 0
    whole[:, kept] = volume
    return whole.view(4, *shape)


def _sample(rgb: Tensor, mask: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear samples of picture x mask [V, N, 3] and of the mask [V, N], zero outside the window."""
    h, w = mask.shape[1:]
    layers = torch.cat([rgb * mask[..., None], mask[..., None]], -1).permute(0, 3, 1, 2)
    # align_corners: -1 and 1 are the centres of the first and last pixel.
    place = 2 * pixels / pixels.new_tensor([max(w - 1, 1), max(h - 1, 1)]) - 1
    found = F.grid_sample(layers, place[:, :, None], mode="bilinear", padding_mode="zeros", align_corners=True)
    found = found[..., 0].mT
    return found[..., :3], found[..., 3]
