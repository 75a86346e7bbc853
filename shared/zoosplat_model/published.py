"""The published network (arXiv 2505.18342), for comparison: `model.network: published`.

As published: 3D U-Nets of full resolution, whose blocks are twice a convolution, BatchNorm3d and a leaky ReLU; halving
by maxima, doubling by transposed convolutions; at the bottom a perceptron that all goes through; volumes of 4 channels;
which voxels become Gaussians, and what the head makes of them. As in the published tool, opacities come from the
occupancy alone, between 0.5 and 0.73, and the head's own number for them has no effect. One colour serves all cameras.

Not as published, but as in our own network: carving (occupancy in parts of a voxel, correct visibility, half-pixel
exactness), orientations turned by a quaternion product, losses, frames at times carved without a view or mirrored,
averaged weights. The paper's first U-Nets are residual; its code overwrites what they compute, so that they double the
volume: here they are residual. Each U-Net starts at zero by its last layer. At the batch size of 1 of the paper,
BatchNorm3d takes the statistics of the volume itself; here it does so for every volume of a batch, also in evaluation:
running statistics would not belong to averaged weights. All in float32, whatever `model.precision` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat_model.network.splatter import REACH, Gaussians, Observed, PoseSplatter
from zoosplat_model.network.unet import FEATURE_CHANNELS, REFINED_CHANNELS

BOTTLENECK = 512
SLOPE = 0.1
PROBABILITY = 0.25  # of a voxel that becomes a Gaussian, at least
FIRST_THRESHOLD, THRESHOLD_STEP = 0.25, 0.05
FIRST_LOG_SCALE = -5.5  # in units of the distance of the farthest camera from the cameras' centre


def thresholded(occupancy: Tensor, fewest: int, most: int) -> tuple[Tensor, Tensor]:
    """The voxels that may become Gaussians, by falling occupancy: indices [M], and the threshold [].

    Those do whose probability, sigmoid(occupancy - threshold), is above 0.25. The threshold starts at 0.25 and rises by
    0.05 until these are at most `most`, then falls until they are at least `fewest`; where that gives more than `most`,
    those of highest occupancy count (the published tool draws lots). M is always `most`, or all, so that nothing waits
    for a GPU.

    Args:
        occupancy: [N] any real numbers.
    """
    n = occupancy.numel()
    most, fewest = min(most, n), min(fewest, n)
    values, indices = torch.topk(occupancy, min(most + 1, n))
    limit = math.log(PROBABILITY / (1 - PROBABILITY))  # a voxel counts if its occupancy - threshold is above
    threshold = torch.full_like(values[0], FIRST_THRESHOLD)
    if n > most:
        steps = torch.ceil((values[most] - limit - FIRST_THRESHOLD) / THRESHOLD_STEP).clamp_min(0)
        threshold = threshold + steps * THRESHOLD_STEP
    excess = threshold - (values[fewest - 1] - limit)  # not negative: too few are above
    steps = torch.where(excess < 0, 0, torch.floor(excess / THRESHOLD_STEP) + 1)
    threshold = threshold - steps * THRESHOLD_STEP
    return indices[:most], threshold


def _block(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((n_in, n_out), (n_out, n_out)):
        layers += [nn.Conv3d(a, b, 3, padding=1), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU(SLOPE, inplace=True)]
    return nn.Sequential(*layers)


class PublishedUNet(nn.Module):
    """Volumes [B, 4, n1, n2, n3] to [B, n_out, n1, n2, n3], 0 at first.

    Args:
        n_out: channels of the output.
        base_filters: channels at full resolution; they double with each halving.
        poolings: halvings; the paper has 4.
        bottleneck: width of the perceptron.
        shape: of the volume, each a multiple of 2^poolings.
    """

    def __init__(self, n_out: int, base_filters: int, poolings: int, bottleneck: int, shape: Sequence[int]) -> None:
        super().__init__()
        widths = [base_filters << level for level in range(poolings + 1)]
        flat = widths[-1] * math.prod(n >> poolings for n in shape)
        self.down = nn.ModuleList(_block(a, b) for a, b in pairwise([REFINED_CHANNELS, *widths]))
        self.bottom = nn.Sequential(
            nn.Linear(flat, bottleneck), nn.ReLU(), nn.Linear(bottleneck, bottleneck), nn.Linear(bottleneck, flat)
        )
        self.doubling = nn.ModuleList(nn.ConvTranspose3d(deep, here, 2, stride=2) for here, deep in pairwise(widths))
        self.up = nn.ModuleList(_block(2 * here, here) for here in widths[:-1])
        self.last = nn.Conv3d(base_filters, n_out, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down[0](x)
        skips = []
        for block in self.down[1:]:
            skips.append(x)
            x = block(F.max_pool3d(x, 2))
        x = self.bottom(x.flatten(1)).view(x.shape)
        for double, block, skip in zip(reversed(self.doubling), reversed(self.up), reversed(skips), strict=True):
            x = block(torch.cat([skip, double(x)], 1))
        return self.last(x)  # type: ignore[no-any-return]


class PublishedStack(nn.Module):
    """U-Nets in a row: volumes [B, 8, n1, n2, n3], of which the first 4 channels count, to features of the same shape.

    All but the last are residual. The first 4 of the last one's 8 channels are its input, so only the others are made.
    """

    def __init__(self, num_unets: int, base_filters: int, poolings: int, bottleneck: int, shape: Sequence[int]) -> None:
        super().__init__()
        outputs = [REFINED_CHANNELS] * (num_unets - 1) + [FEATURE_CHANNELS - REFINED_CHANNELS]
        self.unets = nn.ModuleList(PublishedUNet(n, base_filters, poolings, bottleneck, shape) for n in outputs)

    def forward(self, volume: Tensor, needed: object = None) -> tuple[Tensor, list[Tensor]]:
        x = volume[:, :REFINED_CHANNELS]
        with torch.autocast(x.device.type, enabled=False):
            for unet in self.unets[:-1]:
                x = x + unet(x)
            return torch.cat([x, self.unets[-1](x)], 1), []


class PublishedSplatter(PoseSplatter):
    """A `PoseSplatter` with the published network between carving and rendering.

    Args:
        unit_m: the published unit of length, metres.
    """

    network = "published"

    def __init__(
        self,
        points: Tensor,
        *args: Any,
        unit_m: float,
        num_unets: int = 3,
        base_filters: int = 8,
        poolings: int = 4,
        bottleneck: int = 0,
        **others: Any,
    ) -> None:
        super().__init__(points, *args, num_unets=1, base_filters=1, poolings=1, **others)
        shape = points.shape[:3]
        self.refine = PublishedStack(num_unets, base_filters, poolings, bottleneck or BOTTLENECK, shape)  # type: ignore[assignment]
        self.head = nn.Sequential(nn.Linear(FEATURE_CHANNELS, 128), nn.ReLU(), nn.Linear(128, 14))
        self.log_scale = nn.Parameter(torch.tensor(FIRST_LOG_SCALE + math.log(unit_m)))  # of metres
        del self.camera_color

    def gaussians_of(self, features: Tensor, mirrored: Tensor, views: Observed, used: Tensor | None) -> Gaussians:
        flat = features.flatten(1)
        chosen, threshold = thresholded(flat[0].detach(), self.min_gaussians, self.max_gaussians)
        kept = flat.index_select(1, chosen).T
        probability = torch.sigmoid(kept[:, 0] - threshold)
        quats, scales, _, colors, offsets = torch.split_with_sizes(self._head(kept), [4, 3, 1, 3, 3], 1)
        opacities = torch.sigmoid(((probability - PROBABILITY) / (1 - PROBABILITY)).clamp(0, 1))
        one, other = torch.ones_like(self.log_scale), torch.where(mirrored, -1.0, 1.0)
        side = torch.stack([one, other, one, one, other, one, other])  # of x y z, then of w x y z
        return Gaussians(
            means=self.points.reshape(-1, 3)[chosen] + REACH * self.voxel_size_m * torch.tanh(offsets) * side[:3],
            quats=F.normalize(quats, dim=1) * side[3:],
            scales=torch.exp(self.log_scale + scales),
            opacities=torch.where(probability > PROBABILITY, opacities, 0),
            colors=torch.sigmoid(colors),
        )

    def _need(self, hull: Tensor, views: Observed, used: Tensor | None) -> Callable[[Tensor], Tensor]:
        return torch.zeros_like  # its U-Nets do not ask

    def _color_change(self, cameras: Sequence[int | None]) -> Tensor:
        return self.points.new_zeros(len(cameras), 3, 4)
