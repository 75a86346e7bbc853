"""Checks of the files that a configuration names besides the recording, by reading their headers.

Otherwise a training whose initial weights are missing would fail only after hours of preprocessing.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

from zoosplat.config.experiment import Experiment
from zoosplat.config.sections import is_weights_file, is_weights_folder
from zoosplat.config.training import ANIMALS, RANDOM
from zoosplat.errors import Problems, UserError
from zoosplat.formats import ply
from zoosplat.stages.memory import PUBLISHED_BOTTLENECK
from zoosplat.stages.registry import SEGMENT, has_stage
from zoosplat.stages.sam_weights import check_weights_folder
from zoosplat.stages.start_from import no_training, trained_result
from zoosplat.storage import objects, urls

# Names of the checkpoints of the dynamic trainer.
CHECKPOINT = re.compile(r"chkpnt_(coarse|fine)_\d+\.pth")
MAX_HEADER = 100 << 20  # Bytes of a .safetensors header; its own readers have the same limit.
PLY_HEADER = 1 << 16  # Bytes that are read to find the end of a PLY header, which has a few hundred.
Shapes = dict[str, tuple[int, ...]]


def check_outside_files(experiment: Experiment, stages: Iterable[str]) -> None:
    """Check the files that these stages read besides the recording.

    Args:
        experiment: the configuration.
        stages: names of the stages that are to run.

    Raises:
        UserError: a line for each file, with its key, its value and what to do.
    """
    chosen, problems = set(stages), Problems()
    train, dynamic, features = experiment.train, experiment.dynamic, experiment.features
    lpips, segment = experiment.evaluate.lpips_weights, experiment.segment
    makes_masks = SEGMENT in chosen and has_stage(SEGMENT, experiment)
    if makes_masks and segment.method == "sam" and is_weights_folder(segment.sam_weights):
        with problems.collect():
            check_weights_folder(segment.sam_weights, segment.sam_prompt)
    if "train" in chosen and train.method == "pose_splatter" and train.start_from not in (RANDOM, ANIMALS):
        with problems.collect():
            _check_start(experiment)
    if "train" in chosen and train.method == "dynamic":
        if dynamic.initial_ply is not None:
            with problems.collect():
                _check_points("dynamic.initial_ply", dynamic.initial_ply)
        if dynamic.start_checkpoint is not None:
            with problems.collect():
                _check_checkpoint("dynamic.start_checkpoint", dynamic.start_checkpoint)
    if "features" in chosen and features.encoder == "images" and is_weights_file(features.weights):
        with problems.collect():
            _check_weights("features.weights", features.weights)
    if "evaluate" in chosen and lpips is not None:
        with problems.collect():
            _check_weights("evaluate.lpips_weights", lpips)
    problems.report()


def _size(key: str, value: str) -> int:
    """Bytes of a file. Raises UserError unless it is there and holds something."""
    url = urls.normalize(value)
    try:
        if not (n_bytes := objects.size(url)):
            raise UserError(f"{key} = {value}: the file is empty; copy it again")
        with objects.open_read(url):
            return n_bytes
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{key} = {value}: no such file; check {key}") from None
    except IsADirectoryError:
        raise UserError(f"{key} = {value}: no such file, but a folder; check {key}") from None


def _read(value: str, start: int, count: int) -> bytes:
    with objects.open_read(urls.normalize(value)) as file:
        file.seek(start)
        return file.read(count)


# -- weights to begin with ----------------------------------------------------------------------------------------
def _check_start(experiment: Experiment) -> None:
    value = experiment.train.start_from
    if not value.endswith(".safetensors"):
        if trained_result(urls.normalize(value)) is None:
            raise UserError(no_training(value))
        return
    found = dict(read_architecture(read_shapes("train.start_from", value)))
    if not found:
        raise UserError(
            f"train.start_from = {value}: not the weights of a network of zoosplat; name a file that `python -m "
            f"zoosplat_train.pretrain` wrote, or the project of a training"
        )
    problems = []
    for key, there in found.items():
        here = getattr(experiment.model, key)
        if key == "bottleneck" and here == 0 and experiment.model.network == "published":
            here = PUBLISHED_BOTTLENECK
        if here != there:
            problems.append(
                f"model.{key} = {here}: train.start_from = {value} holds weights of a network with {there}; set it so, "
                f"or train.start_from to {RANDOM}"
            )
    if problems:
        raise UserError("\n".join(problems))


def read_shapes(key: str, value: str) -> Shapes:
    """Shapes of the tensors of a .safetensors file, by its header: 8 bytes of length, then JSON."""
    n_bytes = _size(key, value)
    try:
        (length,) = struct.unpack("<Q", _read(value, 0, 8))
        if length > min(n_bytes - 8, MAX_HEADER):
            raise ValueError("no header")
        header: dict[str, Any] = json.loads(_read(value, 8, length))
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        end = max((int(about["data_offsets"][1]) for about in tensors.values()), default=0)
        shapes = {name: tuple(int(n) for n in about["shape"]) for name, about in tensors.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{key} = {value}: not a .safetensors file; save it again") from None
    if n_bytes < 8 + length + end:
        raise UserError(f"{key} = {value}: cut off: {n_bytes} of {8 + length + end} bytes; copy it again")
    return shapes


def read_architecture(shapes: Shapes) -> Iterator[tuple[str, Any]]:
    """The keys of `model` that decide which tensors a network has, and their values by the tensors of a file."""
    first = "refine.unets.0.down."
    levels = {name.removeprefix(first).partition(".")[0] for name in shapes if name.startswith(first)}
    for network, tensor, halvings, doubled in (
        ("zoosplat", f"{first}0.first.weight", len(levels), 1),
        ("published", f"{first}0.0.weight", len(levels) - 1, 0),
    ):
        if tensor in shapes:
            yield "network", network
            yield "num_unets", len({name.split(".")[2] for name in shapes if name.startswith("refine.unets.")})
            yield "base_filters", shapes[tensor][0] >> doubled
            yield "poolings", halvings
            yield "bottleneck", shapes.get("refine.unets.0.bottom.0.weight", (0,))[0]


# -- other files --------------------------------------------------------------------------------------------------
def _check_points(key: str, value: str) -> None:
    n_bytes = _size(key, value)
    try:
        header = ply.read_header(_read(value, 0, PLY_HEADER))
        missing = {"x", "y", "z"} - dict(header.fields).keys()
        if missing:
            raise ValueError(f"no property {min(missing)}")
        if not header.n:
            raise ValueError("no points")
        if n_bytes < header.n_bytes:
            raise ValueError(f"cut off: {n_bytes} of {header.n_bytes} bytes")
    except ValueError as error:
        raise UserError(f"{key} = {value}: cannot be read as points ({error}); export it again") from None


def _check_checkpoint(key: str, value: str) -> None:
    if not CHECKPOINT.fullmatch(value.rpartition("/")[2]):
        raise UserError(f"{key} = {value}: a checkpoint is called chkpnt_coarse_N.pth or chkpnt_fine_N.pth; name one")
    _check_torch_file(key, value)


def _check_weights(key: str, value: str) -> None:
    if value.endswith(".safetensors"):
        shapes = read_shapes(key, value)
        if not sum(math.prod(shape) for shape in shapes.values()):
            raise UserError(f"{key} = {value}: holds no tensors; save the network's state_dict")
    else:
        _check_torch_file(key, value)


def _check_torch_file(key: str, value: str) -> None:
    """Check a file of torch.save: a ZIP file, whose end lists its parts, or a pickle if torch is older than 1.6."""
    _size(key, value)
    with objects.open_read(urls.normalize(value)) as file:
        begins = file.read(1)
        if not (zipfile.is_zipfile(file) if begins == b"P" else begins == b"\x80"):
            raise UserError(f"{key} = {value}: cut off, or not a file that torch.save wrote; copy it again")
