"""The deformation field: a multi-resolution HexPlane over space and time, and its decoder.

HexPlane (Cao & Johnson 2023) and K-Planes (Fridovich-Keil 2023) are the sources, joined as in 4D Gaussian Splatting
(arXiv 2310.08528). Names, shapes and order of the state are those of the published tool, so that states can be
exchanged with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat.config.training import Dynamic

AXES = tuple(itertools.combinations(range(4), 2))  # the axes of the six planes: xy, xz, xt, yz, yt, zt
SPACE = tuple(i for i, pair in enumerate(AXES) if 3 not in pair)  # the planes without time
TIME = tuple(i for i, pair in enumerate(AXES) if 3 in pair)  # the planes with time
CHANNELS = 32  # channels of a plane, as in the published tool
WIDTH = 64  # width of the decoder, as in the published tool
TimeRange = Literal["half", "full"]


class HexPlane(nn.Module):
    """Features of points in space and time: at each level the product of six bilinear samples, levels side by side.

    Attributes:
        aabb: [2, 3] the box, scene units: first its maximum, which maps to -1, then its minimum, which maps to +1.
        grids: for each level six planes [1, 32, R_second, R_first] over the pairs of `AXES`.
    """

    def __init__(
        self,
        multires: Sequence[int] = (1, 2, 4, 8),
        resolution: int = 64,
        time_resolution: int = 25,
        bound: float = 1.6,
        time_range: TimeRange = "half",
    ) -> None:
        super().__init__()
        self.time_range = time_range
        self.aabb = nn.Parameter(torch.tensor([[bound] * 3, [-bound] * 3]), requires_grad=False)
        self.grids = nn.ModuleList()
        for m in multires:
            size = (*[m * resolution] * 3, time_resolution)
            planes = []
            for first, second in AXES:
                plane = torch.empty(1, CHANNELS, size[second], size[first])
                if second == 3:
                    nn.init.ones_(plane)
                else:
                    nn.init.uniform_(plane, 0.1, 0.5)
                # The channels of a cell lie together in memory, so that they are read in one piece.
                planes.append(nn.Parameter(plane.contiguous(memory_format=torch.channels_last)))
            self.grids.append(nn.ParameterList(planes))

    @property
    def width(self) -> int:
        """Number of features of a point."""
        return CHANNELS * len(self.grids)

    def planes(self) -> list[list[Tensor]]:
        """The six planes of each level."""
        return [list(level) for level in self.grids]  # type: ignore[call-overload]

    def forward(
        self,
        points: Tensor,  # [N, 3]
        time: Tensor,  # [] in [0, 1]
    ) -> Tensor:
        """Features [N, 32 L] of points at a time, for L levels.

        With the time range "half", time enters as it is and uses half of a plane. With "full" it is stretched to
        [-1, 1].
        """
        places = (points - self.aabb[0]) * (2 / (self.aabb[1] - self.aabb[0])) - 1
        when = time * 2 - 1 if self.time_range == "full" else time
        if points.is_cuda:
            from zoosplat_model.dynamic import hexplane_triton

            if hexplane_triton.is_available(points.get_device()):
                return hexplane_triton.sample(places, when, [plane for level in self.planes() for plane in level])
        return sample_reference(torch.cat([places, when.expand(len(places), 1)], 1), self.planes())

    def roughness(self) -> Roughness:
        """How rough the planes are, which the loss punishes."""
        planes = self.planes()
        space = torch.stack([_second_differences(level[i]) for level in planes for i in SPACE]).sum()
        time = torch.stack([_second_differences(level[i]) for level in planes for i in TIME]).sum()
        ones = torch.stack([(1 - level[i]).abs().mean() for level in planes for i in TIME]).sum()
        return Roughness(space, time, ones)


class Roughness(NamedTuple):
    """Scalars, each a sum over levels and planes.

    Attributes:
        space: mean square of the second differences of the planes without time, along their second axis (y or z).
        time: mean square of the second differences of the planes with time, along time.
        ones: mean of |1 - plane| of the planes with time.
    """

    space: Tensor
    time: Tensor
    ones: Tensor


def _second_differences(plane: Tensor) -> Tensor:
    return plane.diff(n=2, dim=2).square().mean() if plane.shape[2] > 2 else plane.new_zeros(())


def sample_reference(places: Tensor, planes: Sequence[Sequence[Tensor]]) -> Tensor:
    """Features [N, 32 L] at places [N, 4] (x, y, z, t), in plain PyTorch.

    The places -1 and 1 are the centres of the outermost cells of a plane.
    """
    features = []
    for level in planes:
        product: Tensor | None = None
        for (first, second), plane in zip(AXES, level, strict=True):
            at = torch.stack([places[:, first], places[:, second]], -1)[None, None]
            found = F.grid_sample(plane, at, mode="bilinear", padding_mode="border", align_corners=True)[0, :, 0]
            product = found if product is None else product * found
        assert product is not None
        features.append(product)
    return torch.cat(features).T


class Deformed(NamedTuple):
    """The parameters of N Gaussians, canonical or as the field deforms them for a time; scene units."""

    means: Tensor  # [N, 3]
    log_scales: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    logits: Tensor  # [N, 1] of opacity
    harmonics: Tensor  # [N, 16, 3]


class Decoder(nn.Module):
    """The HexPlane and a head for each attribute; a deformed attribute is the canonical one plus its head's output.

    Attributes:
        grid: the HexPlane.
        feature_out: maps its features to 64 numbers.
        deform_opacity: whether opacities change with time.
        deform_harmonics: whether colours change with time.
    """

    def __init__(
        self, grid: HexPlane, depth: int = 1, deform_opacity: bool = False, deform_harmonics: bool = False
    ) -> None:
        super().__init__()
        self.grid = grid
        layers: list[nn.Module] = [nn.Linear(grid.width, WIDTH)]
        for _ in range(depth - 1):
            layers += [nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
        self.feature_out = nn.Sequential(*layers)
        self.pos_deform, self.scales_deform, self.rotations_deform = _head(3), _head(3), _head(4)
        self.opacity_deform, self.shs_deform = _head(1), _head(48)
        self.deform_opacity, self.deform_harmonics = deform_opacity, deform_harmonics

    def forward(self, canonical: Deformed, time: Tensor) -> Deformed:
        """The parameters of the Gaussians at a time ([] in [0, 1])."""
        hidden = self.feature_out(self.grid(canonical.means, time))
        means, log_scales, quats, logits, harmonics = canonical
        return Deformed(
            means + self.pos_deform(hidden),
            log_scales + self.scales_deform(hidden),
            quats + self.rotations_deform(hidden),
            logits + self.opacity_deform(hidden) if self.deform_opacity else logits,
            harmonics + self.shs_deform(hidden).view(-1, 16, 3) if self.deform_harmonics else harmonics,
        )


def _head(size: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, size))


class DeformationField(nn.Module):
    """The whole deformation network of the published tool, with the parts that the tool keeps but does not use.

    Attributes:
        deformation_net: HexPlane and decoder.
        timenet: unused, as are the buffers; all of them are part of the exchanged state.
    """

    time_poc: Tensor
    pos_poc: Tensor
    rotation_scaling_poc: Tensor
    opacity_poc: Tensor

    def __init__(
        self, grid: HexPlane, depth: int = 1, deform_opacity: bool = False, deform_harmonics: bool = False
    ) -> None:
        super().__init__()
        self.timenet = nn.Sequential(nn.Linear(9, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 32))
        self.deformation_net = Decoder(grid, depth, deform_opacity, deform_harmonics)
        for name, count in (("time_poc", 4), ("pos_poc", 10), ("rotation_scaling_poc", 2), ("opacity_poc", 2)):
            self.register_buffer(name, 2.0 ** torch.arange(count))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if name.endswith("deform.3"):
                    # The last layer of a head starts at zero, so that the fine phase starts as the coarse one ended.
                    nn.init.zeros_(module.weight)
                    nn.init.zeros_(module.bias)
        self.timenet.requires_grad_(False)

    def forward(self, canonical: Deformed, time: Tensor) -> Deformed:
        """The parameters of the Gaussians at a time ([] in [0, 1])."""
        deformed: Deformed = self.deformation_net(canonical, time)
        return deformed

    def grids(self) -> list[nn.Parameter]:
        """The planes of all levels."""
        return [p for name, p in self.named_parameters() if ".grids." in name]

    def layers(self) -> list[nn.Parameter]:
        """Weights and biases of the decoder."""
        return [p for name, p in self.deformation_net.named_parameters() if not name.startswith("grid.")]


def build_field(config: Dynamic) -> DeformationField:
    """The untrained deformation field of the settings, on the CPU."""
    grid = HexPlane(config.multires, config.resolution, config.time_resolution, config.bound, config.time_range)
    return DeformationField(grid, config.decoder_depth, config.deform_opacity, config.deform_harmonics)
