"""A set of 3D Gaussians as tensors, and what moves it between frames of reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoosplat_model.rotations import animal_to_world, quaternion_product

LOW_PASS_PX2 = 0.3  # pixels^2; the rasteriser adds it to the variance of every splat (3DGS, Kerbl 2023)


class Gaussians(NamedTuple):
    """N Gaussians, in the world or in the animal's frame.

    Attributes:
        means: [N, 3] centres, metres.
        quats: [N, 4] quaternions (w, x, y, z) from the Gaussian's axes to the frame; of any length but zero where they
            are only rasterised, of unit length otherwise.
        scales: [N, 3] standard deviations along the Gaussian's axes, metres.
        opacities: [N] 0 to 1.
        colors: [N, 3] 0 to 1.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor

    def to_world(self, center: Tensor, angle: Tensor, tilt: Tensor | None = None) -> Gaussians:
        """The Gaussians of the animal's frame in the world: tilted first, then turned about +z, then moved.

        Args:
            center: [3] the animal's centre, metres.
            angle: [] the animal's heading, radians.
            tilt: [4] unit quaternion (w, x, y, z); None means no tilt.
        """
        zero = torch.zeros_like(angle)
        turn = torch.stack([torch.cos(angle / 2), zero, zero, torch.sin(angle / 2)])
        if tilt is not None:
            turn = quaternion_product(turn, tilt)
        means = self.means @ animal_to_world(angle, tilt).T + center
        return self._replace(means=means, quats=quaternion_product(turn, self.quats))

    def with_low_pass(self, pixel_m: float) -> Gaussians:
        """The Gaussians widened by the low pass of the training's pictures (Mip-Splatting, arXiv 2311.16493).

        The rasteriser widens every splat by a variance of 0.3 pixels^2, and training counts on that. Pixels of a nearer
        camera or of a larger picture are smaller, so that gaps would open between the Gaussians. Therefore the same
        variance is added in space.

        Args:
            pixel_m: width of a training pixel at the animal, metres.
        """
        return self._replace(scales=(self.scales**2 + LOW_PASS_PX2 * pixel_m**2).sqrt())
