"""Projection of Gaussians into views, for the CPU rasteriser: what a pixel needs of a splat, and a box of its reach."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zoosplat_model.gaussians import LOW_PASS_PX2, Gaussians
from zoosplat_model.rasterize.types import Cameras
from zoosplat_model.rotations import rotation_matrices

# The numbers of gsplat 1.5.3.
ALPHA_MIN = 1 / 255  # contributions fainter than this are skipped
EXTENT_MAX = 3.33  # standard deviations; largest half size of a splat's box
NEAR, FAR = 0.01, 1e10  # depths, in the unit of the means, outside of which a Gaussian is culled
GSPLAT_TILE = 16  # pixels; edge of gsplat's tiles, which shows in 2D only; our own tiles must divide it
JACOBIAN_MARGIN = 0.15  # of the picture's size; the Jacobian is taken no farther outside the view than this


class Projected(NamedTuple):
    """C x N splats.

    Attributes:
        table: [C, N, F] what a pixel needs of each splat; the only part with a gradient.
        depth: [C, N] in the unit of the means.
        box: [C, N, 4] x0, y0, x1, y1 of the reach, pixels.
        visible: [C, N] bool.
    """

    table: Tensor
    depth: Tensor
    box: Tensor
    visible: Tensor


def _to_camera(means: Tensor, world_to_camera: Tensor) -> Tensor:
    return means @ world_to_camera[:, :3, :3].mT + world_to_camera[:, None, :3, 3]


def _pinhole(intrinsics: Tensor) -> tuple[Tensor, ...]:
    """Focal lengths and principal points fx, fy, cx, cy, [C, 1] each, pixels."""
    return tuple(intrinsics[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))


def _log_opacity(opacities: Tensor) -> Tensor:
    # Nothing is drawn below ALPHA_MIN, so the clamp only keeps the logarithm and its gradient finite.
    return opacities.clamp_min(ALPHA_MIN / 2).log()


def _on_screen(center: Tensor, radius: Tensor, width: int, height: int) -> Tensor:
    """Whether the box of a splat touches the picture, [C, N] bool."""
    size = center.new_tensor([width, height])
    return (radius > 0).any(-1) & (center + radius > 0).all(-1) & (center - radius < size).all(-1)


def project_3d(gaussians: Gaussians, cameras: Cameras) -> Projected:
    """Project ellipsoids by local affine projection (3DGS, eq. 5).

    The columns of the table are the mean (2), the inverse covariance (xx, xy, yy) and the logarithm of the opacity.
    """
    means, quats, scales, opacities, _ = gaussians
    w2c, intrinsics, w, h = cameras
    x, y, z = _to_camera(means, w2c).unbind(-1)
    visible = (z >= NEAR) & (z <= FAR) & (opacities >= ALPHA_MIN)
    # Culled centres are moved to z = 1, where no gradient is infinite.
    z = torch.where(visible, z, 1.0)
    fx, fy, cx, cy = _pinhole(intrinsics)
    rz = 1 / z
    x, y = x * rz, y * rz
    # That is 0.3 tan(fov / 2) outside the view.
    margin_x, margin_y = JACOBIAN_MARGIN * w / fx, JACOBIAN_MARGIN * h / fy
    jx = fx * torch.clamp(x, -cx / fx - margin_x, (w - cx) / fx + margin_x)
    jy = fy * torch.clamp(y, -cy / fy - margin_y, (h - cy) / fy + margin_y)
    axes = (w2c[:, None, :3, :3] @ (rotation_matrices(quats) * scales[:, None])) * rz[..., None, None]
    ax = fx[..., None] * axes[..., 0, :] - jx[..., None] * axes[..., 2, :]
    ay = fy[..., None] * axes[..., 1, :] - jy[..., None] * axes[..., 2, :]
    xx, yy, xy = (ax * ax).sum(-1) + LOW_PASS_PX2, (ay * ay).sum(-1) + LOW_PASS_PX2, (ax * ay).sum(-1)
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
    return Projected(torch.stack(table, -1), z.detach(), box, visible)


def project_2d(gaussians: Gaussians, cameras: Cameras) -> Projected:
    """Project surfels by the ray-splat transform (2DGS, eq. 9 and 10).

    The columns of the table are the mean (2), the logarithm of the opacity, and u, v and w (3 each). The ray through a
    pixel meets the surfel's plane at (u / w, v / w), and each of the three is linear in the pixel's offset from the
    mean.
    """
    means, quats, scales, opacities, _ = gaussians
    w2c, intrinsics, w, h = cameras
    camera = _to_camera(means, w2c)
    z = camera[..., 2]
    visible = (z > NEAR) & (z < FAR) & (opacities >= ALPHA_MIN)
    camera = torch.where(visible[..., None], camera, camera.new_tensor([0.0, 0.0, 1.0]))
    axes = w2c[:, None, :3, :3] @ (rotation_matrices(quats)[..., :2] * scales[:, None, :2])
    mx, my, mz = torch.cat([axes, camera[..., None]], -1).unbind(-2)
    fx, fy, cx, cy = (k[..., None] for k in _pinhole(intrinsics))
    mx, my = fx * mx + cx * mz, fy * my + cy * mz

    def bounds(k: float) -> tuple[Tensor, Tensor, Tensor]:
        """A number below 0 where the k-sigma contour is an ellipse, and the centre and squared half size of its box."""
        sign = mx.new_tensor([k * k, k * k, -1.0])
        d = (sign * mz * mz).sum(-1, keepdim=True)
        f = sign / torch.where(d == 0, 1.0, d)
        c = torch.stack([(f * m * mz).sum(-1) for m in (mx, my)], -1)
        return d[..., 0], c, c * c - torch.stack([(f * m * m).sum(-1) for m in (mx, my)], -1)

    d, center, half2 = bounds(1.0)
    origin = center.detach()  # the linear forms are expanded here, which has no influence on their values
    p, q = mx - origin[..., :1] * mz, my - origin[..., 1:] * mz
    forms = [torch.linalg.cross(q, mz), torch.linalg.cross(mz, p), torch.linalg.cross(p, q)]
    uvw = torch.stack(forms, -1).flatten(-2)
    table = torch.cat([center, _log_opacity(opacities).expand_as(z)[..., None], uvw], -1)
    with torch.no_grad():
        radius = (EXTENT_MAX * half2.clamp_min(1e-4).sqrt()).ceil()
        visible = visible & (d != 0) & _on_screen(origin, radius, w, h)
        # Alpha can exceed ALPHA_MIN within the contour and within the low-pass disc of exp(-r^2). But gsplat draws only
        # in the tiles of 16 pixels that its own box touches, and cuts the rest off.
        d, c, half2 = bounds(EXTENT_MAX)
        half = torch.where((d < 0)[..., None], half2.clamp_min(0).sqrt(), math.inf)
        disc = math.sqrt(math.log(255)) + 0.01
        low, high = torch.minimum(c - half, origin - disc), torch.maximum(c + half, origin + disc)
        low = torch.maximum(low, ((origin - radius) / GSPLAT_TILE).floor() * GSPLAT_TILE)
        high = torch.minimum(high, ((origin + radius) / GSPLAT_TILE).ceil() * GSPLAT_TILE)
    return Projected(table, z.detach(), torch.cat([low, high], -1), visible)
