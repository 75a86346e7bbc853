"""Dynamic Gaussians through the stages: train, evaluate, render on a tiny scene."""

from __future__ import annotations

import json

import pytest

from zoosplat import stores
from zoosplat.project import Project
from zoosplat.stage import run_stage
from zoosplat_evaluate.stage import STAGE as EVALUATE
from zoosplat_render.stage import STAGE as RENDER
from zoosplat_train.stage import STAGE

SMALL = {
    "coarse_iterations": 60,
    "fine_iterations": 60,
    "initial_points": 300,
    "multires": (1,),
    "resolution": 8,
    "time_resolution": 4,
}


def configure(project: Project, **dynamic: object) -> None:
    old = project.read_experiment()
    changes = {
        "train": old.train.model_copy(update={"method": "dynamic"}),
        "dynamic": old.dynamic.model_copy(update=SMALL | dynamic),
        "render": old.render.model_copy(update={"orbit_frames": 3, "sequence_frames": 2, "device": "cpu"}),
    }
    project.write_experiment(old.model_copy(update=changes))


def test_same_stages(tiny: Project) -> None:
    configure(tiny)
    for stage in (STAGE, EVALUATE, RENDER):
        run_stage(stage, tiny)
    mark = tiny.read_mark("evaluate")
    assert mark is not None
    print(json.dumps(mark["figures"], indent=1), tiny.read_mark("train")["figures"])
    print(list(stores.list_files(tiny.url)))
