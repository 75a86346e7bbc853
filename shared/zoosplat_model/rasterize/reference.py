"""The rules of gsplat 1.5.3 written out for reading; tests compare the fast rasterisers with this slow one.

Every Gaussian is evaluated at every pixel, one after another, and autograd makes the gradients. No formula or code is
shared with the fast implementations: ellipsoids use explicit covariances, and surfels intersect a ray with a plane.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize.types import Cameras


def render(gaussians: Gaussians, cameras: Cameras, *, mode: Literal["3d", "2d"]) -> tuple[Tensor, Tensor]:
    """Premultiplied colours [C, H, W, D] and alpha [C, H, W]; arguments of `rasterize`, pixel centres at (.5, .5)."""
    means, quats, scales, opacities, all_colors = gaussians
    world_to_camera, intrinsics, width, height = cameras
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([x, y], -1).to(means)  # [H, W, 2]
    sigma_of = _sigma_3d if mode == "3d" else _sigma_2d
    views = []
    all_colors = all_colors.expand(len(world_to_camera), -1, -1)
    for w2c, k, colors in zip(world_to_camera, intrinsics, all_colors, strict=True):
        centers = means @ w2c[:3, :3].T + w2c[:3, 3]
        rgb = colors.new_zeros(height, width, colors.shape[1]) + 0 * colors.sum()
        transmittance = colors.new_ones(height, width)
        is_open = torch.ones(height, width, dtype=torch.bool, device=means.device)
        # The order is near to far by float32 depth, and that of the Gaussians where depths are equal.
        for i in torch.sort(centers[:, 2].detach().float(), stable=True)[1].tolist():
            axes = w2c[:3, :3] @ _rotation(quats[i])
            drawn = sigma_of(centers[i], axes, scales[i], opacities[i], k, pixels)
            if drawn is None:
                continue
            sigma, inside = drawn
            alpha = opacities[i] * torch.exp(-sigma)
            alpha = torch.where(alpha > 0.999, 0.999, alpha)  # the cap has no gradient
            counts = inside & is_open & (sigma >= 0) & (alpha >= 1 / 255)
            after = transmittance * (1 - alpha)
            is_open = is_open & ~(counts & (after <= 1e-4))  # the splat that closes a pixel is left out
            counts = counts & is_open
            rgb = rgb + torch.where(counts, alpha * transmittance, 0.0)[..., None] * colors[i]
            transmittance = torch.where(counts, after, transmittance)
        views.append((rgb, 1 - transmittance))
    return torch.stack([rgb for rgb, _ in views]), torch.stack([alpha for _, alpha in views])


def _rotation(quat: Tensor) -> Tensor:
    w, x, y, z = quat / quat.norm()
    cross = torch.stack([0 * x, -z, y, z, 0 * x, -x, -y, x, 0 * x]).view(3, 3)
    rotation: Tensor = torch.eye(3).to(quat) + 2 * w * cross + 2 * cross @ cross
    return rotation


def _touches_image(center: Tensor, radius: Tensor, pixels: Tensor) -> bool:
    size = torch.tensor([pixels.shape[1], pixels.shape[0]]).to(pixels)
    return bool(((center + radius > 0) & (center - radius < size)).all())


def _in_tiles(center: Tensor, radius: Tensor, pixels: Tensor) -> Tensor:
    """The pixels of the tiles of 16 x 16 that the box touches; gsplat draws a splat in no others."""
    low, high = ((center - radius) / 16).floor() * 16, ((center + radius) / 16).ceil() * 16
    return ((pixels > low) & (pixels < high)).all(-1)


def _sigma_3d(
    center: Tensor, axes: Tensor, scale: Tensor, opacity: Tensor, k: Tensor, pixels: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Exponent [H, W] of an ellipsoid and the pixels that it may touch; None if it is culled (3DGS, eq. 5 and 6)."""
    x, y, z = center
    if z < 0.01 or z > 1e10 or opacity < 1 / 255:
        return None
    height, width = pixels.shape[:2]
    fx, fy, cx, cy = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
    margin_x, margin_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    tx = z * torch.clamp(x / z, -cx / fx - margin_x, (width - cx) / fx + margin_x)
    ty = z * torch.clamp(y / z, -cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * tx / z**2, zero, fy / z, -fy * ty / z**2]).view(2, 3)
    covariance = jacobian @ axes @ torch.diag(scale**2) @ axes.T @ jacobian.T + 0.3 * torch.eye(2).to(k)
    if torch.linalg.det(covariance) <= 0:
        return None
    mean = torch.stack([fx * x / z + cx, fy * y / z + cy])
    extent = torch.sqrt(2 * torch.log(255 * opacity.detach())).clamp_max(3.33)
    radius = torch.ceil(extent * covariance.detach().diagonal().sqrt())
    if bool((radius <= 0).all()) or not _touches_image(mean, radius, pixels):
        return None
    offset = pixels - mean
    sigma = 0.5 * torch.einsum("hwi,ij,hwj->hw", offset, torch.linalg.inv(covariance), offset)
    return sigma, _in_tiles(mean, radius, pixels)


def _sigma_2d(
    center: Tensor, axes: Tensor, scale: Tensor, opacity: Tensor, k: Tensor, pixels: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Exponent [H, W] of a surfel and the pixels that it may touch; None if it is culled (2DGS, eq. 5 to 11)."""
    if center[2] <= 0.01 or center[2] >= 1e10:
        return None
    # The rows x, y and z of the map from the surfel's plane (u, v, 1) to homogeneous pixels.
    to_pixel = k @ torch.stack([axes[:, 0] * scale[0], axes[:, 1] * scale[1], center], -1)
    sign = torch.tensor([1.0, 1.0, -1.0]).to(k)
    distance = (sign * to_pixel[2] ** 2).sum()
    if distance == 0:
        return None
    # `mean` is the centre of the box of the 1-sigma contour, which is not the projected centre.
    mean = (sign * to_pixel[:2] * to_pixel[2]).sum(-1) / distance
    half = (mean**2 - (sign * to_pixel[:2] ** 2).sum(-1) / distance).detach().clamp_min(1e-4).sqrt()
    radius = torch.ceil(3.33 * half)
    if not _touches_image(mean, radius, pixels):
        return None
    ray = torch.cat([(pixels - k[:2, 2]) / torch.stack([k[0, 0], k[1, 1]]), torch.ones_like(pixels[..., :1])], -1)
    slope = ray @ axes[:, 2]
    misses = slope == 0
    hit = ray * (center @ axes[:, 2] / torch.where(misses, 1.0, slope))[..., None] - center
    u, v = (hit @ axes[:, 0]) / scale[0], (hit @ axes[:, 1]) / scale[1]
    low_pass = 2 * ((pixels - mean) ** 2).sum(-1)
    sigma = 0.5 * torch.minimum(u**2 + v**2, low_pass)
    return sigma, _in_tiles(mean, radius, pixels) & ~misses
