"""The chain of stages as data: what each stage is made of, reads and writes.

The services implement the stages, the flows chain them; both, and every reader of a group, look here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    Attributes:
        name: stage and service name; the package is `zoosplat_<name>`.
        version: raised when the same configuration gives another result, so that old results are made again.
        config: dotted keys of the experiment that determine the result; a leading `-` takes one out again.
        reads: stages whose groups it reads.
        writes: the group or folder below the project that it writes.
        gpu: whether it uses a GPU where there is one.
    """

    name: str
    version: int
    config: tuple[str, ...]
    reads: tuple[str, ...]
    writes: str
    gpu: bool = False


PIPELINE: tuple[StageSpec, ...] = (
    StageSpec(
        "ingest",
        1,
        (
            "data.camera_names",
            "data.calibration_format",
            "data.calibration_unit",
            "data.up",
            "data.fps",
            "data.image_width",
            "data.image_height",
            "ingest",
        ),
        (),
        "masks.zarr",
    ),
    StageSpec(
        "center_rotation",
        1,
        ("center_rotation", "holdout_views", "unit", "adaptive_camera"),
        ("ingest",),
        "tracking.zarr",
    ),
    StageSpec("crop", 1, ("crop", "holdout_views", "unit"), ("ingest", "center_rotation"), "crop.zarr"),
    StageSpec("pack", 1, ("pack",), ("ingest",), "images.zarr"),
    StageSpec(
        "train",
        5,
        ("model", "dynamic", "train", "-train.device", "-train.gpus", "holdout_views"),
        ("pack", "center_rotation", "crop"),
        "model",
        gpu=True,
    ),
    StageSpec(
        "evaluate",
        2,
        ("evaluate", "-evaluate.device"),
        ("train", "pack", "center_rotation", "crop"),
        "evaluation",
        gpu=True,
    ),
    StageSpec(
        "render",
        1,
        ("render", "-render.device"),
        ("train", "pack", "center_rotation", "crop"),
        "renders",
        gpu=True,
    ),
    StageSpec(
        "features",
        1,
        ("features", "-features.device"),
        ("train", "pack", "center_rotation", "crop"),
        "features.zarr",
        gpu=True,
    ),
    StageSpec("embedding", 1, ("embedding",), ("features", "center_rotation", "pack"), "embedding.zarr"),
)
STAGES: dict[str, StageSpec] = {spec.name: spec for spec in PIPELINE}
# What comes before the model: the same bytes on every machine.
PREPROCESSING: tuple[StageSpec, ...] = tuple(itertools.takewhile(lambda spec: not spec.gpu, PIPELINE))
