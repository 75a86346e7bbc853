"""Pose Splatter (arXiv 2505.18342): one network that turns any frame's carved volume into Gaussians.

Where it differs from the published network, for speed and better pictures:
- Its units are voxels, so nothing depends on the size of the animal or the unit of the calibration.
- It starts as the coloured hull: occupancy drives the opacity, and colours and sizes are changes to the voxel's own.
  A voxel at the limit of selection has an opacity too small to be drawn, so selection causes no jumps.
- Each U-Net is told how much the masks need every voxel, by what those before it have left (`carving.need`): it can
  put back what they took too much of.
- Colours are looked up in the pictures once more where the Gaussians have come to lie, with their own occlusion: a
  carved voxel's are means over its footprint, too coarse for eyes, and go by the hull's occlusion.
- Each camera has a small learned colour transformation, because real cameras differ in exposure and colour.
- Once it has learned, Gaussians that float beside the animal are not drawn (`pieces.attached`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat.config.experiment import Experiment
from zoosplat_model.carving import carve, grid_points, look_up, need, rotation_about_z, triton_kernels
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.network.pieces import attached
from zoosplat_model.network.unet import FEATURE_CHANNELS, UNetStack
from zoosplat_model.rasterize import Pairs, Rendering, rasterize
from zoosplat_model.rasterize.torch_cpu import rotations

LEAST_OCCUPANCY = 0.25  # of a selected voxel
SOLID_VOXEL, DEPTH = 0.75, 2  # occupancy of one that hides others; voxels from the surface on which nobody sees one
OPACITY_SLOPE, OPACITY_MIDDLE = 16.0, 0.75  # opacity 0.98 where all views agree, 0.02 where one does not
FIRST_SCALE = 0.3  # voxels: from 0.25 to 0.5, the smaller the better the first silhouettes; smaller ones have holes
REACH = 2.0  # voxels that a Gaussian can move away from its voxel
LOW_PASS = 0.3  # pixels^2: what the rasteriser adds to a splat's variance
SOLID = 0.3  # opacity from which on a Gaussian hides what is behind it, when colours are looked up
FIRST_TRUST = 2.0  # logit of the share of the looked-up colour
HEAD_PARTS = 128  # of the head's products on a GPU
WIDEST = 4.0  # voxels, of a Gaussian's standard deviation
CELL = 2  # voxels: nearer than one cell of that edge, at least, Gaussians are of one piece


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

    def to_world(self, center: Tensor, angle: Tensor, tilt: Tensor | None = None) -> Gaussians:
        """From the animal's frame to the world: first tilted, then turned about +z, then moved.

        Args:
            center: [3] metres.
            angle: [] radians.
            tilt: [4] unit quaternion (w, x, y, z); None: none.
        """
        zero = torch.zeros_like(angle)
        turn = torch.stack([torch.cos(angle / 2), zero, zero, torch.sin(angle / 2)])
        if tilt is not None:
            turn = quaternion_product(turn, tilt)
        means = self.means @ orientation(angle, tilt).T + center
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


class Observed(NamedTuple):
    """The V observed views of a frame.

    Attributes:
        rgb: [V, h, w, 3] 0 to 1.
        mask: [V, h, w] 0 or 1.
        world_to_camera: [V, 4, 4] from the animal's frame.
        intrinsics: [V, 3, 3] calibration pixels.
    """

    rgb: Tensor
    mask: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor


def indecision(earlier: Sequence[Tensor], last: Tensor, hull: Tensor) -> Tensor:
    """How far the occupancies before the last U-Net are from what it makes of them; [], above 0.

    The cross entropy of their opacities with the last ones, which are taken as given: a mean over the hull's voxels,
    summed over the U-Nets. Deep supervision (Lee et al. 2015, arXiv 1409.5185) by the network's own result (Zhang et
    al. 2019, arXiv 1905.08094). Without, the last U-Net alone takes away what is no animal, and none is left that the
    masks could tell what it took too much of.

    Args:
        earlier: [B, n1, n2, n3] each.
        last: [B, n1, n2, n3].
        hull: [B, n1, n2, n3] bool.
    """
    result = torch.sigmoid(OPACITY_SLOPE * (last.detach() - OPACITY_MIDDLE))
    total = last.new_zeros(())
    for occupancy in earlier:
        logits = OPACITY_SLOPE * (occupancy - OPACITY_MIDDLE)
        each = nn.functional.binary_cross_entropy_with_logits(logits, result, reduction="none")
        total = total + torch.where(hull, each, 0).sum()
    return total / hull.sum().clamp_min(1)


def turned(values: Tensor, mirrored: Tensor | None) -> Tensor:
    """[B, ..., n1, n2, n3] as the network sees them, left for right where `mirrored` ([B] bool), and back again."""
    if mirrored is None:
        return values
    return torch.where(mirrored.view(-1, *[1] * (values.ndim - 1)), values.flip(-2), values)


def orientation(angle: Tensor, tilt: Tensor | None) -> Tensor:
    """[3, 3] rotation from the animal's frame to the world's axes: by `tilt` ([4] quaternion), then about +z."""
    turn = rotation_about_z(angle)
    return turn if tilt is None else turn @ rotations(tilt[None])[0]


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


def select(occupancy: Tensor, fewest: int, most: int) -> tuple[Tensor, Tensor]:
    """Indices [M] of the voxels that become Gaussians, by falling occupancy, and which of them [M] are drawn.

    Those with an occupancy above 0.25; if these are fewer than `fewest` or more than `most`, that many of highest
    occupancy instead (all, where the volume has fewer). On a GPU always `most` indices are given, so that nothing waits
    for the device and shapes never change; elsewhere only those that are drawn.

    Args:
        occupancy: [N] any real numbers.
    """
    most = min(most, occupancy.numel())
    if not occupancy.is_cuda:
        most = min(max(int((occupancy > LEAST_OCCUPANCY).sum()), fewest), most)
    values, indices = torch.topk(occupancy, most)
    return indices, (values > LEAST_OCCUPANCY) | (torch.arange(most, device=values.device) < fewest)


def surface_first(occupancy: Tensor) -> Tensor:
    """Occupancy [n1, n2, n3], flattened to [N], with what lies deep inside the animal at the limit of selection.

    So where there are more voxels than Gaussians, `select` leaves out those that nobody sees: all voxels up to `DEPTH`
    away, along each axis, hold something too.
    """
    deep = triton_kernels.least_around(occupancy, 2 * DEPTH + 1, (-1, -2, -3)) > SOLID_VOXEL
    return torch.where(deep, LEAST_OCCUPANCY * 1.001, occupancy).flatten()


class PoseSplatter(nn.Module):
    """Carving, refinement and the head that makes Gaussians.

    Attributes:
        points: [n1, n2, n3, 3] the grid in the animal's frame, metres.
        camera_color: [C, 3, 4] learned change of each camera's colour, linear and constant part.
    """

    points: Tensor
    network = "zoosplat"
    seen: Tensor  # [V] the observed cameras, for indexing without a copy from the CPU
    upright: Tensor  # [4] a quaternion

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
        precision: Literal["auto", "fp32"] = "auto",
        min_gaussians: int = 1024,
        max_gaussians: int = 16000,
    ) -> None:
        super().__init__()
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("seen", torch.tensor(list(observed)), persistent=False)
        self.register_buffer("upright", torch.tensor([1.0, 0.0, 0.0, 0.0]), persistent=False)
        self.voxel_size_m, self.footprint_px, self.fill_color = voxel_size_m, footprint_px, fill_color
        self.observed, self.mode, self.precision = list(observed), mode, precision
        self.min_gaussians, self.max_gaussians = min_gaussians, max_gaussians
        self.refine = UNetStack(num_unets, base_filters, poolings, bottleneck, points.shape[:3])
        self.head = nn.Sequential(nn.Linear(FEATURE_CHANNELS, 128), nn.LeakyReLU(0.01), nn.Linear(128, 15))
        last = self.head[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.camera_color = nn.Parameter(torch.zeros(n_cameras, 3, 4))

    @classmethod
    def of(cls, reader: FrameReader, experiment: Experiment) -> PoseSplatter:
        """The network for a recording that `model.network` names, untrained, on the CPU."""
        settings = experiment.model
        if settings.network == "published":
            from zoosplat_model.published import PublishedSplatter  # which is made of this class

            camera = reader.world_to_camera.cpu()
            centers = -(camera[:, :3, :3].mT @ camera[:, :3, 3:])[..., 0]
            cls = partial(PublishedSplatter, unit_m=float((centers - centers.mean(0)).norm(dim=1).max()))  # type: ignore[assignment]
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
            precision=settings.precision,
            min_gaussians=settings.min_gaussians,
            max_gaussians=settings.max_gaussians,
        )

    def on(self, device: torch.device) -> PoseSplatter:
        """Moved to a device, in the layout that is fastest there."""
        if device.type == "cuda":
            self.refine.to(memory_format=torch.channels_last_3d)
        return self.to(device)

    def only_applied(self) -> PoseSplatter:
        """Not to be trained any more: on a GPU, convolutions' weights are kept in the precision they compute in."""
        if self.points.is_cuda and self.precision == "auto" and isinstance(self.refine, UNetStack):
            for module in self.refine.modules():
                if isinstance(module, nn.Conv3d):  # autocast would convert them for every frame
                    module.to(torch.bfloat16)
        return self

    @torch.no_grad()
    def observe(self, frame: Frame) -> Observed:
        """The frame's observed views, their cameras placed in the animal's frame."""
        place = F.pad(torch.cat([orientation(frame.angle, frame.tilt), frame.center[:, None]], 1), (0, 0, 0, 1))
        place[3, 3:].fill_(1)  # from the animal's frame to the world
        seen = self.seen
        return Observed(frame.rgb[seen], frame.mask[seen], frame.world_to_camera[seen] @ place, frame.intrinsics[seen])

    @torch.no_grad()
    def carve(self, views: Observed, used: Tensor | None = None) -> Tensor:
        """Volume [8, n1, n2, n3] of a frame, from the `used` ([V] bool) of its V observed views (default: all)."""
        return carve(*views, self.points, self.voxel_size_m, self.footprint_px, self.fill_color, used)

    def forward(
        self, frames: Sequence[Frame], used: Tensor | None = None, mirrored: Tensor | None = None
    ) -> list[Gaussians]:
        """Gaussians of each frame in the animal's frame.

        Args:
            frames: any number.
            used: [frames, V] bool, which of the V observed views each is carved from (default: all).
            mirrored: [frames] bool, which of them the network sees mirrored, left for right (default: none).
        """
        volumes, observed = self._carved(frames, used)
        return self.reconstruct(volumes, observed, used, mirrored)

    def learn(self, frames: Sequence[Frame], used: Tensor, mirrored: Tensor) -> tuple[list[Gaussians], Tensor]:
        """As `forward`, and the U-Nets' `indecision` over all of the hulls' voxels."""
        volumes, observed = self._carved(frames, used)
        features, earlier = self._refined(volumes, observed, used, mirrored)
        earlier = [turned(occupancy, mirrored) for occupancy in earlier]
        undecided = indecision(earlier, features[:, 0], volumes[:, 0] > 0)
        return self._gaussians(features, observed, used, mirrored), undecided

    def reconstruct(
        self, volumes: Tensor, observed: Sequence[Observed], used: Tensor | None = None, mirrored: Tensor | None = None
    ) -> list[Gaussians]:
        """`forward` from the frames' carved volumes [B, 8, n1, n2, n3] on."""
        features, _ = self._refined(volumes, observed, used, mirrored)
        return self._gaussians(features, observed, used, mirrored)

    def _carved(self, frames: Sequence[Frame], used: Tensor | None) -> tuple[Tensor, list[Observed]]:
        observed = [self.observe(frame) for frame in frames]
        chosen = [None] * len(frames) if used is None else used
        return torch.stack([self.carve(views, u) for views, u in zip(observed, chosen, strict=True)]), observed

    def _refined(
        self, volumes: Tensor, observed: Sequence[Observed], used: Tensor | None, mirrored: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Features [B, 8, n1, n2, n3], and the occupancies before the last U-Net, as the network sees them."""
        chosen = [None] * len(observed) if used is None else used
        needs = [self._need(*of_frame) for of_frame in zip(volumes[:, 0], observed, chosen, strict=True)]

        def needed(occupancies: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(volumes.device.type, enabled=False):
                each = zip(needs, turned(occupancies, mirrored), strict=True)
                return turned(torch.stack([need(occupancy) for need, occupancy in each]), mirrored)

        low = volumes.is_cuda and self.precision == "auto"
        with torch.autocast(volumes.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            features, earlier = self.refine(turned(volumes, mirrored), needed)
        return turned(features.to(volumes.dtype), mirrored), earlier

    def _gaussians(
        self, features: Tensor, observed: Sequence[Observed], used: Tensor | None, mirrored: Tensor | None
    ) -> list[Gaussians]:
        chosen = [None] * len(observed) if used is None else used
        if mirrored is None:
            mirrored = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        return [self.gaussians_of(*one) for one in zip(features, mirrored, observed, chosen, strict=True)]

    @torch.no_grad()
    def _need(self, hull: Tensor, views: Observed, used: Tensor | None) -> Callable[[Tensor], Tensor]:
        """How much the views that a frame is carved from need each voxel, as a function of occupancy."""
        return need(hull, *views[1:], self.points, self.voxel_size_m, OPACITY_SLOPE, OPACITY_MIDDLE, used)

    def gaussians_of(self, features: Tensor, mirrored: Tensor, views: Observed, used: Tensor | None) -> Gaussians:
        """Gaussians in the animal's frame from features [8, n1, n2, n3]: occupancy, colour and four more.

        Where the network saw the mirror image (`mirrored` [] bool), offsets and orientations are mirrored back.
        """
        flat = features.flatten(1)
        chosen, drawn = select(surface_first(features[0].detach()), self.min_gaussians, self.max_gaussians)
        kept = flat.index_select(1, chosen).T
        quats, scales, opacities, colors, offsets, trust = torch.split_with_sizes(
            self._head(kept), [4, 3, 1, 3, 3, 1], 1
        )
        one, other = torch.ones_like(self.log_scale), torch.where(mirrored, -1.0, 1.0)
        side = torch.stack([one, other, one, one, other, one, other])  # of x y z, then of w x y z
        log_scales = (self.log_scale + scales).clamp(max=math.log(WIDEST))
        opacities = torch.sigmoid(opacities[:, 0] + OPACITY_SLOPE * (kept[:, 0] - OPACITY_MIDDLE))
        opacities = torch.where(drawn, opacities, 0)
        means = self.points.reshape(-1, 3)[chosen] + REACH * self.voxel_size_m * torch.tanh(offsets) * side[:3]
        if not self.training:
            opacities = torch.where(self._attached(means, opacities), opacities, 0)
        base = kept[:, 1:4]
        looked_up, seen = self._look_up(views, means.detach(), opacities.detach() > SOLID, used)
        base = base + torch.sigmoid(FIRST_TRUST + trust) * seen[:, None] * (looked_up - base)
        return Gaussians(
            means=means,
            quats=nn.functional.normalize(quats + self.upright, dim=1) * side[3:],
            scales=self.voxel_size_m * torch.exp(log_scales),
            opacities=opacities,
            colors=torch.sigmoid(colors + torch.logit(base.clamp(0.02, 0.98))),
        )

    @torch.no_grad()
    def _attached(self, means: Tensor, opacities: Tensor) -> Tensor:
        """Which Gaussians [M] are not beside the animal, but part of it."""
        shape = [-(-n // CELL) for n in self.points.shape[:3]]
        corner = self.points[0, 0, 0] - self.voxel_size_m / 2  # so that each cell has `CELL` voxels along an axis
        return attached(means, opacities, corner, CELL * self.voxel_size_m, shape)

    @torch.no_grad()
    def _look_up(self, views: Observed, means: Tensor, solid: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
        """Colours [M, 3] of Gaussians in the pictures that they are carved from, and whether there are any [M]."""
        return look_up(*views, means, solid, self.voxel_size_m, self.footprint_px, used)

    def _head(self, features: Tensor) -> Tensor:
        """[M, 8] to [M, 15]."""
        if not features.is_cuda:
            return self.head(features)  # type: ignore[no-any-return]
        # In parts: cuBLAS sums the weights' gradients over thousands of rows with a few threads.
        m = len(features)
        x = F.pad(features, (0, 0, 0, -m % HEAD_PARTS)).view(HEAD_PARTS, -1, features.shape[1])
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                x = torch.baddbmm(layer.bias, x, layer.weight.T.expand(HEAD_PARTS, -1, -1))
            else:
                x = layer(x)
        return x.flatten(0, 1)[:m]

    def render(
        self,
        gaussians: Gaussians,  # in the world
        world_to_camera: Tensor,  # [V, 4, 4]
        intrinsics: Tensor,  # [V, 3, 3] calibration pixels
        width: int,
        height: int,
        cameras: Sequence[int | None] | None = None,  # [V]
        pairs: Pairs | None = None,
    ) -> Rendering:
        """Render on white, with the colours of the given cameras (None and held-out ones: of the average camera)."""
        white = gaussians.means.new_ones(3)
        rgb, alpha = rasterize(
            *gaussians, world_to_camera, intrinsics, width, height, background=white, mode=self.mode, pairs=pairs
        )
        if cameras is not None:
            behind = (1 - alpha)[..., None]
            change = self._color_change(cameras)
            # Not as a product of matrices: cuBLAS takes 2 ms for its gradient.
            linear = (change[:, None, None, :, :3] * (rgb - behind)[..., None, :]).sum(-1)
            rgb = rgb + linear + alpha[..., None] * change[:, None, None, :, 3]
        return Rendering(rgb.clamp(0, 1), alpha)

    def _color_change(self, cameras: Sequence[int | None]) -> Tensor:
        """[V, 3, 4] change of colour of each view; zero on average over the observed cameras."""
        centered = self.camera_color - self.camera_color[self.seen].mean(0)
        none = torch.zeros_like(centered[0])
        return torch.stack([centered[c] if c in self.observed and c is not None else none for c in cameras])
