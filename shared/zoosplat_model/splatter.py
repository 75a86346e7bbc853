"""Pose Splatter (arXiv 2505.18342): one network that turns any frame's carved volume into Gaussians.

Where it differs from the published network, for speed and better pictures:
- Its units are voxels, so nothing depends on the size of the animal or the unit of the calibration.
- It starts as the coloured hull: occupancy drives the opacity, and colours and sizes are changes to the voxel's own.
  A voxel at the limit of selection has an opacity too small to be drawn, so selection causes no jumps.
- Each camera has a small learned colour transformation, because real cameras differ in exposure and colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoosplat.config import Experiment
from zoosplat_model.carving import carve, grid_points, rotation_about_z
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.rasterize import Rendering, rasterize
from zoosplat_model.unet import FEATURE_CHANNELS, UNetStack

LEAST_OCCUPANCY = 0.25  # of a selected voxel
OPACITY_SLOPE, OPACITY_MIDDLE = 16.0, 0.75  # opacity 0.98 where all views agree, 0.02 where one does not
FIRST_SCALE = 0.3  # voxels: from 0.25 to 0.5, the smaller the better the first silhouettes; smaller ones have holes
REACH = 2.0  # voxels that a Gaussian can move away from its voxel
LOW_PASS = 0.3  # pixels^2: what the rasteriser adds to a splat's variance
WIDEST = 4.0  # voxels, of a Gaussian's standard deviation


class Gaussians(NamedTuple):
    """N Gaussians, in the world or in the animal's frame.

    Attributes:
        means: [N, 3] metres.
        quats: [N, 4] unit quaternions (w, x, y, z).
        scales: [N, 3] standard deviations along the Gaussian's axes, metres.
        opacities: [N] 0 to 1.
        colors: [N, 3] 0 to 1.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor

    def to_world(self, center: Tensor, angle: Tensor) -> Gaussians:
        """From the animal's frame to the world: turned by `angle` [] radians about +z, moved to `center` [3] metres."""
        zero = torch.zeros_like(angle)
        turn = torch.stack([torch.cos(angle / 2), zero, zero, torch.sin(angle / 2)])
        means = self.means @ rotation_about_z(angle).T + center
        return self._replace(means=means, quats=quaternion_product(turn, self.quats))

    def smoothed(self, pixel_m: float) -> Gaussians:
        """The low pass of the training's pictures, as part of the Gaussians (Mip-Splatting, arXiv 2311.16493).

        The rasteriser widens every splat by a variance of 0.3 pixels, and training counts on it. From closer, or in
        larger pictures, those pixels are smaller, and gaps would open between Gaussians: so the variance is added in
        space.

        Args:
            pixel_m: width of a training pixel at the animal, metres.
        """
        return self._replace(scales=(self.scales**2 + LOW_PASS * pixel_m**2).sqrt())


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product [..., 4] of quaternions (w, x, y, z): first the rotation `b`, then `a`."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


def select(occupancy: Tensor, fewest: int, most: int) -> Tensor:
    """Indices of the voxels that become Gaussians.

    Those with an occupancy above 0.25; if these are fewer than `fewest` or more than `most`, that many of highest
    occupancy instead (all, where the volume has fewer). Reads one number back from the device.

    Args:
        occupancy: [N] any real numbers.
    """
    count = int((occupancy > LEAST_OCCUPANCY).sum())
    count = min(max(count, fewest), most, occupancy.numel())
    return torch.topk(occupancy, count, sorted=False).indices


class PoseSplatter(nn.Module):
    """Carving, refinement and the head that makes Gaussians.

    Attributes:
        points: [n1, n2, n3, 3] the grid in the animal's frame, metres.
        camera_color: [C, 3, 4] learned change of each camera's colour, linear and constant part.
    """

    points: Tensor

    def __init__(
        self,
        points: Tensor,  # [n1, n2, n3, 3] animal's frame, metres
        voxel_size_m: float,
        footprint_px: int,
        n_cameras: int,
        observed: Sequence[int],
        *,
        fill_color: float = 0.38,
        num_unets: int = 3,
        base_filters: int = 8,
        poolings: int = 4,
        bottleneck: int = 0,
        mode: Literal["3d", "2d"] = "3d",
        min_gaussians: int = 1024,
        max_gaussians: int = 16000,
    ) -> None:
        super().__init__()
        self.register_buffer("points", points, persistent=False)
        self.voxel_size_m, self.footprint_px, self.fill_color = voxel_size_m, footprint_px, fill_color
        self.observed, self.mode = list(observed), mode
        self.min_gaussians, self.max_gaussians = min_gaussians, max_gaussians
        self.refine = UNetStack(num_unets, base_filters, poolings, bottleneck, points.shape[:3])
        self.head = nn.Sequential(nn.Linear(FEATURE_CHANNELS, 128), nn.LeakyReLU(0.01), nn.Linear(128, 14))
        last = self.head[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.camera_color = nn.Parameter(torch.zeros(n_cameras, 3, 4))

    @classmethod
    def of(cls, reader: FrameReader, experiment: Experiment) -> PoseSplatter:
        """The network for a recording, untrained, on the CPU."""
        settings = experiment.model
        return cls(
            grid_points(reader.ell_m, reader.grid_size, reader.volume_idx),
            reader.voxel_size_m,
            reader.footprint_px(),
            reader.n_cameras,
            reader.observed,
            fill_color=settings.volume_fill_color,
            num_unets=settings.num_unets,
            base_filters=settings.base_filters,
            poolings=settings.poolings,
            bottleneck=settings.bottleneck,
            mode=settings.gaussian_mode,
            min_gaussians=settings.min_gaussians,
            max_gaussians=settings.max_gaussians,
        )

    @torch.no_grad()
    def carve(self, frame: Frame, views: Sequence[int] | None = None) -> Tensor:
        """Volume [4, n1, n2, n3] of a frame, from some of its views (default: all observed ones)."""
        chosen = list(self.observed if views is None else views)
        points = self.points @ rotation_about_z(frame.angle).T + frame.center
        return carve(
            frame.rgb[chosen],
            frame.mask[chosen],
            frame.world_to_camera[chosen],
            frame.intrinsics[chosen],
            points,
            self.voxel_size_m,
            self.footprint_px,
            self.fill_color,
        )

    def forward(self, frames: Sequence[Frame], views: Sequence[Sequence[int]] | None = None) -> list[Gaussians]:
        """Gaussians of each frame in the animal's frame.

        Args:
            frames: any number.
            views: for each frame, the views to carve from (default: all observed ones).
        """
        chosen = [None] * len(frames) if views is None else views
        volumes = torch.stack([self.carve(frame, v) for frame, v in zip(frames, chosen, strict=True)])
        return [self.gaussians_of(features) for features in self.refine(volumes)]

    def gaussians_of(self, features: Tensor) -> Gaussians:
        """Gaussians in the animal's frame from features [8, n1, n2, n3]: occupancy, colour and four more."""
        flat = features.flatten(1).T
        chosen = select(flat[:, 0].detach(), self.min_gaussians, self.max_gaussians)
        kept = flat[chosen]
        quats, scales, opacities, colors, offsets = self.head(kept).split([4, 3, 1, 3, 3], 1)
        upright = kept.new_tensor([1.0, 0.0, 0.0, 0.0])
        log_scales = (self.log_scale + scales).clamp(max=math.log(WIDEST))
        return Gaussians(
            means=self.points.reshape(-1, 3)[chosen] + REACH * self.voxel_size_m * torch.tanh(offsets),
            quats=nn.functional.normalize(quats + upright, dim=1),
            scales=self.voxel_size_m * torch.exp(log_scales),
            opacities=torch.sigmoid(opacities[:, 0] + OPACITY_SLOPE * (kept[:, 0] - OPACITY_MIDDLE)),
            colors=torch.sigmoid(colors + torch.logit(kept[:, 1:4].clamp(0.02, 0.98))),
        )

    def render(
        self,
        gaussians: Gaussians,  # in the world
        world_to_camera: Tensor,  # [V, 4, 4]
        intrinsics: Tensor,  # [V, 3, 3] calibration pixels
        width: int,
        height: int,
        cameras: Sequence[int | None] | None = None,  # [V]
    ) -> Rendering:
        """Render on white, with the colours of the given cameras (None and held-out ones: of the average camera)."""
        white = gaussians.means.new_ones(3)
        mode = self.mode
        rgb, alpha = rasterize(
            *gaussians, world_to_camera, intrinsics, width, height, background=white, mode=mode, backend="auto"
        )
        if cameras is not None:
            behind = (1 - alpha)[..., None]
            change = self._color_change(cameras)
            linear = torch.einsum("vij,vhwj->vhwi", change[:, :, :3], rgb - behind)
            rgb = rgb + linear + alpha[..., None] * change[:, None, None, :, 3]
        return Rendering(rgb.clamp(0, 1), alpha)

    def _color_change(self, cameras: Sequence[int | None]) -> Tensor:
        """[V, 3, 4] change of colour of each view; zero on average over the observed cameras."""
        centered = self.camera_color - self.camera_color[self.observed].mean(0)
        none = torch.zeros_like(centered[0])
        return torch.stack([centered[c] if c in self.observed and c is not None else none for c in cameras])
