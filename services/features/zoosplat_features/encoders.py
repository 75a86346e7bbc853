"""The two encoders, `gaussians` and `images`, behind one interface."""

from __future__ import annotations

import io
import urllib.error
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.config.sections import WEIGHTS_FILES, is_weights_file
from zoosplat.errors import UserError
from zoosplat.storage import objects, urls
from zoosplat_features import ops
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize import Rendering

CHANNELS = 512  # outputs of a ResNet-18 without its last layer
# Means and deviations of the colours of ImageNet, on which the weights were trained.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(ABC):
    """Computes a descriptor of an animal.

    Attributes:
        size: length of a descriptor.
        capturable: whether the encoder can be part of a CUDA graph.
    """

    size: int
    capturable: bool

    @abstractmethod
    def __call__(self, gaussians: Gaussians) -> Tensor:
        """The descriptor [size] float32, unchanged by a turn about the vertical, of Gaussians in the animal's frame."""


class GaussiansEncoder(Encoder):
    """Moments of the Gaussians on rings about the vertical: see `ops.cylinder_descriptor`."""

    size, capturable = ops.cylinder_size(), True

    def __init__(self, radius_m: float) -> None:
        self.radius_m = radius_m

    def __call__(self, gaussians: Gaussians) -> Tensor:
        return ops.cylinder_descriptor(gaussians, self.radius_m)


class Renderer(Protocol):
    """The `render` of a predictor."""

    def __call__(
        self, gaussians: Gaussians, world_to_camera: Tensor, intrinsics: Tensor, width: int, height: int
    ) -> Rendering: ...


class ImagesEncoder(Encoder):
    """Magnitudes of the spherical harmonics, over 32 directions, of what a ResNet-18 sees from each direction.

    This is the descriptor of Pose Splatter (arXiv 2505.18342), except that the cameras stand round the animal's own
    direction. What a network sees changes so fast with the azimuth that 8 azimuths alias: with cameras that stand still
    in the frame, the magnitudes change by half when the animal turns by 20 degrees.
    """

    size, capturable = len(ops.harmonics()) * CHANNELS, False

    def __init__(self, render: Renderer, radius_m: float, network: torch.nn.Module, device: torch.device) -> None:
        self._render = render
        poses, intrinsics = ops.sphere_cameras(radius_m)
        self.poses, self.intrinsics = torch.from_numpy(poses).to(device), torch.from_numpy(intrinsics).to(device)
        self.harmonics = torch.from_numpy(ops.harmonics()).to(device)
        self.network = network.to(device).eval()
        self.mean, self.deviation = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))

    def __call__(self, gaussians: Gaussians) -> Tensor:
        turned = ops.upright(gaussians)
        pictures = self._render(turned, self.poses, self.intrinsics, ops.PIXELS, ops.PIXELS).rgb.permute(0, 3, 1, 2)
        seen: Tensor = self.network((pictures - self.mean) / self.deviation)
        return (self.harmonics @ seen.to(self.harmonics.dtype)).abs().flatten()


def weights_file(experiment: Experiment) -> str | None:
    """URL of the file that the network's weights are read from; None: there is none, or torchvision knows them."""
    settings = experiment.features
    if settings.encoder != "images" or not is_weights_file(settings.weights):
        return None
    return urls.normalize(settings.weights)


def resnet18(weights: str) -> torch.nn.Module:
    """A ResNet-18 (He et al. 2016, arXiv 1512.03385) without its last layer: [B, 3, h, w] to [B, 512].

    Args:
        weights: torchvision's name, or URL of a file with torchvision's names of tensors.

    Raises:
        UserError: there are no such weights, they cannot be had, or they are not those of a ResNet-18.
    """
    import torchvision.models as models

    network: torch.nn.Module = models.resnet18(weights=None)
    state = _read(weights) if is_weights_file(weights) else _download(models.ResNet18_Weights, weights)
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    network.fc = torch.nn.Identity()
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError):
        raise UserError(
            f"features.weights = {weights}: not the weights of torchvision's ResNet-18; give such a file"
        ) from None
    return network


def _read(url: str) -> dict[str, Any]:
    data = objects.read_bytes(url)
    try:
        if url.endswith(".safetensors"):
            return safetensors.torch.load(data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"features.weights = {url}: cannot be read ({type(error).__name__}); save it again") from None
    if not isinstance(found, dict):
        raise UserError(f"features.weights = {url}: holds no named tensors; save the network's state_dict")
    return found


def _download(known: Any, name: str) -> dict[str, Any]:
    chosen = known.__members__.get(name)
    if chosen is None:
        names = ", ".join(known.__members__)
        raise UserError(f"features.weights = {name}: neither a {' or '.join(WEIGHTS_FILES)} file nor one of {names}")
    try:
        return dict(chosen.get_state_dict(progress=False, check_hash=True))
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise UserError(
            f"features.weights = {name}: cannot be downloaded ({error}); fetch {chosen.url} elsewhere and name "
            "the file, or set features.encoder to gaussians, which needs no weights"
        ) from None


def open_encoder(experiment: Experiment, radius_m: float, render: Renderer, device: torch.device) -> Encoder:
    """The encoder that an experiment asks for.

    Raises:
        UserError: its weights cannot be had.
    """
    if experiment.features.encoder == "gaussians":
        return GaussiansEncoder(radius_m)
    weights = weights_file(experiment) or experiment.features.weights
    return ImagesEncoder(render, radius_m, resnet18(weights), device)


def flattened(encode: Callable[[Gaussians], Tensor]) -> Callable[[Gaussians], Tensor]:
    """An encoder for models of flat Gaussians, whose third scale means nothing: it is set to 0."""

    def of_flat(gaussians: Gaussians) -> Tensor:
        flat = torch.cat([gaussians.scales[:, :2], torch.zeros_like(gaussians.scales[:, 2:])], 1)
        return encode(gaussians._replace(scales=flat))

    return of_flat
