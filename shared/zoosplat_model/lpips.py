"""LPIPS: how different two pictures look to a network (Zhang et al., CVPR 2018, arXiv 1801.03924)."""

from __future__ import annotations

import io
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoosplat.errors import UserError
from zoosplat.storage import objects, urls

# Mean and standard deviation of the colours -1 to 1 that the networks were trained on (lpips 0.1, ScalingLayer).
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Added to squared lengths of features before they are divided by their root (as in torchmetrics).
EPSILON = 1e-8
LEAST_SIDE = 32  # pixels; of smaller pictures AlexNet's last features would have no pixel
# The convolutions of a stage: place in torchvision's `features`, input and output channels, kernel, stride and padding.
Stage = tuple[tuple[int, int, int, int, int, int], ...]
ALEXNET: tuple[Stage, ...] = (
    ((0, 3, 64, 11, 4, 2),),
    ((3, 64, 192, 5, 1, 2),),
    ((6, 192, 384, 3, 1, 1),),
    ((8, 384, 256, 3, 1, 1),),
    ((10, 256, 256, 3, 1, 1),),
)
VGG16: tuple[Stage, ...] = (
    ((0, 3, 64, 3, 1, 1), (2, 64, 64, 3, 1, 1)),
    ((5, 64, 128, 3, 1, 1), (7, 128, 128, 3, 1, 1)),
    ((10, 128, 256, 3, 1, 1), (12, 256, 256, 3, 1, 1), (14, 256, 256, 3, 1, 1)),
    ((17, 256, 512, 3, 1, 1), (19, 512, 512, 3, 1, 1), (21, 512, 512, 3, 1, 1)),
    ((24, 512, 512, 3, 1, 1), (26, 512, 512, 3, 1, 1), (28, 512, 512, 3, 1, 1)),
)
# Kernel of the maxima (with stride 2) before a stage; 0 where there are none.
POOLS = {ALEXNET: (0, 3, 3, 0, 0), VGG16: (0, 2, 2, 2, 2)}


class Lpips(nn.Module):
    """The distance of pictures by the features of a network.

    Its tensors have the names of `lpips.LPIPS(net=...).state_dict()`: `net.slice1.0.weight` and so on for the network,
    `lin0.model.1.weight` for the weights of the features' channels.
    """

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        super().__init__()
        self.stages, self.pools = stages, POOLS[stages]
        self.net = nn.Module()
        for n, stage in enumerate(stages):
            convolutions = {str(place): nn.Conv2d(i, o, k, s, p) for place, i, o, k, s, p in stage}
            self.net.add_module(f"slice{n + 1}", nn.ModuleDict(convolutions))
            linear = nn.ModuleDict({"1": nn.Conv2d(stage[-1][2], 1, 1, bias=False)})
            self.add_module(f"lin{n}", nn.ModuleDict({"model": linear}))
        self.requires_grad_(False)

    def forward(
        self,
        pictures: Tensor,  # [B, 3, h, w]
        truths: Tensor,  # [B, 3, h, w]
    ) -> Tensor:
        """LPIPS [B] of pictures with colours 0 to 1 and sides of at least `LEAST_SIDE` pixels."""
        x = 2 * torch.cat([pictures, truths]).to(next(self.parameters())) - 1
        x = (x - x.new_tensor(SHIFT)[:, None, None]) / x.new_tensor(SCALE)[:, None, None]
        distance = x.new_zeros(len(pictures))
        for n, (stage, pool) in enumerate(zip(self.stages, self.pools, strict=True)):
            if pool:
                x = functional.max_pool2d(x, pool, 2)
            convolutions = self.net.get_submodule(f"slice{n + 1}")
            for place, *_ in stage:
                x = functional.relu(convolutions.get_submodule(str(place))(x))
            unit = x / (x.square().sum(1, keepdim=True) + EPSILON).sqrt()
            one, other = unit.chunk(2)
            weighted = self.get_submodule(f"lin{n}.model.1")((one - other).square())
            distance = distance + weighted.mean((1, 2, 3))
        return distance


def read_lpips(value: str, device: torch.device) -> Lpips:
    """LPIPS with the weights of a file, of AlexNet or of VGG.

    Args:
        value: path or URL of a .safetensors file, or of one that `torch.save` wrote, of the state_dict of `lpips.LPIPS`
            (or of torchmetrics' network). A pickle that holds anything else than tensors is refused.
        device: where to compute.

    Raises:
        UserError: the file cannot be read, or holds other weights.
    """
    named = f"evaluate.lpips_weights = {value}"
    data = objects.read_bytes(urls.normalize(value))
    found: Any
    try:
        if value.endswith(".safetensors"):
            found = safetensors.torch.load(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{named}: cannot be read ({type(error).__name__}); save the state_dict again") from None
    if isinstance(found, dict):
        for stages in (ALEXNET, VGG16):
            network = Lpips(stages)
            wanted = {key: found.get(key) for key in network.state_dict()}
            if all(isinstance(v, Tensor) and v.shape == network.state_dict()[k].shape for k, v in wanted.items()):
                network.load_state_dict(wanted)
                return network.to(device).eval()
    raise UserError(
        f'{named}: not the weights of LPIPS with AlexNet or VGG; save lpips.LPIPS(net="alex").state_dict() with '
        "torch.save, or give null"
    )
