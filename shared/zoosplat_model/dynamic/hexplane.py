"""The deformation field: a multi-resolution HexPlane over space and time and its decoder.

HexPlane (Cao & Johnson 2023), K-Planes (Fridovich-Keil 2023), as 4D Gaussian Splatting (arXiv 2310.08528) joins them.
Names, shapes and order of the state are those of the published tool, so that states are exchanged with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AXES = tuple(itertools.combinations(range(4), 2))  # of the six planes: xy, xz, xt, yz, yt, zt
SPACE = tuple(i for i, pair in enumerate(AXES) if 3 not in pair)
TIME = tuple(i for i, pair in enumerate(AXES) if 3 in pair)
CHANNELS = 32  # of a plane
WIDTH = 64  # of the decoder
TimeRange = Literal["half", "full"]


class HexPlane(nn.Module):
    """Features of points in space and time: at each level the product of six bilinear samples, levels side by side.

    Attributes:
        aabb: [2, 3] the box, its maximum first, which maps to -1; its minimum maps to +1.
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
                # A point's channels lie together in memory, so that it is read in one piece.
                planes.append(nn.Parameter(plane.contiguous(memory_format=torch.channels_last)))
            self.grids.append(nn.ParameterList(planes))

    @property
    def width(self) -> int:
        """Length of the features."""
        return CHANNELS * len(self.grids)

    def planes(self) -> list[list[Tensor]]:
        """The planes by level."""
        return [list(level) for level in self.grids]  # type: ignore[call-overload]

    def forward(
        self,
        points: Tensor,  # [N, 3]
        time: Tensor,  # [] in [0, 1]
    ) -> Tensor:
        """Features [N, 32 L]. Time enters as it is, which uses half of a plane, or stretched to [-1, 1] (`full`)."""
        places = (points - self.aabb[0]) * (2 / (self.aabb[1] - self.aabb[0])) - 1
        when = time * 2 - 1 if self.time_range == "full" else time
        if points.is_cuda:
            from .hexplane_gpu import sample, works

            if works(points.get_device()):
                return sample(places, when, [plane for level in self.planes() for plane in level])
        return sample_plainly(torch.cat([places, when.expand(len(places), 1)], 1), self.planes())

    def roughness(self) -> Roughness:
        """What the loss adds for planes that are not smooth, see `Roughness`."""
        planes = self.planes()
        space = torch.stack([_second_differences(level[i]) for level in planes for i in SPACE]).sum()
        time = torch.stack([_second_differences(level[i]) for level in planes for i in TIME]).sum()
        ones = torch.stack([(1 - level[i]).abs().mean() for level in planes for i in TIME]).sum()
        return Roughness(space, time, ones)


class Roughness(NamedTuple):
    """Scalars, sums over levels and planes.

    Attributes:
        space: mean square of second differences along the second axis (y or z) of the planes without time.
        time: the same of the planes with time, along it.
        ones: mean of |1 - plane| of the planes with time.
    """

    space: Tensor
    time: Tensor
    ones: Tensor


def _second_differences(plane: Tensor) -> Tensor:
    return plane.diff(n=2, dim=2).square().mean() if plane.shape[2] > 2 else plane.new_zeros(())


def sample_plainly(places: Tensor, planes: Sequence[Sequence[Tensor]]) -> Tensor:
    """Features [N, 32 L] at [N, 4] places (x, y, z, t), -1 and 1 the centres of a plane's outermost cells."""
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
    """What the field makes of N Gaussians' parameters at a time; shapes as they went in."""

    means: Tensor  # [N, 3]
    log_scales: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    logits: Tensor  # [N, 1] of opacity
    harmonics: Tensor  # [N, 16, 3]


class Decoder(nn.Module):
    """The field and a head for each attribute; a deformed attribute is the canonical one plus its head's output.

    Attributes:
        grid: the field.
        feature_out: its features to 64 numbers.
        heads: names of the heads in use.
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
        """The Gaussians' parameters at `time` [] in [0, 1]."""
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
    """The published tool's whole deformation network, parts that it keeps but does not use included.

    Attributes:
        deformation_net: field and decoder.
        timenet: unused, as are the buffers; all are part of the exchanged state.
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
                    # The last layer of a head: the fine stage starts as the coarse one ended.
                    nn.init.zeros_(module.weight)
                    nn.init.zeros_(module.bias)
        self.timenet.requires_grad_(False)

    def forward(self, canonical: Deformed, time: Tensor) -> Deformed:
        """See `Decoder`."""
        deformed: Deformed = self.deformation_net(canonical, time)
        return deformed

    def grids(self) -> list[nn.Parameter]:
        """The planes."""
        return [p for name, p in self.named_parameters() if ".grids." in name]

    def layers(self) -> list[nn.Parameter]:
        """Weights and biases of the decoder."""
        return [p for name, p in self.deformation_net.named_parameters() if not name.startswith("grid.")]
