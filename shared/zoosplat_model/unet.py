"""The 3D U-Nets that refine a carved volume (arXiv 2505.18342), initialised so that the stack is the identity.

Where it differs from the published network: channels are normalised by the mean and variance of their own volume,
written as plain reductions (BatchNorm3d at batch size 1 does the same in one GPU block a channel, half of a step's
time, and keeps running statistics that do not fit at evaluation); activations are kept channels-last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOLUME_CHANNELS = 4
FEATURE_CHANNELS = 8


class _Block(nn.Module):
    """Twice: 3x3x3 convolution, normalisation of each channel over its volume, leaky ReLU."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(n_in, n_out, 3, padding=1, bias=False)
        self.second = nn.Conv3d(n_out, n_out, 3, padding=1, bias=False)
        self.gain = nn.Parameter(torch.ones(2, n_out))
        self.shift = nn.Parameter(torch.zeros(2, n_out))

    def forward(self, x: Tensor) -> Tensor:
        for i, convolution in enumerate((self.first, self.second)):
            x = convolution(x)
            variance, mean = torch.var_mean(x, dim=(2, 3, 4), keepdim=True, correction=0)
            gain = self.gain[i].view(1, -1, 1, 1, 1) * torch.rsqrt(variance + 1e-5)
            x = F.leaky_relu(torch.addcmul(self.shift[i].view(1, -1, 1, 1, 1) - mean * gain, x, gain), 0.01)
        return x


class UNet(nn.Module):
    """A 3D U-Net whose last convolution starts at zero: its output is 0 at first.

    Args:
        n_out: channels of the output; the input has 4.
        base_filters: channels of the first level; they double with each of the `poolings` halvings.
        bottleneck: width of the multilayer perceptron at the bottom; the volume there is flattened into it.
        shape: of the volume, each a multiple of 2^poolings.
    """

    def __init__(self, n_out: int, base_filters: int, poolings: int, bottleneck: int, shape: Sequence[int]) -> None:
        super().__init__()
        widths = [base_filters << level for level in range(poolings)]
        bottom = [n >> poolings for n in shape]
        flat = widths[-1] * math.prod(bottom)
        inputs = [VOLUME_CHANNELS, *widths[:-1]]
        self.down = nn.ModuleList(_Block(a, b) for a, b in zip(inputs, widths, strict=True))
        self.bottom = nn.Sequential(nn.Linear(flat, bottleneck), nn.LeakyReLU(0.01), nn.Linear(bottleneck, flat))
        self.up = nn.ModuleList(
            _Block(b + (widths[i + 1] if i + 1 < poolings else b), b) for i, b in enumerate(widths)
        )
        self.last = nn.Conv3d(base_filters, n_out, 1)
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, n1, n2, n3] -> [B, n_out, n1, n2, n3]
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool3d(x, 2)
        x = x + self.bottom(x.flatten(1)).view(x.shape)
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1))
        out: Tensor = self.last(x)
        return out


class UNetStack(nn.Module):
    """U-Nets in a row: volumes [B, 4, n1, n2, n3] to features [B, 8, n1, n2, n3].

    All but the last are residual. The last adds to its input, in the first 4 of its 8 channels. As every U-Net starts
    at zero, the first 4 features are the volume itself at first, exactly, and the others 0.
    """

    def __init__(
        self, num_unets: int, base_filters: int, poolings: int, bottleneck: int, shape: Sequence[int]
    ) -> None:
        super().__init__()
        outputs = [VOLUME_CHANNELS] * (num_unets - 1) + [FEATURE_CHANNELS]
        self.unets = nn.ModuleList(UNet(n, base_filters, poolings, bottleneck, shape) for n in outputs)

    def forward(self, volume: Tensor) -> Tensor:
        x = volume
        for unet in self.unets:
            change = unet(x)
            x = F.pad(x, (0, 0) * 3 + (0, change.shape[1] - x.shape[1])) + change
        return x
