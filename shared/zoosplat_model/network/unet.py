"""The 3D U-Nets that refine a carved volume (arXiv 2505.18342), initialised so that the stack is the identity.

They differ from the published network in these points, for speed:
- The first pooling is a space-to-depth transformation of 2 x 2 x 2 voxels, and the last upsampling is its inverse.
  Convolutions of a few channels at full resolution take most of the time and hardly use the hardware. No voxel is lost.
  U-Nets in a row pass such volumes on, so that the transformation happens once for the whole stack.
- Channels are normalised by the mean and variance of their own volume. BatchNorm3d at batch size 1 does the same with
  one GPU block for each channel, and keeps running statistics that do not fit afterwards.
And in this point, for better pictures:
- The perceptron at the bottom is left out unless it is asked for. It ties what it learns to places in the volume. On a
  recording of 100 training frames it knew by heart where the parts of the animal were, and cut the feet off rearing
  animals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat_model.network.volume_ops import instance_norm_leaky_relu, max_pool2

VOLUME_CHANNELS = 8  # channels of a carved volume
REFINED_CHANNELS = 4  # the first channels of a carved volume, occupancy and colour, which the U-Nets refine
INPUT_CHANNELS = VOLUME_CHANNELS + 1  # channels of a U-Net's input; the last one is the silhouettes' evidence
FEATURE_CHANNELS = 8  # channels of the stack's output
FILTER_LENGTH = 3**-0.5  # norm of a new network's filters, which PyTorch draws from +- 1 / sqrt(number of weights)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The zero-padded 3 x 3 x 3 convolution of volumes [B, c, n1, n2, n3]."""
    if x.is_cuda or len(x) > 1 or x.shape[2] % 2:
        return F.conv3d(x, weight, padding=1)
    # On CPUs PyTorch convolves batches with oneDNN, and most single volumes with kernels that are 5 to 10 times slower.
    # So a single volume becomes a batch of two halves, each with its neighbouring voxels.
    half = x.shape[2] // 2
    x = F.pad(x, (0, 0, 0, 0, 1, 1))
    halves = torch.cat([x[:, :, : half + 2], x[:, :, half:]])
    first, second = F.conv3d(halves, weight, padding=(0, 1, 1)).unbind()
    return torch.cat([first, second], 1)[None]


class _Block(nn.Module):
    """Two layers of a 3 x 3 x 3 convolution, instance normalisation and a leaky ReLU."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(n_in, n_out, 3, padding=1, bias=False)
        self.second = nn.Conv3d(n_out, n_out, 3, padding=1, bias=False)
        self.gain = nn.Parameter(torch.ones(2, n_out))
        self.shift = nn.Parameter(torch.zeros(2, n_out))

    def forward(self, x: Tensor) -> Tensor:
        for convolution, gain, shift in zip((self.first, self.second), self.gain, self.shift, strict=True):
            x = instance_norm_leaky_relu(convolve(x, convolution.weight.to(x.dtype)), gain, shift)
        return x


def space_to_depth(x: Tensor) -> Tensor:
    """Move blocks of 2 x 2 x 2 voxels to channels: [B, c, n1, n2, n3] to [B, 8 c, n1 / 2, n2 / 2, n3 / 2].

    The result has the memory layout channels-last.
    """
    b, c, n1, n2, n3 = x.shape
    x = x.reshape(b, c, n1 // 2, 2, n2 // 2, 2, n3 // 2, 2).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(b, n1 // 2, n2 // 2, n3 // 2, 8 * c).permute(0, 4, 1, 2, 3)


def depth_to_space(x: Tensor) -> Tensor:
    """The inverse of `space_to_depth`: [B, 8 c, n1, n2, n3] to [B, c, 2 n1, 2 n2, 2 n3]."""
    b, c, n1, n2, n3 = x.shape
    x = x.reshape(b, c // 8, 2, 2, 2, n1, n2, n3).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // 8, 2 * n1, 2 * n2, 2 * n3)


def upsample2(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2: [B, c, n1, n2, n3] to [B, c, 2 n1, 2 n2, 2 n3]."""
    if not x.is_cuda:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    b, c, n1, n2, n3 = x.shape
    x = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None].expand(b, n1, 2, n2, 2, n3, 2, c)
    return x.reshape(b, 2 * n1, 2 * n2, 2 * n3, c).permute(0, 4, 1, 2, 3)


class UNet(nn.Module):
    """A 3D U-Net of volumes after `space_to_depth`. Its last layer starts at zero, so that its output is 0 at first.

    Args:
        n_out: channels of the output, before `space_to_depth`; the input has `INPUT_CHANNELS`.
        base_filters: channels at full resolution, where nothing is computed; they double with each pooling.
        poolings: number of times that the resolution is halved, the first time by `space_to_depth`.
        bottleneck: width of the perceptron at the bottom, into which the volume there is flattened; 0 means none.
        shape: of the volume at full resolution, each a multiple of 2^poolings.
    """

    def __init__(self, n_out: int, base_filters: int, poolings: int, bottleneck: int, shape: Sequence[int]) -> None:
        super().__init__()
        widths = [base_filters << level for level in range(1, poolings + 1)]
        flat = widths[-1] * math.prod(n >> poolings for n in shape)
        self.down = nn.ModuleList(_Block(a, b) for a, b in pairwise([8 * INPUT_CHANNELS, *widths]))
        self.bottom: nn.Module | None = None
        if bottleneck:
            self.bottom = nn.Sequential(nn.Linear(flat, bottleneck), nn.LeakyReLU(0.01), nn.Linear(bottleneck, flat))
        self.up = nn.ModuleList(_Block(deep + here, here) for here, deep in pairwise(widths))
        self.last = nn.Conv3d(widths[0], 8 * n_out, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 72, n1 / 2, n2 / 2, n3 / 2] to [B, 8 n_out, n1 / 2, n2 / 2, n3 / 2]."""
        x = self.down[0](x)
        skips = []
        for block in self.down[1:]:
            skips.append(x)
            x = block(max_pool2(x))
        if self.bottom is not None:
            x = x + self.bottom(x.flatten(1)).view(x.shape)
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = block(torch.cat([upsample2(x), skip], 1))
        return self.last(x)  # type: ignore[no-any-return]


class UNetStack(nn.Module):
    """U-Nets in a row, from volumes [B, 8, n1, n2, n3] to features [B, 8, n1, n2, n3].

    Every U-Net sees the last 4 channels of the volume and refines its first 4. It also sees the silhouettes' evidence
    at the occupancy that it is given, so that it can put back what those before it took too much of. All U-Nets but the
    last are residual. The last one adds to its input in the first 4 of its 8 channels. As every U-Net starts at zero,
    the first 4 features are at first exactly those of the volume, and the others are 0.
    """

    def __init__(self, num_unets: int, base_filters: int, poolings: int, bottleneck: int, shape: Sequence[int]) -> None:
        super().__init__()
        outputs = [REFINED_CHANNELS] * (num_unets - 1) + [FEATURE_CHANNELS]
        self.unets = nn.ModuleList(UNet(n, base_filters, poolings, bottleneck, shape) for n in outputs)

    def forward(self, volume: Tensor, evidence: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Refine volumes.

        Args:
            volume: [B, 8, n1, n2, n3].
            evidence: gives a number for each voxel of occupancies [B, n1, n2, n3].

        Returns:
            The features, and the occupancy [B, n1, n2, n3] that each U-Net but the last has left.
        """
        kind = volume.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else volume.dtype
        x, rest = space_to_depth(volume[:, :REFINED_CHANNELS]), space_to_depth(volume[:, REFINED_CHANNELS:].to(low))
        occupancies = []
        for unet in self.unets:
            occupancies.append(depth_to_space(x[:, :8])[:, 0])
            given = space_to_depth(evidence(occupancies[-1].detach())[:, None].to(low))
            change = unet(torch.cat([x.to(low), rest, given], 1))
            x = F.pad(x, (0, 0) * 3 + (0, change.shape[1] - x.shape[1])) + change
        return depth_to_space(x), occupancies[1:]

    @torch.no_grad()
    def shorten_filters(self) -> None:
        """Give every filter the norm that filters have in a new network; the output of the stack stays the same.

        The output of a filter is normalised, so the norm of its weights has no effect. But Adam increases the norm with
        every step, and a step turns a long filter by less. After a long training, filters would hardly learn any more.
        """
        for block in self.modules():
            if isinstance(block, _Block):
                for convolution in (block.first, block.second):
                    weight = convolution.weight
                    length = weight.flatten(1).norm(dim=1).clamp_min(1e-6)
                    weight *= (FILTER_LENGTH / length).view(-1, 1, 1, 1, 1)
