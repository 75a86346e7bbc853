"""Differentiable rendering of Gaussians: one signature, three implementations that agree in their numbers.

The backend `gsplat` runs gsplat's CUDA kernels, and `torch` is plain PyTorch for the CPU (float32 or float64). The
backend `reference` is a slow, literal transcription of the same rules, against which the other two are tested.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize.types import Cameras, PairBuffer, Rendering, ScreenStatistics

__all__ = ["PairBuffer", "Rendering", "ScreenStatistics", "load_kernels", "rasterize"]


def load_kernels(device: torch.device) -> None:
    """Load the rasteriser of a device, so that the first picture does not wait for it.

    Where gsplat finds a CUDA toolkit, it compiles its kernels at their first use on a machine, which takes minutes.

    Raises:
        UserError: there is no gsplat for this GPU.
    """
    if device.type == "cuda":
        from zoosplat_model.rasterize import gsplat_cuda

        gsplat_cuda.load()


def rasterize(
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
    background: Tensor | None = None,
    mode: Literal["3d", "2d"] = "3d",
    backend: Literal["auto", "gsplat", "torch", "reference"] = "auto",
    pair_buffer: PairBuffer | None = None,
    screen_statistics: ScreenStatistics | None = None,
) -> Rendering:
    """Render N Gaussians into C views; the result has a gradient by the Gaussians and by the background.

    All tensors share one floating dtype (float32; float64 too except with gsplat) and one device.

    Args:
        means: [N, 3] centres in the world frame, in its length unit.
        quats: [N, 4] orientations (w, x, y, z), Gaussian to world, of any length but zero.
        scales: [N, 3] standard deviations along the Gaussian's axes, linear, in the unit of `means`.
        opacities: [N] in [0, 1]; below 1/255 a Gaussian is not drawn.
        colors: [N, D] per Gaussian, or [C, N, D] in each view, any D features in any unit.
        world_to_camera: [C, 4, 4] rigid, OpenCV axes: x_camera = R x_world + t.
        intrinsics: [C, 3, 3] in calibration pixels: the centre of the top-left pixel is (0, 0), no skew.
        width: of the pictures, pixels.
        height: of the pictures, pixels.
        background: [D] colour behind the Gaussians, the same in all views; None is zeros (black).
        mode: "3d" ellipsoids (3DGS, Kerbl 2023), "2d" surfels (2DGS, Huang 2024, arXiv 2403.17888), which ignore the
            third scale.
        backend: "auto" means gsplat (arXiv 2409.06765) for CUDA tensors and torch for all others.
        pair_buffer: the size of gsplat's lists in a CUDA graph; other backends ignore it.
        screen_statistics: takes part in the projection and receives its radii.

    Raises:
        UserError: the gsplat backend is wanted and gsplat or CUDA is not there.
        ValueError: shapes, dtypes or devices do not fit together.
    """
    n, d, c = means.shape[0], colors.shape[-1], world_to_camera.shape[0]
    expected = {
        "means": (means, (n, 3)),
        "quats": (quats, (n, 4)),
        "scales": (scales, (n, 3)),
        "opacities": (opacities, (n,)),
        "colors": (colors, (n, d) if colors.ndim == 2 else (c, n, d)),
        "world_to_camera": (world_to_camera, (c, 4, 4)),
        "intrinsics": (intrinsics, (c, 3, 3)),
    }
    if background is not None:
        expected["background"] = (background, (d,))
    if screen_statistics is not None:
        if mode != "3d" or backend == "reference":
            raise ValueError("screen needs mode 3d and backend gsplat or torch")
        expected["screen.offsets"] = (screen_statistics.offsets, (c, n, 2))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != means.dtype or tensor.device != means.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but means is {means.dtype} on {means.device}: convert it"
            )
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means is {means.dtype}: rasterise in float32 or float64")
    if backend == "auto":
        backend = "gsplat" if means.is_cuda else "torch"

    # The backends put the centre of the top-left pixel at (0.5, 0.5). This is the only place that converts.
    intrinsics = intrinsics.clone()
    intrinsics[:, :2, 2] += 0.5
    gaussians = Gaussians(means, quats, scales, opacities, colors)
    cameras = Cameras(world_to_camera, intrinsics, width, height)
    # Autocast would round exponents to bfloat16.
    with torch.autocast(means.device.type, enabled=False):
        if backend == "gsplat":
            from zoosplat_model.rasterize import gsplat_cuda

            rgb, alpha = gsplat_cuda.render(
                gaussians, cameras, mode=mode, pair_buffer=pair_buffer, screen_statistics=screen_statistics
            )
        elif backend == "torch":
            from zoosplat_model.rasterize import torch_cpu

            rgb, alpha = torch_cpu.render(gaussians, cameras, mode=mode, screen_statistics=screen_statistics)
        elif backend == "reference":
            from zoosplat_model.rasterize import reference

            rgb, alpha = reference.render(gaussians, cameras, mode=mode)
        else:
            raise ValueError(f"backend is {backend!r}: choose auto, gsplat, torch or reference")
        if background is not None:
            rgb = rgb + (1 - alpha)[..., None] * background
    return Rendering(rgb, alpha)
