"""Which splats meet which tiles, for the CPU rasteriser."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model.rasterize.torch_projection import ALPHA_MIN, Projected


class TilePairs(NamedTuple):
    """M pairs of a splat and a tile, ordered by tile (the tile with most pairs first), then near to far.

    Attributes:
        splat: [M + 1] flat index into C x N; the last entry is C x N and stands for no splat.
        tiles: [T] flat indices, into C x down x across, of the tiles that have pairs.
        center: [T, 2] centres of these tiles, pixels.
        sizes: [T] number of pairs of each tile, descending.
        bag: [M] the pairs grouped by splat.
        bag_start: [V] where each group starts in `bag`.
        bag_splat: [V] the splat of each group.
    """

    splat: Tensor
    tiles: Tensor
    center: Tensor
    sizes: Tensor
    bag: Tensor
    bag_start: Tensor
    bag_splat: Tensor


def list_tile_pairs(splats: Projected, across: int, down: int, tile: int, *, ellipses: bool) -> TilePairs:
    """List the pairs of a splat and a tile that the splat's box touches.

    Args:
        splats: the projected Gaussians.
        across: tiles along the width of the picture.
        down: tiles along its height.
        tile: edge of a tile, pixels.
        ellipses: whether the splats are ellipses; then tiles that the ellipse misses are left out.
    """
    views, n = splats.depth.shape
    ids = splats.visible.flatten().nonzero()[:, 0]
    # With float32 depths and a stable sort, ties are drawn in the order of the Gaussians, as in gsplat.
    ids = ids[torch.sort(splats.depth.flatten()[ids].float(), stable=True)[1]]
    box = splats.box.flatten(0, 1)[ids] / tile
    limit = box.new_tensor([across, down])
    low = box[:, :2].floor().clamp_min(0).minimum(limit).int()
    columns, rows = (box[:, 2:].ceil().clamp_min(0).minimum(limit).int() - low).clamp_min(0).unbind(-1)
    per_splat = columns * rows
    k = torch.repeat_interleave(per_splat)
    base = ids.div(n, rounding_mode="floor").int() * (across * down)
    first = (per_splat.cumsum(0) - per_splat).int()
    # One gather of packed rows is far faster than a gather for each column.
    x, y, columns, first, base = torch.stack([*low.unbind(-1), columns, first, base], -1).index_select(0, k).unbind(-1)
    j = torch.arange(len(k), dtype=torch.int32, device=k.device) - first
    row = j.div(columns, rounding_mode="trunc")
    x, y = x + (j - row * columns), y + row
    place = base + y * across + x
    if ellipses:
        table = splats.table.detach().flatten(0, 1).index_select(0, ids)
        keep = _ellipse_meets_tile(table, k, x, y, tile).nonzero()[:, 0]
        k, place = k.index_select(0, keep), place.index_select(0, keep)
        per_splat = torch.bincount(k, minlength=len(ids))

    sizes, tiles = torch.sort(torch.bincount(place, minlength=views * across * down), descending=True, stable=True)
    occupied = int((sizes > 0).sum())
    sizes, tiles = sizes[:occupied], tiles[:occupied]
    rank = torch.empty(views * across * down, dtype=torch.int32, device=k.device)
    rank[tiles] = torch.arange(occupied, dtype=torch.int32, device=k.device)
    order = torch.sort(rank.index_select(0, place), stable=True)[1]
    bag = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=k.device))
    center = (torch.stack([tiles % across, tiles // across % down], -1) + 0.5).to(box.dtype) * tile
    splat = F.pad(ids.index_select(0, k.index_select(0, order)), (0, 1), value=views * n)
    return TilePairs(splat, tiles, center, sizes, bag, per_splat.cumsum(0) - per_splat, ids)


def _ellipse_meets_tile(table: Tensor, k: Tensor, x: Tensor, y: Tensor, tile: int) -> Tensor:
    """Whether alpha reaches ALPHA_MIN between the outermost pixel centres of tile (x, y), for splats table[k]."""
    mx, my, a, b, c, log_opacity = table.unbind(-1)
    limit = 1.001 * (log_opacity - math.log(ALPHA_MIN)) + 1e-3  # a little more than needed, because of rounding
    packed = torch.stack([mx, my, 0.5 * a, b, 0.5 * c, -b / c, -b / a, limit], -1).index_select(0, k)
    mx, my, a, b, c, y_per_x, x_per_y, limit = packed.unbind(-1)
    # The exponent is convex, so its minimum on the tile lies on the edge that faces the centre, in x or in y.
    half = tile / 2 - 0.5
    x0, y0 = (x + 0.5).mul_(tile).sub_(mx + half), (y + 0.5).mul_(tile).sub_(my + half)
    x1, y1 = x0 + 2 * half, y0 + 2 * half
    ex, ey = x0.clamp_min(0).add_(x1.clamp_max(0)), y0.clamp_min(0).add_(y1.clamp_max(0))
    along_y, along_x = (y_per_x * ex).clamp_(y0, y1), (x_per_y * ey).clamp_(x0, x1)
    least_x = ex * (a * ex + b * along_y) + c * along_y * along_y
    least_y = ey * (c * ey + b * along_x) + a * along_x * along_x
    return torch.minimum(least_x, least_y) <= limit
