"""gsplat's CUDA kernels (arXiv 2409.06765), through its public API. gsplat is imported on first use only."""

from __future__ import annotations

import subprocess
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat.errors import UserError
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize.types import Cameras, PairBuffer, ScreenStatistics

TILE_3D = 8  # pixels; small tiles spread a small animal over more of the GPU
TILE_2D = 16  # pixels; gsplat cuts surfels off at the borders of their tiles, so the number of gsplat itself is kept


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    mode: Literal["3d", "2d"],
    pair_buffer: PairBuffer | None = None,
    screen_statistics: ScreenStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Premultiplied colours [C, H, W, D] and alpha [C, H, W]; arguments as in `rasterize`, pixel centres at (.5, .5).

    Raises:
        UserError: gsplat is not installed, has no CUDA kernels, or the tensors are not float32 on CUDA.
    """
    means, quats, scales, opacities, colors = gaussians
    world_to_camera, _, width, height = cameras
    instead = 'use backend "torch"'
    if not means.is_cuda:
        raise UserError(f"rasteriser backend gsplat needs CUDA tensors, these are on {means.device}: {instead}")
    if means.dtype.itemsize != 4:
        raise UserError(f"rasteriser backend gsplat needs float32, not {means.dtype}: {instead}")
    gsplat = load()

    # gsplat pads the channel counts it was not compiled for with uninitialised memory, whose gradients can be NaN.
    channels, views = colors.shape[-1], len(world_to_camera)
    padded = F.pad(colors, (0, 0 if channels < 5 else (1 << (channels - 1).bit_length()) - channels))
    appearance = (padded.expand(views, -1, -1), opacities.expand(views, -1))
    if mode == "3d":
        radii, centers, depths, conics, _ = gsplat.fully_fused_projection(
            means, None, quats, scales, *cameras, opacities=opacities
        )
        if screen_statistics is not None:
            centers = centers + screen_statistics.offsets
            screen_statistics.radii = radii.amax(-1).to(means.dtype)
        starts, ids, inside = _tile_lists(centers, radii, depths, width, height, TILE_3D, pair_buffer)
        rgb, alpha = gsplat.rasterize_to_pixels(
            centers, conics, *appearance, width, height, TILE_3D, starts, ids, masks=inside
        )
    else:
        radii, centers, depths, transforms, normals = gsplat.fully_fused_projection_2dgs(means, quats, scales, *cameras)
        radii = radii * (opacities > 0)[:, None]
        starts, ids, inside = _tile_lists(centers, radii, depths, width, height, TILE_2D, pair_buffer)
        unused = torch.zeros_like(centers)
        rgb, alpha, *_ = gsplat.rasterize_to_pixels_2dgs(
            centers, transforms, *appearance, normals, unused, width, height, TILE_2D, starts, ids, masks=inside
        )
    return rgb[..., :channels], alpha[..., 0]


def load() -> Any:
    """The module gsplat with its kernels.

    There is no fallback to the CPU, which takes minutes for a frame and so has to be asked for.

    Raises:
        UserError: gsplat is not installed, or its kernels cannot be compiled or loaded.
    """
    remedy = "run `zoosplat doctor --build-kernels` on this machine, or set train.device, evaluate.device and "
    remedy += "render.device to cpu"
    try:
        import gsplat
        from gsplat.cuda._backend import _C as kernels
    except ModuleNotFoundError as error:
        raise UserError(f"rasteriser backend gsplat: {error}; install zoosplat[gpu]") from error
    # gsplat compiles at its first import where it finds a CUDA toolkit.
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"gsplat's kernels cannot be had: {reason}; {remedy}") from error
    if kernels is None:
        raise UserError(f"gsplat's kernels are not compiled: {remedy}")
    return gsplat


@torch.no_grad()
def _tile_lists(
    centers: Tensor,  # [C, N, 2] pixels
    radii: Tensor,  # [C, N, 2] pixels, 0 where nothing is drawn
    depths: Tensor,  # [C, N]
    width: int,
    height: int,
    tile: int,
    pair_buffer: PairBuffer | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Gaussians of every tile, near to far, as gsplat's rasteriser takes them.

    gsplat's own `isect_tiles` waits for the device to learn how much memory it needs, which a CUDA graph cannot do.
    Here a graph has the capacity that `pair_buffer` sets. Entries that are left over belong to a row of tiles below the
    picture, which is not drawn.

    Returns:
        The starts [C, down + 1, across] int32 of the tiles' lists, the flat Gaussian indices [pairs] int32 in these
        lists, and the tiles to draw [C, down + 1, across] bool.
    """
    views, n = depths.shape
    across, down = -(-width // tile), -(-height // tile) + 1
    drawn = (radii > 0).all(-1) & centers.isfinite().all(-1)
    centers = torch.where(drawn[..., None], centers, 0) / tile
    reach = radii / tile
    low, high = (centers - reach).floor().clamp_min(0), (centers + reach).ceil().clamp_min(0)
    low_x, high_x = (edge[..., 0].clamp_max(across).int() for edge in (low, high))
    low_y, high_y = (edge[..., 1].clamp_max(down - 1).int() for edge in (low, high))
    columns = (high_x - low_x).flatten()
    count = torch.where(drawn.flatten(), columns * (high_y - low_y).flatten(), 0)
    stop = count.cumsum(0)
    if pair_buffer is not None:
        pair_buffer.required.copy_(torch.maximum(pair_buffer.required, stop[-1]))
    captured = pair_buffer is not None and torch.cuda.is_current_stream_capturing()
    capacity = pair_buffer.capacity if pair_buffer is not None and captured else int(stop[-1])

    place = torch.arange(capacity, device=radii.device)
    owner = torch.searchsorted(stop, place, right=True)
    left_over = owner == views * n
    owner = owner.clamp_max(views * n - 1)
    nth = place - (stop - count)[owner]
    columns = columns[owner]
    row = nth // columns.clamp_min(1)
    x, y = low_x.flatten()[owner] + nth - row * columns, low_y.flatten()[owner] + row
    flat = ((owner // n) * down + y) * across + x
    flat = torch.where(left_over, views * down * across - 1, flat)
    # Positive floats have the order of their bits.
    key = (flat << 32) | depths.flatten()[owner].view(torch.int32)
    key, order = torch.sort(torch.where(left_over, (flat << 32) | 0x7FFFFFFF, key), stable=True)
    tiles = torch.arange(views * down * across, device=radii.device) << 32
    starts = torch.searchsorted(key, tiles).int().view(views, down, across)
    inside = torch.ones_like(starts, dtype=torch.bool)
    inside[:, -1] = False
    return starts, owner[order].int(), inside
