"""Carving in plain PyTorch, for the CPU and for GPUs without Triton; `zoosplat_model.carving` documents it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model.carving.geometry import HIDDEN_WEIGHT, OCCLUDED_WEIGHT, ObservedViews, project
from zoosplat_model.carving.window_minimum import window_minimum


def _pixels(x: Tensor, y: Tensor, depth: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Whether projected points [V, N] lie in the window of h x w pixels, and the flat index of their nearest pixel."""
    in_window = (depth > 0) & (x >= -0.5) & (x < w - 0.5) & (y >= -0.5) & (y < h - 0.5)
    column, row = (x + 0.5).clamp_(0, w - 1).int(), (y + 0.5).clamp_(0, h - 1).int()
    return in_window, (row * w + column).long()


def carve(
    views: ObservedViews, points: Tensor, voxel_size_m: float, footprint_px: int, fill_color: float, used: Tensor
) -> Tensor:
    """As `carving.carve`."""
    rgb, mask, world_to_camera, intrinsics = views
    n_views, h, w = mask.shape
    shape = points.shape[:3]
    half = footprint_px // 2
    used = used[:, None]
    x, y, depth = project(points.reshape(-1, 3).T, world_to_camera, intrinsics)
    in_window, nearest = _pixels(x, y, depth, h, w)

    kept: Tensor | None = None
    if not points.is_cuda:
        # From here on only the voxels that the larger hull can touch matter, a few percent of the grid.
        near = F.max_pool2d(mask[:, None], footprint_px + 2, stride=1, padding=half + 1)
        touched = (depth > 0) & (near.flatten(1).gather(1, nearest) > 0.5)
        kept = torch.nonzero((~used | touched).sum(0) >= n_views - 1)[:, 0]
        x, y, depth, nearest, in_window = (v[:, kept] for v in (x, y, depth, nearest, in_window))
    samples, covered = _sample(rgb, mask, x, y, footprint_px)
    in_front = used & (depth > 0)

    # The smallest and the second smallest coverage among the views that count are the occupancies of the two hulls.
    least = second = points.new_full(covered.shape[1:], torch.inf)
    for inside in torch.where(used, torch.where(depth > 0, covered, 0), torch.inf):
        least, second = torch.minimum(least, inside), torch.minimum(second, torch.maximum(least, inside))
    second = torch.where(second.isinf(), least, second)

    volume = points.new_zeros(8, len(least))
    for occupancy in (least, second):
        solid = in_window & (occupancy >= 0.5)
        front = _front(depth, nearest, solid, h, w, footprint_px)
        if occupancy is least:
            bare = in_window & used & (mask.flatten(1).gather(1, nearest) > 0.5) & front.isinf()
            volume[5] = torch.where(second > 0, bare.to(depth.dtype).sum(0) / used.sum(), 0)
        seen = depth <= front + voxel_size_m
        weight = torch.where(seen, 1.0, HIDDEN_WEIGHT) * in_front
        color = (weight[..., None] * samples).sum(0) / (weight * covered).sum(0).clamp_min(1e-6)[..., None]
        volume[0] += 0.5 * occupancy
        volume[1:4] += 0.5 * torch.where(occupancy > 0, color.T, fill_color)
        off = (samples / covered.clamp_min(1e-3)[..., None] - color).square().sum(-1)
        spread = (weight * covered * off).sum(0) / (weight * covered).sum(0).clamp_min(1e-6)
        volume[6] += 0.5 * torch.where(occupancy > 0, spread.sqrt(), 0)
        volume[7] += 0.5 * torch.where(occupancy > 0, (seen & in_front).to(depth.dtype).mean(0), 0)
    volume[4] = least
    if kept is None:
        return volume.view(8, *shape)

    whole = points.new_zeros(8, shape.numel())
    whole[1:4] = fill_color
    whole[:, kept] = volume
    return whole.view(8, *shape)


def prepare_silhouette_evidence(
    hull: Tensor, views: ObservedViews, points: Tensor, voxel_size_m: float, slope: float, middle: float, used: Tensor
) -> Callable[[Tensor], Tensor]:
    """As `carving.prepare_silhouette_evidence`."""
    _, mask, world_to_camera, intrinsics = views
    h, w = mask.shape[1:]
    inside = (hull > 0).flatten()
    kept = torch.arange(len(inside), device=points.device) if points.is_cuda else torch.nonzero(inside)[:, 0]
    x, y, depth = project(points.reshape(-1, 3)[kept].T, world_to_camera, intrinsics)
    in_window, nearest = _pixels(x, y, depth, h, w)
    counted = used[:, None] & in_window & inside[kept]
    on_animal = counted & (mask.flatten(1).gather(1, nearest) > 0.5)
    focal = (intrinsics[:, 0, 0] * intrinsics[:, 1, 1]).sqrt()[:, None]
    per_pixel = (world_to_camera[:, 2, 3, None] / (focal * voxel_size_m)).clamp(
        max=1
    )  # of the larger pixels that voxels are counted in
    column, row = (((v + 0.5).clamp(0, n - 1) * per_pixel).long() for v, n in ((x, w), (y, h)))
    cell = row * w + column
    size = (focal * voxel_size_m * per_pixel / depth.clamp_min(1e-9)).square()  # area of a voxel in these larger pixels
    tent = mask.new_tensor([0.25, 0.5, 0.25])
    window = (tent[:, None] * tent)[None, None]

    def evidence(occupancy: Tensor) -> Tensor:
        opacity = torch.sigmoid(slope * (occupancy.flatten()[kept] - middle))
        counts = mask.new_zeros(len(mask), h * w).scatter_add_(1, cell, counted * opacity)
        counts = F.conv2d(counts.view(-1, 1, h, w), window, padding=1).flatten(1)
        found = (on_animal / (counts.gather(1, cell) * size).clamp_min(1)).amax(0)
        return found.new_zeros(len(inside)).index_copy(0, kept, found).view(occupancy.shape)

    return evidence


def _front(depth: Tensor, nearest: Tensor, solid: Tensor, h: int, w: int, footprint_px: int) -> Tensor:
    """Depth [V, N] of the nearest solid point in the footprint around each point, whose pixel is `nearest` [V, N]."""
    buffer = depth.new_full((len(depth), h * w), torch.inf)
    buffer.scatter_reduce_(1, nearest, torch.where(solid, depth, torch.inf), "amin")
    front = window_minimum(buffer.view(-1, h, w), footprint_px)
    return front.flatten(1).gather(1, nearest)


def sample_colors(
    views: ObservedViews, points: Tensor, solid: Tensor, voxel_size_m: float, footprint_px: int, used: Tensor
) -> tuple[Tensor, Tensor]:
    """As `carving.sample_colors`."""
    rgb, mask, world_to_camera, intrinsics = views
    h, w = mask.shape[1:]
    x, y, depth = project(points.T, world_to_camera, intrinsics)
    in_window, nearest = _pixels(x, y, depth, h, w)
    samples, covered = _sample(rgb, mask, x, y, 1)
    front = _front(depth, nearest, in_window & solid, h, w, footprint_px)
    weight = torch.where(depth <= front + 2 * voxel_size_m, 1.0, OCCLUDED_WEIGHT) * (in_window & used[:, None])
    total = (weight * covered).sum(0)
    return (weight[..., None] * samples).sum(0) / total.clamp_min(1e-6)[:, None], total > 0.01


def _sample(rgb: Tensor, mask: Tensor, x: Tensor, y: Tensor, footprint_px: int) -> tuple[Tensor, Tensor]:
    """Picture times mask [V, N, 3], and mask [V, N], at places [V, N]: means over footprints, bilinear, 0 outside."""
    h, w = mask.shape[1:]
    layers = torch.cat([rgb * mask[..., None], mask[..., None]], -1).permute(0, 3, 1, 2)
    if footprint_px > 1:
        layers = F.avg_pool2d(layers, footprint_px, stride=1, padding=footprint_px // 2)
    # With align_corners, -1 and 1 are the centres of the first and the last pixel.
    place = torch.stack([x * (2 / max(w - 1, 1)) - 1, y * (2 / max(h - 1, 1)) - 1], -1)
    found = F.grid_sample(layers, place[:, :, None], mode="bilinear", padding_mode="zeros", align_corners=True)
    found = found[..., 0].mT
    return found[..., :3], found[..., 3]
