"""Two runs with different settings on one project at once, killed at random and started again: each gets its own."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PREPROCESSING
from zoosplat.stages.runs import Run
from zoosplat.storage import leases, listing, objects

if TYPE_CHECKING:
    from tests.conftest import Recording

EPOCHS = (1, 2)
KINDS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
# Stages after whose begin a command is killed; with the empty one before, as it starts.
MOMENTS = ("", *(spec.name for spec in PREPROCESSING), "train", "evaluate")
PAUSE_S = 3.0
ENDS_WITHIN_S = 20.0  # a process that was told to stop, on a busy machine
FINISHES_WITHIN_S = 540.0


class Command:
    """`zoosplat run` with a number of epochs, on the common project, again and again."""

    def __init__(self, folder: Path, recording: Recording, settings: dict[str, Any], epochs: int) -> None:
        self.epochs = epochs
        config = folder / f"{epochs}.yaml"
        train = {**settings["train"], "epochs": epochs}
        config.write_text(json.dumps(recording.config(**{**settings, "train": train})))
        zoosplat = str(Path(sys.executable).with_name("zoosplat"))
        self._command = [zoosplat, "run", str(config), "--project", str(folder / "project"), "--until", "evaluate"]
        self._env = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
        self._env |= {"OMP_NUM_THREADS": "1", "PREFECT_HOME": str(folder / "no prefect")}
        self._log = folder / f"{epochs}.log"
        self.start()

    def start(self) -> None:
        self._from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    def kill(self, number: signal.Signals, stage: str, pause_s: float) -> bool:
        """Send a signal so long after a stage has begun (none: after the start), and start again.

        Returns:
            Whether that has ended it, and it had not come to its end before.
        """
        deadline = time.monotonic() + FINISHES_WITHIN_S
        while stage and f"{stage}: started" not in self.said()[self._from :] and self.process.poll() is None:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        time.sleep(pause_s)
        self.process.send_signal(number)
        status = self.process.wait(ENDS_WITHIN_S)
        assert status in (0, -number, 130), self.said()
        self.start()
        return status != 0

    def end(self) -> None:
        assert self.process.wait(FINISHES_WITHIN_S) == 0, self.said()

    def said(self) -> str:
        return self._log.read_text()


def commands_with(text: str) -> list[str]:
    """Command lines, of any process, in which a text occurs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command:
            found.append(command)
    return found


def check_own(run: Run, epochs: int) -> None:
    """A run's training and evaluation are what its configuration says, complete, and of nothing else."""
    train, evaluate = run.result("train"), run.result("evaluate")
    rows = list(csv.DictReader(io.StringIO(objects.read_bytes(f"{train.data_url}/history.csv").decode())))
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    assert train.require()["settings"]["train.epochs"] == epochs
    assert train.require()["inputs"] == {name: run.result(name).id for name in ("pack", "center_rotation", "crop")}
    assert evaluate.require()["inputs"]["train"] == train.id
    for result in (train, evaluate):
        folder = result.data_url.rpartition("/")[2]
        assert {
            f"{folder}/{name}": size for name, size in listing.manifest(result.data_url).items()
        } == result.manifest()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_two_runs_at_once_killed_at_random(
    kills: int,
    recording: Recording,
    whole_settings: dict[str, Any],
    whole_project: Path,
    check_same: Callable[[str, Path, Path], None],
    tmp_path: Path,
) -> None:
    """Every round is a new project on which both work until they are done, however often they are killed meanwhile."""
    rng, began = random.Random(kills), time.monotonic()
    killed: Counter[str] = Counter()
    rounds = 0
    while killed.total() < kills:
        rounds += 1
        folder = tmp_path / str(rounds)
        folder.mkdir()
        commands = [Command(folder, recording, whole_settings, epochs) for epochs in EPOCHS]
        try:
            while killed.total() < kills and any(command.process.poll() is None for command in commands):
                number = KINDS[killed.total() % len(KINDS)]
                # Either of those that still run.
                running = [command for command in commands if command.process.poll() is None]
                if running and rng.choice(running).kill(number, rng.choice(MOMENTS), rng.uniform(0, PAUSE_S)):
                    killed[number.name] += 1
            for command in commands:
                command.end()
        finally:
            for command in commands:
                command.process.kill()
                command.process.wait()
        check_round(folder, commands, whole_project, check_same)
    print(f"{killed.total()} kills in {rounds} rounds and {time.monotonic() - began:.0f} s: {dict(killed)}")


def check_round(
    folder: Path, commands: list[Command], undisturbed: Path, check_same: Callable[[str, Path, Path], None]
) -> None:
    path = folder / "project"
    project = Project.at(str(path))
    for command in commands:
        assert "Traceback" not in command.said()
        mine = [
            run
            for run in (open_run(project, run_id) for run_id in project.run_ids())
            if run.experiment.train.epochs == command.epochs
        ]
        for run in mine:
            check_own(run, command.epochs)
        assert any(run.record()["state"] == "done" for run in mine)
    # Each has a training and an evaluation of its own; what comes before was made once, and is shared.
    for stage, count in {"train": 2, "evaluate": 2, **{spec.name: 1 for spec in PREPROCESSING}}.items():
        assert len(list((path / "results" / stage).iterdir())) == count, stage
    for spec in PREPROCESSING:
        check_same(spec.name, path, undisturbed)
    assert not [each for each in path.rglob("*.partial") if "results" in each.relative_to(path).parts]
    assert not [each for each in path.rglob("*lease") if "results" in each.relative_to(path).parts]
    assert not [each for each in path.rglob("*lease") if leases.is_held(str(each))]
    deadline = time.monotonic() + 10
    while left := commands_with(str(path)):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
