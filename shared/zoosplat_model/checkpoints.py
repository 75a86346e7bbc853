"""Checkpoints of a training: a file is written under a new name before a pointer names it, so a crash loses nothing.

    model/checkpoints/step-XXXXXXXX.safetensors    weights, their average over the last steps, Adam's moments; in the
                                                   header the name of the network and the progress (JSON); the best
                                                   checkpoint may hold only average and header
    model/latest.json, model/best.json             name a checkpoint; replaced atomically after its file is there

Nothing is pickled. No random state is kept, because the order of frames is a function of seed and epoch.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from zoosplat.errors import UserError
from zoosplat.storage import listing, objects, urls

Pointer = Literal["latest", "best"]


@dataclass
class TrainingProgress:
    """How far a training has come; its fields are the JSON in the header of a checkpoint.

    Attributes:
        epoch: the running epoch, from 0.
        position: frames of this epoch that are done.
        step: optimiser steps that are done.
        seconds: time spent so far, over all resumptions.
        sums: sums of the training losses of the running epoch by name, and the number of "frames".
        history: a row for each finished epoch: epoch, step, seconds, and figures of training and validation.
        best: validation loss of the checkpoint to use; None before the first validation.
        best_step: step of the checkpoint to use.
        least_losses: loss of each validation frame at the validation with the lowest mean.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    best_step: int | None = None
    least_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        model: weights to train on from, by parameter name.
        average: averaged weights, which are those to use.
        optimizer: Adam's state (`exp_avg`, `exp_avg_sq`, `step`) by parameter name.
        progress: how far the training has come.
        network: name of the network, as in `model.network`.
    """

    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    progress: TrainingProgress
    network: str

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        return self.progress.step


def _name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def _folder(model_url: str) -> str:
    return urls.join(model_url, "checkpoints")


def _pointer_url(model_url: str, pointer: Pointer) -> str:
    return urls.join(model_url, f"{pointer}.json")


def named_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state of an optimiser by the names of the parameters."""
    return {
        name: {k: torch.as_tensor(v) for k, v in optimizer.state[p].items()}
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def restore_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]
) -> None:
    """Put back what `named_state` gave, on the devices and in the layouts of the parameters, as fused Adam requires."""
    for name, p in model.named_parameters():
        if name in state:
            optimizer.state[p] = {
                key: torch.empty_like(p).copy_(value) if value.shape == p.shape else value.to(p.device)
                for key, value in state[name].items()
            }


def save(
    model_url: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    progress: TrainingProgress,
    *,
    keep_last: int,
    best: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, move the pointers, and delete checkpoints that are neither the best nor among the last.

    The best checkpoint is that of `progress.best_step`. It is this one, an earlier one that was saved, or one whose
    averaged weights were kept until now and are given as `best`.

    Args:
        model_url: the folder `model` of a training's result.
        model: whose weights are written.
        optimizer: its Adam.
        average: averaged weights.
        progress: how far the training has come.
        keep_last: number of the last checkpoints that are kept.
        best: averaged weights of the best checkpoint, where it has not been saved.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors.update({f"average.{k}": v for k, v in average.items()})
    for name, state in named_state(model, optimizer).items():
        tensors.update({f"optimizer.{k}.{name}": v for k, v in state.items()})
    name = _name(progress.step)
    network = str(getattr(model, "network", ""))
    _write(model_url, name, tensors, progress, network)
    if progress.best_step is not None:
        if best is not None and progress.best_step != progress.step:
            at_best = replace(progress, step=progress.best_step)
            _write(model_url, _name(progress.best_step), {f"average.{k}": v for k, v in best.items()}, at_best, network)
        # The pointer is written every time, so that a kill between two writes never leaves it at a file that is deleted
        # later.
        pointer = {"checkpoint": _name(progress.best_step), "step": progress.best_step, "valid_loss": progress.best}
        objects.write_json(_pointer_url(model_url, "best"), pointer)
    latest = {"checkpoint": name, "step": progress.step, "epoch": progress.epoch}
    objects.write_json(_pointer_url(model_url, "latest"), latest)

    names = [n for n in listing.list_files(_folder(model_url)) if n.endswith(".safetensors")]
    kept = {n for n in names if n <= name}
    kept = set(sorted(kept)[-keep_last:])
    if progress.best_step is not None:
        kept.add(_name(progress.best_step))
    for other in names:
        if other not in kept:
            objects.delete(urls.join(_folder(model_url), other))


def _write(model_url: str, name: str, tensors: dict[str, Tensor], progress: TrainingProgress, network: str) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = {"progress": json.dumps(asdict(progress), sort_keys=True), "network": network}
    objects.write_bytes(urls.join(_folder(model_url), name), safetensors.torch.save(tensors, header))


def load(model_url: str, pointer: Pointer) -> Checkpoint | None:
    """Read the checkpoint that a pointer of a folder `model` names, on the CPU; None where nothing has been saved.

    Raises:
        UserError: the pointer or the checkpoint is damaged or missing.
    """
    url = _pointer_url(model_url, pointer)
    try:
        if not objects.exists(url):
            return None
        found = json.loads(objects.read_bytes(url))
        url = urls.join(_folder(model_url), str(found["checkpoint"]))
        return _parse(objects.read_bytes(url))
    except (FileNotFoundError, ValueError, KeyError, TypeError, struct.error, safetensors.SafetensorError) as error:
        raise UserError(f"{url}: damaged checkpoint ({error}); run stage train again with --force") from None


def _parse(data: bytes) -> Checkpoint:
    tensors = safetensors.torch.load(data)
    # The bytes interface of safetensors gives no access to the header, which is 8 bytes of length and then JSON.
    (length,) = struct.unpack("<Q", data[:8])
    metadata: dict[str, Any] = json.loads(data[8 : 8 + length])["__metadata__"]
    weights: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind in weights:
            weights[kind][name] = tensor
        else:
            quantity, _, parameter = name.partition(".")
            optimizer.setdefault(parameter, {})[quantity] = tensor
    progress = TrainingProgress(**json.loads(metadata["progress"]))
    return Checkpoint(weights["model"], weights["average"], optimizer, progress, metadata["network"])
