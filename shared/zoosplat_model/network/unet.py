"""The 3D U-Nets that refine a carved volume (arXiv 2505.18342), initialised so that the stack is the identity.

Where it differs from the published network, for speed:
- The first halving folds 2 x 2 x 2 voxels into channels, and the last doubling unfolds them: convolutions of a few
  channels at full resolution take most of the time and hardly use the hardware. No voxel is lost. U-Nets in a row hand
  folded volumes on, so that all is folded and unfolded once.
- Channels are normalised by the mean and variance of their own volume: BatchNorm3d at batch size 1 does the same with
  one GPU block a channel, and keeps running statistics that do not fit afterwards.
And for better pictures:
- The perceptron at the bottom is left out unless asked for. It ties what it learns to places in the volume: on a
  recording of 100 training frames it knew by heart where the animal's parts were, and cut the feet off rearing ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat_model.network.volumes import halve, normalize

VOLUME_CHANNELS = 8  # of a carved volume; the first 4, occupancy and colour, are what is refined
INPUT_CHANNELS = VOLUME_CHANNELS + 1  # of a U-Net: how much the masks need each voxel, too
REFINED_CHANNELS = 4
FEATURE_CHANNELS = 8
FILTER_LENGTH = 3**-0.5  # norm of a filter in a new network: PyTorch draws from +- 1 / sqrt(number of its weights)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Zero-padded 3x3x3 convolution of [B, c, n1, n2, n3]."""
    if x.is_cuda or len(x) > 1 or x.shape[2] % 2:
        return F.conv3d(x, weight, padding=1)
    # On CPUs PyTorch runs batches with oneDNN, and most single volumes with kernels that are 5 to 10 times slower. So a
    # single volume goes as a batch of two halves, each with its neighbours.
    half = x.shape[2] // 2
    x = F.pad(x, (0, 0, 0, 0, 1, 1))
    halves = torch.cat([x[:, :, : half + 2], x[:, :, half:]])
    first, second = F.conv3d(halves, weight, padding=(0, 1, 1)).unbind()
    return torch.cat([first, second], 1)[None]


class _Block(nn.Module):
    """Twice: 3x3x3 convolution, normalisation of each channel over its volume, leaky ReLU."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(n_in, n_out, 3, padding=1, bias=False)
        self.second = nn.Conv3d(n_out, n_out, 3, padding=1, bias=False)
        self.gain = nn.Parameter(torch.ones(2, n_out))
        self.shift = nn.Parameter(torch.zeros(2, n_out))

    def forward(self, x: Tensor) -> Tensor:
        for convolution, gain, shift in zip((self.first, self.second), self.gain, self.shift, strict=True):
            x = normalize(convolve(x, convolution.weight.to(x.dtype)), gain, shift)
        return x


def fold(x: Tensor) -> Tensor:
    """[B, c, n1, n2, n3] -> [B, 8 c, n1 / 2, n2 / 2, n3 / 2], channels last: blocks of 2 x 2 x 2 voxels to channels."""
    b, c, n1, n2, n3 = x.shape
    x = x.reshape(b, c, n1 // 2, 2, n2 // 2, 2, n3 // 2, 2).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(b, n1 // 2, n2 // 2, n3 // 2, 8 * c).permute(0, 4, 1, 2, 3)


def unfold(x: Tensor) -> Tensor:
    """The inverse of `fold`."""
    b, c, n1, n2, n3 = x.shape
    x = x.reshape(b, c // 8, 2, 2, 2, n1, n2, n3).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // 8, 2 * n1, 2 * n2, 2 * n3)


def doubled(x: Tensor) -> Tensor:
    """Every voxel 2 x 2 x 2 times: [B, c, n1, n2, n3] -> [B, c, 2 n1, 2 n2, 2 n3]."""
    if not x.is_cuda:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    b, c, n1, n2, n3 = x.shape
    x = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None].expand(b, n1, 2, n2, 2, n3, 2, c)
    return x.reshape(b, 2 * n1, 2 * n2, 2 * n3, c).permute(0, 4, 1, 2, 3)


class UNet(nn.Module):
    """A 3D U-Net of folded volumes, whose last layer starts at zero, so that its output is 0 at first.

    Args:
        n_out: channels of the unfolded output; the input has 9.
        base_filters: channels double with each halving, from this at full resolution, where nothing is computed.
        poolings: halvings of the resolution, the first by folding.
        bottleneck: width of the multilayer perceptron at the bottom, into which the volume there is flattened; 0: none.
        shape: of the volume, each a multiple of 2^poolings.
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

    def forward(self, x: Tensor) -> Tensor:  # [B, 72, n1 / 2, n2 / 2, n3 / 2] -> [B, 8 n_out, n1 / 2, n2 / 2, n3 / 2]
        x = self.down[0](x)
        skips = []
        for block in self.down[1:]:
            skips.append(x)
            x = block(halve(x))
        if self.bottom is not None:
            x = x + self.bottom(x.flatten(1)).view(x.shape)
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = block(torch.cat([doubled(x), skip], 1))
        return self.last(x)  # type: ignore[no-any-return]


class UNetStack(nn.Module):
    """U-Nets in a row: volumes [B, 8, n1, n2, n3] to features [B, 8, n1, n2, n3].

    All see the volume's last 4 channels and refine its first 4. Each is told how much the masks need a voxel, by the
    occupancy that it is given: what those before took too much of, it can put back. All but the last are residual. The
    last adds to its input, in the first 4 of its 8 channels. As every U-Net starts at zero, the first 4 features are
    the volume's own at first, exactly, and the others 0.
    """

    def __init__(self, num_unets: int, base_filters: int, poolings: int, bottleneck: int, shape: Sequence[int]) -> None:
        super().__init__()
        outputs = [REFINED_CHANNELS] * (num_unets - 1) + [FEATURE_CHANNELS]
        self.unets = nn.ModuleList(UNet(n, base_filters, poolings, bottleneck, shape) for n in outputs)

    def forward(self, volume: Tensor, needed: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features of volumes; `needed` is asked for a number for each voxel of occupancies [B, n1, n2, n3].

        Returns:
            The features, and the occupancy [B, n1, n2, n3] that each U-Net but the last has left.
        """
        kind = volume.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else volume.dtype
        x, rest = fold(volume[:, :REFINED_CHANNELS]), fold(volume[:, REFINED_CHANNELS:].to(low))
        occupancies = []
        for unet in self.unets:
            occupancies.append(unfold(x[:, :8])[:, 0])
            need = fold(needed(occupancies[-1].detach())[:, None].to(low))
            change = unet(torch.cat([x.to(low), rest, need], 1))
            x = F.pad(x, (0, 0) * 3 + (0, change.shape[1] - x.shape[1])) + change
        return unfold(x), occupancies[1:]

    @torch.no_grad()
    def shorten_filters(self) -> None:
        """Give every filter the length that it has in a new network. What the stack makes of a volume stays the same.

        What a filter finds is normalised, so its length means nothing; but Adam makes it longer with every step, and
        turns a long one by less. Those of a network that has learned for long would hardly learn more.
        """
        for block in self.modules():
            if isinstance(block, _Block):
                for convolution in (block.first, block.second):
                    weight = convolution.weight
                    length = weight.flatten(1).norm(dim=1).clamp_min(1e-6)
                    weight *= (FILTER_LENGTH / length).view(-1, 1, 1, 1, 1)
