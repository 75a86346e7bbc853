"""A training of two processes that is told to stop: one line, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from process_groups import group_exists, wait_for_group

from zoosplat.stages.registry import PREPROCESSING

if TYPE_CHECKING:
    from tests.conftest import Recording, Stages

LINE = "zoosplat train: stopped; finished work is kept, the same command goes on from here\n"


@pytest.fixture
def command(recording: Recording, stages: Stages, tmp_path: Path) -> list[str]:
    """Trains for hours, by two processes on the CPU. An epoch has four frames."""
    project = tmp_path / "project"
    model = {"num_unets": 1, "base_filters": 2, "bottleneck": 16, "min_gaussians": 64, "max_gaussians": 1500}
    train = {"epochs": 100_000, "device": "cpu", "gpus": 2, "batch_frames": 2, "plot_every": 1000}
    recording.write_project(project, ingest__max_frames=12, model=model, train=train)
    for spec in PREPROCESSING:
        assert stages(spec.name, str(project)).status == 0
    options = ["--project", str(project), "--config", str(project / "tested.yaml")]
    return [sys.executable, "-m", "zoosplat_train", *options]


@pytest.mark.parametrize(
    ("number", "everyone"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["SIGTERM", "^C"]
)
def test_it_leaves_nothing(command: list[str], number: signal.Signals, everyone: bool) -> None:
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        # Both processes have met by the end of an epoch.
        assert any('"done": 1' in line for line in process.stdout), process.communicate()[1]
        (os.killpg if everyone else os.kill)(process.pid, number)
        errors = wait_for_group(process)
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (process.returncode, errors) == (128 + number, LINE)
