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

OF_THE_RIG = "camera_color"  # the only parameter that says something about the cameras; it begins anew
KEYS = "model.network, num_unets, base_filters, poolings and bottleneck"


def begin(model: PoseSplatter, start_from: str) -> None:
    """Give a new network the weights that another one has learned.

    Nothing of a network depends on the size of the volume (without `model.bottleneck`) or the number of cameras, so it
    can have learned from other recordings, rigs and grids. Its filters are made as long as a new network's: steps of
    the same `train.lr` turn them as fast.

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
    own, others = ({n: v for n, v in found.items() if n != OF_THE_RIG} for found in (model.state_dict(), weights))
    shapes, given = ({n: v.shape for n, v in found.items()} for found in (own, others))
    differ = sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n))
    if differ:
        raise UserError(
            f"train.start_from = {start_from}: weights of another network ({differ[0]} differs, one of "
            f"{len(differ)}); set {KEYS} to what they were there, or train.start_from to {RANDOM}"
        )
    model.load_state_dict(others, strict=False)
    if isinstance(model.refine, UNetStack):
        model.refine.shorten_filters()


def write(url: str, model: PoseSplatter) -> None:
    """Write a network's weights for other trainings to begin with: half precision, without the cameras' colours."""
    kept = {name: value for name, value in model.state_dict().items() if name != OF_THE_RIG}
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
