"""Gaussian rasterisation in plain PyTorch, for the CPU: the numbers of gsplat 1.5.3 without its CUDA kernels.

Sources: 3DGS (Kerbl 2023), 2DGS (Huang 2024, arXiv 2403.17888), gsplat (arXiv 2409.06765).

1. Project every Gaussian into every view (autograd): a table row holds what a pixel needs, and a box bounds its reach.
2. List the (Gaussian, tile) pairs of all boxes, near to far within a tile, and shift their rows to the tile's centre.
   There the exponent (3D), or each ingredient of it (2D), is one polynomial in the pixel offset, so that a tile's
   exponents are a matrix product.
3. Composite near to far in blocks of many tiles (hand-written backward), and drop tiles whose pixels are all closed.

Masks are applied with `threshold`, which on the CPU is several times faster than `where` and `masked_fill`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Screen

# The numbers of gsplat 1.5.3; from 1.6.0 on ALPHA_MAX is 0.99.
ALPHA_MIN = 1 / 255  # fainter contributions are skipped
ALPHA_MAX = 0.999  # alpha is capped here, and has no gradient above
TRANSMITTANCE_MIN = 1e-4  # a pixel is closed before the splat that would take it to this transmittance
EXTENT_MAX = 3.33  # half size of a box in standard deviations
LOW_PASS_3D = 0.3  # pixels^2, added to the diagonal of the projected covariance
NEAR, FAR = 0.01, 1e10
GSPLAT_TILE = 16  # pixels; shows in 2D only. Our own tiles must divide it.

BLOCK_ELEMENTS = 1 << 17  # [tiles, pixels, splats] composited at once: the working set stays in the cache
BLOCK_DEPTH = 128  # splats of a tile composited before asking whether its pixels are closed


class _Projected(NamedTuple):
    """C x N splats. `table` [C, N, F] differentiable; the rest is not: `depth` [C, N], `box` [C, N, 4] (x0 y0 x1 y1)
    in pixels, `visible` [C, N]."""

    table: Tensor
    depth: Tensor
    box: Tensor
    visible: Tensor


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
    screen: Screen | None = None,
) -> tuple[Tensor, Tensor]:
    """Premultiplied colours [C, H, W, D] and alpha [C, H, W]; arguments of `rasterize`, pixel centres at (.5, .5)."""
    project = _project_3d if mode == "3d" else _project_2d
    splats = project(means, quats, scales, opacities, world_to_camera, intrinsics, width, height)
    if screen is not None:
        splats = splats._replace(table=splats.table + F.pad(screen.offsets, (0, splats.table.shape[-1] - 2)))
        half = (splats.box[..., 2:] - splats.box[..., :2]).amax(-1) / 2
        screen.radii = torch.where(splats.visible, half, 0)
    views, channels = len(world_to_camera), colors.shape[-1]
    with torch.no_grad():
        # Small tiles waste fewer pixels, large ones fewer pairs.
        box = splats.box[splats.visible]
        side = (box[:, 2:] - box[:, :2]).mean().item() if len(box) else 0.0
        tile = 4 if side < 20 else 8 if side < 60 else 16
        across, down = -(-width // tile), -(-height // tile)
        pairs = _tile_pairs(splats, across, down, tile, ellipses=mode == "3d")

    # Colours, and a constant channel whose rendering is alpha.
    features = F.pad(colors, (0, 1), value=1.0).expand(views, -1, -1)
    table = torch.cat([splats.table, features], -1).flatten(0, 1)
    can_clamp = bool((opacities > ALPHA_MAX).any())
    image: Tensor = _Composite.apply(table, pairs, tile, channels + 1, mode, can_clamp)

    image = image.new_zeros(views * across * down, *image.shape[1:]).index_copy(0, pairs.tiles, image)
    image = image.view(views, down, across, tile, tile, -1).transpose(2, 3)
    image = image.reshape(views, down * tile, across * tile, -1)[:, :height, :width]
    return image[..., :channels], image[..., channels]


def rotations(quats: Tensor) -> Tensor:
    """Rotation matrices [N, 3, 3] of quaternions [N, 4] (w, x, y, z)."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, -1).view(-1, 3, 3)


def _to_camera(means: Tensor, world_to_camera: Tensor) -> Tensor:
    return means @ world_to_camera[:, :3, :3].mT + world_to_camera[:, None, :3, 3]


def _pinhole(intrinsics: Tensor) -> tuple[Tensor, ...]:
    """fx, fy, cx, cy, each [C, 1]."""
    return tuple(intrinsics[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))


def _log_opacity(opacities: Tensor) -> Tensor:
    # Below the threshold nothing is drawn, so that the clamp only keeps the logarithm and its gradient finite.
    return opacities.clamp_min(ALPHA_MIN / 2).log()


def _on_screen(center: Tensor, radius: Tensor, width: int, height: int) -> Tensor:
    size = center.new_tensor([width, height])
    return (radius > 0).any(-1) & (center + radius > 0).all(-1) & (center - radius < size).all(-1)


def _project_3d(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, w2c: Tensor, intrinsics: Tensor, w: int, h: int
) -> _Projected:
    """Local affine projection (3DGS, eq. 5). Table: mean (2), inverse covariance (xx, xy, yy), log opacity."""
    x, y, z = _to_camera(means, w2c).unbind(-1)
    visible = (z >= NEAR) & (z <= FAR) & (opacities >= ALPHA_MIN)
    # Culled centres move to z = 1, where no gradient is infinite.
    z = torch.where(visible, z, 1.0)
    fx, fy, cx, cy = _pinhole(intrinsics)
    rz = 1 / z
    x, y = x * rz, y * rz
    # The Jacobian is taken no farther outside the view than 0.3 tan(fov / 2).
    margin_x, margin_y = 0.15 * w / fx, 0.15 * h / fy
    jx = fx * torch.clamp(x, -cx / fx - margin_x, (w - cx) / fx + margin_x)
    jy = fy * torch.clamp(y, -cy / fy - margin_y, (h - cy) / fy + margin_y)
    axes = (w2c[:, None, :3, :3] @ (rotations(quats) * scales[:, None])) * rz[..., None, None]
    ax = fx[..., None] * axes[..., 0, :] - jx[..., None] * axes[..., 2, :]
    ay = fy[..., None] * axes[..., 1, :] - jy[..., None] * axes[..., 2, :]
    xx, yy, xy = (ax * ax).sum(-1) + LOW_PASS_3D, (ay * ay).sum(-1) + LOW_PASS_3D, (ax * ay).sum(-1)
    det = xx * yy - xy * xy
    visible = visible & (det > 0)
    rdet = 1 / torch.where(det > 0, det, 1.0)
    center = torch.stack([fx * x + cx, fy * y + cy], -1)
    table = [center[..., 0], center[..., 1], yy * rdet, -xy * rdet, xx * rdet, _log_opacity(opacities).expand_as(z)]
    with torch.no_grad():
        extent = (2 * (opacities / ALPHA_MIN).clamp_min(1).log()).sqrt().clamp_max(EXTENT_MAX)
        radius = (extent[:, None] * torch.stack([xx, yy], -1).sqrt()).ceil()
        visible = visible & _on_screen(center, radius, w, h)
        box = torch.cat([center - radius, center + radius], -1)
    return _Projected(torch.stack(table, -1), z.detach(), box, visible)


def _project_2d(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, w2c: Tensor, intrinsics: Tensor, w: int, h: int
) -> _Projected:
    """Ray-splat transform (2DGS, eq. 9-10). Table: mean (2), log opacity, and u, v, w (3 each): the ray through a
    pixel meets the surfel's plane at (u / w, v / w), and each is linear in the pixel's offset from the mean."""
    camera = _to_camera(means, w2c)
    z = camera[..., 2]
    visible = (z > NEAR) & (z < FAR) & (opacities >= ALPHA_MIN)
    camera = torch.where(visible[..., None], camera, camera.new_tensor([0.0, 0.0, 1.0]))
    axes = w2c[:, None, :3, :3] @ (rotations(quats)[..., :2] * scales[:, None, :2])
    mx, my, mz = torch.cat([axes, camera[..., None]], -1).unbind(-2)
    fx, fy, cx, cy = (k[..., None] for k in _pinhole(intrinsics))
    mx, my = fx * mx + cx * mz, fy * my + cy * mz

    def bounds(k: float) -> tuple[Tensor, Tensor, Tensor]:
        """Centre and squared half size of the box of the k-sigma contour, which is an ellipse where the first < 0."""
        sign = mx.new_tensor([k * k, k * k, -1.0])
        d = (sign * mz * mz).sum(-1, keepdim=True)
        f = sign / torch.where(d == 0, 1.0, d)
        c = torch.stack([(f * m * mz).sum(-1) for m in (mx, my)], -1)
        return d[..., 0], c, c * c - torch.stack([(f * m * m).sum(-1) for m in (mx, my)], -1)

    d, center, half2 = bounds(1.0)
    origin = center.detach()  # where the linear forms are expanded: it has no influence on their values
    p, q = mx - origin[..., :1] * mz, my - origin[..., 1:] * mz
    forms = [torch.linalg.cross(q, mz), torch.linalg.cross(mz, p), torch.linalg.cross(p, q)]
    uvw = torch.stack(forms, -1).flatten(-2)
    table = torch.cat([center, _log_opacity(opacities).expand_as(z)[..., None], uvw], -1)
    with torch.no_grad():
        radius = (EXTENT_MAX * half2.clamp_min(1e-4).sqrt()).ceil()
        visible = visible & (d != 0) & _on_screen(origin, radius, w, h)
        # What can exceed ALPHA_MIN: the contour, and the low-pass disc of exp(-r^2) ...
        d, c, half2 = bounds(EXTENT_MAX)
        half = torch.where((d < 0)[..., None], half2.clamp_min(0).sqrt(), math.inf)
        disc = math.sqrt(math.log(255)) + 0.01
        low, high = torch.minimum(c - half, origin - disc), torch.maximum(c + half, origin + disc)
        # ... but gsplat draws only in the 16-pixel tiles that its own box touches, and cuts the rest off.
        low = torch.maximum(low, ((origin - radius) / GSPLAT_TILE).floor() * GSPLAT_TILE)
        high = torch.minimum(high, ((origin + radius) / GSPLAT_TILE).ceil() * GSPLAT_TILE)
    return _Projected(table, z.detach(), torch.cat([low, high], -1), visible)


class _Pairs(NamedTuple):
    """(splat, tile) pairs, ordered by tile (that with most pairs first), then near to far."""

    splat: Tensor  # [M + 1] flat index into C x N; the last entry stands for "none" and is C x N
    tiles: Tensor  # [T] flat indices, into C x down x across, of the tiles that have pairs
    center: Tensor  # [T, 2] of these tiles, in pixels
    sizes: Tensor  # [T] pairs of each, descending
    bag: Tensor  # [M] the pairs grouped by splat ...
    bag_start: Tensor  # [V] ... where each group starts ...
    bag_splat: Tensor  # [V] ... and whose it is


def _tile_pairs(splats: _Projected, across: int, down: int, tile: int, *, ellipses: bool) -> _Pairs:
    """All pairs of a splat and a tile that its box touches; those that its ellipse misses are left out if known."""
    views, n = splats.depth.shape
    ids = splats.visible.flatten().nonzero()[:, 0]
    # float32 depth and a stable sort: ties are drawn in the order of the Gaussians, as in gsplat.
    ids = ids[torch.sort(splats.depth.flatten()[ids].float(), stable=True)[1]]
    box = splats.box.flatten(0, 1)[ids] / tile
    limit = box.new_tensor([across, down])
    low = box[:, :2].floor().clamp_min(0).minimum(limit).int()
    columns, rows = (box[:, 2:].ceil().clamp_min(0).minimum(limit).int() - low).clamp_min(0).unbind(-1)
    per_splat = columns * rows
    k = torch.repeat_interleave(per_splat)
    base = ids.div(n, rounding_mode="floor").int() * (across * down)
    first = (per_splat.cumsum(0) - per_splat).int()
    # Packed rows: one gather of a row is far faster than a gather for each column.
    x, y, columns, first, base = torch.stack([*low.unbind(-1), columns, first, base], -1).index_select(0, k).unbind(-1)
    j = torch.arange(len(k), dtype=torch.int32, device=k.device) - first
    row = j.div(columns, rounding_mode="trunc")
    x, y = x + (j - row * columns), y + row
    place = base + y * across + x
    if ellipses:
        table = splats.table.detach().flatten(0, 1).index_select(0, ids)
        keep = _ellipse_meets_tile(table, k, x, y, tile).nonzero()[:, 0]
        k, place = k.index_select(0, keep), place.index_select(0, keep)
        per_splat = torch.bincount(k, minlength=len(ids))

    sizes, tiles = torch.sort(torch.bincount(place, minlength=views * across * down), descending=True, stable=True)
    occupied = int((sizes > 0).sum())
    sizes, tiles = sizes[:occupied], tiles[:occupied]
    rank = torch.empty(views * across * down, dtype=torch.int32, device=k.device)
    rank[tiles] = torch.arange(occupied, dtype=torch.int32, device=k.device)
    order = torch.sort(rank.index_select(0, place), stable=True)[1]
    bag = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=k.device))
    center = (torch.stack([tiles % across, tiles // across % down], -1) + 0.5).to(box.dtype) * tile
    splat = F.pad(ids.index_select(0, k.index_select(0, order)), (0, 1), value=views * n)
    return _Pairs(splat, tiles, center, sizes, bag, per_splat.cumsum(0) - per_splat, ids)


def _ellipse_meets_tile(table: Tensor, k: Tensor, x: Tensor, y: Tensor, tile: int) -> Tensor:
    """Whether alpha reaches ALPHA_MIN between the outermost pixel centres of tile (x, y), for splats table[k]."""
    mx, my, a, b, c, log_opacity = table.unbind(-1)
    limit = 1.001 * (log_opacity - math.log(ALPHA_MIN)) + 1e-3  # a little more than needed, against rounding
    packed = torch.stack([mx, my, 0.5 * a, b, 0.5 * c, -b / c, -b / a, limit], -1).index_select(0, k)
    mx, my, a, b, c, y_per_x, x_per_y, limit = packed.unbind(-1)
    # The exponent is convex: on the tile it is least where the edge that faces the centre, in x or in y, has its least.
    half = tile / 2 - 0.5
    x0, y0 = (x + 0.5).mul_(tile).sub_(mx + half), (y + 0.5).mul_(tile).sub_(my + half)
    x1, y1 = x0 + 2 * half, y0 + 2 * half
    ex, ey = x0.clamp_min(0).add_(x1.clamp_max(0)), y0.clamp_min(0).add_(y1.clamp_max(0))
    along_y, along_x = (y_per_x * ex).clamp_(y0, y1), (x_per_y * ey).clamp_(x0, x1)
    least_x = ex * (a * ex + b * along_y) + c * along_y * along_y
    least_y = ey * (c * ey + b * along_x) + a * along_x * along_x
    return torch.minimum(least_x, least_y) <= limit


def _coefficients_3d(geometry: Tensor, center: Tensor) -> Tensor:
    """geometry [T, K, 6], tile centres [T, 2] -> [T, K, 6]: log alpha as a polynomial in the offset (x, y) from the
    tile's centre, the coefficients of 1, x, y, xx, xy, yy."""
    x, y, a, b, c, log_opacity = geometry.unbind(-1)
    dx, dy = x - center[:, :1], y - center[:, 1:]
    gx, gy = a * dx + b * dy, b * dx + c * dy
    return torch.stack([log_opacity - 0.5 * (dx * gx + dy * gy), gx, gy, -0.5 * a, -b, -0.5 * c], -1)


def _coefficients_3d_backward(grad: Tensor, geometry: Tensor, center: Tensor) -> list[Tensor]:
    """grad [T, 6, K] -> the 6 columns [T, K] of the gradient of the geometry."""
    x, y, a, b, c, _ = geometry.unbind(-1)
    g0, g1, g2, g3, g4, g5 = grad.unbind(1)
    dx, dy = x - center[:, :1], y - center[:, 1:]
    # d / d gx and d / d gy, of which log alpha at the centre holds one half directly, one through dx and dy.
    h1, h2 = g1 - 0.5 * g0 * dx, g2 - 0.5 * g0 * dy
    g_x = a * h1 + b * h2 - 0.5 * g0 * (a * dx + b * dy)
    g_y = b * h1 + c * h2 - 0.5 * g0 * (b * dx + c * dy)
    return [g_x, g_y, dx * h1 - 0.5 * g3, dy * h1 + dx * h2 - g4, dy * h2 - 0.5 * g5, g0]


def _coefficients_2d(geometry: Tensor, center: Tensor) -> Tensor:
    """geometry [T, K, 12], tile centres [T, 2] -> [T, K, 13]: log opacity, three linear forms u, v, w (1, x, y each)
    and the squared distance from the mean (1, x, y; the coefficient of xx + yy is 1)."""
    log_opacity, forms = geometry[..., 2:3], geometry[..., 3:].view(*geometry.shape[:2], 3, 3)
    shift = geometry[..., :2] - center[:, None]
    at_center = forms[..., 2] - (forms[..., 0] * shift[..., :1] + forms[..., 1] * shift[..., 1:])
    forms = torch.stack([at_center, forms[..., 0], forms[..., 1]], -1).flatten(-2)
    return torch.cat([log_opacity, forms, (shift * shift).sum(-1, keepdim=True), -2 * shift], -1)


def _coefficients_2d_backward(grad: Tensor, geometry: Tensor, center: Tensor) -> list[Tensor]:
    """grad [T, 13, K] -> the 12 columns [T, K] of the gradient of the geometry."""
    x, y = geometry[..., 0] - center[:, :1], geometry[..., 1] - center[:, 1:]
    g_log_opacity, u0, ux, uy, v0, vx, vy, w0, wx, wy, d0, dx, dy = grad.unbind(1)
    columns = [2 * (x * d0 - dx), 2 * (y * d0 - dy), g_log_opacity]
    for g0, gx, gy in ((u0, ux, uy), (v0, vx, vy), (w0, wx, wy)):
        columns += [gx - x * g0, gy - y * g0, g0]
    return columns


def _basis(tile: int, like: Tensor) -> Tensor:
    """1, x, y, xx, xy, yy at the pixel centres of a tile, from its centre: [tile * tile, 6]."""
    offset = torch.arange(tile, dtype=like.dtype, device=like.device) + (0.5 - tile / 2)
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1).flatten(0, 1)


def _log_alpha_2d(coefficients: Tensor, basis: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """coefficients [T, K, 13], basis [P, 6] -> log alpha [T, P, K] and what its backward needs.

    The exponent is half the smaller of the squared ray-splat distance and gsplat's low pass 2 r^2 (2DGS, eq. 11).
    """
    linear = basis[:, :3].expand(len(coefficients), -1, -1)
    u, v, w, disc = (torch.bmm(linear, coefficients[..., i : i + 3].mT) for i in (1, 4, 7, 10))
    disc += (basis[:, 3] + basis[:, 5])[:, None]
    # A ray within the surfel's plane misses it, low pass included. Large quotients are clamped to stay finite.
    parallel = w.abs() < torch.finfo(w.dtype).tiny * 1e4
    rw = w.masked_fill_(parallel, 1).reciprocal_()
    u, v = u.mul_(rw).clamp_(-1e6, 1e6), v.mul_(rw).clamp_(-1e6, 1e6)
    half = (u * u).addcmul_(v, v).mul_(0.5)
    on_splat = half < disc
    log_alpha = coefficients[..., 0][:, None] - torch.minimum(half, disc).masked_fill_(parallel, 1e4)
    return log_alpha, (u, v, rw, on_splat)


def _log_alpha_2d_backward(grad: Tensor, saved: tuple[Tensor, ...], basis: Tensor) -> Tensor:
    """grad [T, P, K] of log alpha -> [T, 13, K]."""
    u, v, rw, on_splat = saved
    linear = basis[:, :3].T.expand(len(grad), -1, -1)
    on = grad * on_splat
    g_disc = on - grad
    on *= rw
    g_u, g_v = on * u, on * v
    g_w = (g_u * u).addcmul_(g_v, v)
    g_u, g_v, g_w, g_disc = (torch.bmm(linear, g) for g in (g_u, g_v, g_w, g_disc))
    return torch.cat([grad.sum(1, keepdim=True), -g_u, -g_v, g_w, g_disc], 1)


class _Composite(torch.autograd.Function):
    """Composite the splats of every tile near to far: the sum over k of T_k alpha_k feature_k, [T, tile * tile, D],
    with T_k the product of 1 - alpha_j for j < k. `table` [C * N, F + D] holds the geometry, then the features.

    Backward: with g_k = T_k alpha_k (feature_k . v), d / d log alpha_k = g_k - alpha_k / (1 - alpha_k) sum_{j > k} g_j.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, pairs: _Pairs, tile: int, d: int, mode: str, can_clamp: bool) -> Tensor:
        basis, sizes, device = _basis(tile, table), pairs.sizes, table.device
        # The splat that blocks are padded with is all zeros but for a log opacity that makes alpha 0.
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
                    coefficients = _coefficients_3d(rows[..., :-d], center)
                    alpha = torch.bmm(basis.expand(len(tiles), -1, -1), coefficients.mT)
                else:
                    alpha, saved = _log_alpha_2d(_coefficients_2d(rows[..., :-d], center), basis)
                alpha.exp_()
                unclamped = alpha <= ALPHA_MAX if can_clamp else None
                alpha = torch.threshold_(alpha.clamp_max_(ALPHA_MAX), faintest, 0.0)
                after = 1 - alpha
                ratio = alpha.div_(after)
                after = torch.cumprod(after, -1).mul_(transmittance[tiles, :, None])
                # It never rises, so that cutting it off here closes the pixel for all splats behind, too.
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
                columns = _coefficients_2d_backward(_log_alpha_2d_backward(g, saved, basis), geometry, center)
            else:
                g_coefficients = torch.bmm(basis.T.expand(len(g), -1, -1), g)
                columns = _coefficients_3d_backward(g_coefficients, geometry, center)
            per_pair[index] = torch.stack([*columns, *g_features.unbind(1)], -1)
        # Sum each splat's pairs; far faster than an indexed addition.
        out = grad.new_zeros(ctx.shape)
        if len(pairs.bag):
            out[pairs.bag_splat] = F.embedding_bag(pairs.bag, per_pair, pairs.bag_start, mode="sum")
        return out, None, None, None, None, None
