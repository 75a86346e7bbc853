"""The samples and the roughness of the HexPlane on a GPU, as Triton kernels.

PyTorch's `grid_sample` needs a launch for each of 24 planes, and a thread for each point, which makes 32 scattered
reads or atomic additions. Here one launch covers a level, and the 32 channels of a cell are one line of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoosplat_model import triton_support

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

BLOCK_POINTS = 16  # points of a block of threads
BLOCK_ELEMENTS = 1024  # elements of a plane of a block of threads


def is_available(device: int) -> bool:
    """Whether the kernels run on the CUDA device of this number."""
    return triton_support.runs_on(_probe, device)


def _probe(cuda: torch.device) -> None:
    planes = [torch.ones(1, 32, 3, 3, device=cuda).contiguous(memory_format=torch.channels_last) for _ in range(6)]
    sample(torch.zeros(1, 3, device=cuda), torch.zeros((), device=cuda), planes)


def sample(places: Tensor, time: Tensor, planes: Sequence[Tensor]) -> Tensor:
    """Features [N, 32 L], as `hexplane.sample_reference` gives them.

    Args:
        places: [N, 3] x, y, z, float32.
        time: [] t; it gets no gradient.
        planes: 6 L planes [1, 32, R_second, R_first], channels last in memory.
    """
    result: Tensor = _Sample.apply(places.contiguous(), time, *planes)
    return result


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, time: Tensor, *planes: Tensor) -> Tensor:
        n, levels = len(places), len(planes) // 6
        out = places.new_empty(n, 32 * levels)
        for level in range(levels):
            six = planes[6 * level : 6 * level + 6]
            _forward[(triton.cdiv(n, BLOCK_POINTS),)](
                places, time, *six, out, n, six[0].shape[3], six[2].shape[2], 32 * levels, 32 * level, BLOCK_POINTS
            )
        ctx.save_for_backward(places, time, *planes)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        places, time, *planes = ctx.saved_tensors
        grad = grad.contiguous()
        n, levels = len(places), len(planes) // 6
        # All planes share one piece of memory, so that one launch sets it to zero.
        whole = places.new_zeros(sum(p.numel() for p in planes))
        grads = [
            part.view(p.shape[2], p.shape[3], 32).permute(2, 0, 1)[None]
            for part, p in zip(whole.split([p.numel() for p in planes]), planes, strict=True)
        ]
        of_places = places.new_empty(levels, n, 3)
        for level in range(levels):
            chosen = slice(6 * level, 6 * level + 6)
            six = planes[chosen]
            _backward[(triton.cdiv(n, BLOCK_POINTS),)](
                places, time, *six, *grads[chosen], grad, of_places[level], n, six[0].shape[3], six[2].shape[2],
                32 * levels, 32 * level, BLOCK_POINTS,
            )  # fmt: skip
        return of_places.sum(0), None, *grads


def add_roughness(planes: Sequence[Tensor], axis_is_time: Sequence[bool], weights: tuple[float, float, float]) -> None:
    """Add to the planes' gradients those of the weighted sum of the parts of `hexplane.Roughness`.

    Args:
        planes: with gradients, channels last in memory.
        axis_is_time: of each plane, whether its second axis is time.
        weights: of the parts space, time and ones.
    """
    space, time, ones = weights
    for plane, with_time in zip(planes, axis_is_time, strict=True):
        assert plane.grad is not None
        n, height = plane.numel(), plane.shape[2]
        row = n // height
        smooth = 2 * (time if with_time else space) / max((height - 2) * row, 1)
        _add_roughness[(triton.cdiv(n, BLOCK_ELEMENTS),)](
            plane, plane.grad, n, row, height, smooth, ones / n if with_time else 0.0, BLOCK_ELEMENTS
        )


if triton is not None:

    @triton.jit
    def _cell(x, size):  # type: ignore[no-untyped-def]
        """Lower and upper cell, weight of the upper one, and whether the place lies inside the plane."""
        at = (x + 1.0) * 0.5 * (size - 1)
        inside = (at > 0.0) & (at < size - 1)
        at = tl.minimum(tl.maximum(at, 0.0), (size - 1) * 1.0)
        low = at.to(tl.int32)
        return low, tl.minimum(low + 1, size - 1), at - low.to(tl.float32), inside

    @triton.jit  # type: ignore[untyped-decorator]
    def _cells(places, time, i, inside, size, times, points: tl.constexpr):  # type: ignore[no-untyped-def]
        """What `_cell` gives of the points i along x, y, z and time; time is always inside."""
        x0, x1, fx, in_x = _cell(tl.load(places + i * 3, mask=inside, other=0.0), size)
        y0, y1, fy, in_y = _cell(tl.load(places + i * 3 + 1, mask=inside, other=0.0), size)
        z0, z1, fz, in_z = _cell(tl.load(places + i * 3 + 2, mask=inside, other=0.0), size)
        t0, t1, ft, _ = _cell(tl.load(time) + tl.zeros((points,), tl.float32), times)
        return x0, x1, fx, in_x, y0, y1, fy, in_y, z0, z1, fz, in_z, t0, t1, ft

    @triton.jit
    def _corners(plane, x0, x1, y0, y1, width, there):  # type: ignore[no-untyped-def]
        """The 32 channels of the four cells around each place."""
        c = tl.arange(0, 32)[None, :]
        v00 = tl.load(plane + (y0 * width + x0)[:, None] * 32 + c, mask=there, other=0.0)
        v01 = tl.load(plane + (y0 * width + x1)[:, None] * 32 + c, mask=there, other=0.0)
        v10 = tl.load(plane + (y1 * width + x0)[:, None] * 32 + c, mask=there, other=0.0)
        v11 = tl.load(plane + (y1 * width + x1)[:, None] * 32 + c, mask=there, other=0.0)
        return v00, v01, v10, v11

    @triton.jit
    def _bilinear(plane, x0, x1, fx, y0, y1, fy, width, there):  # type: ignore[no-untyped-def]
        """The bilinear samples of a plane, 32 channels each."""
        v00, v01, v10, v11 = _corners(plane, x0, x1, y0, y1, width, there)
        fx, fy = fx[:, None], fy[:, None]
        return (1 - fy) * ((1 - fx) * v00 + fx * v01) + fy * ((1 - fx) * v10 + fx * v11)

    @triton.jit
    def _spread(plane, grad, g, x0, x1, fx, y0, y1, fy, width, there):  # type: ignore[no-untyped-def]
        """Add the gradient of a sample to that of the plane, and return those by the place, in cells."""
        v00, v01, v10, v11 = _corners(plane, x0, x1, y0, y1, width, there)
        c = tl.arange(0, 32)[None, :]
        fx, fy = fx[:, None], fy[:, None]
        tl.atomic_add(grad + (y0 * width + x0)[:, None] * 32 + c, g * (1 - fy) * (1 - fx), mask=there, sem="relaxed")
        tl.atomic_add(grad + (y0 * width + x1)[:, None] * 32 + c, g * (1 - fy) * fx, mask=there, sem="relaxed")
        tl.atomic_add(grad + (y1 * width + x0)[:, None] * 32 + c, g * fy * (1 - fx), mask=there, sem="relaxed")
        tl.atomic_add(grad + (y1 * width + x1)[:, None] * 32 + c, g * fy * fx, mask=there, sem="relaxed")
        along_x = tl.sum(g * ((1 - fy) * (v01 - v00) + fy * (v11 - v10)), 1)
        along_y = tl.sum(g * ((1 - fx) * (v10 - v00) + fx * (v11 - v01)), 1)
        return along_x, along_y

    @triton.jit  # type: ignore[untyped-decorator]
    def _forward(  # type: ignore[no-untyped-def]
        places, time, xy, xz, xt, yz, yt, zt, out, n, size, times, width, first, points: tl.constexpr
    ):  # fmt: skip
        """The features of a level: the product of the samples of its six planes."""
        i = tl.program_id(0) * points + tl.arange(0, points)
        inside = i < n
        there = inside[:, None]
        x0, x1, fx, _, y0, y1, fy, _, z0, z1, fz, _, t0, t1, ft = _cells(places, time, i, inside, size, times, points)
        product = _bilinear(xy, x0, x1, fx, y0, y1, fy, size, there)
        product *= _bilinear(xz, x0, x1, fx, z0, z1, fz, size, there)
        product *= _bilinear(xt, x0, x1, fx, t0, t1, ft, size, there)
        product *= _bilinear(yz, y0, y1, fy, z0, z1, fz, size, there)
        product *= _bilinear(yt, y0, y1, fy, t0, t1, ft, size, there)
        product *= _bilinear(zt, z0, z1, fz, t0, t1, ft, size, there)
        tl.store(out + i[:, None] * width + first + tl.arange(0, 32)[None, :], product, mask=there)

    @triton.jit  # type: ignore[untyped-decorator]
    def _backward(  # type: ignore[no-untyped-def]
        places, time, xy, xz, xt, yz, yt, zt, g_xy, g_xz, g_xt, g_yz, g_yt, g_zt, grad, of_places,
        n, size, times, width, first, points: tl.constexpr,
    ):  # fmt: skip
        """The gradients of a level's planes and places; the letters a to f are the samples of the six planes."""
        i = tl.program_id(0) * points + tl.arange(0, points)
        inside = i < n
        there = inside[:, None]
        x0, x1, fx, in_x, y0, y1, fy, in_y, z0, z1, fz, in_z, t0, t1, ft = _cells(
            places, time, i, inside, size, times, points
        )
        a = _bilinear(xy, x0, x1, fx, y0, y1, fy, size, there)
        b = _bilinear(xz, x0, x1, fx, z0, z1, fz, size, there)
        c = _bilinear(xt, x0, x1, fx, t0, t1, ft, size, there)
        d = _bilinear(yz, y0, y1, fy, z0, z1, fz, size, there)
        e = _bilinear(yt, y0, y1, fy, t0, t1, ft, size, there)
        f = _bilinear(zt, z0, z1, fz, t0, t1, ft, size, there)
        g = tl.load(grad + i[:, None] * width + first + tl.arange(0, 32)[None, :], mask=there, other=0.0)
        ab, ef = a * b, e * f
        cd = c * d
        gx1, gy1 = _spread(xy, g_xy, g * b * cd * ef, x0, x1, fx, y0, y1, fy, size, there)
        gx2, gz1 = _spread(xz, g_xz, g * a * cd * ef, x0, x1, fx, z0, z1, fz, size, there)
        gx3, _ = _spread(xt, g_xt, g * ab * d * ef, x0, x1, fx, t0, t1, ft, size, there)
        gy2, gz2 = _spread(yz, g_yz, g * ab * c * ef, y0, y1, fy, z0, z1, fz, size, there)
        gy3, _ = _spread(yt, g_yt, g * ab * cd * f, y0, y1, fy, t0, t1, ft, size, there)
        gz3, _ = _spread(zt, g_zt, g * ab * cd * e, z0, z1, fz, t0, t1, ft, size, there)
        cells = 0.5 * (size - 1)
        tl.store(of_places + i * 3, tl.where(in_x, (gx1 + gx2 + gx3) * cells, 0.0), mask=inside)
        tl.store(of_places + i * 3 + 1, tl.where(in_y, (gy1 + gy2 + gy3) * cells, 0.0), mask=inside)
        tl.store(of_places + i * 3 + 2, tl.where(in_z, (gz1 + gz2 + gz3) * cells, 0.0), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _add_roughness(plane, grad, n, row, height, smooth, ones, elements: tl.constexpr):  # type: ignore[no-untyped-def]
        """Add the gradients of the squared second differences along the first axis, and of |1 - plane|."""
        i = tl.program_id(0) * elements + tl.arange(0, elements)
        inside = i < n
        y = i // row
        p = tl.load(plane + i, mask=inside, other=0.0)
        before = tl.load(plane + i - row, mask=inside & (y >= 1), other=0.0)
        before2 = tl.load(plane + i - 2 * row, mask=inside & (y >= 2), other=0.0)
        after = tl.load(plane + i + row, mask=inside & (y + 1 < height), other=0.0)
        after2 = tl.load(plane + i + 2 * row, mask=inside & (y + 2 < height), other=0.0)
        total = tl.where(y + 2 < height, p - 2 * after + after2, 0.0)
        total -= 2 * tl.where((y >= 1) & (y + 1 < height), before - 2 * p + after, 0.0)
        total += tl.where(y >= 2, before2 - 2 * before + p, 0.0)
        sign = tl.where(p > 1.0, 1.0, tl.where(p < 1.0, -1.0, 0.0))
        old = tl.load(grad + i, mask=inside, other=0.0)
        tl.store(grad + i, old + smooth * total + ones * sign, mask=inside)
