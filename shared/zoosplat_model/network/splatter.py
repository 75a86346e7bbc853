"""Pose Splatter (arXiv 2505.18342): one network that turns the carved volume of any frame into Gaussians.

It differs from the published network in these points, for speed and for better pictures:
- Its units are voxels, so nothing depends on the size of the animal or on the unit of the calibration.
- It starts as the coloured hull: occupancy drives the opacity, and the network's colours and sizes are changes to those
  of the voxel. A voxel at the limit of selection has an opacity too small to be drawn, so selection causes no jumps.
- Each U-Net is given the evidence of the silhouettes for every voxel, at the occupancy that the U-Nets before it have
  left (`carving.prepare_silhouette_evidence`). So it can put back what they took too much of.
- Colours are sampled from the pictures once more where the Gaussians have come to lie, with the occlusion among them.
  The colours of carved voxels are means over a footprint, too coarse for eyes, and use the occlusion of the hull.
- Each camera has a small learned colour transformation, because real cameras differ in exposure and colour.
- After training, Gaussians that float beside the animal are not drawn
  (`connected_components.touches_largest_component`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat.config.experiment import Experiment
from zoosplat_model.carving import ObservedViews, carve, grid_points, prepare_silhouette_evidence, sample_colors
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.network.connected_components import touches_largest_component
from zoosplat_model.network.selection import select_voxels, suppress_interior
from zoosplat_model.network.unet import FEATURE_CHANNELS, UNetStack
from zoosplat_model.rasterize import PairBuffer, Rendering, rasterize
from zoosplat_model.rotations import animal_to_world

OPACITY_SLOPE = 16.0  # logits of opacity for each unit of occupancy; see OPACITY_MIDDLE
OPACITY_MIDDLE = 0.75  # occupancy of opacity 0.5: 0.98 where all views agree, 0.02 where one of them does not
INITIAL_SCALE = 0.3  # voxels; of 0.25 to 0.5, smaller ones give better first silhouettes, and still smaller ones holes
MAX_OFFSET = 2.0  # voxels that a Gaussian can move away from its voxel along each axis
MAX_SCALE = 4.0  # voxels; limit of a Gaussian's standard deviations
OCCLUDER_OPACITY = 0.3  # opacity above which a Gaussian hides what is behind it when colours are sampled
INITIAL_COLOR_LOGIT = 2.0  # logit of the share of the sampled colour in an untrained network
HEAD_BATCHES = 128  # batches into which the products of the head are split on a GPU
COMPONENT_CELL = 2  # voxels; edge of the cells that connect Gaussians to one component


def deep_supervision_loss(earlier: Sequence[Tensor], last: Tensor, hull: Tensor) -> Tensor:
    """How far the occupancies before the last U-Net are from what the last one makes of them; [], not below 0.

    This is the cross entropy of their opacities with the last ones, which get no gradient: a mean over the voxels of
    the hull, summed over the U-Nets. It is deep supervision (Lee et al. 2015, arXiv 1409.5185) by the network's own
    result (Zhang et al. 2019, arXiv 1905.08094). Without it the last U-Net alone takes away what is not animal, and no
    U-Net is left to which the silhouettes' evidence could show what was taken too much.

    Args:
        earlier: [B, n1, n2, n3] each, the occupancies that the U-Nets but the last have left.
        last: [B, n1, n2, n3], the occupancies that the last U-Net has left.
        hull: [B, n1, n2, n3] bool.
    """
    result = torch.sigmoid(OPACITY_SLOPE * (last.detach() - OPACITY_MIDDLE))
    total = last.new_zeros(())
    for occupancy in earlier:
        logits = OPACITY_SLOPE * (occupancy - OPACITY_MIDDLE)
        each = nn.functional.binary_cross_entropy_with_logits(logits, result, reduction="none")
        total = total + torch.where(hull, each, 0).sum()
    return total / hull.sum().clamp_min(1)


def mirror_where(values: Tensor, mirrored: Tensor | None) -> Tensor:
    """Volumes [B, ..., n1, n2, n3], left and right exchanged in those that are `mirrored` ([B] bool; None: none)."""
    if mirrored is None:
        return values
    return torch.where(mirrored.view(-1, *[1] * (values.ndim - 1)), values.flip(-2), values)


def mirror_signs(mirrored: Tensor, like: Tensor) -> Tensor:
    """The [7] factors that mirror an offset (x, y, z) and a quaternion (w, x, y, z) back where `mirrored` ([] bool)."""
    one, other = torch.ones_like(like), torch.where(mirrored, -1.0, 1.0)
    return torch.stack([one, other, one, one, other, one, other])


class PoseSplatter(nn.Module):
    """Carving, refinement, and the head that makes Gaussians.

    Attributes:
        network: name of the network in the settings (`model.network`) and in checkpoints.
        points: [n1, n2, n3, 3] the grid in the animal's frame, metres.
        observed_index: [V] the observed cameras, on the device, for indexing without a copy from the CPU.
        identity_quaternion: [4] (1, 0, 0, 0).
        camera_color: [C, 3, 4] learned change of each camera's colour, linear and constant part.
    """

    network = "zoosplat"
    points: Tensor
    observed_index: Tensor
    identity_quaternion: Tensor

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
        self.register_buffer("observed_index", torch.tensor(list(observed)), persistent=False)
        self.register_buffer("identity_quaternion", torch.tensor([1.0, 0.0, 0.0, 0.0]), persistent=False)
        self.voxel_size_m, self.footprint_px, self.fill_color = voxel_size_m, footprint_px, fill_color
        self.observed, self.mode, self.precision = list(observed), mode, precision
        self.min_gaussians, self.max_gaussians = min_gaussians, max_gaussians
        self.refine = UNetStack(num_unets, base_filters, poolings, bottleneck, points.shape[:3])
        self.head = nn.Sequential(nn.Linear(FEATURE_CHANNELS, 128), nn.LeakyReLU(0.01), nn.Linear(128, 15))
        last = self.head[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.camera_color = nn.Parameter(torch.zeros(n_cameras, 3, 4))

    @classmethod
    def from_reader(cls, reader: FrameReader, experiment: Experiment, **others: Any) -> Self:
        """An untrained network of this class for a recording, on the CPU.

        Args:
            reader: the recording, which gives grid and cameras.
            experiment: whose `model` gives the settings.
            others: further arguments of the class.
        """
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
            precision=settings.precision,
            min_gaussians=settings.min_gaussians,
            max_gaussians=settings.max_gaussians,
            **others,
        )

    def move_to(self, device: torch.device) -> Self:
        """Move the network to a device, in the memory layout that is fastest there."""
        if device.type == "cuda":
            self.refine.to(memory_format=torch.channels_last_3d)
        return self.to(device)

    def freeze_for_inference(self) -> Self:
        """Convert the convolutions' weights to the precision that a GPU computes in; the network cannot train on."""
        if self.points.is_cuda and self.precision == "auto" and isinstance(self.refine, UNetStack):
            for module in self.refine.modules():
                if isinstance(module, nn.Conv3d):  # autocast would convert its weights for every frame
                    module.to(torch.bfloat16)
        return self

    @torch.no_grad()
    def observe(self, frame: Frame) -> ObservedViews:
        """The observed views of a frame, with their cameras in the animal's frame."""
        place = F.pad(torch.cat([animal_to_world(frame.angle, frame.tilt), frame.center[:, None]], 1), (0, 0, 0, 1))
        place[3, 3:].fill_(1)  # now [4, 4], from the animal's frame to the world
        seen = self.observed_index
        return ObservedViews(
            frame.rgb[seen], frame.mask[seen], frame.world_to_camera[seen] @ place, frame.intrinsics[seen]
        )

    def find_seen(self, frame: Frame) -> Tensor | None:
        """Which of the observed views of a frame are there, [V] bool; None means that all are."""
        return None if frame.seen is None else frame.seen[self.observed_index]

    @torch.no_grad()
    def carve(self, views: ObservedViews, used: Tensor | None = None) -> Tensor:
        """The carved volume [8, n1, n2, n3] of a frame, from the `used` ([V] bool; by default all) of its views."""
        return carve(views, self.points, self.voxel_size_m, self.footprint_px, self.fill_color, used)

    def forward(
        self, frames: Sequence[Frame], used: Tensor | None = None, mirrored: Tensor | None = None
    ) -> list[Gaussians]:
        """The Gaussians of each frame in the animal's frame, from those of its views that are there.

        Args:
            frames: any number B; at least one observed view of each is there.
            used: [B, V] bool, the observed views from which each frame is carved (by default all).
            mirrored: [B] bool, the frames that the network sees with left and right exchanged (by default none).
        """
        used = self._leave_out_absent(frames, used)
        volumes, observed = self._carve_all(frames, used)
        return self.reconstruct(volumes, observed, used, mirrored)

    def forward_deep_supervision(
        self, frames: Sequence[Frame], used: Tensor, mirrored: Tensor
    ) -> tuple[list[Gaussians], Tensor]:
        """As `forward`, and the `deep_supervision_loss` of all frames together."""
        among = self._leave_out_absent(frames, used)
        volumes, observed = self._carve_all(frames, among)
        features, earlier = self._refine(volumes, observed, among, mirrored)
        earlier = [mirror_where(occupancy, mirrored) for occupancy in earlier]
        supervision = deep_supervision_loss(earlier, features[:, 0], volumes[:, 0] > 0)
        return self._decode_all(features, observed, among, mirrored), supervision

    def reconstruct(
        self,
        volumes: Tensor,
        observed: Sequence[ObservedViews],
        used: Tensor | None = None,
        mirrored: Tensor | None = None,
    ) -> list[Gaussians]:
        """`forward` from the carved volumes [B, 8, n1, n2, n3] of the frames on."""
        features, _ = self._refine(volumes, observed, used, mirrored)
        return self._decode_all(features, observed, used, mirrored)

    def _leave_out_absent(self, frames: Sequence[Frame], used: Tensor | None) -> Tensor | None:
        """The views that are `used` ([B, V] bool; None means all), without those that are not there."""
        if all(frame.seen is None for frame in frames):
            return used
        every = torch.ones_like(self.observed_index, dtype=torch.bool)
        found = [self.find_seen(frame) for frame in frames]
        seen = torch.stack([every if one is None else one for one in found])
        return seen if used is None else used & seen

    def _carve_all(self, frames: Sequence[Frame], used: Tensor | None) -> tuple[Tensor, list[ObservedViews]]:
        observed = [self.observe(frame) for frame in frames]
        chosen = [None] * len(frames) if used is None else used
        return torch.stack([self.carve(views, u) for views, u in zip(observed, chosen, strict=True)]), observed

    def _refine(
        self, volumes: Tensor, observed: Sequence[ObservedViews], used: Tensor | None, mirrored: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Features [B, 8, n1, n2, n3], and the occupancies before the last U-Net, mirrored as the network sees them."""
        chosen = [None] * len(observed) if used is None else used
        functions = [
            self._prepare_evidence(*of_frame) for of_frame in zip(volumes[:, 0], observed, chosen, strict=True)
        ]

        def evidence(occupancies: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(volumes.device.type, enabled=False):
                each = zip(functions, mirror_where(occupancies, mirrored), strict=True)
                return mirror_where(torch.stack([function(occupancy) for function, occupancy in each]), mirrored)

        low = volumes.is_cuda and self.precision == "auto"
        with torch.autocast(volumes.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            features, earlier = self.refine(mirror_where(volumes, mirrored), evidence)
        return mirror_where(features.to(volumes.dtype), mirrored), earlier

    def _decode_all(
        self, features: Tensor, observed: Sequence[ObservedViews], used: Tensor | None, mirrored: Tensor | None
    ) -> list[Gaussians]:
        chosen = [None] * len(observed) if used is None else used
        if mirrored is None:
            mirrored = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        return [self.decode_gaussians(*one) for one in zip(features, mirrored, observed, chosen, strict=True)]

    @torch.no_grad()
    def _prepare_evidence(self, hull: Tensor, views: ObservedViews, used: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The evidence of the silhouettes from which a frame is carved, as a function of occupancy."""
        opacity = (OPACITY_SLOPE, OPACITY_MIDDLE)
        return prepare_silhouette_evidence(hull, views, self.points, self.voxel_size_m, *opacity, used)

    def decode_gaussians(
        self, features: Tensor, mirrored: Tensor, views: ObservedViews, used: Tensor | None
    ) -> Gaussians:
        """The Gaussians in the animal's frame that features [8, n1, n2, n3] stand for.

        The features are occupancy, colour and four more. Where the network saw the mirror image (`mirrored` [] bool),
        offsets and orientations are mirrored back.
        """
        flat = features.flatten(1)
        chosen, drawn = select_voxels(suppress_interior(features[0].detach()), self.min_gaussians, self.max_gaussians)
        kept = flat.index_select(1, chosen).T
        quats, scales, opacities, colors, offsets, trust = torch.split_with_sizes(
            self._apply_head(kept), [4, 3, 1, 3, 3, 1], 1
        )
        signs = mirror_signs(mirrored, self.log_scale)
        log_scales = (self.log_scale + scales).clamp(max=math.log(MAX_SCALE))
        opacities = torch.sigmoid(opacities[:, 0] + OPACITY_SLOPE * (kept[:, 0] - OPACITY_MIDDLE))
        opacities = torch.where(drawn, opacities, 0)
        means = self.points.reshape(-1, 3)[chosen] + MAX_OFFSET * self.voxel_size_m * torch.tanh(offsets) * signs[:3]
        if not self.training:
            opacities = torch.where(self._touches_animal(means, opacities), opacities, 0)
        base = kept[:, 1:4]
        sampled, seen = self._sample_colors(views, means.detach(), opacities.detach() > OCCLUDER_OPACITY, used)
        base = base + torch.sigmoid(INITIAL_COLOR_LOGIT + trust) * seen[:, None] * (sampled - base)
        return Gaussians(
            means=means,
            quats=nn.functional.normalize(quats + self.identity_quaternion, dim=1) * signs[3:],
            scales=self.voxel_size_m * torch.exp(log_scales),
            opacities=opacities,
            colors=torch.sigmoid(colors + torch.logit(base.clamp(0.02, 0.98))),
        )

    @torch.no_grad()
    def _touches_animal(self, means: Tensor, opacities: Tensor) -> Tensor:
        """Which Gaussians [M] do not float beside the animal."""
        shape = [-(-n // COMPONENT_CELL) for n in self.points.shape[:3]]
        corner = self.points[0, 0, 0] - self.voxel_size_m / 2  # so that a cell has `COMPONENT_CELL` voxels on each axis
        return touches_largest_component(means, opacities, corner, COMPONENT_CELL * self.voxel_size_m, shape)

    @torch.no_grad()
    def _sample_colors(
        self, views: ObservedViews, means: Tensor, solid: Tensor, used: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The colours [M, 3] of Gaussians in the pictures that they are carved from, and whether there are any [M]."""
        return sample_colors(views, means, solid, self.voxel_size_m, self.footprint_px, used)

    def _apply_head(self, features: Tensor) -> Tensor:
        """The head's output [M, 15] for features [M, 8]."""
        if not features.is_cuda:
            return self.head(features)  # type: ignore[no-any-return]
        # In batches, because cuBLAS sums the weights' gradients over thousands of rows with a few threads.
        m = len(features)
        x = F.pad(features, (0, 0, 0, -m % HEAD_BATCHES)).view(HEAD_BATCHES, -1, features.shape[1])
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                x = torch.baddbmm(layer.bias, x, layer.weight.T.expand(HEAD_BATCHES, -1, -1))
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
        pair_buffer: PairBuffer | None = None,
    ) -> Rendering:
        """Render Gaussians on white, with the colours of the given cameras.

        A view whose camera is None or held out has the colours of the average camera, and so have all views where
        `cameras` is None.
        """
        white = gaussians.means.new_ones(3)
        rgb, alpha = rasterize(
            *gaussians,
            world_to_camera,
            intrinsics,
            width,
            height,
            background=white,
            mode=self.mode,
            pair_buffer=pair_buffer,
        )
        if cameras is not None:
            behind = (1 - alpha)[..., None]
            change = self._color_change(cameras)
            # Not as a product of matrices, because cuBLAS takes 2 ms for its gradient.
            linear = (change[:, None, None, :, :3] * (rgb - behind)[..., None, :]).sum(-1)
            rgb = rgb + linear + alpha[..., None] * change[:, None, None, :, 3]
        return Rendering(rgb.clamp(0, 1), alpha)

    def _color_change(self, cameras: Sequence[int | None]) -> Tensor:
        """The change of colour of each view, [V, 3, 4]; its average over the observed cameras is zero."""
        centered = self.camera_color - self.camera_color[self.observed_index].mean(0)
        none = torch.zeros_like(centered[0])
        return torch.stack([centered[c] if c in self.observed and c is not None else none for c in cameras])
