"""Carving on a GPU as Triton kernels, a thread for each voxel.

In PyTorch's functions it is a hundred passes over arrays of all views of all voxels, for an animal that fills a few
percent of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model import triton_support

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without
    triton = None

VOXELS = 128  # of a block of threads
WIDEST = 5  # window that a kernel goes through both ways: its loops are unrolled
OPAQUE = 1024  # an opaque voxel, where voxels are counted: sums of whole numbers are the same in any order


def works(device: int) -> bool:
    """Whether the kernels run on this CUDA device."""
    return triton_support.work(_attempt, device)


def takes(values: Tensor) -> bool:
    """Whether the kernels can work on these: float32 on a GPU where they run."""
    return triton_support.take(_attempt, values)


def _attempt(cuda: torch.device) -> None:
    one = torch.ones(1, 2, 2, device=cuda)
    matrix = torch.eye(3, 4, device=cuda)[None]
    used = torch.ones(1, dtype=torch.bool, device=cuda)
    points = one.new_ones(1, 1, 1, 3)
    carve(one[..., None].expand(1, 2, 2, 3), one, matrix, points, 1.0, 1, 0.0, 0.5, used)
    voxel = one[:, :1, :1]
    need(voxel, one, matrix, matrix[:, :, :3], points, 1.0, 1.0, 0.0, used)(voxel)
    look_up(one[..., None].expand(1, 2, 2, 3), one, matrix, points.view(1, 3), used, 1.0, 1, 0.5, used)


def carve(
    rgb: Tensor,
    mask: Tensor,
    matrices: Tensor,
    points: Tensor,
    voxel_size_m: float,
    footprint_px: int,
    fill_color: float,
    hidden_weight: float,
    used: Tensor,
) -> Tensor:
    """`carving.carve` of float32 tensors on one device; `matrices` [V, 3, 4] are intrinsics times poses."""
    n_views, h, w = mask.shape
    shape = points.shape[:3]
    points = points.reshape(-1, 3).contiguous()
    n = len(points)
    rgb, mask, matrices, used = rgb.contiguous(), mask.contiguous(), matrices.contiguous(), used.view(torch.uint8)
    layers = _masked(rgb, mask, footprint_px)
    # Depths of the nearest solid voxels, of the smaller hull and of the larger one; as integers, for atomic minima:
    # positive floats are in the order of their bits.
    front = points.new_full((2, n_views, h, w), torch.inf)
    hulls, volume = points.new_empty(2, n), points.new_empty(8, n)
    blocks = (triton.cdiv(n, VOXELS),)
    _hulls[blocks](points, matrices, layers, used, hulls, front.view(torch.int32), n, n_views, h, w, VOXELS)
    front = _least_of_windows(front, footprint_px, (-1, -2))
    _colors[blocks](
        points, matrices, layers, mask, used, hulls, front, volume,
        n, n_views, h, w, float(voxel_size_m), float(fill_color), float(hidden_weight), VOXELS,
    )  # fmt: skip
    return volume.view(8, *shape)


def need(
    hull: Tensor,
    mask: Tensor,
    matrices: Tensor,
    intrinsics: Tensor,
    points: Tensor,
    voxel_size_m: float,
    slope: float,
    middle: float,
    used: Tensor,
) -> Callable[[Tensor], Tensor]:
    """`carving.need` of float32 tensors on one device; `matrices` [V, 3, 4] are intrinsics times poses."""
    n_views, h, w = mask.shape
    hull, mask, points, matrices, intrinsics = (v.contiguous() for v in (hull, mask, points, matrices, intrinsics))
    n = hull.numel()
    given = (hull, points, matrices, intrinsics, used.view(torch.uint8))
    sizes = (n, n_views, h, w, float(voxel_size_m))
    blocks = (triton.cdiv(n, VOXELS),)

    def needed(occupancy: Tensor) -> Tensor:
        occupancy = occupancy.contiguous()
        counts = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
        found = torch.empty_like(occupancy)
        _count[blocks](occupancy, *given, counts, *sizes, float(slope), float(middle), OPAQUE, VOXELS)
        _needed[blocks](found, *given, mask, counts, *sizes, OPAQUE, VOXELS)
        return found

    return needed


def look_up(
    rgb: Tensor,
    mask: Tensor,
    matrices: Tensor,
    points: Tensor,
    solid: Tensor,
    voxel_size_m: float,
    footprint_px: int,
    behind_weight: float,
    used: Tensor,
) -> tuple[Tensor, Tensor]:
    """`carving.look_up` of float32 tensors on one device; `matrices` [V, 3, 4] are intrinsics times poses."""
    n_views, h, w = mask.shape
    rgb, mask, points, matrices = (v.contiguous() for v in (rgb, mask, points, matrices))
    solid, used = solid.contiguous().view(torch.uint8), used.view(torch.uint8)
    n = len(points)
    front = points.new_full((n_views, h, w), torch.inf)
    size = footprint_px if footprint_px <= WIDEST else 1
    colors, seen = torch.empty_like(points), solid.new_empty(n, dtype=torch.bool)
    blocks = (triton.cdiv(n, VOXELS),)
    _solid_front[blocks](points, matrices, solid, front.view(torch.int32), n, n_views, h, w, VOXELS)
    if footprint_px > WIDEST:
        front = _least_of_windows(front, footprint_px, (-1, -2))
    _look_up[blocks](
        points, matrices, rgb, mask, used, front, colors, seen.view(torch.uint8),
        n, n_views, h, w, float(voxel_size_m), float(behind_weight), size, VOXELS,
    )  # fmt: skip
    return colors, seen


def least_around(values: Tensor, size: int, axes: Sequence[int] = (-1, -2)) -> Tensor:
    """The least in the window of `size` (odd) elements each way along the axes; what is outside does not count.

    As `-F.max_pool2d(-values, size, 1, size // 2)`, which also finds where they are, and took 0.1 ms of a frame's
    2.4 on an H200.

    Args:
        axes: counted from the last, which is -1.
    """
    if takes(values):
        return _least_of_windows(values, size, axes)
    for axis in axes:
        wide = F.pad(values, [*[0, 0] * (-1 - axis), size // 2, size // 2], value=torch.inf)
        n = values.shape[axis]
        values = wide.narrow(axis, 0, n)
        for k in range(1, size):
            values = torch.minimum(values, wide.narrow(axis, k, n))
    return values


def _masked(rgb: Tensor, mask: Tensor, size: int) -> Tensor:
    """Picture times mask, and mask, as [V, h, w, 4]: means over windows of `size` pixels each way, 0 outside."""
    pixels, (h, w) = mask.numel(), mask.shape[1:]
    if size <= WIDEST:
        layers = rgb.new_empty(*mask.shape, 4)
        _layers[(triton.cdiv(pixels, VOXELS),)](rgb, mask, layers, pixels, h, w, size, VOXELS)
        return layers
    layers = torch.cat([rgb * mask[..., None], mask[..., None]], -1).permute(0, 3, 1, 2)
    # Channels first: the other layout's kernel took 0.14 ms of a frame's 2.4 on an H200.
    layers = F.avg_pool2d(layers.contiguous(), size, stride=1, padding=size // 2)
    return layers.permute(0, 2, 3, 1).contiguous()


def _least_of_windows(values: Tensor, size: int, axes: Sequence[int]) -> Tensor:
    values = values.contiguous()
    n = values.numel()
    for axis in axes:
        found = torch.empty_like(values)
        stride, length = values.stride(axis), values.shape[axis]
        _least[(triton.cdiv(n, 4 * VOXELS),)](values, found, n, length, stride, size, 4 * VOXELS)
        values = found
    return values


if triton is not None:

    @triton.jit
    def _projected(points_ptr, matrices_ptr, v, i, inside, h, w):  # type: ignore[no-untyped-def]
        """Place (pixels) and depth of voxels i in view v, whether they lie in the window, and their nearest pixel."""
        px = tl.load(points_ptr + 3 * i, mask=inside, other=0.0)
        py = tl.load(points_ptr + 3 * i + 1, mask=inside, other=0.0)
        pz = tl.load(points_ptr + 3 * i + 2, mask=inside, other=0.0)
        m = matrices_ptr + 12 * v
        x = tl.load(m) * px + tl.load(m + 1) * py + tl.load(m + 2) * pz + tl.load(m + 3)
        y = tl.load(m + 4) * px + tl.load(m + 5) * py + tl.load(m + 6) * pz + tl.load(m + 7)
        depth = tl.load(m + 8) * px + tl.load(m + 9) * py + tl.load(m + 10) * pz + tl.load(m + 11)
        near = tl.maximum(depth, 1e-9)
        # What is far outside stays outside, at numbers that are whole numbers too.
        x = tl.minimum(tl.maximum(x / near, -2.0), w + 1.0)
        y = tl.minimum(tl.maximum(y / near, -2.0), h + 1.0)
        in_window = inside & (depth > 0) & (x >= -0.5) & (x < w - 0.5) & (y >= -0.5) & (y < h - 0.5)
        column = tl.minimum(tl.maximum(x + 0.5, 0.0), w - 1.0).to(tl.int32)
        row = tl.minimum(tl.maximum(y + 0.5, 0.0), h - 1.0).to(tl.int32)
        return x, y, depth, in_window, row * w + column

    @triton.jit
    def _layer(layers_ptr, v, x, y, h, w, channel, wanted):  # type: ignore[no-untyped-def]
        """A channel of view v's layers [h, w, 4] at places: bilinear, 0 outside."""
        left, top = tl.floor(x), tl.floor(y)
        right_part, low_part = x - left, y - top
        column, row = left.to(tl.int32), top.to(tl.int32)
        total = x * 0.0
        for dy in tl.static_range(2):
            for dx in tl.static_range(2):
                c, r = column + dx, row + dy
                here = wanted & (c >= 0) & (c < w) & (r >= 0) & (r < h)
                value = tl.load(layers_ptr + ((v * h + r) * w + c) * 4 + channel, mask=here, other=0.0)
                across = right_part if dx == 1 else 1 - right_part
                down = low_part if dy == 1 else 1 - low_part
                total += across * down * value
        return total

    @triton.jit  # type: ignore[untyped-decorator]
    def _least(  # type: ignore[no-untyped-def]
        values_ptr, found_ptr, n, length, stride, size: tl.constexpr, elements: tl.constexpr
    ):
        """The least of `size` values along an axis of some length and stride."""
        i = tl.program_id(0) * elements + tl.arange(0, elements)
        at = (i // stride) % length
        least = tl.full((elements,), float("inf"), tl.float32)
        for k in tl.static_range(size):
            off = k - size // 2
            here = (i < n) & (at + off >= 0) & (at + off < length)
            least = tl.minimum(least, tl.load(values_ptr + i + off * stride, mask=here, other=float("inf")))
        tl.store(found_ptr + i, least, mask=i < n)

    @triton.jit  # type: ignore[untyped-decorator]
    def _layers(  # type: ignore[no-untyped-def]
        rgb_ptr, mask_ptr, layers_ptr, n, h, w, size: tl.constexpr, pixels: tl.constexpr
    ):
        """As `_masked`."""
        i = tl.program_id(0) * pixels + tl.arange(0, pixels)
        row, column = (i // w) % h, i % w
        covered = tl.zeros((pixels,), tl.float32)
        red, green, blue = covered * 0, covered * 0, covered * 0
        for dy in tl.static_range(size):
            for dx in tl.static_range(size):
                r, c = row + (dy - size // 2), column + (dx - size // 2)
                here = (i < n) & (r >= 0) & (r < h) & (c >= 0) & (c < w)
                there = i + (dy - size // 2) * w + (dx - size // 2)
                inside = tl.load(mask_ptr + there, mask=here, other=0.0)
                covered += inside
                here &= inside > 0  # most pixels are background
                red += inside * tl.load(rgb_ptr + 3 * there, mask=here, other=0.0)
                green += inside * tl.load(rgb_ptr + 3 * there + 1, mask=here, other=0.0)
                blue += inside * tl.load(rgb_ptr + 3 * there + 2, mask=here, other=0.0)
        share: tl.constexpr = 1 / (size * size)
        tl.store(layers_ptr + 4 * i, red * share, mask=i < n)
        tl.store(layers_ptr + 4 * i + 1, green * share, mask=i < n)
        tl.store(layers_ptr + 4 * i + 2, blue * share, mask=i < n)
        tl.store(layers_ptr + 4 * i + 3, covered * share, mask=i < n)

    @triton.jit  # type: ignore[untyped-decorator]
    def _solid_front(  # type: ignore[no-untyped-def]
        points_ptr, matrices_ptr, solid_ptr, front_ptr, n, n_views, h, w, voxels: tl.constexpr
    ):
        """The depths of solid points into the views' pixels [V, h w]."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        solid = tl.load(solid_ptr + i, mask=i < n, other=0) != 0
        for v in range(n_views):
            _, _, depth, in_window, nearest = _projected(points_ptr, matrices_ptr, v, i, i < n, h, w)
            bits = depth.to(tl.int32, bitcast=True)
            tl.atomic_min(front_ptr + v * h * w + nearest, bits, mask=in_window & solid)

    @triton.jit  # type: ignore[untyped-decorator]
    def _look_up(  # type: ignore[no-untyped-def]
        points_ptr, matrices_ptr, rgb_ptr, mask_ptr, used_ptr, front_ptr, colors_ptr, seen_ptr,
        n, n_views, h, w, voxel_size, behind_weight, size: tl.constexpr, voxels: tl.constexpr,
    ):  # fmt: skip
        """Colours [n, 3] of points, and whether there are any [n]."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        total = tl.zeros((voxels,), tl.float32)
        red, green, blue = total * 0, total * 0, total * 0
        for v in range(n_views):
            if tl.load(used_ptr + v) != 0:
                x, y, depth, in_window, nearest = _projected(points_ptr, matrices_ptr, v, i, inside, h, w)
                row, column = nearest // w, nearest % w
                front = tl.full((voxels,), float("inf"), tl.float32)
                for dy in tl.static_range(size):
                    for dx in tl.static_range(size):
                        r, c = row + (dy - size // 2), column + (dx - size // 2)
                        here = in_window & (r >= 0) & (r < h) & (c >= 0) & (c < w)
                        other = tl.load(front_ptr + (v * h + r) * w + c, mask=here, other=float("inf"))
                        front = tl.minimum(front, other)
                weight = tl.where(in_window, tl.where(depth <= front + 2 * voxel_size, 1.0, behind_weight), 0.0)
                left, top = tl.floor(x), tl.floor(y)
                for dy in tl.static_range(2):
                    for dx in tl.static_range(2):
                        c, r = left.to(tl.int32) + dx, top.to(tl.int32) + dy
                        here = in_window & (c >= 0) & (c < w) & (r >= 0) & (r < h)
                        there = (v * h + r) * w + c
                        share = weight * tl.load(mask_ptr + there, mask=here, other=0.0)
                        share *= (x - left if dx == 1 else 1 - (x - left)) * (y - top if dy == 1 else 1 - (y - top))
                        total += share
                        red += share * tl.load(rgb_ptr + 3 * there, mask=here, other=0.0)
                        green += share * tl.load(rgb_ptr + 3 * there + 1, mask=here, other=0.0)
                        blue += share * tl.load(rgb_ptr + 3 * there + 2, mask=here, other=0.0)
        least = tl.maximum(total, 1e-6)
        tl.store(colors_ptr + 3 * i, red / least, mask=inside)
        tl.store(colors_ptr + 3 * i + 1, green / least, mask=inside)
        tl.store(colors_ptr + 3 * i + 2, blue / least, mask=inside)
        tl.store(seen_ptr + i, (total > 0.01).to(tl.uint8), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _hulls(  # type: ignore[no-untyped-def]
        points_ptr, matrices_ptr, layers_ptr, used_ptr, hulls_ptr, front_ptr, n, n_views, h, w, voxels: tl.constexpr
    ):
        """Occupancies of both hulls [2, n], and the depths of their solid voxels into the views' pixels [2, V, h w]."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        least = tl.full((voxels,), float("inf"), tl.float32)
        second = tl.full((voxels,), float("inf"), tl.float32)
        for v in range(n_views):
            x, y, depth, _, _ = _projected(points_ptr, matrices_ptr, v, i, inside, h, w)
            covered = _layer(layers_ptr, v, x, y, h, w, 3, inside & (depth > 0))
            covered = tl.where(tl.load(used_ptr + v) != 0, covered, float("inf"))
            second = tl.minimum(second, tl.maximum(least, covered))
            least = tl.minimum(least, covered)
        second = tl.where(second == float("inf"), least, second)
        tl.store(hulls_ptr + i, least, mask=inside)
        tl.store(hulls_ptr + n + i, second, mask=inside)
        if tl.max(tl.where(inside, second, 0.0), 0) >= 0.5:
            for v in range(n_views):
                _, _, depth, in_window, nearest = _projected(points_ptr, matrices_ptr, v, i, inside, h, w)
                bits = depth.to(tl.int32, bitcast=True)
                at = front_ptr + v * h * w + nearest
                tl.atomic_min(at, bits, mask=in_window & (least >= 0.5))
                tl.atomic_min(at + n_views * h * w, bits, mask=in_window & (second >= 0.5))

    @triton.jit  # type: ignore[untyped-decorator]
    def _colors(  # type: ignore[no-untyped-def]
        points_ptr, matrices_ptr, layers_ptr, mask_ptr, used_ptr, hulls_ptr, front_ptr, volume_ptr,
        n, n_views, h, w, voxel_size, fill_color, hidden_weight, voxels: tl.constexpr,
    ):  # fmt: skip
        """The volume [8, n] from the hulls and from what hides what."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        smaller = tl.load(hulls_ptr + i, mask=inside, other=0.0)
        larger = tl.load(hulls_ptr + n + i, mask=inside, other=0.0)
        red, green, blue = tl.zeros((voxels,), tl.float32), smaller * 0, smaller * 0
        spread, seen_share, bare = smaller * 0, smaller * 0, smaller * 0
        if tl.max(larger, 0) == 0:  # nothing here
            red += fill_color
            green += fill_color
            blue += fill_color
        else:
            counted = 0
            for v in range(n_views):
                counted += tl.load(used_ptr + v)
            for hull in tl.static_range(2):
                occupied = (smaller if hull == 0 else larger) > 0
                there = front_ptr + hull * n_views * h * w
                weights, r, g, b = smaller * 0, smaller * 0, smaller * 0, smaller * 0
                for v in range(n_views):
                    x, y, depth, in_window, nearest = _projected(points_ptr, matrices_ptr, v, i, inside, h, w)
                    front = tl.load(there + v * h * w + nearest, mask=inside, other=0.0)
                    given = (tl.load(used_ptr + v) != 0) & (depth > 0)
                    seen = depth <= front + voxel_size
                    weight = tl.where(given, tl.where(seen, 1.0, hidden_weight), 0.0)
                    weights += weight * _layer(layers_ptr, v, x, y, h, w, 3, occupied)
                    r += weight * _layer(layers_ptr, v, x, y, h, w, 0, occupied)
                    g += weight * _layer(layers_ptr, v, x, y, h, w, 1, occupied)
                    b += weight * _layer(layers_ptr, v, x, y, h, w, 2, occupied)
                    seen_share += tl.where(occupied & seen & given, 0.5, 0.0)
                    if hull == 0:
                        on_animal = tl.load(mask_ptr + v * h * w + nearest, mask=in_window, other=0.0) > 0.5
                        alone = in_window & on_animal & (front == float("inf")) & (tl.load(used_ptr + v) != 0)
                        bare += tl.where(alone & (larger > 0), 1.0, 0.0)
                total = tl.maximum(weights, 1e-6)
                r, g, b = r / total, g / total, b / total
                off = smaller * 0
                for v in range(n_views):
                    x, y, depth, _, nearest = _projected(points_ptr, matrices_ptr, v, i, inside, h, w)
                    front = tl.load(there + v * h * w + nearest, mask=inside, other=0.0)
                    given = (tl.load(used_ptr + v) != 0) & (depth > 0)
                    weight = tl.where(given, tl.where(depth <= front + voxel_size, 1.0, hidden_weight), 0.0)
                    covered = _layer(layers_ptr, v, x, y, h, w, 3, occupied)
                    own = tl.maximum(covered, 1e-3)
                    off_r = _layer(layers_ptr, v, x, y, h, w, 0, occupied) / own - r
                    off_g = _layer(layers_ptr, v, x, y, h, w, 1, occupied) / own - g
                    off_b = _layer(layers_ptr, v, x, y, h, w, 2, occupied) / own - b
                    off += weight * covered * (off_r * off_r + off_g * off_g + off_b * off_b)
                spread += tl.where(occupied, 0.5 * tl.sqrt(off / total), 0.0)
                red += 0.5 * tl.where(occupied, r, fill_color)
                green += 0.5 * tl.where(occupied, g, fill_color)
                blue += 0.5 * tl.where(occupied, b, fill_color)
            seen_share /= n_views
            bare /= counted
        tl.store(volume_ptr + i, 0.5 * (smaller + larger), mask=inside)
        tl.store(volume_ptr + n + i, red, mask=inside)
        tl.store(volume_ptr + 2 * n + i, green, mask=inside)
        tl.store(volume_ptr + 3 * n + i, blue, mask=inside)
        tl.store(volume_ptr + 4 * n + i, smaller, mask=inside)
        tl.store(volume_ptr + 5 * n + i, bare, mask=inside)
        tl.store(volume_ptr + 6 * n + i, spread, mask=inside)
        tl.store(volume_ptr + 7 * n + i, seen_share, mask=inside)

    @triton.jit
    def _counted(x, y, matrices_ptr, intrinsics_ptr, v, h, w, voxel_size):  # type: ignore[no-untyped-def]
        """Row and column of the larger pixels that voxels are counted in, and a voxel's size in them at depth 1."""
        wide = tl.sqrt(tl.load(intrinsics_ptr + 9 * v) * tl.load(intrinsics_ptr + 9 * v + 4)) * voxel_size
        per_pixel = tl.minimum(tl.load(matrices_ptr + 12 * v + 11) / wide, 1.0)
        column = (tl.minimum(tl.maximum(x + 0.5, 0.0), w - 1.0) * per_pixel).to(tl.int32)
        row = (tl.minimum(tl.maximum(y + 0.5, 0.0), h - 1.0) * per_pixel).to(tl.int32)
        return row, column, wide * per_pixel

    @triton.jit  # type: ignore[untyped-decorator]
    def _count(  # type: ignore[no-untyped-def]
        occupancy_ptr, hull_ptr, points_ptr, matrices_ptr, intrinsics_ptr, used_ptr, counts_ptr,
        n, n_views, h, w, voxel_size, slope, middle, opaque: tl.constexpr, voxels: tl.constexpr,
    ):  # fmt: skip
        """How many voxels [V, h, w] lie on the lines of sight."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        hull = tl.load(hull_ptr + i, mask=inside, other=0.0) > 0
        if tl.max(hull.to(tl.int32), 0) > 0:
            occupancy = tl.load(occupancy_ptr + i, mask=hull, other=0.0)
            share = (opaque / (1 + tl.exp(-slope * (occupancy - middle))) + 0.5).to(tl.int32)
            for v in range(n_views):
                if tl.load(used_ptr + v) != 0:
                    x, y, _, in_window, _ = _projected(points_ptr, matrices_ptr, v, i, inside, h, w)
                    row, column, _ = _counted(x, y, matrices_ptr, intrinsics_ptr, v, h, w, voxel_size)
                    there = counts_ptr + (v * h + row) * w + column
                    tl.atomic_add(there, share, mask=hull & in_window & (share > 0))

    @triton.jit  # type: ignore[untyped-decorator]
    def _needed(  # type: ignore[no-untyped-def]
        found_ptr, hull_ptr, points_ptr, matrices_ptr, intrinsics_ptr, used_ptr, mask_ptr, counts_ptr,
        n, n_views, h, w, voxel_size, opaque: tl.constexpr, voxels: tl.constexpr,
    ):  # fmt: skip
        """How much voxels [n] are needed, from the counts."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        hull = tl.load(hull_ptr + i, mask=inside, other=0.0) > 0
        most = tl.zeros((voxels,), tl.float32)
        if tl.max(hull.to(tl.int32), 0) > 0:
            for v in range(n_views):
                if tl.load(used_ptr + v) != 0:
                    x, y, depth, in_window, nearest = _projected(points_ptr, matrices_ptr, v, i, inside, h, w)
                    row, column, wide = _counted(x, y, matrices_ptr, intrinsics_ptr, v, h, w, voxel_size)
                    shown = hull & in_window
                    shown &= tl.load(mask_ptr + v * h * w + nearest, mask=shown, other=0.0) > 0.5
                    total = x * 0.0
                    for dy in tl.static_range(3):
                        for dx in tl.static_range(3):
                            r, c = row + (dy - 1), column + (dx - 1)
                            here = shown & (r >= 0) & (r < h) & (c >= 0) & (c < w)
                            value = tl.load(counts_ptr + (v * h + r) * w + c, mask=here, other=0)
                            total += (0.5 if dy == 1 else 0.25) * (0.5 if dx == 1 else 0.25) * value
                    wide /= tl.maximum(depth, 1e-9)
                    thick = total / opaque * wide * wide
                    most = tl.maximum(most, tl.where(shown, 1 / tl.maximum(thick, 1.0), 0.0))
        tl.store(found_ptr + i, most, mask=inside)
