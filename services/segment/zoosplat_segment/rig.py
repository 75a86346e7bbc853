"""Calibrated cameras as tensors: where points lie in pictures as the cameras saw them, and the rays of their pixels."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat.geometry.cameras import Cameras

RAY_STEP = 8  # pixels between the rays of a camera that are stored
REACH = 1.1  # a point farther from the optical axis than the corners of the picture, times this, is not projected


class Rig:
    """C cameras with distortion.

    Args:
        cameras: at full resolution, metres.
        size: width and height of the pictures, pixels.
        device: where the tensors lie.

    Attributes:
        centers: [C, 3] metres.
        rays: [C, 3, h, w] unit vectors of every `RAY_STEP`-th pixel, in the world.
    """

    def __init__(self, cameras: Cameras, size: tuple[int, int], device: torch.device) -> None:
        def tensor(values: object) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=device)

        self.size, self.device = size, device
        self.rotation, self.translation = tensor(cameras.rotation), tensor(cameras.translation_m)
        self.intrinsics, self.distortion = tensor(cameras.intrinsics), tensor(cameras.distortion)
        self.centers = tensor(cameras.centers_m)
        width, height = size
        x = np.arange(0, width + RAY_STEP, RAY_STEP, dtype=np.float64)
        y = np.arange(0, height + RAY_STEP, RAY_STEP, dtype=np.float64)
        places = np.stack(np.meshgrid(x, y), -1)
        rays, reach = [], []
        for k, distortion, rotation in zip(cameras.intrinsics, cameras.distortion, cameras.rotation, strict=True):
            straight = cv2.undistortPoints(places.reshape(-1, 1, 2), k, distortion).reshape(*places.shape)
            toward = np.concatenate([straight, np.ones_like(straight[..., :1])], -1) @ rotation
            rays.append(toward / np.linalg.norm(toward, axis=-1, keepdims=True))
            reach.append(np.linalg.norm(straight, axis=-1).max())
        self.rays = tensor(np.moveaxis(np.stack(rays), -1, 1))
        self._reach = tensor(reach) * REACH

    def __len__(self) -> int:
        return len(self.centers)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [C, N, 2] of points [N, 3] (metres), NaN where the camera cannot see them, and depths [C, N]."""
        seen = torch.einsum("cij,nj->cni", self.rotation, points) + self.translation[:, None]
        depth = seen[..., 2]
        xy = seen[..., :2] / depth.clamp_min(1e-6)[..., None]
        r2 = (xy * xy).sum(-1)
        k1, k2, p1, p2, k3 = self.distortion.T[:, :, None]
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        x, y = xy[..., 0], xy[..., 1]
        bent_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        bent_y = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        k = self.intrinsics[:, None]
        pixels = torch.stack(
            [
                k[..., 0, 0] * bent_x + k[..., 0, 1] * bent_y + k[..., 0, 2],
                k[..., 1, 1] * bent_y + k[..., 1, 2],
            ],
            -1,
        )
        good = (depth > 1e-3) & (r2.sqrt() < self._reach[:, None])
        return torch.where(good[..., None], pixels, torch.nan), depth

    def inside(self, pixels: Tensor) -> Tensor:
        """Whether pixels [..., 2] lie in the picture; False for NaN."""
        width, height = self.size
        x, y = pixels[..., 0], pixels[..., 1]
        return (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)

    def rays_at(self, camera: int, pixels: Tensor) -> Tensor:
        """Unit vectors [h, w, 3] in the world of pixels [h, w, 2] of a camera."""
        height, width = self.rays.shape[2:]
        size = torch.tensor([width - 1, height - 1], dtype=torch.float32, device=self.device)
        grid = 2 * pixels / RAY_STEP / size - 1
        found = F.grid_sample(self.rays[camera : camera + 1], grid[None], padding_mode="border", align_corners=True)
        return F.normalize(found, dim=1)[0].permute(1, 2, 0)

    def pixels_per_metre(self, center: Tensor) -> Tensor:
        """[C] pixels that a metre at a point [3] covers."""
        distance = (self.centers - center).norm(dim=-1)
        pixels: Tensor = self.intrinsics[:, 0, 0] / distance
        return pixels
