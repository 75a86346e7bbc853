"""The stages of the pipeline, and what each of them reads and writes.

The services implement the stages, and the flows chain them. Which keys of the configuration determine a stage's result
is declared with the keys: see `zoosplat.stages.dependencies`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    Attributes:
        name: name of the stage and of its service; the package is `zoosplat_<name>`.
        version: raised when the same configuration gives another result. Results of earlier versions stay where they
            are; the next run makes new ones beside them.
        reads: stages whose results it reads.
        writes: the group or folder that it writes into its result.
        also: further files that it writes beside that.
        gpu: whether it uses a GPU where there is one.
    """

    name: str
    version: int
    reads: tuple[str, ...]
    writes: str
    also: tuple[str, ...] = ()
    gpu: bool = False


PIPELINE: tuple[StageSpec, ...] = (
    StageSpec("ingest", 1, (), "masks.zarr"),
    StageSpec("center_rotation", 1, ("ingest",), "tracking.zarr"),
    StageSpec("crop", 1, ("ingest", "center_rotation"), "crop.zarr"),
    StageSpec("pack", 1, ("ingest",), "images.zarr"),
    StageSpec("train", 5, ("pack", "center_rotation", "crop"), "model", gpu=True),
    StageSpec("evaluate", 3, ("train", "pack", "center_rotation", "crop"), "evaluation", gpu=True),
    StageSpec("render", 1, ("train", "pack", "center_rotation", "crop"), "renders", gpu=True),
    StageSpec("features", 1, ("train", "pack", "center_rotation", "crop"), "features.zarr", gpu=True),
    StageSpec("embedding", 1, ("features", "center_rotation", "pack"), "embedding.zarr", ("embedding.csv",)),
)
STAGES: dict[str, StageSpec] = {spec.name: spec for spec in PIPELINE}
# The stages before the model. Their results have the same bytes on every machine.
PREPROCESSING: tuple[StageSpec, ...] = tuple(itertools.takewhile(lambda spec: not spec.gpu, PIPELINE))


def downstream(names: Iterable[str]) -> set[str]:
    """The given stages, and all stages that read their results, directly or not."""
    found = set(names)
    for spec in PIPELINE:
        if found & set(spec.reads):
            found.add(spec.name)
    return found


def upstream(names: Iterable[str]) -> set[str]:
    """The given stages, and all stages whose results they read, directly or not."""
    found = set(names)
    for spec in reversed(PIPELINE):
        if spec.name in found:
            found |= set(spec.reads)
    return found
