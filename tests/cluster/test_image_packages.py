"""The packages of each image are enough for what runs in it, also where a stage begins a run by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from zoosplat.stages.registry import PREPROCESSING

if TYPE_CHECKING:
    from tests.conftest import Recording

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
STAGES = [spec.name for spec in PREPROCESSING]

# Runs a module as `python -m` does, where what is not installed in an image cannot be imported.
WITHOUT = """
import importlib.abc, json, runpy, sys
absent = set(json.loads(sys.argv[1]))
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[2:]
"""
STAGE = WITHOUT + "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
FLOWS = (
    WITHOUT
    + """
import zoosplat_flows.cli.app, zoosplat_flows.pipeline, zoosplat_flows.report.page
from zoosplat.config.load import load_config
from zoosplat.stages.begin import begin_run
from zoosplat.stages.projects import Project
with begin_run(Project.at(sys.argv[1]), load_config(sys.argv[2]).experiment, ["ingest"], []) as run:
    assert not run.result("ingest").is_done()
"""
)


def installed_with(extra: str) -> set[str]:
    """Names of all packages that `pip install zoosplat[extra]` brings."""
    found: set[str] = set()
    wanted = [(Requirement(text), "") for text in (*PROJECT["dependencies"], f"zoosplat[{extra}]")]
    while wanted:
        requirement, by = wanted.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": by}):
            continue
        name = canonicalize_name(requirement.name)
        if name == "zoosplat":
            lines = [text for one in requirement.extras for text in PROJECT["optional-dependencies"][one]]
            wanted += [(Requirement(text), "") for text in lines]
            continue
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        wanted += [(each, one) for one in ("", *requirement.extras) for each in needs]
    return found


def absent_in(extra: str) -> list[str]:
    """Modules of this environment that are not in one with an extra alone."""
    there = {*installed_with(extra), "zoosplat", "packaging"}
    owners = metadata.packages_distributions().items()
    return sorted(module for module, names in owners if not there & {canonicalize_name(name) for name in names})


def run(program: str, extra: str, *arguments: str) -> None:
    command = [sys.executable, "-c", program, json.dumps(absent_in(extra)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_absent_in_an_image() -> None:
    """Otherwise the other tests would show nothing."""
    assert {"torch", "av", "h5py", "scipy", "prefect", "gsplat"} <= set(absent_in("crop"))
    assert {"torch", "h5py", "prefect"} <= set(absent_in("pack"))
    assert not {"numpy", "zarr", "yaml", "cv2", "boto3", "s3fs"} & set(absent_in("crop"))
    assert "av" not in absent_in("pack")


def test_every_stage_before_the_model_begins_and_ends_with_its_own_packages(
    recording: Recording, tmp_path: Path
) -> None:
    project = recording.write_project(tmp_path / "project")
    config = str(tmp_path / "project" / "tested.yaml")
    for stage in STAGES:
        arguments = ["--project", project, "--config", config, "--workers", "1"]
        run(STAGE, stage, f"zoosplat_{stage}", *arguments)


@pytest.mark.parametrize("extra", ["flows"])
def test_the_flow_checks_a_recording_with_its_own_packages(extra: str, recording: Recording, tmp_path: Path) -> None:
    project = recording.write_project(tmp_path / "project")
    run(FLOWS, extra, "flow", project, str(tmp_path / "project" / "tested.yaml"))
