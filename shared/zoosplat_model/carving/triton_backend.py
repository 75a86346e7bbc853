"""Carving on a GPU with Triton kernels, in which a thread computes a voxel; this module launches them.

PyTorch's own functions would make about a hundred passes over arrays of all views of all voxels, although the animal
fills a few percent of them. All tensors are float32 on one CUDA device, and `zoosplat_model.carving` documents the
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model import triton_support
from zoosplat_model.carving import triton_kernels as kernels
from zoosplat_model.carving.geometry import HIDDEN_WEIGHT, OCCLUDED_WEIGHT, ObservedViews, projection_matrices

try:
    import triton
except ImportError:  # CPU builds of torch come without Triton
    triton = None

BLOCK_SIZE = 128  # voxels or pixels of a block of threads
MAX_UNROLLED_WINDOW = 5  # pixels; a kernel visits smaller windows in both directions at once, with unrolled loops
OPAQUE_COUNT = 1024  # what an opaque voxel counts: sums of whole numbers are the same in any order


def is_available(device: int) -> bool:
    """Whether the kernels run on the CUDA device of this number."""
    return triton_support.runs_on(_probe, device)


def supports(values: Tensor) -> bool:
    """Whether the kernels can compute with these values: float32 on a GPU on which the kernels run."""
    return triton_support.supports(_probe, values)


def _probe(cuda: torch.device) -> None:
    one = torch.ones(1, 2, 2, device=cuda)
    intrinsics, pose = torch.eye(3, device=cuda)[None], torch.eye(4, device=cuda)[None]
    used = torch.ones(1, dtype=torch.bool, device=cuda)
    points = one.new_ones(1, 1, 1, 3)
    views = ObservedViews(one[..., None].expand(1, 2, 2, 3), one, pose, intrinsics)
    carve(views, points, 1.0, 1, 0.0, used)
    voxel = one[:, :1, :1]
    prepare_silhouette_evidence(voxel, views, points, 1.0, 1.0, 0.0, used)(voxel)
    sample_colors(views, points.view(1, 3), used, 1.0, 1, used)


def carve(
    views: ObservedViews, points: Tensor, voxel_size_m: float, footprint_px: int, fill_color: float, used: Tensor
) -> Tensor:
    """As `carving.carve`."""
    n_views, h, w = views.mask.shape
    shape = points.shape[:3]
    points = points.reshape(-1, 3).contiguous()
    n = len(points)
    rgb, mask, used = views.rgb.contiguous(), views.mask.contiguous(), used.view(torch.uint8)
    matrices = projection_matrices(views).contiguous()
    layers = _average_masked_layers(rgb, mask, footprint_px)
    # Depths of the nearest solid voxels of the smaller and of the larger hull. The kernel treats them as integers, for
    # atomic minima: positive floats have the order of their bits.
    front = points.new_full((2, n_views, h, w), torch.inf)
    hulls, volume = points.new_empty(2, n), points.new_empty(8, n)
    blocks = (triton.cdiv(n, BLOCK_SIZE),)
    kernels.carve_hulls[blocks](
        points, matrices, layers, used, hulls, front.view(torch.int32), n, n_views, h, w, BLOCK_SIZE
    )
    front = window_minimum(front, footprint_px, (-1, -2))
    kernels.carve_colors[blocks](
        points, matrices, layers, mask, used, hulls, front, volume,
        n, n_views, h, w, float(voxel_size_m), float(fill_color), HIDDEN_WEIGHT, BLOCK_SIZE,
    )  # fmt: skip
    return volume.view(8, *shape)


def prepare_silhouette_evidence(
    hull: Tensor, views: ObservedViews, points: Tensor, voxel_size_m: float, slope: float, middle: float, used: Tensor
) -> Callable[[Tensor], Tensor]:
    """As `carving.prepare_silhouette_evidence`."""
    n_views, h, w = views.mask.shape
    tensors = (hull, views.mask, points, projection_matrices(views), views.intrinsics)
    hull, mask, points, matrices, intrinsics = (v.contiguous() for v in tensors)
    n = hull.numel()
    given = (hull, points, matrices, intrinsics, used.view(torch.uint8))
    sizes = (n, n_views, h, w, float(voxel_size_m))
    blocks = (triton.cdiv(n, BLOCK_SIZE),)

    def evidence(occupancy: Tensor) -> Tensor:
        occupancy = occupancy.contiguous()
        counts = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
        found = torch.empty_like(occupancy)
        opacity = (float(slope), float(middle))
        kernels.count_voxels[blocks](occupancy, *given, counts, *sizes, *opacity, OPAQUE_COUNT, BLOCK_SIZE)
        kernels.gather_evidence[blocks](found, *given, mask, counts, *sizes, OPAQUE_COUNT, BLOCK_SIZE)
        return found

    return evidence


def sample_colors(
    views: ObservedViews, points: Tensor, solid: Tensor, voxel_size_m: float, footprint_px: int, used: Tensor
) -> tuple[Tensor, Tensor]:
    """As `carving.sample_colors`."""
    n_views, h, w = views.mask.shape
    rgb, mask, points = (v.contiguous() for v in (views.rgb, views.mask, points))
    matrices = projection_matrices(views).contiguous()
    solid, used = solid.contiguous().view(torch.uint8), used.view(torch.uint8)
    n = len(points)
    front = points.new_full((n_views, h, w), torch.inf)
    size = footprint_px if footprint_px <= MAX_UNROLLED_WINDOW else 1
    colors, seen = torch.empty_like(points), solid.new_empty(n, dtype=torch.bool)
    blocks = (triton.cdiv(n, BLOCK_SIZE),)
    kernels.splat_solid_depth[blocks](points, matrices, solid, front.view(torch.int32), n, n_views, h, w, BLOCK_SIZE)
    if footprint_px > MAX_UNROLLED_WINDOW:
        front = window_minimum(front, footprint_px, (-1, -2))
    kernels.sample_colors[blocks](
        points, matrices, rgb, mask, used, front, colors, seen.view(torch.uint8),
        n, n_views, h, w, float(voxel_size_m), OCCLUDED_WEIGHT, size, BLOCK_SIZE,
    )  # fmt: skip
    return colors, seen


def _average_masked_layers(rgb: Tensor, mask: Tensor, size: int) -> Tensor:
    """Picture times mask, and mask, as [V, h, w, 4]: means over windows of `size` pixels each way, 0 outside."""
    pixels, (h, w) = mask.numel(), mask.shape[1:]
    if size <= MAX_UNROLLED_WINDOW:
        layers = rgb.new_empty(*mask.shape, 4)
        kernels.average_masked_layers[(triton.cdiv(pixels, BLOCK_SIZE),)](
            rgb, mask, layers, pixels, h, w, size, BLOCK_SIZE
        )
        return layers
    layers = torch.cat([rgb * mask[..., None], mask[..., None]], -1).permute(0, 3, 1, 2)
    # Channels come first, because PyTorch's kernel for the other layout takes 0.14 ms of the 2.4 ms of a frame on an
    # H200.
    layers = F.avg_pool2d(layers.contiguous(), size, stride=1, padding=size // 2)
    return layers.permute(0, 2, 3, 1).contiguous()


def window_minimum(values: Tensor, size: int, axes: Sequence[int]) -> Tensor:
    """As `window_minimum.window_minimum`."""
    values = values.contiguous()
    n = values.numel()
    for axis in axes:
        found = torch.empty_like(values)
        stride, length = values.stride(axis), values.shape[axis]
        kernels.window_minimum[(triton.cdiv(n, 4 * BLOCK_SIZE),)](
            values, found, n, length, stride, size, 4 * BLOCK_SIZE
        )
        values = found
    return values
