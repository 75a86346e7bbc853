"""Space carving: a frame's masks and pictures to a coloured volume in the animal's frame (arXiv 2505.18342).

Every function runs as Triton kernels for float32 tensors on a GPU where Triton works, and in plain PyTorch elsewhere.

All cameras here are in calibration pixels: the centre of the top-left pixel is (0, 0), as in the rasteriser.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoosplat_model.carving import reference, triton_backend
from zoosplat_model.carving.geometry import ObservedViews, grid_points, project

__all__ = ["ObservedViews", "carve", "grid_points", "prepare_silhouette_evidence", "project", "sample_colors"]


def carve(
    views: ObservedViews,
    points: Tensor,  # [n1, n2, n3, 3] world, metres
    voxel_size_m: float,
    footprint_px: int,
    fill_color: float,
    used: Tensor | None = None,  # [V] bool
) -> Tensor:
    """Carve a volume from views: the mean of two coloured hulls, of what all masks cover and of what all but one cover.

    `used` tells which views count, at least one; by default all do. On a GPU nothing waits for the device, and all
    shapes are the same for every frame, so that carving can be part of a CUDA graph.

    A voxel covers `footprint_px` x `footprint_px` pixels around its projection. All samples are means over these
    pixels, so that the surface is known to a fraction of a voxel and colours are not aliased. The occupancy of a voxel
    is the share of its footprint that lies inside the mask, in the view where that share is least (for the larger hull:
    second least). The paper takes the centre alone, so that its occupancy is 0 or 1. A voxel with an occupancy of at
    least 0.5 hides what is behind it. A view sees a voxel if no such voxel is nearer there by more than one voxel size.
    The colour of a voxel is the weighted mean of the pictures within the masks, with weight 1 where the voxel is seen
    and `HIDDEN_WEIGHT` where it is hidden. So, unlike in the paper, a view that has the voxel outside its mask has no
    weight, because it shows background.

    Four more channels tell what the mean of the two hulls does not show. The first is the occupancy of the smaller hull
    (that of the larger one follows). The second is the share of the views in which the voxel lies on animal that the
    smaller hull leaves bare, which is the sign of a wrong mask. The third is how far the views' colours are apart,
    which is the sign of a voxel that no view really sees. The fourth is the share of the views that see the voxel.

    Returns:
        [8, n1, n2, n3] float32: occupancy 0 to 1; red, green, blue (`fill_color` where empty); occupancy of the smaller
        hull; share of the used views in which the voxel lies on animal that this hull leaves bare; root of the mean
        squared distance of the views' colours from their mean; share of all views that see the voxel. The last three
        are 0 where the volume is empty.
    """
    arguments = (views, points, voxel_size_m, footprint_px, fill_color, _all_if_none(used, views))
    if triton_backend.supports(points):
        return triton_backend.carve(*arguments)
    return reference.carve(*arguments)


def prepare_silhouette_evidence(
    hull: Tensor,  # [n1, n2, n3] above 0 where there may be animal
    views: ObservedViews,
    points: Tensor,  # [n1, n2, n3, 3] world, metres; its origin is about where the animal is
    voxel_size_m: float,
    slope: float,
    middle: float,
    used: Tensor | None = None,  # [V] bool
) -> Callable[[Tensor], Tensor]:
    """A function that tells how strongly the silhouettes ask for each voxel, given the occupancies of all voxels.

    The evidence of a mask for a voxel is 1 / (thickness of the animal on the voxel's line of sight, in voxels), at most
    1. Where a mask shows animal, some voxel on the line of sight has to be animal. So a voxel of a hull that is one
    voxel thick in any view is animal for sure, and so is a voxel that is the only one left on its line. About one among
    twenty on a line nothing is known. A network cannot find that out by itself, because it does not know where the
    cameras are.

    A voxel counts with the opacity sigmoid(slope * (occupancy - middle)). In each view voxels are counted in pixels of
    a voxel's size at the animal, and the thickness on a line is a mean over nine such pixels (tent weights 1 2 1 along
    each axis).

    Returns:
        A function of occupancies [n1, n2, n3], any real numbers, which may be called as often as they change. It
        returns [n1, n2, n3] float32: the largest evidence of the `used` views (by default all) whose mask shows animal
        there, and 0 outside the hull.
    """
    arguments = (hull, views, points, voxel_size_m, slope, middle, _all_if_none(used, views))
    if triton_backend.supports(points):
        return triton_backend.prepare_silhouette_evidence(*arguments)
    return reference.prepare_silhouette_evidence(*arguments)


def sample_colors(
    views: ObservedViews,
    points: Tensor,  # [N, 3] world, metres
    solid: Tensor,  # [N] bool
    voxel_size_m: float,
    footprint_px: int,
    used: Tensor | None = None,  # [V] bool
) -> tuple[Tensor, Tensor]:
    """Sample the views at points, with their occlusion.

    A solid point hides what lies more than two voxels behind it, within the pixels of a voxel's footprint. A view that
    does not see a point has the weight `OCCLUDED_WEIGHT`.

    Returns:
        The weighted mean of the colours that the `used` views (by default all) show within their masks, [N, 3], and
        whether any view shows one, [N] bool.
    """
    arguments = (views, points, solid, voxel_size_m, footprint_px, _all_if_none(used, views))
    if triton_backend.supports(points):
        return triton_backend.sample_colors(*arguments)
    return reference.sample_colors(*arguments)


def _all_if_none(used: Tensor | None, views: ObservedViews) -> Tensor:
    return views.mask.new_ones(len(views.mask), dtype=torch.bool) if used is None else used
