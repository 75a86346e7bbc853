"""Installing one stage brings what that stage needs, and nothing of the others."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from zoosplat.project import Project
from zoosplat.stage import run_stage

ROOT = Path(__file__).resolve().parents[2]
UV = [sys.executable, "-m", "uv"]


def test_crop_alone_brings_no_torch_and_runs(recording: Any, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([*UV, "venv", "-q", "--python", sys.executable, str(environment)], check=True)
    python = str(environment / "bin" / "python")
    install = [*UV, "pip", "install", "-q", "--python", python, "-c", str(ROOT / "constraints.txt"), f"{ROOT}[crop]"]
    subprocess.run(install, check=True)
    listing = [*UV, "pip", "list", "--python", python, "--format", "json"]
    listed = subprocess.run(listing, capture_output=True, check=True)
    installed = {entry["name"] for entry in json.loads(listed.stdout)}
    assert "zoosplat" in installed
    assert not installed & {"torch", "gsplat", "prefect", "scipy", "av", "h5py", "matplotlib", "tensorboard"}

    project = Project.at(recording.write_project(tmp_path / "project"))
    for name in ("ingest", "center_rotation"):
        run_stage(importlib.import_module(f"zoosplat_{name}.stage").STAGE, project)
    # -P: not the checkout's own packages, though the tests run in it.
    command = [python, "-P", "-m", "zoosplat_crop", "--project", project.url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert project.read_mark("crop") is not None
