"""Runs of a project that differ in the settings of their training, and what these trainings have saved."""

from __future__ import annotations

from typing import Any

from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runs import Run
from zoosplat_model import checkpoints
from zoosplat_model.checkpoints import Checkpoint


def configure(project: Project, force: bool = False, **train: Any) -> Run:
    """A new run of the latest run's experiment with other settings of `train`; with `force` it trains again."""
    old = open_run(project).experiment
    new = old.model_copy(update={"train": old.train.model_copy(update=train)})
    return record_run(draft_run(project, new, ["train"] if force else []), ["train"])


def latest(project: Project) -> Checkpoint:
    """The newest checkpoint of the latest run's training."""
    found = checkpoints.load(open_run(project).output_url("train"), "latest")
    assert found is not None
    return found
