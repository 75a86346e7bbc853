"""gsplat's own PyTorch pipeline on the CPU, as an independent truth for tests.

The maths is gsplat's; only what gsplat has in CUDA or takes from nerfacc (lists of indices, accumulation along rays) is
replaced, by plain loops with the rules of the CUDA kernels.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import gsplat.cuda._torch_impl as impl
import gsplat.cuda._torch_impl_2dgs as impl_2dgs
import gsplat.cuda._wrapper as wrapper
import gsplat.rendering as rendering
import torch
from torch import Tensor

from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize.types import Cameras

TILE = 16


def _weights(alphas: Tensor, ray_indices: Tensor, n_rays: int) -> tuple[Tensor, Tensor]:
    """nerfacc.render_weight_from_alpha: entries of a ray are adjacent, near to far."""
    log = torch.log1p(-alphas)
    before = torch.cumsum(log, 0) - log
    first = torch.ones_like(ray_indices, dtype=torch.bool)
    first[1:] = ray_indices[1:] != ray_indices[:-1]
    transmittance = torch.exp(before - before[first.nonzero()[:, 0]][torch.cumsum(first, 0) - 1])
    return alphas * transmittance, transmittance


def _accumulate(weights: Tensor, values: Tensor | None = None, *, ray_indices: Tensor, n_rays: int) -> Tensor:
    """nerfacc.accumulate_along_rays."""
    terms = weights[:, None] if values is None else weights[:, None] * values
    return terms.new_zeros(n_rays, terms.shape[1]).index_add(0, ray_indices, terms)


def _indices(
    sigma_of: Callable[[Tensor, float, float], Tensor],
    opacities: Tensor,
    n: int,
    width: int,
    height: int,
    tile: int,
    offsets: Tensor,
    ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which Gaussians contribute to which pixel of which image: the loop of the CUDA kernels, pixel by pixel."""
    images, down, across = offsets.reshape(-1, *offsets.shape[-2:]).shape
    bounds = [*offsets.flatten().tolist(), len(ids)]
    found: list[tuple[Tensor, int, int]] = []
    for t in range(images * down * across):
        g = ids[bounds[t] : bounds[t + 1]].long()
        image, row, column = t // (down * across), t // across % down, t % across
        for y in range(row * tile, min(height, (row + 1) * tile)) if len(g) else ():
            for x in range(column * tile, min(width, (column + 1) * tile)):
                sigma = sigma_of(g, x + 0.5, y + 0.5)
                alpha = (opacities.reshape(-1)[g] * torch.exp(-sigma)).clamp_max(0.999)
                kept = ((sigma >= 0) & (alpha >= 1 / 255)).nonzero()[:, 0]
                kept = kept[torch.cumprod(1 - alpha[kept], 0) > 1e-4]
                found.append((g[kept] - image * n, y * width + x, image))
    empty = torch.zeros(0, dtype=torch.long)
    return (
        torch.cat([empty, *(g for g, _, _ in found)]),
        torch.cat([empty, *(torch.full_like(g, pixel) for g, pixel, _ in found)]),
        torch.cat([empty, *(torch.full_like(g, image) for g, _, image in found)]),
    )


@torch.no_grad()
def _indices_3d(a: int, b: int, t: Tensor, means2d: Tensor, conics: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mean, conic = means2d.reshape(-1, 2), conics.reshape(-1, 3)

    def sigma(g: Tensor, x: float, y: float) -> Tensor:
        dx, dy = mean[g, 0] - x, mean[g, 1] - y
        return 0.5 * (conic[g, 0] * dx * dx + conic[g, 2] * dy * dy) + conic[g, 1] * dx * dy

    opacities, *image = rest
    return _indices(sigma, opacities, means2d.shape[-2], *image)


@torch.no_grad()
def _indices_2d(a: int, b: int, t: Tensor, means2d: Tensor, transforms: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mean, transform = means2d.reshape(-1, 2), transforms.reshape(-1, 3, 3)

    def sigma(g: Tensor, x: float, y: float) -> Tensor:
        m = transform[g]
        zeta = torch.linalg.cross(x * m[:, 2] - m[:, 0], y * m[:, 2] - m[:, 1])
        on_splat = (zeta[:, 0] / zeta[:, 2]) ** 2 + (zeta[:, 1] / zeta[:, 2]) ** 2
        return 0.5 * torch.minimum(on_splat, 2 * ((mean[g, 0] - x) ** 2 + (mean[g, 1] - y) ** 2))

    opacities, *image = rest
    return _indices(sigma, opacities, means2d.shape[-2], *image)


def _isect_tiles(means2d: Tensor, radii: Tensor, depths: Tensor, tile: int, across: int, down: int, **_: Any) -> Any:
    return impl._isect_tiles(means2d.detach(), radii, depths.detach(), tile, across, down)


def render(gaussians: Gaussians, cameras: Cameras, *, mode: str) -> tuple[Tensor, Tensor]:
    """Premultiplied colours [C, H, W, D] and alpha [C, H, W]; pixel centres at (.5, .5). Nothing may be empty."""
    means, quats, scales, opacities, colors = gaussians
    world_to_camera, intrinsics, width, height = cameras
    nerfacc = types.ModuleType("nerfacc")
    vars(nerfacc).update(render_weight_from_alpha=_weights, accumulate_along_rays=_accumulate)
    with (
        mock.patch.dict(sys.modules, nerfacc=nerfacc),
        mock.patch.object(wrapper, "rasterize_to_indices_in_range", _indices_3d),
        mock.patch.object(wrapper, "rasterize_to_indices_in_range_2dgs", _indices_2d),
        mock.patch.object(rendering, "isect_tiles", _isect_tiles),
        mock.patch.object(rendering, "isect_offset_encode", impl._isect_offset_encode),
    ):
        everything = 10**9
        if mode == "3d":
            rgb, alpha, _ = rendering._rasterization(*gaussians, *cameras, tile_size=TILE, batch_per_iter=everything)
            return rgb, alpha[..., 0]
        # The CUDA kernel takes (s1, s2, 1); the PyTorch one would scale the normal by the third.
        flat = torch.cat([scales[:, :2], torch.ones_like(scales[:, :1])], 1)
        radii, means2d, depths, transforms, normals = impl_2dgs._fully_fused_projection_2dgs(
            means, quats, flat, world_to_camera, intrinsics, width, height
        )
        views, n = depths.shape
        across, down = -(-width // TILE), -(-height // TILE)
        _, tile_ids, ids = _isect_tiles(means2d, radii, depths, TILE, across, down)
        offsets = impl._isect_offset_encode(tile_ids, views, across, down)
        rgb, alpha, _ = impl_2dgs._rasterize_to_pixels_2dgs(
            means2d,
            transforms,
            colors.expand(views, -1, -1),
            normals,
            opacities.expand(views, n),
            width,
            height,
            TILE,
            offsets,
            ids,
            batch_per_iter=everything,
        )
        return rgb, alpha[..., 0]
