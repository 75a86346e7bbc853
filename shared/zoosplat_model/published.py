"""The published network (arXiv 2505.18342), for comparison: `model.network: published`.

As published are:
- the 3D U-Nets of full resolution, whose blocks are twice a convolution, BatchNorm3d and a leaky ReLU, with max
  pooling, transposed convolutions and, at the bottom, a perceptron through which everything passes;
- the volumes of 4 channels;
- which voxels become Gaussians, and what the head makes of them. As in the published tool, opacities come from the
  occupancy alone and lie between 0.5 and 0.73, and the head's own number for them has no effect;
- one colour for all cameras.

As in our own network are carving (occupancy in parts of a voxel, correct visibility, exactness to half a pixel),
orientations turned by a quaternion product, losses, frames that are at times carved without a view or mirrored, and
averaged weights. The first U-Nets of the paper are residual. Its code overwrites what they compute, so that they double
the volume; here they are residual. Each U-Net starts at zero by its last layer. At the paper's batch size of 1,
BatchNorm3d takes the statistics of the volume itself. Here it does so for every volume of a batch, also in evaluation,
because running statistics would not belong to averaged weights. Everything is float32, whatever `model.precision` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat.config.experiment import Experiment
from zoosplat_model.carving import ObservedViews
from zoosplat_model.frames import FrameReader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.network.splatter import MAX_OFFSET, PoseSplatter, mirror_signs
from zoosplat_model.network.unet import FEATURE_CHANNELS, REFINED_CHANNELS

# The numbers of the published tool.
BOTTLENECK = 512  # width of the perceptron where `model.bottleneck` is 0
LEAKY_SLOPE = 0.1  # slope of the leaky ReLUs below 0
MIN_PROBABILITY = 0.25  # probability above which a voxel becomes a Gaussian
INITIAL_THRESHOLD = 0.25  # occupancy at which the search for the threshold starts
THRESHOLD_STEP = 0.05  # occupancy by which the search moves the threshold
INITIAL_LOG_SCALE = -5.5  # natural logarithm; the unit is the distance of the farthest camera from the cameras' centre


def find_threshold(occupancy: Tensor, fewest: int, most: int) -> tuple[Tensor, Tensor]:
    """Choose the voxels that may become Gaussians, and the threshold that decides which of them do.

    A voxel becomes a Gaussian if its probability, sigmoid(occupancy - threshold), is above 0.25. The threshold starts
    at 0.25 and rises by 0.05 until these voxels are at most `most`, then falls until they are at least `fewest`. Where
    they are then more than `most`, those of highest occupancy count (the published tool draws lots).

    Args:
        occupancy: [N] any real numbers.

    Returns:
        Indices [M] by falling occupancy, and the threshold []. M is `most`, or N where that is less, so that nothing
        waits for a GPU.
    """
    n = occupancy.numel()
    most, fewest = min(most, n), min(fewest, n)
    values, indices = torch.topk(occupancy, min(most + 1, n))
    limit = math.log(MIN_PROBABILITY / (1 - MIN_PROBABILITY))  # a voxel counts if occupancy - threshold is above this
    threshold = torch.full_like(values[0], INITIAL_THRESHOLD)
    if n > most:
        steps = torch.ceil((values[most] - limit - INITIAL_THRESHOLD) / THRESHOLD_STEP).clamp_min(0)
        threshold = threshold + steps * THRESHOLD_STEP
    excess = threshold - (values[fewest - 1] - limit)  # not negative where too few voxels are above
    steps = torch.where(excess < 0, 0, torch.floor(excess / THRESHOLD_STEP) + 1)
    threshold = threshold - steps * THRESHOLD_STEP
    return indices[:most], threshold


def _block(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((n_in, n_out), (n_out, n_out)):
        layers += [
            nn.Conv3d(a, b, 3, padding=1),
            nn.InstanceNorm3d(b, affine=True),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
        ]
    return nn.Sequential(*layers)


class PublishedUNet(nn.Module):
    """The U-Net from volumes [B, 4, n1, n2, n3] to [B, n_out, n1, n2, n3]; its output is 0 at first.

    Args:
        n_out: channels of the output.
        base_filters: channels at full resolution; they double with each pooling.
        poolings: number of times that the resolution is halved; 4 in the paper.
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
    """U-Nets in a row, from volumes [B, 8, n1, n2, n3], of which the first 4 channels count, to features of that shape.

    All U-Nets but the last are residual. The first 4 feature channels are the input of the last U-Net, which makes the
    other 4.
    """

    def __init__(self, num_unets: int, base_filters: int, poolings: int, bottleneck: int, shape: Sequence[int]) -> None:
        super().__init__()
        outputs = [REFINED_CHANNELS] * (num_unets - 1) + [FEATURE_CHANNELS - REFINED_CHANNELS]
        self.unets = nn.ModuleList(PublishedUNet(n, base_filters, poolings, bottleneck, shape) for n in outputs)

    def forward(self, volume: Tensor, evidence: object = None) -> tuple[Tensor, list[Tensor]]:
        """The features, and no occupancies, because this stack is not deeply supervised; it ignores `evidence`."""
        x = volume[:, :REFINED_CHANNELS]
        with torch.autocast(x.device.type, enabled=False):
            for unet in self.unets[:-1]:
                x = x + unet(x)
            return torch.cat([x, self.unets[-1](x)], 1), []


class PublishedSplatter(PoseSplatter):
    """A `PoseSplatter` with the published network between carving and rendering.

    Args:
        unit_m: metres in the published unit of length, the distance of the farthest camera from the cameras' centre.
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
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE + math.log(unit_m)))  # of metres
        del self.camera_color

    @classmethod
    def from_reader(cls, reader: FrameReader, experiment: Experiment, **others: Any) -> Self:
        camera = reader.world_to_camera.cpu()
        centers = -(camera[:, :3, :3].mT @ camera[:, :3, 3:])[..., 0]
        unit_m = float((centers - centers.mean(0)).norm(dim=1).max())
        return super().from_reader(reader, experiment, unit_m=unit_m, **others)

    def decode_gaussians(
        self, features: Tensor, mirrored: Tensor, views: ObservedViews, used: Tensor | None
    ) -> Gaussians:
        flat = features.flatten(1)
        chosen, threshold = find_threshold(flat[0].detach(), self.min_gaussians, self.max_gaussians)
        kept = flat.index_select(1, chosen).T
        probability = torch.sigmoid(kept[:, 0] - threshold)
        quats, scales, _, colors, offsets = torch.split_with_sizes(self._apply_head(kept), [4, 3, 1, 3, 3], 1)
        opacities = torch.sigmoid(((probability - MIN_PROBABILITY) / (1 - MIN_PROBABILITY)).clamp(0, 1))
        signs = mirror_signs(mirrored, self.log_scale)
        return Gaussians(
            means=self.points.reshape(-1, 3)[chosen] + MAX_OFFSET * self.voxel_size_m * torch.tanh(offsets) * signs[:3],
            quats=F.normalize(quats, dim=1) * signs[3:],
            scales=torch.exp(self.log_scale + scales),
            opacities=torch.where(probability > MIN_PROBABILITY, opacities, 0),
            colors=torch.sigmoid(colors),
        )

    def _prepare_evidence(self, hull: Tensor, views: ObservedViews, used: Tensor | None) -> Callable[[Tensor], Tensor]:
        return torch.zeros_like  # the published U-Nets do not use it

    def _color_change(self, cameras: Sequence[int | None]) -> Tensor:
        return self.points.new_zeros(len(cameras), 3, 4)
