"""The stages of the pipeline, and what each of them reads and writes.

The services implement the stages, and the flows chain them. Which keys of the configuration determine a stage's result
is declared with the keys: see `zoosplat.stages.dependencies`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    Attributes:
        name: name of the stage and of its service; the package is `zoosplat_<name>`.
        version: raised when the same configuration gives another result. Results of earlier versions stay where they
            are; the next run makes new ones beside them.
        reads: stages whose results it reads, where the experiment has them: see `pipeline_of`.
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


SEGMENT = "segment"  # The one stage that not every experiment has.
# All stages that there are. Those of one experiment, and what they read in it, are `pipeline_of(experiment)`.
PIPELINE: tuple[StageSpec, ...] = (
    StageSpec(SEGMENT, 1, (), "segments.zarr", ("weights.safetensors",), gpu=True),
    StageSpec("ingest", 1, (SEGMENT,), "masks.zarr"),
    StageSpec("center_rotation", 1, ("ingest",), "tracking.zarr"),
    StageSpec("crop", 1, ("ingest", "center_rotation"), "crop.zarr"),
    StageSpec("pack", 1, (SEGMENT, "ingest"), "images.zarr"),
    StageSpec("train", 5, ("pack", "center_rotation", "crop"), "model", gpu=True),
    StageSpec("evaluate", 3, ("train", "pack", "center_rotation", "crop"), "evaluation", gpu=True),
    StageSpec("render", 1, ("train", "pack", "center_rotation", "crop"), "renders", gpu=True),
    StageSpec("features", 1, ("train", "pack", "center_rotation", "crop"), "features.zarr", gpu=True),
    StageSpec("embedding", 1, ("features", "center_rotation", "pack"), "embedding.zarr", ("embedding.csv",)),
)
STAGES: dict[str, StageSpec] = {spec.name: spec for spec in PIPELINE}
# The stages between the masks and the model, which every experiment has. Where what they read has the same bytes, their
# results have the same bytes on every machine. Stage segment is not among them: a GPU's arithmetic differs.
PREPROCESSING: tuple[StageSpec, ...] = tuple(
    spec for spec in itertools.takewhile(lambda spec: spec.name != "train", PIPELINE) if not spec.gpu
)


def has_stage(stage: str, experiment: Experiment) -> bool:
    """Whether a stage is part of an experiment. Segment is only where the masks are made from the videos."""
    return stage != SEGMENT or experiment.data.masks_are_made


def require_stage(stage: str, experiment: Experiment) -> None:
    """Raise UserError if there is no stage of this name, or if the experiment does not have it."""
    names = ", ".join(spec.name for spec in PIPELINE if has_stage(spec.name, experiment))
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage}; the stages are {names}")
    if not has_stage(stage, experiment):
        raise UserError(f"this experiment has no stage {stage}, because data.masks names files; its stages are {names}")


def pipeline_of(experiment: Experiment) -> tuple[StageSpec, ...]:
    """The stages of an experiment in their order. What each of them reads are stages of this experiment."""
    return tuple(
        replace(spec, reads=reads_of(spec.name, experiment)) for spec in PIPELINE if has_stage(spec.name, experiment)
    )


def reads_of(stage: str, experiment: Experiment) -> tuple[str, ...]:
    """The stages whose results a stage reads in an experiment."""
    return tuple(name for name in STAGES[stage].reads if has_stage(name, experiment))


def wants_gpu(stage: str, experiment: Experiment) -> bool:
    """Whether a cluster runs a stage as one process beside a GPU, and not as shards on nodes without one.

    Stage segment works on either; `segment.device: cpu` chooses the shards. The other stages that can use a GPU are
    one process wherever they compute.
    """
    return STAGES[stage].gpu and not (stage == SEGMENT and experiment.segment.device == "cpu")


def downstream(names: Iterable[str]) -> set[str]:
    """The given stages of an experiment, and all stages that read their results, directly or not."""
    found = set(names)
    for spec in PIPELINE:
        if found & set(spec.reads):
            found.add(spec.name)
    return found


def upstream(names: Iterable[str], experiment: Experiment) -> set[str]:
    """The given stages of an experiment, and all stages whose results they read, directly or not."""
    found = set(names)
    for spec in reversed(pipeline_of(experiment)):
        if spec.name in found:
            found |= set(spec.reads)
    return found
