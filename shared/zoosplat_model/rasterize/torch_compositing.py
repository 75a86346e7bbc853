"""Front-to-back compositing of the splats of each tile, for the CPU rasteriser, with a hand-written gradient.

Masks are applied with `threshold`, which on the CPU is several times faster than `where` and `masked_fill`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model.rasterize.torch_coefficients import (
    basis_of_tile,
    coefficients_2d,
    coefficients_2d_backward,
    coefficients_3d,
    coefficients_3d_backward,
    log_alpha_2d,
    log_alpha_2d_backward,
)
from zoosplat_model.rasterize.torch_projection import ALPHA_MIN
from zoosplat_model.rasterize.torch_tiles import TilePairs

# The numbers of gsplat 1.5.3; from 1.6.0 on ALPHA_MAX is 0.99.
ALPHA_MAX = 0.999  # alpha is capped here, and has no gradient above
TRANSMITTANCE_MIN = 1e-4  # a pixel is closed before the splat that would take it to this transmittance

BLOCK_ELEMENTS = 1 << 17  # tiles x pixels x splats composited at once, so that the working set stays in the cache
BLOCK_DEPTH = 128  # splats of a tile composited before it is asked whether all its pixels are closed


class Composite(torch.autograd.Function):
    """Composite the splats of every tile near to far.

    The result [T, tile * tile, D] is the sum over k of T_k alpha_k feature_k, where T_k is the product of 1 - alpha_j
    for j < k. `table` [C * N, F + D] holds the geometry, then the features.

    For the gradient v of the result, let g_k = T_k alpha_k (feature_k . v). Then the gradient of log alpha_k is
    g_k - alpha_k / (1 - alpha_k) sum_{j > k} g_j.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, pairs: TilePairs, tile: int, d: int, mode: str, can_clamp: bool) -> Tensor:
        basis, sizes, device = basis_of_tile(tile, table), pairs.sizes, table.device
        # Blocks are padded with a splat that is all zeros but for a log opacity that makes alpha 0.
        padding = table.new_zeros(1, table.shape[1])
        padding[0, 5 if mode == "3d" else 2] = -1e4
        padded = torch.cat([table, padding])
        faintest = torch.nextafter(table.new_tensor(ALPHA_MIN), table.new_tensor(0.0)).item()
        out = table.new_zeros(len(sizes), len(basis), d)
        transmittance = table.new_ones(len(sizes), len(basis))
        offset, none = sizes.cumsum(0) - sizes, len(pairs.splat) - 1
        blocks = []
        active, start = torch.arange(len(sizes), device=device), 0
        while len(active):
            depth = (sizes[active] - start).clamp_max_(BLOCK_DEPTH).tolist()
            i = 0
            while i < len(active):
                k = torch.arange(start, start + depth[i], device=device)
                tiles = active[i : i + max(1, BLOCK_ELEMENTS // (len(basis) * depth[i]))]
                i += len(tiles)
                index = torch.where(k < sizes[tiles, None], offset[tiles, None] + k, none)
                rows = padded.index_select(0, pairs.splat[index.flatten()]).view(*index.shape, -1)
                center = pairs.center[tiles]
                saved: tuple[Tensor, ...] = ()
                if mode == "3d":
                    coefficients = coefficients_3d(rows[..., :-d], center)
                    alpha = torch.bmm(basis.expand(len(tiles), -1, -1), coefficients.mT)
                else:
                    alpha, saved = log_alpha_2d(coefficients_2d(rows[..., :-d], center), basis)
                alpha.exp_()
                unclamped = alpha <= ALPHA_MAX if can_clamp else None
                alpha = torch.threshold_(alpha.clamp_max_(ALPHA_MAX), faintest, 0.0)
                after = 1 - alpha
                ratio = alpha.div_(after)
                after = torch.cumprod(after, -1).mul_(transmittance[tiles, :, None])
                # Transmittance never rises, so cutting it off here closes the pixel for all splats behind, too.
                after = torch.threshold_(after, TRANSMITTANCE_MIN, 0.0)
                transmittance[tiles] = after[..., -1]
                weight = after.mul_(ratio)
                out[tiles] += torch.bmm(weight, rows[..., -d:])
                if ctx.needs_input_grad[0]:
                    blocks.append((tiles, index, rows, weight, ratio, unclamped, saved))
            start += BLOCK_DEPTH
            active = active[sizes[active] > start]
            active = active[(transmittance[active] > 0).any(-1)]
        ctx.blocks, ctx.basis, ctx.pairs, ctx.shape = blocks, basis, pairs, table.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, pairs, d = ctx.basis, ctx.pairs, grad.shape[2]
        per_pair = grad.new_zeros(len(pairs.splat), ctx.shape[1])
        all_behind = grad.new_zeros(grad.shape[:2])
        for tiles, index, rows, weight, ratio, unclamped, saved in reversed(ctx.blocks):
            v = grad[tiles]
            g_features = torch.bmm(v.mT, weight)
            g = torch.bmm(v, rows[..., -d:].mT).mul_(weight)
            behind = torch.cumsum(g, -1)
            total = all_behind[tiles] + behind[..., -1]
            all_behind[tiles] = total
            g -= torch.sub(total[..., None], behind, out=behind).mul_(ratio)
            if unclamped is not None:
                g *= unclamped
            center, geometry = pairs.center[tiles], rows[..., :-d]
            if saved:
                columns = coefficients_2d_backward(log_alpha_2d_backward(g, saved, basis), geometry, center)
            else:
                g_coefficients = torch.bmm(basis.T.expand(len(g), -1, -1), g)
                columns = coefficients_3d_backward(g_coefficients, geometry, center)
            per_pair[index] = torch.stack([*columns, *g_features.unbind(1)], -1)
        # Summing the pairs of each splat is far faster than an indexed addition.
        out = grad.new_zeros(ctx.shape)
        if len(pairs.bag):
            out[pairs.bag_splat] = F.embedding_bag(pairs.bag, per_pair, pairs.bag_start, mode="sum")
        return out, None, None, None, None, None
