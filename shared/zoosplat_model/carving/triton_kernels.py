"""The Triton kernels of carving; `triton_backend` launches them."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

if triton is not None:

    @triton.jit
    def _project(points_ptr, matrices_ptr, v, i, inside, h, w):  # type: ignore[no-untyped-def]
        """Place (pixels) and depth of voxels i in view v, whether they lie in the window, and their nearest pixel."""
        px = tl.load(points_ptr + 3 * i, mask=inside, other=0.0)
        py = tl.load(points_ptr + 3 * i + 1, mask=inside, other=0.0)
        pz = tl.load(points_ptr + 3 * i + 2, mask=inside, other=0.0)
        m = matrices_ptr + 12 * v
        x = tl.load(m) * px + tl.load(m + 1) * py + tl.load(m + 2) * pz + tl.load(m + 3)
        y = tl.load(m + 4) * px + tl.load(m + 5) * py + tl.load(m + 6) * pz + tl.load(m + 7)
        depth = tl.load(m + 8) * px + tl.load(m + 9) * py + tl.load(m + 10) * pz + tl.load(m + 11)
        near = tl.maximum(depth, 1e-9)
        # A place far outside stays outside, and stays within the range of int32.
        x = tl.minimum(tl.maximum(x / near, -2.0), w + 1.0)
        y = tl.minimum(tl.maximum(y / near, -2.0), h + 1.0)
        in_window = inside & (depth > 0) & (x >= -0.5) & (x < w - 0.5) & (y >= -0.5) & (y < h - 0.5)
        column = tl.minimum(tl.maximum(x + 0.5, 0.0), w - 1.0).to(tl.int32)
        row = tl.minimum(tl.maximum(y + 0.5, 0.0), h - 1.0).to(tl.int32)
        return x, y, depth, in_window, row * w + column

    @triton.jit
    def _sample_layer(layers_ptr, v, x, y, h, w, channel, wanted):  # type: ignore[no-untyped-def]
        """Sample a channel of the layers [h, w, 4] of view v at places: bilinear, 0 outside."""
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
    def window_minimum(  # type: ignore[no-untyped-def]
        values_ptr, found_ptr, n, length, stride, size: tl.constexpr, elements: tl.constexpr
    ):
        """The minimum over windows of `size` elements along the axis of this length and stride."""
        i = tl.program_id(0) * elements + tl.arange(0, elements)
        at = (i // stride) % length
        least = tl.full((elements,), float("inf"), tl.float32)
        for k in tl.static_range(size):
            off = k - size // 2
            here = (i < n) & (at + off >= 0) & (at + off < length)
            least = tl.minimum(least, tl.load(values_ptr + i + off * stride, mask=here, other=float("inf")))
        tl.store(found_ptr + i, least, mask=i < n)

    @triton.jit  # type: ignore[untyped-decorator]
    def average_masked_layers(  # type: ignore[no-untyped-def]
        rgb_ptr, mask_ptr, layers_ptr, n, h, w, size: tl.constexpr, pixels: tl.constexpr
    ):
        """Means of picture times mask, and of mask, over windows of `size` pixels, [V, h, w, 4]; n is V h w."""
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
    def splat_solid_depth(  # type: ignore[no-untyped-def]
        points_ptr, matrices_ptr, solid_ptr, front_ptr, n, n_views, h, w, voxels: tl.constexpr
    ):
        """Write the smallest depth of the solid points in each pixel of the views, [V, h w]."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        solid = tl.load(solid_ptr + i, mask=i < n, other=0) != 0
        for v in range(n_views):
            _, _, depth, in_window, nearest = _project(points_ptr, matrices_ptr, v, i, i < n, h, w)
            bits = depth.to(tl.int32, bitcast=True)
            tl.atomic_min(front_ptr + v * h * w + nearest, bits, mask=in_window & solid)

    @triton.jit  # type: ignore[untyped-decorator]
    def sample_colors(  # type: ignore[no-untyped-def]
        points_ptr, matrices_ptr, rgb_ptr, mask_ptr, used_ptr, front_ptr, colors_ptr, seen_ptr,
        n, n_views, h, w, voxel_size, behind_weight, size: tl.constexpr, voxels: tl.constexpr,
    ):  # fmt: skip
        """Colours [n, 3] of points, and whether any view shows one [n]."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        total = tl.zeros((voxels,), tl.float32)
        red, green, blue = total * 0, total * 0, total * 0
        for v in range(n_views):
            if tl.load(used_ptr + v) != 0:
                x, y, depth, in_window, nearest = _project(points_ptr, matrices_ptr, v, i, inside, h, w)
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
    def carve_hulls(  # type: ignore[no-untyped-def]
        points_ptr, matrices_ptr, layers_ptr, used_ptr, hulls_ptr, front_ptr, n, n_views, h, w, voxels: tl.constexpr
    ):
        """Occupancies of both hulls [2, n], and the smallest depth of their solid voxels in each pixel, [2, V, h w]."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        least = tl.full((voxels,), float("inf"), tl.float32)
        second = tl.full((voxels,), float("inf"), tl.float32)
        for v in range(n_views):
            x, y, depth, _, _ = _project(points_ptr, matrices_ptr, v, i, inside, h, w)
            covered = _sample_layer(layers_ptr, v, x, y, h, w, 3, inside & (depth > 0))
            covered = tl.where(tl.load(used_ptr + v) != 0, covered, float("inf"))
            second = tl.minimum(second, tl.maximum(least, covered))
            least = tl.minimum(least, covered)
        second = tl.where(second == float("inf"), least, second)
        tl.store(hulls_ptr + i, least, mask=inside)
        tl.store(hulls_ptr + n + i, second, mask=inside)
        if tl.max(tl.where(inside, second, 0.0), 0) >= 0.5:
            for v in range(n_views):
                _, _, depth, in_window, nearest = _project(points_ptr, matrices_ptr, v, i, inside, h, w)
                bits = depth.to(tl.int32, bitcast=True)
                at = front_ptr + v * h * w + nearest
                tl.atomic_min(at, bits, mask=in_window & (least >= 0.5))
                tl.atomic_min(at + n_views * h * w, bits, mask=in_window & (second >= 0.5))

    @triton.jit  # type: ignore[untyped-decorator]
    def carve_colors(  # type: ignore[no-untyped-def]
        points_ptr, matrices_ptr, layers_ptr, mask_ptr, used_ptr, hulls_ptr, front_ptr, volume_ptr,
        n, n_views, h, w, voxel_size, fill_color, hidden_weight, voxels: tl.constexpr,
    ):  # fmt: skip
        """The volume [8, n] from the occupancies of the hulls and the depths of what is in front."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        smaller = tl.load(hulls_ptr + i, mask=inside, other=0.0)
        larger = tl.load(hulls_ptr + n + i, mask=inside, other=0.0)
        red, green, blue = tl.zeros((voxels,), tl.float32), smaller * 0, smaller * 0
        spread, seen_share, bare = smaller * 0, smaller * 0, smaller * 0
        if tl.max(larger, 0) == 0:  # no voxel of this block is in a hull
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
                    x, y, depth, in_window, nearest = _project(points_ptr, matrices_ptr, v, i, inside, h, w)
                    front = tl.load(there + v * h * w + nearest, mask=inside, other=0.0)
                    given = (tl.load(used_ptr + v) != 0) & (depth > 0)
                    seen = depth <= front + voxel_size
                    weight = tl.where(given, tl.where(seen, 1.0, hidden_weight), 0.0)
                    weights += weight * _sample_layer(layers_ptr, v, x, y, h, w, 3, occupied)
                    r += weight * _sample_layer(layers_ptr, v, x, y, h, w, 0, occupied)
                    g += weight * _sample_layer(layers_ptr, v, x, y, h, w, 1, occupied)
                    b += weight * _sample_layer(layers_ptr, v, x, y, h, w, 2, occupied)
                    seen_share += tl.where(occupied & seen & given, 0.5, 0.0)
                    if hull == 0:
                        on_animal = tl.load(mask_ptr + v * h * w + nearest, mask=in_window, other=0.0) > 0.5
                        alone = in_window & on_animal & (front == float("inf")) & (tl.load(used_ptr + v) != 0)
                        bare += tl.where(alone & (larger > 0), 1.0, 0.0)
                total = tl.maximum(weights, 1e-6)
                r, g, b = r / total, g / total, b / total
                off = smaller * 0
                for v in range(n_views):
                    x, y, depth, _, nearest = _project(points_ptr, matrices_ptr, v, i, inside, h, w)
                    front = tl.load(there + v * h * w + nearest, mask=inside, other=0.0)
                    given = (tl.load(used_ptr + v) != 0) & (depth > 0)
                    weight = tl.where(given, tl.where(depth <= front + voxel_size, 1.0, hidden_weight), 0.0)
                    covered = _sample_layer(layers_ptr, v, x, y, h, w, 3, occupied)
                    own = tl.maximum(covered, 1e-3)
                    off_r = _sample_layer(layers_ptr, v, x, y, h, w, 0, occupied) / own - r
                    off_g = _sample_layer(layers_ptr, v, x, y, h, w, 1, occupied) / own - g
                    off_b = _sample_layer(layers_ptr, v, x, y, h, w, 2, occupied) / own - b
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
    def _count_cell(x, y, matrices_ptr, intrinsics_ptr, v, h, w, voxel_size):  # type: ignore[no-untyped-def]
        """Row and column of the larger pixels that voxels are counted in, and a voxel's size at depth 1 in them."""
        wide = tl.sqrt(tl.load(intrinsics_ptr + 9 * v) * tl.load(intrinsics_ptr + 9 * v + 4)) * voxel_size
        per_pixel = tl.minimum(tl.load(matrices_ptr + 12 * v + 11) / wide, 1.0)
        column = (tl.minimum(tl.maximum(x + 0.5, 0.0), w - 1.0) * per_pixel).to(tl.int32)
        row = (tl.minimum(tl.maximum(y + 0.5, 0.0), h - 1.0) * per_pixel).to(tl.int32)
        return row, column, wide * per_pixel

    @triton.jit  # type: ignore[untyped-decorator]
    def count_voxels(  # type: ignore[no-untyped-def]
        occupancy_ptr, hull_ptr, points_ptr, matrices_ptr, intrinsics_ptr, used_ptr, counts_ptr,
        n, n_views, h, w, voxel_size, slope, middle, opaque: tl.constexpr, voxels: tl.constexpr,
    ):  # fmt: skip
        """Count the voxels on each line of sight, [V, h, w], weighted by their opacity."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        hull = tl.load(hull_ptr + i, mask=inside, other=0.0) > 0
        if tl.max(hull.to(tl.int32), 0) > 0:
            occupancy = tl.load(occupancy_ptr + i, mask=hull, other=0.0)
            share = (opaque / (1 + tl.exp(-slope * (occupancy - middle))) + 0.5).to(tl.int32)
            for v in range(n_views):
                if tl.load(used_ptr + v) != 0:
                    x, y, _, in_window, _ = _project(points_ptr, matrices_ptr, v, i, inside, h, w)
                    row, column, _ = _count_cell(x, y, matrices_ptr, intrinsics_ptr, v, h, w, voxel_size)
                    there = counts_ptr + (v * h + row) * w + column
                    tl.atomic_add(there, share, mask=hull & in_window & (share > 0))

    @triton.jit  # type: ignore[untyped-decorator]
    def gather_evidence(  # type: ignore[no-untyped-def]
        found_ptr, hull_ptr, points_ptr, matrices_ptr, intrinsics_ptr, used_ptr, mask_ptr, counts_ptr,
        n, n_views, h, w, voxel_size, opaque: tl.constexpr, voxels: tl.constexpr,
    ):  # fmt: skip
        """The evidence of the silhouettes for each voxel [n], from the counts."""
        i = tl.program_id(0) * voxels + tl.arange(0, voxels)
        inside = i < n
        hull = tl.load(hull_ptr + i, mask=inside, other=0.0) > 0
        most = tl.zeros((voxels,), tl.float32)
        if tl.max(hull.to(tl.int32), 0) > 0:
            for v in range(n_views):
                if tl.load(used_ptr + v) != 0:
                    x, y, depth, in_window, nearest = _project(points_ptr, matrices_ptr, v, i, inside, h, w)
                    row, column, wide = _count_cell(x, y, matrices_ptr, intrinsics_ptr, v, h, w, voxel_size)
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
