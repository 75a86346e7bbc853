"""The exponents of splats as polynomials in the pixel offset from a tile's centre, with hand-written gradients.

T is the number of tiles, K that of splats of each tile, and P that of pixels of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coefficients_3d(geometry: Tensor, center: Tensor) -> Tensor:
    """The logarithm of alpha as a polynomial in the offset (x, y): coefficients [T, K, 6] of 1, x, y, xx, xy, yy.

    Args:
        geometry: [T, K, 6] rows of the table of `project_3d`.
        center: [T, 2] centres of the tiles, pixels.
    """
    x, y, a, b, c, log_opacity = geometry.unbind(-1)
    dx, dy = x - center[:, :1], y - center[:, 1:]
    gx, gy = a * dx + b * dy, b * dx + c * dy
    return torch.stack([log_opacity - 0.5 * (dx * gx + dy * gy), gx, gy, -0.5 * a, -b, -0.5 * c], -1)


def coefficients_3d_backward(grad: Tensor, geometry: Tensor, center: Tensor) -> list[Tensor]:
    """The 6 columns [T, K] of the gradient of the geometry, from the gradient [T, 6, K] of the coefficients."""
    x, y, a, b, c, _ = geometry.unbind(-1)
    g0, g1, g2, g3, g4, g5 = grad.unbind(1)
    dx, dy = x - center[:, :1], y - center[:, 1:]
    # Gradients by gx and gy; log alpha at the centre depends on them by one half directly, by one half through dx, dy.
    h1, h2 = g1 - 0.5 * g0 * dx, g2 - 0.5 * g0 * dy
    g_x = a * h1 + b * h2 - 0.5 * g0 * (a * dx + b * dy)
    g_y = b * h1 + c * h2 - 0.5 * g0 * (b * dx + c * dy)
    return [g_x, g_y, dx * h1 - 0.5 * g3, dy * h1 + dx * h2 - g4, dy * h2 - 0.5 * g5, g0]


def coefficients_2d(geometry: Tensor, center: Tensor) -> Tensor:
    """What `log_alpha_2d` needs of each splat and tile, [T, K, 13].

    Args:
        geometry: [T, K, 12] rows of the table of `project_2d`.
        center: [T, 2] centres of the tiles, pixels.

    Returns:
        The logarithm of the opacity, the linear forms u, v and w (coefficients of 1, x, y each), and the squared
        distance from the mean (coefficients of 1, x, y; that of xx + yy is 1).
    """
    log_opacity, forms = geometry[..., 2:3], geometry[..., 3:].view(*geometry.shape[:2], 3, 3)
    shift = geometry[..., :2] - center[:, None]
    at_center = forms[..., 2] - (forms[..., 0] * shift[..., :1] + forms[..., 1] * shift[..., 1:])
    forms = torch.stack([at_center, forms[..., 0], forms[..., 1]], -1).flatten(-2)
    return torch.cat([log_opacity, forms, (shift * shift).sum(-1, keepdim=True), -2 * shift], -1)


def coefficients_2d_backward(grad: Tensor, geometry: Tensor, center: Tensor) -> list[Tensor]:
    """The 12 columns [T, K] of the gradient of the geometry, from the gradient [T, 13, K] of the coefficients."""
    x, y = geometry[..., 0] - center[:, :1], geometry[..., 1] - center[:, 1:]
    g_log_opacity, u0, ux, uy, v0, vx, vy, w0, wx, wy, d0, dx, dy = grad.unbind(1)
    columns = [2 * (x * d0 - dx), 2 * (y * d0 - dy), g_log_opacity]
    for g0, gx, gy in ((u0, ux, uy), (v0, vx, vy), (w0, wx, wy)):
        columns += [gx - x * g0, gy - y * g0, g0]
    return columns


def basis_of_tile(tile: int, like: Tensor) -> Tensor:
    """The monomials 1, x, y, xx, xy, yy of the offsets of a tile's pixel centres from its centre, [tile * tile, 6]."""
    offset = torch.arange(tile, dtype=like.dtype, device=like.device) + (0.5 - tile / 2)
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1).flatten(0, 1)


def log_alpha_2d(coefficients: Tensor, basis: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The logarithm of alpha [T, P, K] from coefficients [T, K, 13] and basis [P, 6], and what its gradient needs.

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


def log_alpha_2d_backward(grad: Tensor, saved: tuple[Tensor, ...], basis: Tensor) -> Tensor:
    """The gradient [T, 13, K] of the coefficients, from that of the logarithm of alpha, [T, P, K]."""
    u, v, rw, on_splat = saved
    linear = basis[:, :3].T.expand(len(grad), -1, -1)
    on = grad * on_splat
    g_disc = on - grad
    on *= rw
    g_u, g_v = on * u, on * v
    g_w = (g_u * u).addcmul_(g_v, v)
    g_u, g_v, g_w, g_disc = (torch.bmm(linear, g) for g in (g_u, g_v, g_w, g_disc))
    return torch.cat([grad.sum(1, keepdim=True), -g_u, -g_v, g_w, g_disc], 1)
