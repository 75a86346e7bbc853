"""Gaussian rasterisation in plain PyTorch, for the CPU: the numbers of gsplat 1.5.3 without its CUDA kernels.

Sources: 3DGS (Kerbl 2023), 2DGS (Huang 2024, arXiv 2403.17888), gsplat (arXiv 2409.06765).

1. `torch_projection` projects every Gaussian into every view, with autograd. A row of a table holds what a pixel needs
   of a splat, and a box bounds the splat's reach.
2. `torch_tiles` lists the pairs of a splat and a tile that its box touches, near to far within a tile, and
   `torch_coefficients` shifts the rows to the tile's centre. There the exponent (3D), or each ingredient of it (2D), is
   one polynomial in the pixel offset, so that a matrix product gives the exponents of a tile.
3. `torch_compositing` composites near to far in blocks of many tiles, and drops tiles whose pixels are all closed.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize.torch_compositing import ALPHA_MAX, Composite
from zoosplat_model.rasterize.torch_projection import project_2d, project_3d
from zoosplat_model.rasterize.torch_tiles import list_tile_pairs
from zoosplat_model.rasterize.types import Cameras, ScreenStatistics


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    mode: Literal["3d", "2d"],
    screen_statistics: ScreenStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Premultiplied colours [C, H, W, D] and alpha [C, H, W]; arguments of `rasterize`, pixel centres at (.5, .5)."""
    world_to_camera, _, width, height = cameras
    splats = project_3d(gaussians, cameras) if mode == "3d" else project_2d(gaussians, cameras)
    if screen_statistics is not None:
        splats = splats._replace(table=splats.table + F.pad(screen_statistics.offsets, (0, splats.table.shape[-1] - 2)))
        half = (splats.box[..., 2:] - splats.box[..., :2]).amax(-1) / 2
        screen_statistics.radii = torch.where(splats.visible, half, 0)
    views, channels = len(world_to_camera), gaussians.colors.shape[-1]
    with torch.no_grad():
        # Small tiles waste fewer pixels, and large ones need fewer pairs.
        box = splats.box[splats.visible]
        side = (box[:, 2:] - box[:, :2]).mean().item() if len(box) else 0.0
        tile = 4 if side < 20 else 8 if side < 60 else 16
        across, down = -(-width // tile), -(-height // tile)
        pairs = list_tile_pairs(splats, across, down, tile, ellipses=mode == "3d")

    # A constant channel beside the colours renders alpha.
    features = F.pad(gaussians.colors, (0, 1), value=1.0).expand(views, -1, -1)
    table = torch.cat([splats.table, features], -1).flatten(0, 1)
    can_clamp = bool((gaussians.opacities > ALPHA_MAX).any())
    image: Tensor = Composite.apply(table, pairs, tile, channels + 1, mode, can_clamp)

    image = image.new_zeros(views * across * down, *image.shape[1:]).index_copy(0, pairs.tiles, image)
    image = image.view(views, down, across, tile, tile, -1).transpose(2, 3)
    image = image.reshape(views, down * tile, across * tile, -1)[:, :height, :width]
    return image[..., :channels], image[..., channels]
