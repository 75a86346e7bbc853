"""Stages killed at random points and run again end as stages that were never disturbed, and keep what was done."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PREPROCESSING, STAGES
from zoosplat.stages.results import Result

if TYPE_CHECKING:
    from tests.conftest import Recording, Stages

# Their groups are equal byte for byte.
EXACT = [spec.name for spec in PREPROCESSING]
TRIES = 6


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def result_of(project: Path, stage: str) -> Result:
    """A stage's result in the project's latest run, finished or not."""
    return open_run(Project.at(str(project))).result(stage)


def without(finished: Path, stage: str, project: Path) -> Path:
    """A copy of a finished project in which one stage has not run yet."""
    shutil.copytree(finished, project, symlinks=True)
    shutil.rmtree(result_of(project, stage).folder)
    return project


def shard_marks(project: Path, stage: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(result_of(project, stage).file("shards")).glob("*.json")}


def is_done(project: Path, stage: str) -> bool:
    return result_of(project, stage).is_done()


def check_equal(project: Path, finished: Path, stage: str) -> None:
    result, undisturbed = result_of(project, stage), result_of(finished, stage)
    assert files(Path(result.data_url)) == files(Path(undisturbed.data_url))
    assert result.manifest() == undisturbed.manifest()
    assert not list(project.rglob("*.partial"))
    assert not list(Path(result.folder).rglob("*lease"))
    assert result.id == undisturbed.id
    assert len(shard_marks(project, stage)) == result.require()["shards"] == 3
    assert len(list(Path(result.folder).parent.iterdir())) == 1  # no attempt beside it
    assert os.path.realpath(project / "latest" / STAGES[stage].writes) == os.path.realpath(result.data_url)


def alive(group: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = entry.read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("stage", EXACT)
def test_killed_at_random_points(stage: str, stages: Stages, finished: Path, tmp_path: Path) -> None:
    rng = random.Random(stage)
    started = time.monotonic()
    undisturbed = without(finished, stage, tmp_path / "undisturbed")
    assert stages(stage, str(undisturbed)).status == 0
    seconds = time.monotonic() - started
    check_equal(undisturbed, finished, stage)

    shards_kept = 0
    for i in range(TRIES):
        project = without(finished, stage, tmp_path / str(i))
        for _ in range(rng.choice((1, 1, 2))):
            process = stages.start(stage, str(project), "--workers", "1")
            # Spread evenly over the run, so that whatever its speed every part of it is hit.
            time.sleep(seconds * (i + rng.random()) / TRIES)
            with contextlib.suppress(ProcessLookupError):  # it may have ended before
                os.killpg(process, signal.SIGKILL)
            stages.finished()
            if is_done(project, stage):
                check_equal(project, finished, stage)
        done = shard_marks(project, stage)
        shards_kept += len(done)
        outcome = stages(stage, str(project))
        assert (outcome.status, outcome.err) == (0, "")
        check_equal(project, finished, stage)
        # A shard that is computed again has another time and process in its mark.
        assert done.items() <= shard_marks(project, stage).items()
    assert shards_kept, "no try was killed after a shard; the test shows nothing"


@pytest.mark.parametrize("stage", EXACT)
def test_killed_with_its_workers_at_a_shard(stage: str, stages: Stages, finished: Path, tmp_path: Path) -> None:
    """Shards in processes; only the parent is killed: its workers must not live on and write beside the next run."""
    project = without(finished, stage, tmp_path / "project")
    process = stages.start(stage, str(project), "--workers", "2")
    deadline = time.monotonic() + 120
    while not shard_marks(project, stage):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert stages.finished().status == -signal.SIGKILL
    while alive(process):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    done = shard_marks(project, stage)
    assert stages(stage, str(project)).status == 0
    check_equal(project, finished, stage)
    assert done.items() <= shard_marks(project, stage).items()


@pytest.mark.parametrize("stage", EXACT)
def test_separate_commands_in_any_order(stage: str, stages: Stages, finished: Path, tmp_path: Path) -> None:
    project = without(finished, stage, tmp_path / "project")
    early = stages(stage, str(project), "--shard", "0/3")
    assert early.status == 2
    assert "not prepared" in early.err
    prepared = stages(stage, str(project), "--prepare")
    assert prepared.status == 0
    assert json.loads(prepared.out) == {"event": "plan", "stage": stage, "shards": 3}
    order = random.Random(stage).sample(range(3), 3)
    for i in order[:-1]:
        assert stages(stage, str(project), "--shard", f"{i}/3").status == 0
    unfinished = stages(stage, str(project), "--finish")
    assert unfinished.status == 2
    assert f"shards [{order[-1]}] of stage {stage}" in unfinished.err
    assert not is_done(project, stage)
    before = shard_marks(project, stage)
    for i in (*order, order[0]):  # those that are done again, too
        assert stages(stage, str(project), "--shard", f"{i}/3").status == 0
    assert before.items() <= shard_marks(project, stage).items()
    assert stages(stage, str(project), "--finish").status == 0
    check_equal(project, finished, stage)


def test_torn_data_of_an_unfinished_shard_is_replaced(stages: Stages, finished: Path, tmp_path: Path) -> None:
    """What a power cut can leave: a storage block that is cut short, its shard not marked."""
    project = without(finished, "ingest", tmp_path / "project")
    assert stages("ingest", str(project), "--prepare").status == 0
    assert stages("ingest", str(project), "--shard", "2/3").status == 0
    result = result_of(project, "ingest")
    Path(result.shard_mark_url(2, 3)).unlink()
    for block in ("mask/c/2/0/0/0", "box/c/2/0/0"):
        torn = Path(result.data_url, block)
        torn.write_bytes(torn.read_bytes()[:-7])
    Path(result.data_url, "mask/c/0.deadbeef.partial").write_bytes(b"half")
    assert stages("ingest", str(project)).status == 0
    check_equal(project, finished, "ingest")


def test_shard_size_changes_nothing(recording: Recording, stages: Stages, finished: Path, tmp_path: Path) -> None:
    """Other shards, the same groups; crop also keeps its counts by shard, whose sums are compared."""
    project = tmp_path / "project"
    recording.write_project(project, scheduling__frames_per_shard=1000)
    for stage in EXACT:
        assert stages(stage, str(project)).status == 0
        result, undisturbed = result_of(project, stage), result_of(finished, stage)
        assert result.require()["shards"] == 1
        assert result.id == undisturbed.id
        ours, theirs = (
            {k: data for k, data in files(Path(of.data_url)).items() if not k.startswith("counts/")}
            for of in (result, undisturbed)
        )
        assert ours == theirs


# -- an older plan that is still at work --------------------------------------------------------------------------
def stopped_within_a_shard(stages: Stages, url: str, written: Callable[[], bool], **options: Any) -> int:
    """A process that has written the first of three blocks of the only shard and is stopped; its id."""
    assert stages("ingest", url, "--prepare", **options).status == 0
    process = stages.start("ingest", url, "--shard", "0/1", "--workers", "1", **options)
    deadline = time.monotonic() + 120
    while not written():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process, signal.SIGSTOP)
    return process


def test_a_shard_of_older_settings_goes_on_beside_the_new_ones(
    recording: Recording, stages: Stages, files_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Stopped in the middle; meanwhile other settings are prepared, run and finished; then it goes on to its end."""
    project = tmp_path / "project"
    url = recording.write_project(project, scheduling__frames_per_shard=1000)
    first = project / "results/ingest"
    process = stopped_within_a_shard(stages, url, lambda: bool(list(first.glob("*/masks.zarr/mask/c/0/*/*/*"))))
    old = result_of(project, "ingest")
    assert not Path(old.shard_mark_url(0, 1)).exists(), "the shard was done before it was stopped"

    recording.write_project(project, ingest__max_frames=12, scheduling__frames_per_shard=1000)
    # A server of its own: that of `stages` waits for the process that is stopped.
    other = type(stages)(tmp_path)
    try:
        for step in (["--prepare"], ["--shard", "0/1"], ["--finish"]):
            assert other("ingest", url, *step).status == 0
    finally:
        other.close()
    new = result_of(project, "ingest")
    assert new.is_done()
    assert new.id != old.id
    before = files_of(project)
    os.kill(process, signal.SIGCONT)
    outcome = stages.finished()
    assert (outcome.status, outcome.err) == (0, "")
    assert files_of(project) == before
    assert len(shard_marks(project, "ingest")) == 1
    # What it has done is not lost: whoever wants those settings again finishes it.
    recording.write_project(project, scheduling__frames_per_shard=1000)
    assert stages("ingest", url, "--finish").status == 0
    assert result_of(project, "ingest") == old
    assert old.is_done()
