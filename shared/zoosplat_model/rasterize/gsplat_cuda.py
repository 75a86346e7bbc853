"""gsplat's CUDA kernels (arXiv 2409.06765), through its public API. gsplat is imported on first use only."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from zoosplat.errors import UserError


def render(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    *,
    mode: Literal["3d", "2d"],
) -> tuple[Tensor, Tensor]:
    """Premultiplied colours [C, H, W, D] and alpha [C, H, W]; arguments as in `rasterize`, pixel centres at (.5, .5).

    Raises `UserError` when gsplat is not installed, has no CUDA kernels, or the tensors are not float32 on CUDA.
    """
    instead = 'use backend "torch"'
    if not means.is_cuda:
        raise UserError(f"rasteriser backend gsplat needs CUDA tensors, these are on {means.device}: {instead}")
    if means.dtype.itemsize != 4:
        raise UserError(f"rasteriser backend gsplat needs float32, not {means.dtype}: {instead}")
    try:
        import gsplat
        from gsplat.cuda._backend import _C as kernels
    except ImportError as error:
        raise UserError(f"rasteriser backend gsplat: {error}; install zoosplat[gpu] or {instead}") from error
    if kernels is None:
        raise UserError(f"rasteriser backend gsplat: no compiled kernels and no CUDA toolkit to build them; {instead}")

    # gsplat pads the channel counts it was not compiled for with uninitialised memory, whose gradients can be NaN.
    channels = colors.shape[-1]
    padded = F.pad(colors, (0, 0 if channels < 5 else (1 << (channels - 1).bit_length()) - channels))
    # rasterization_2dgs of 1.5.3 takes colours per view only.
    padded = padded.expand(len(world_to_camera), -1, -1)
    args = (means, quats, scales, opacities, padded, world_to_camera, intrinsics, width, height)
    rasterization = gsplat.rasterization if mode == "3d" else gsplat.rasterization_2dgs
    rgb, alpha = rasterization(*args, packed=False)[:2]
    return rgb[..., :channels], alpha[..., 0]
