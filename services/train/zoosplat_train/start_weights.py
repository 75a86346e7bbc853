"""Weights that a training begins with instead of random ones: `train.start_from`."""

from __future__ import annotations

import importlib.resources

import safetensors
import safetensors.torch
from torch import Tensor

from zoosplat.config.training import ANIMALS, RANDOM
from zoosplat.errors import UserError
from zoosplat.stages.start_from import trained_result
from zoosplat.storage import objects, urls
from zoosplat_model import checkpoints
from zoosplat_model.network.splatter import PoseSplatter
from zoosplat_model.network.unet import UNetStack

RIG_PARAMETER = "camera_color"  # the only parameter that depends on the cameras: it is not taken over
ARCHITECTURE_KEYS = "model.network, num_unets, base_filters, poolings and bottleneck"


def load_into(model: PoseSplatter, start_from: str) -> None:
    """Give a new network the weights that another one has learned.

    Without `model.bottleneck` nothing of a network depends on the size of the volume or the number of cameras, so the
    other network may have learned from other recordings, rigs and grids. Its filters are scaled to the norms of a new
    network's, so that steps of the same `train.lr` change their direction as fast.

    Args:
        model: on any device; all its parameters but the cameras' colours are replaced.
        start_from: `random` (nothing changes), `animals`, the URL of a project, of the folder of a training's result,
            or of a .safetensors file that `write` wrote.

    Raises:
        UserError: there are no such weights, or they are those of a network of another architecture.
    """
    if start_from == RANDOM:
        return
    weights = _read(start_from)
    own, others = ({n: v for n, v in found.items() if n != RIG_PARAMETER} for found in (model.state_dict(), weights))
    shapes, given = ({n: v.shape for n, v in found.items()} for found in (own, others))
    differ = sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n))
    if differ:
        raise UserError(
            f"train.start_from = {start_from}: weights of another network ({differ[0]} differs, one of "
            f"{len(differ)}); set {ARCHITECTURE_KEYS} to what they were there, or train.start_from to {RANDOM}"
        )
    model.load_state_dict(others, strict=False)
    if isinstance(model.refine, UNetStack):
        model.refine.shorten_filters()


def write(url: str, model: PoseSplatter) -> None:
    """Write weights for other trainings to begin with, in half precision and without the cameras' colours."""
    kept = {name: value for name, value in model.state_dict().items() if name != RIG_PARAMETER}
    objects.write_bytes(url, safetensors.torch.save({k: v.half().cpu().contiguous() for k, v in kept.items()}))


def _read(start_from: str) -> dict[str, Tensor]:
    if start_from == ANIMALS:
        data = (importlib.resources.files("zoosplat_train") / "animals.safetensors").read_bytes()
        return safetensors.torch.load(data)
    url = urls.normalize(start_from)
    if url.endswith(".safetensors"):
        try:
            return safetensors.torch.load(objects.read_bytes(url))
        except FileNotFoundError:
            raise UserError(f"{url}: no such file; check train.start_from") from None
        except safetensors.SafetensorError as error:
            raise UserError(f"{url}: not a file of weights ({error}); check train.start_from") from None
    result = trained_result(url)
    found = None if result is None else checkpoints.load(result.data_url, "best")
    if found is None:
        raise UserError(f"{url}: holds no finished training; check train.start_from")
    return found.average
