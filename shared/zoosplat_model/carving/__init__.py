"""Space carving: a frame's masks and pictures to a coloured volume in the animal's frame (arXiv 2505.18342).

All cameras here are in calibration pixels: the centre of the top-left pixel is (0, 0), as in the rasteriser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model.carving import triton_kernels

HIDDEN_WEIGHT = 0.25  # in a voxel's colour, of a view in which another voxel is in front of it

BEHIND_WEIGHT = 0.02  # the same, in the colour that is looked up for a Gaussian


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
    rows = matrices.reshape(-1, 4)
    if points.is_cuda:  # cuBLAS takes a millisecond for such a product
        in_image = rows[:, 0, None] * points[0] + rows[:, 3, None]
        in_image = torch.addcmul(torch.addcmul(in_image, rows[:, 1, None], points[1]), rows[:, 2, None], points[2])
    else:
        in_image = rows[:, :3] @ points + rows[:, 3:]
    in_image = in_image.view(len(matrices), 3, -1)
    depth = in_image[:, 2]
    inverse = depth.clamp_min(1e-9).reciprocal()
    return in_image[:, 0] * inverse, in_image[:, 1] * inverse, depth


def _pixels(x: Tensor, y: Tensor, depth: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Which projected points [V, N] lie in the h x w window, and the index of each one's nearest pixel there."""
    in_window = (depth > 0) & (x >= -0.5) & (x < w - 0.5) & (y >= -0.5) & (y < h - 0.5)
    column, row = (x + 0.5).clamp_(0, w - 1).int(), (y + 0.5).clamp_(0, h - 1).int()
    return in_window, (row * w + column).long()


def _matrices(world_to_camera: Tensor, intrinsics: Tensor) -> Tensor:
    """[V, 3, 4] from the world to pixels, as the kernels want them: cuBLAS would take longer."""
    return (intrinsics[:, :, :, None] * world_to_camera[:, None, :3]).sum(2)


def carve(
    rgb: Tensor,  # [V, h, w, 3] float32, 0 to 1
    mask: Tensor,  # [V, h, w] float32, 0 or 1
    world_to_camera: Tensor,  # [V, 4, 4]
    intrinsics: Tensor,  # [V, 3, 3]
    points: Tensor,  # [n1, n2, n3, 3] world, metres
    voxel_size_m: float,
    footprint_px: int,
    fill_color: float,
    used: Tensor | None = None,  # [V] bool
) -> Tensor:
    """Carve the V given views. The mean of two coloured hulls: of what is inside all masks, and inside all but one.

    `used` names those that count, at least one; default: all. On a GPU nothing waits for the device, and all shapes
    are the same for every frame, so that carving can be part of a CUDA graph.

    A voxel covers `footprint_px` x `footprint_px` pixels round its projection; all samples are means over these, so
    that the surface is known to a fraction of a voxel and colours are not aliased. Its occupancy is the part that lies
    inside the mask, in the view where that is least (second least for the larger hull); the paper's is that of the
    centre alone, 0 or 1. From 0.5 on it hides what is behind it. A view sees a voxel if no occupied voxel is more than
    one voxel nearer there. Its colour is the weighted mean of the pictures within the masks, with weight 1 where it
    is seen and 0.25 where it is hidden. So, unlike in the paper, a view that has the voxel outside its mask has no
    weight: it shows background.

    Four more channels say what the mean of the two hulls hides: the occupancy of the smaller one (that of the larger
    follows), in how many views the voxel lies on animal that the smaller one does not cover (the sign that a mask is
    wrong, where masks disagree), how far the views' colours are from each other (the sign of a voxel that no view
    really sees), and how many see it.

    Returns:
        [8, n1, n2, n3] float32: occupancy 0 to 1, red, green, blue (`fill_color` where empty); occupancy of the smaller
        hull, share of the views in which the voxel lies on animal that hull leaves bare, root of the mean squared
        distance of the views' colours from their mean, share of all views that see the voxel (all three 0 where empty).
    """
    n_views, h, w = mask.shape
    shape = points.shape[:3]
    half = footprint_px // 2
    used = mask.new_ones(n_views, dtype=torch.bool) if used is None else used
    if triton_kernels.takes(points):
        matrices = _matrices(world_to_camera, intrinsics)
        return triton_kernels.carve(
            rgb, mask, matrices, points, voxel_size_m, footprint_px, fill_color, HIDDEN_WEIGHT, used
        )
    used = used[:, None]
    x, y, depth = project(points.reshape(-1, 3).T, world_to_camera, intrinsics)
    in_window, nearest = _pixels(x, y, depth, h, w)

    kept: Tensor | None = None
    if not points.is_cuda:
        # Only voxels that can be touched by the larger hull matter from here on: a few percent of the grid.
        near = F.max_pool2d(mask[:, None], footprint_px + 2, stride=1, padding=half + 1)
        touched = (depth > 0) & (near.flatten(1).gather(1, nearest) > 0.5)
        kept = torch.nonzero((~used | touched).sum(0) >= n_views - 1)[:, 0]
        x, y, depth, nearest, in_window = (v[:, kept] for v in (x, y, depth, nearest, in_window))
    samples, covered = _sample(rgb, mask, x, y, footprint_px)
    in_front = used & (depth > 0)

    # The least and the second least of the views that count.
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


def need(
    hull: Tensor,  # [n1, n2, n3] above 0 where there may be animal
    mask: Tensor,  # [V, h, w]
    world_to_camera: Tensor,  # [V, 4, 4]
    intrinsics: Tensor,  # [V, 3, 3]
    points: Tensor,  # [n1, n2, n3, 3] world, metres; its origin is about where the animal is
    voxel_size_m: float,
    slope: float,
    middle: float,
    used: Tensor | None = None,  # [V] bool
) -> Callable[[Tensor], Tensor]:
    """How much the masks of the V given views need a voxel: 1 / (animal on its line of sight, in voxels), at most 1.

    Where a mask shows animal, some voxel on the line of sight has to be it. So a voxel of a hull that is one voxel
    thick, in any view, is animal for sure, and so is one, if all others on its line have been taken away; of one amid
    twenty nothing is known. No network finds that out by itself: it would have to know where the cameras are.

    Voxels count with sigmoid(slope (occupancy - middle)). In each view they are counted in pixels of a voxel's size at
    the animal, and what is on a line is a mean over nine of these (tent weights 1 2 1 each way).

    Returns:
        A function of occupancies [n1, n2, n3], any real numbers, to be asked as often as these change. It gives
        [n1, n2, n3] float32, the most of all `used` views (default: all) that have animal in their mask there; 0
        outside the hull.
    """
    used = mask.new_ones(len(mask), dtype=torch.bool) if used is None else used
    if triton_kernels.takes(points):
        matrices = _matrices(world_to_camera, intrinsics)
        return triton_kernels.need(hull, mask, matrices, intrinsics, points, voxel_size_m, slope, middle, used)
    h, w = mask.shape[1:]
    inside = (hull > 0).flatten()
    kept = torch.arange(len(inside), device=points.device) if points.is_cuda else torch.nonzero(inside)[:, 0]
    x, y, depth = project(points.reshape(-1, 3)[kept].T, world_to_camera, intrinsics)
    in_window, nearest = _pixels(x, y, depth, h, w)
    counted = used[:, None] & in_window & inside[kept]
    on_animal = counted & (mask.flatten(1).gather(1, nearest) > 0.5)
    focal = (intrinsics[:, 0, 0] * intrinsics[:, 1, 1]).sqrt()[:, None]
    per_pixel = (world_to_camera[:, 2, 3, None] / (focal * voxel_size_m)).clamp(max=1)  # of the larger pixels
    column, row = (((v + 0.5).clamp(0, n - 1) * per_pixel).long() for v, n in ((x, w), (y, h)))
    cell = row * w + column
    size = (focal * voxel_size_m * per_pixel / depth.clamp_min(1e-9)).square()  # of a voxel, in those
    tent = mask.new_tensor([0.25, 0.5, 0.25])
    window = (tent[:, None] * tent)[None, None]

    def needed(occupancy: Tensor) -> Tensor:
        opacity = torch.sigmoid(slope * (occupancy.flatten()[kept] - middle))
        counts = mask.new_zeros(len(mask), h * w).scatter_add_(1, cell, counted * opacity)
        counts = F.conv2d(counts.view(-1, 1, h, w), window, padding=1).flatten(1)
        found = (on_animal / (counts.gather(1, cell) * size).clamp_min(1)).amax(0)
        return found.new_zeros(len(inside)).index_copy(0, kept, found).view(occupancy.shape)

    return needed


def _front(depth: Tensor, nearest: Tensor, solid: Tensor, h: int, w: int, footprint_px: int) -> Tensor:
    """Depth [V, N] of the nearest solid point in the picture round each point; its pixel is `nearest` [V, N]."""
    buffer = depth.new_full((len(depth), h * w), torch.inf)
    buffer.scatter_reduce_(1, nearest, torch.where(solid, depth, torch.inf), "amin")
    front = triton_kernels.least_around(buffer.view(-1, h, w), footprint_px)
    return front.flatten(1).gather(1, nearest)


def look_up(
    rgb: Tensor,  # [V, h, w, 3]
    mask: Tensor,  # [V, h, w]
    world_to_camera: Tensor,  # [V, 4, 4]
    intrinsics: Tensor,  # [V, 3, 3]
    points: Tensor,  # [N, 3] world, metres
    solid: Tensor,  # [N] bool
    voxel_size_m: float,
    footprint_px: int,
    used: Tensor | None = None,  # [V] bool
) -> tuple[Tensor, Tensor]:
    """Colours [N, 3] of points as the views see them, and whether any does [N] bool.

    Solid points hide what lies more than two voxels behind them in the pictures of a voxel.
    """
    used = mask.new_ones(len(mask), dtype=torch.bool) if used is None else used
    if triton_kernels.takes(points):
        matrices = _matrices(world_to_camera, intrinsics)
        return triton_kernels.look_up(
            rgb, mask, matrices, points, solid, voxel_size_m, footprint_px, BEHIND_WEIGHT, used
        )
    h, w = mask.shape[1:]
    x, y, depth = project(points.T, world_to_camera, intrinsics)
    in_window, nearest = _pixels(x, y, depth, h, w)
    samples, covered = _sample(rgb, mask, x, y, 1)
    front = _front(depth, nearest, in_window & solid, h, w, footprint_px)
    weight = torch.where(depth <= front + 2 * voxel_size_m, 1.0, BEHIND_WEIGHT) * (in_window & used[:, None])
    total = (weight * covered).sum(0)
    return (weight[..., None] * samples).sum(0) / total.clamp_min(1e-6)[:, None], total > 0.01


def _sample(rgb: Tensor, mask: Tensor, x: Tensor, y: Tensor, footprint_px: int) -> tuple[Tensor, Tensor]:
    """Picture x mask [V, N, 3] and mask [V, N] at [V, N] pixels: bilinear, means over footprints, 0 outside."""
    h, w = mask.shape[1:]
    layers = torch.cat([rgb * mask[..., None], mask[..., None]], -1).permute(0, 3, 1, 2)
    if footprint_px > 1:
        layers = F.avg_pool2d(layers, footprint_px, stride=1, padding=footprint_px // 2)
    # align_corners: -1 and 1 are the centres of the first and last pixel.
    place = torch.stack([x * (2 / max(w - 1, 1)) - 1, y * (2 / max(h - 1, 1)) - 1], -1)
    found = F.grid_sample(layers, place[:, :, None], mode="bilinear", padding_mode="zeros", align_corners=True)
    found = found[..., 0].mT
    return found[..., :3], found[..., 3]
