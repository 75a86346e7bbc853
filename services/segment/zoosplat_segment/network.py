"""The network that tells the animal from the background: a frame, the empty scene and a prior in, a soft mask out."""

from __future__ import annotations

import itertools
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

CHANNELS = (8, 32, 48, 80, 128, 160)  # feature channels at each level; each level has half the resolution of the last
MULTIPLE = 1 << (len(CHANNELS) - 1)  # pixels; width and height of the input are multiples of it
NO_PRIOR = 0.5  # value of the prior where other views say nothing
CHANGE_SIGMAS = 8.0  # a change of so many standard deviations of the noise is as sure as a larger one
MIN_NOISE = 1 / 255  # smallest standard deviation of the noise, of the full range of grey levels
INPUTS = 8  # frame and plate in red, green and blue, the change in units of the noise, and the prior
WEIGHTS = "masks.safetensors"  # beside this module; see `pretrain`


def _convolve(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class MaskNetwork(nn.Module):
    """A small U-Net (Ronneberger et al. 2015), about 1.9 million weights, 28,000 multiplications a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolve(INPUTS, CHANNELS[0])
        levels = list(itertools.pairwise(CHANNELS))
        self.down = nn.ModuleList(
            nn.Sequential(_convolve(above, here, 2), *(_convolve(here, here) for _ in range(1 if i == 0 else 2)))
            for i, (above, here) in enumerate(levels)
        )
        self.lift = nn.ModuleList(nn.Conv2d(here, above, 1) for above, here in levels)
        self.up = nn.ModuleList(
            nn.Sequential(_convolve(2 * above, above), *([] if i == 0 else [_convolve(above, above)]))
            for i, (above, _) in enumerate(levels)
        )
        self.head = nn.Conv2d(CHANNELS[0], 1, 3, 1, 1)

    def forward(self, frame: Tensor, plate: Tensor, noise: Tensor, prior: Tensor) -> Tensor:
        """Logits that pixels are animal.

        Args:
            frame: [B, 3, h, w] RGB, 0 to 1; h and w are multiples of `MULTIPLE`.
            plate: [B, 3, h, w] RGB of the empty scene in the frame's light, 0 to 1.
            noise: [B] standard deviation of frame minus plate where the scene is empty, in the same unit.
            prior: [B, 1, h, w] what other views say, 0 to 1; `NO_PRIOR` everywhere where they say nothing.

        Returns:
            [B, 1, h, w].
        """
        change = (frame - plate).abs().amax(1, keepdim=True)
        change = (change / (CHANGE_SIGMAS * noise.clamp_min(MIN_NOISE)).view(-1, 1, 1, 1)).clamp_max(1)
        x = torch.cat([2 * frame - 1, 2 * plate - 1, 2 * change - 1, 2 * prior - 1], 1)
        skips = [self.stem(x.contiguous(memory_format=torch.channels_last))]
        for down in self.down:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for lift, up in zip(reversed(self.lift), reversed(self.up), strict=True):
            risen = F.interpolate(lift(x), scale_factor=2.0, mode="bilinear", align_corners=False)
            x = up(torch.cat([risen, skips.pop()], 1))
        logits: Tensor = self.head(x)
        return logits


def package_weights() -> dict[str, Tensor]:
    """The weights that come with the package."""
    return load(resources.files(__package__).joinpath(WEIGHTS).read_bytes())


def build_network(weights: dict[str, Tensor] | None, device: torch.device) -> MaskNetwork:
    """A network with weights; None: those of the package."""
    network = MaskNetwork()
    values = package_weights() if weights is None else weights
    network.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in values.items()}
    )
    moved: MaskNetwork = network.to(device).to(memory_format=torch.channels_last)
    return moved


def load_network(weights: dict[str, Tensor] | None, device: torch.device) -> MaskNetwork:
    """A network for inference: the normalisations are part of the convolutions."""
    network = build_network(weights, device).eval()
    for block in list(network.modules()):
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Sequential) and len(layer) == 3 and isinstance(layer[1], nn.BatchNorm2d):
                convolution = layer[0]
                assert isinstance(convolution, nn.Conv2d)
                setattr(block, name, nn.Sequential(fuse_conv_bn_eval(convolution, layer[1]), layer[2]))
    return network


def predict_masks(
    network: MaskNetwork, frames: Tensor, plates: Tensor, noise: Tensor, priors: Tensor | None = None
) -> Tensor:
    """Probabilities [n, h, w] that pixels are animal.

    Args:
        network: for inference.
        frames: [n, 3, h, w] 0 to 255.
        plates: [n, 3, h, w] 0 to 255, in the frames' light.
        noise: [n] 0 to 1.
        priors: [n, h, w] what the other views tell; None: nothing.
    """
    told = torch.full_like(frames[:, :1], NO_PRIOR) if priors is None else priors[:, None]
    logits: Tensor = network(frames / 255, plates / 255, noise, told)
    return logits.float().sigmoid()[:, 0]
