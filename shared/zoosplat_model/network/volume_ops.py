"""What the U-Nets do to volumes besides convolutions: instance normalisation with a leaky ReLU, and max pooling.

On a GPU these are Triton kernels in the channels-last layout, which cuDNN's convolutions are fastest in. Plain PyTorch
needs a dozen launches for each and converts layouts back and forth, and its BatchNorm3d runs one block of threads for
each channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model import triton_support

EPSILON = 1e-5  # added to variances, as in PyTorch's BatchNorm3d
LEAKY_SLOPE = 0.01  # slope of the leaky ReLU below 0, PyTorch's default

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None


def instance_norm_leaky_relu(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """leaky_relu(gain * (x - mean) / sqrt(variance + 1e-5) + shift), with the statistics of each channel of a volume.

    Args:
        x: [B, c, n1, n2, n3] float32 or bfloat16; statistics are computed in float32.
        gain: [c] float32.
        shift: [c] float32.
    """
    if _fits_kernels(x):
        result: Tensor = _InstanceNormLeakyReLU.apply(x, gain, shift)
        return result
    return instance_norm_leaky_relu_reference(x, gain, shift)


def instance_norm_leaky_relu_reference(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """`instance_norm_leaky_relu` in plain PyTorch."""
    variance, mean = torch.var_mean(x.float(), dim=(2, 3, 4), keepdim=True, correction=0)
    scale = gain.view(1, -1, 1, 1, 1) * torch.rsqrt(variance + EPSILON)
    y = torch.addcmul(shift.view(1, -1, 1, 1, 1) - mean * scale, x, scale)
    return F.leaky_relu(y, LEAKY_SLOPE).to(x.dtype)


def max_pool2(x: Tensor) -> Tensor:
    """Maxima of blocks of 2 x 2 x 2 voxels: [B, c, n1, n2, n3], all even, to [B, c, n1 / 2, n2 / 2, n3 / 2]."""
    if _fits_kernels(x):
        result: Tensor = _MaxPool2.apply(x)
        return result
    return F.max_pool3d(x, 2)


def _fits_kernels(x: Tensor) -> bool:
    # A row of the kernels' tiles holds the channels of a voxel, and Triton requires their number to be a power of 2.
    return x.is_cuda and x.shape[1] & (x.shape[1] - 1) == 0 and triton_support.runs_on(_probe, x.get_device())


def _probe(cuda: torch.device) -> None:
    x = torch.zeros(1, 16, 2, 2, 2, device=cuda)
    _InstanceNormLeakyReLU.apply(x, x.new_ones(16), x.new_zeros(16))


if triton is not None:

    @triton.jit
    def _merge_moments(sums, squares, counts):  # type: ignore[no-untyped-def]
        """Merge the means, sums of squared deviations and counts of blocks to mean and variance (Chan 1979)."""
        n = tl.sum(counts, 0)
        mean = tl.sum(sums * counts, 0) / n
        off = sums - mean[None, :]
        return mean, (tl.sum(squares, 0) + tl.sum(off * off * counts, 0)) / n

    @triton.jit  # type: ignore[untyped-decorator]
    def _measure_moments(x_ptr, part_ptr, n, per_block, c: tl.constexpr, rows: tl.constexpr):  # type: ignore[no-untyped-def]
        """The mean of each channel in each block, and the sum of its squared deviations from it."""
        block, batch = tl.program_id(0), tl.program_id(1)
        channel = tl.arange(0, c)
        start = block * per_block
        stop = tl.minimum(start + per_block, n)
        total = tl.zeros((c,), tl.float32)
        squares = tl.zeros((c,), tl.float32)
        # Deviations are taken from the first voxel, because sums of squares lose the variance where means are large.
        x_ptr += batch.to(tl.int64) * n * c
        first = tl.load(x_ptr + tl.minimum(start, n - 1) * c + channel).to(tl.float32)
        for row in range(start, stop, rows):
            at = row + tl.arange(0, rows)
            inside = (at < stop)[:, None]
            x = tl.load(x_ptr + at[:, None] * c + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - first[None, :], 0.0)
            total += tl.sum(x, 0)
            squares += tl.sum(x * x, 0)
        count = tl.maximum(stop - start, 0).to(tl.float32)
        mean = total / tl.maximum(count, 1.0)
        part_ptr += ((batch * tl.num_programs(0) + block) * 2) * c
        tl.store(part_ptr + channel, mean + first)
        tl.store(part_ptr + c + channel, squares - mean * total)

    @triton.jit  # type: ignore[untyped-decorator]
    def _normalize(  # type: ignore[no-untyped-def]
        x_ptr, part_ptr, gain_ptr, shift_ptr, y_ptr, stats_ptr, n, per_block,
        c: tl.constexpr, rows: tl.constexpr, blocks: tl.constexpr, eps: tl.constexpr, slope: tl.constexpr,
    ):  # fmt: skip
        """Normalise and apply the leaky ReLU; the first block also stores mean and inverse deviation."""
        block, batch = tl.program_id(0), tl.program_id(1)
        channel = tl.arange(0, c)
        part = tl.arange(0, blocks)
        counts = tl.minimum(tl.maximum(n - part * per_block, 0), per_block).to(tl.float32)[:, None]
        part_ptr += batch * blocks * 2 * c
        means = tl.load(part_ptr + part[:, None] * (2 * c) + channel[None, :])
        squares = tl.load(part_ptr + part[:, None] * (2 * c) + c + channel[None, :])
        mean, variance = _merge_moments(means, squares, counts)
        inverse = 1.0 / tl.sqrt(variance + eps)
        if block == 0:
            tl.store(stats_ptr + batch * 2 * c + channel, mean)
            tl.store(stats_ptr + batch * 2 * c + c + channel, inverse)
        scale = tl.load(gain_ptr + channel) * inverse
        offset = tl.load(shift_ptr + channel) - mean * scale
        x_ptr += batch.to(tl.int64) * n * c
        y_ptr += batch.to(tl.int64) * n * c
        start = block * per_block
        stop = tl.minimum(start + per_block, n)
        for row in range(start, stop, rows):
            at = row + tl.arange(0, rows)
            inside = (at < stop)[:, None]
            x = tl.load(x_ptr + at[:, None] * c + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            y = x * scale[None, :] + offset[None, :]
            y = tl.where(y > 0, y, y * slope)
            tl.store(y_ptr + at[:, None] * c + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _gradient_before_activation(  # type: ignore[no-untyped-def]
        x_ptr, g_ptr, place, inside, mean, inverse, gain, shift, slope: tl.constexpr
    ):
        """The normalised input of voxels, and the gradient before the leaky ReLU."""
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
        unit = (x - mean[None, :]) * inverse[None, :]
        return unit, tl.where(unit * gain[None, :] + shift[None, :] > 0, g, g * slope)

    @triton.jit  # type: ignore[untyped-decorator]
    def _sum_gradients(  # type: ignore[no-untyped-def]
        x_ptr, g_ptr, gain_ptr, shift_ptr, stats_ptr, part_ptr, n, per_block,
        c: tl.constexpr, rows: tl.constexpr, slope: tl.constexpr,
    ):  # fmt: skip
        """The sums over a block of dy and of dy * xhat, where dy is the gradient before the leaky ReLU."""
        block, batch = tl.program_id(0), tl.program_id(1)
        channel = tl.arange(0, c)
        mean = tl.load(stats_ptr + batch * 2 * c + channel)
        inverse = tl.load(stats_ptr + batch * 2 * c + c + channel)
        gain, shift = tl.load(gain_ptr + channel), tl.load(shift_ptr + channel)
        x_ptr += batch.to(tl.int64) * n * c
        g_ptr += batch.to(tl.int64) * n * c
        start = block * per_block
        stop = tl.minimum(start + per_block, n)
        total = tl.zeros((c,), tl.float32)
        along = tl.zeros((c,), tl.float32)
        for row in range(start, stop, rows):
            at = row + tl.arange(0, rows)
            inside = (at < stop)[:, None]
            place = at[:, None] * c + channel[None, :]
            unit, g = _gradient_before_activation(x_ptr, g_ptr, place, inside, mean, inverse, gain, shift, slope)
            total += tl.sum(g, 0)
            along += tl.sum(tl.where(inside, g * unit, 0.0), 0)
        part_ptr += ((batch * tl.num_programs(0) + block) * 2) * c
        tl.store(part_ptr + channel, total)
        tl.store(part_ptr + c + channel, along)

    @triton.jit  # type: ignore[untyped-decorator]
    def _normalize_backward(  # type: ignore[no-untyped-def]
        x_ptr, g_ptr, gain_ptr, shift_ptr, stats_ptr, part_ptr, dx_ptr, sums_ptr, n, per_block,
        c: tl.constexpr, rows: tl.constexpr, blocks: tl.constexpr, slope: tl.constexpr,
    ):  # fmt: skip
        """The gradient of the input; the first block also stores those of gain and shift."""
        block, batch = tl.program_id(0), tl.program_id(1)
        channel = tl.arange(0, c)
        part = tl.arange(0, blocks)
        part_ptr += batch * blocks * 2 * c
        total = tl.sum(tl.load(part_ptr + part[:, None] * (2 * c) + channel[None, :]), 0)
        along = tl.sum(tl.load(part_ptr + part[:, None] * (2 * c) + c + channel[None, :]), 0)
        if block == 0:
            tl.store(sums_ptr + batch * 2 * c + channel, along)
            tl.store(sums_ptr + batch * 2 * c + c + channel, total)
        mean = tl.load(stats_ptr + batch * 2 * c + channel)
        inverse = tl.load(stats_ptr + batch * 2 * c + c + channel)
        gain, shift = tl.load(gain_ptr + channel), tl.load(shift_ptr + channel)
        x_ptr += batch.to(tl.int64) * n * c
        g_ptr += batch.to(tl.int64) * n * c
        dx_ptr += batch.to(tl.int64) * n * c
        start = block * per_block
        stop = tl.minimum(start + per_block, n)
        for row in range(start, stop, rows):
            at = row + tl.arange(0, rows)
            inside = (at < stop)[:, None]
            place = at[:, None] * c + channel[None, :]
            unit, g = _gradient_before_activation(x_ptr, g_ptr, place, inside, mean, inverse, gain, shift, slope)
            g = (g - total[None, :] / n - unit * along[None, :] / n) * (gain * inverse)[None, :]
            tl.store(dx_ptr + place, g.to(dx_ptr.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _first_of_eight(at, n2, n3, c: tl.constexpr):  # type: ignore[no-untyped-def]
        """Where in the larger volume the first of the 8 voxels that belong to each voxel `at` of the smaller begins."""
        z, rest = at % n3, at // n3
        y, x = rest % n2, rest // n2
        return ((2 * x * (2 * n2) + 2 * y) * (2 * n3) + 2 * z) * c

    @triton.jit  # type: ignore[untyped-decorator]
    def _max_pool2_forward(x_ptr, y_ptr, n, n2, n3, c: tl.constexpr, rows: tl.constexpr):  # type: ignore[no-untyped-def]
        """Maxima of blocks of 8 voxels, for n voxels of the smaller volume."""
        at = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
        inside = (at < n)[:, None]
        channel = tl.arange(0, c)[None, :]
        first = x_ptr + _first_of_eight(at, n2, n3, c)[:, None] + channel
        best = tl.load(first, mask=inside)
        for k in tl.static_range(1, 8):
            step = (((k >> 2) * 2 * n2 + ((k >> 1) & 1)) * 2 * n3 + (k & 1)) * c
            best = tl.maximum(best, tl.load(first + step, mask=inside))
        tl.store(y_ptr + at[:, None] * c + channel, best, mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _max_pool2_backward(  # type: ignore[no-untyped-def]
        x_ptr, y_ptr, g_ptr, dx_ptr, n, n2, n3, c: tl.constexpr, rows: tl.constexpr
    ):
        """The gradient of the input: that of a maximum goes to the first of the 8 voxels that have it."""
        at = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
        inside = (at < n)[:, None]
        channel = tl.arange(0, c)[None, :]
        start = _first_of_eight(at, n2, n3, c)[:, None] + channel
        y = tl.load(y_ptr + at[:, None] * c + channel, mask=inside)
        g = tl.load(g_ptr + at[:, None] * c + channel, mask=inside)
        for k in tl.static_range(0, 8):
            step = (((k >> 2) * 2 * n2 + ((k >> 1) & 1)) * 2 * n3 + (k & 1)) * c
            hit = tl.load(x_ptr + start + step, mask=inside) == y
            tl.store(dx_ptr + start + step, tl.where(hit, g, 0.0), mask=inside)
            g = tl.where(hit, 0.0, g).to(g.dtype)


class _MaxPool2(torch.autograd.Function):
    @staticmethod
    def _launch(small: Tensor, kernel: Any, *tensors: Tensor) -> None:
        # The volumes of a batch follow each other in memory, like one volume that is longer along the first axis.
        channels, (n2, n3) = small.shape[1], small.shape[3:]
        rows = max(1024 // channels, 1)
        n = small.numel() // channels
        with torch.cuda.device(small.device):
            kernel[(triton.cdiv(n, rows),)](*tensors, n, n2, n3, c=channels, rows=rows)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        size = (len(x), x.shape[1], *(n // 2 for n in x.shape[2:]))
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        _MaxPool2._launch(y, _max_pool2_forward, x, y)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        x, y = ctx.saved_tensors
        g = gradients[0].contiguous(memory_format=torch.channels_last_3d)
        dx = torch.empty_like(x)
        _MaxPool2._launch(y, _max_pool2_backward, x, y, g, dx)
        return dx


class _InstanceNormLeakyReLU(torch.autograd.Function):
    @staticmethod
    def _shape(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
        """The grid of the kernels, and the sizes of their tiles."""
        channels, voxels = x.shape[1], x[0, 0].numel()
        rows = max(4096 // channels, 16)
        blocks = min(triton.next_power_of_2(triton.cdiv(voxels, rows)), 128)
        return (blocks, len(x)), {"n": voxels, "per_block": triton.cdiv(voxels, blocks), "c": channels, "rows": rows}

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        grid, sizes = _InstanceNormLeakyReLU._shape(x)
        part = gain.new_empty(len(x), grid[0], 2, len(gain))
        stats = gain.new_empty(len(x), 2, len(gain))
        y = torch.empty_like(x)
        with torch.cuda.device(x.device):
            _measure_moments[grid](x, part, **sizes)
            _normalize[grid](x, part, gain, shift, y, stats, **sizes, blocks=grid[0], eps=EPSILON, slope=LEAKY_SLOPE)
        ctx.save_for_backward(x, gain, shift, stats)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, gain, shift, stats = ctx.saved_tensors
        g = gradients[0].contiguous(memory_format=torch.channels_last_3d)
        grid, sizes = _InstanceNormLeakyReLU._shape(x)
        part = gain.new_empty(len(x), grid[0], 2, len(gain))
        sums = gain.new_empty(len(x), 2, len(gain))
        dx = torch.empty_like(x)
        with torch.cuda.device(x.device):
            _sum_gradients[grid](x, g, gain, shift, stats, part, **sizes, slope=LEAKY_SLOPE)
            _normalize_backward[grid](
                x, g, gain, shift, stats, part, dx, sums, **sizes, blocks=grid[0], slope=LEAKY_SLOPE
            )
        along, total = sums.sum(0).unbind() if len(x) > 1 else sums[0].unbind()
        return dx, along, total
