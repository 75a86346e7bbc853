"""`zoosplat gc`: what it frees, and everything that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import TWO_CAMERAS
from pipelines import FILES_PIPELINE
from typer.testing import CliRunner

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.results import DONE, REQUEST, Result
from zoosplat.stages.runs import Run
from zoosplat.storage import leases, listing, objects, urls
from zoosplat_flows.cli.app import app
from zoosplat_flows.execution.garbage import find_garbage, remove_garbage
from zoosplat_flows.formatting import format_size

if TYPE_CHECKING:
    from tests.conftest import S3, ByHand

NAMES = [spec.name for spec in FILES_PIPELINE]
LATER = NAMES[NAMES.index("train") :]


def gc(project: str, *arguments: str) -> list[str]:
    done = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(app, ["gc", project, *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def files(url: str) -> set[str]:
    return set(listing.list_files(url))


def make(run: Run, by_hand: ByHand, *stages: str) -> None:
    """Results of 1000 bytes and their marks."""
    for stage in stages or NAMES:
        objects.write_bytes(urls.join(run.output_url(stage), "part", "block"), bytes(1000))
        by_hand.mark(run, stage)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment.from_yaml(TWO_CAMERAS.replace("directory: ", f"directory: {tmp_path}/"))


def with_epochs(experiment: Experiment, epochs: int) -> Experiment:
    return experiment.model_copy(update={"train": experiment.train.model_copy(update={"epochs": epochs})})


@pytest.fixture
def three(tmp_path: Path, experiment: Experiment, by_hand: ByHand) -> list[Run]:
    """Three runs that share what comes before the model; the last is the latest."""
    begun = []
    for epochs in (1, 2, 3):
        run = by_hand.begin(tmp_path / "project", with_epochs(experiment, epochs), state="done")
        make(run, by_hand)
        begun.append(run)
    return begun


def test_what_runs_refer_to_is_left(three: list[Run]) -> None:
    url = three[0].project.url
    before = files(url)
    assert gc(url) == ["nothing to free: every result is one that a run refers to"]
    assert gc(url, "--keep-last", "3") == ["nothing to free: every result is one that a run refers to"]
    assert files(url) == before


def test_keep_last_removes_runs_and_what_only_they_refer_to(three: list[Run]) -> None:
    url = three[0].project.url
    first, second, _ = three
    gone = {f"runs/{run.id}/" for run in (first, second)}
    gone |= {f"results/{stage}/{run.result(stage).id}/" for run in (first, second) for stage in LATER}
    before = files(url)
    lines = gc(url, "--keep-last", "1", "--dry-run")
    assert files(url) == before
    assert {line.partition(":")[0] + "/" for line in lines[:-1]} == gone
    size = len(objects.read_bytes(first.result("train").file(DONE))) + 1000
    size += len(objects.read_bytes(first.result("train").file(REQUEST)))
    assert f"results/train/{first.result('train').id}: {format_size(size)}" in lines
    assert lines[-1].startswith("would free about ")

    done = gc(url, "--keep-last", "1")
    assert done[:-1] == lines[:-1]
    assert done[-1] == lines[-1].replace("would free", "freed")
    assert files(url) == {name for name in before if not any(name.startswith(each) for each in gone)}
    # Nor an empty folder, which would count as an attempt.
    assert {path.name for path in Path(url).glob("results/train/*")} == {three[2].result("train").id}
    assert all(open_run(Project.at(url)).result(stage).is_done() for stage in NAMES)
    assert gc(url, "--keep-last", "1")[-1].startswith("nothing to free")


def test_a_forced_attempt_that_is_freed_leaves_the_one_before(three: list[Run], by_hand: ByHand) -> None:
    """A run of the newest attempt is removed: the next run finds the older one, which is done."""
    project, last = three[0].project, three[2]
    forced = by_hand.begin(Path(project.url), last.experiment, "train", state="done")
    make(forced, by_hand, *LATER)
    assert forced.result("train").id == f"{last.result('train').id}-2"
    objects.write_json(project.path("latest.json"), {"run": last.id})
    objects.delete(forced.path("run.json"))
    assert f"results/train/{forced.result('train').id}" in "".join(gc(project.url))
    draft = draft_run(project, last.experiment)
    assert draft.results["train"].id == last.result("train").id
    assert draft.todo(NAMES) == []


def test_runs_that_are_alive_and_the_latest_are_left(three: list[Run]) -> None:
    project = three[0].project
    objects.write_json(project.path("latest.json"), {"run": three[0].id})
    with leases.locked(three[1].path("lease"), lambda: None):
        lines = gc(project.url, "--keep-last", "1")
    assert f"left runs/{three[1].id}: a process works on it" in lines
    assert project.run_ids() == [run.id for run in three]
    gc(project.url, "--keep-last", "1")
    assert project.run_ids() == [three[0].id, three[2].id]


def orphans(three: list[Run]) -> Run:
    """The first run, whose record is lost: what only it referred to is free."""
    objects.delete(three[0].path())
    return three[0]


def test_foreign_files_links_and_adopted_results_are_named_and_left(three: list[Run], tmp_path: Path) -> None:
    free = orphans(three)
    url = Path(free.project.url)
    evaluation = f"results/evaluate/{free.result('evaluate').id}"
    foreign = {
        "results/weights.pt": "left results/weights.pt: is not a file of zoosplat",
        "results/notes/mine.txt": "left results/notes: is not a file of zoosplat",
        "results/train/mine/x": "left results/train/mine: is not a result of zoosplat",
        "runs/mine/thoughts.txt": "left runs/mine: is not a run of zoosplat",
        f"{evaluation}/paper.pdf": f"left {evaluation}: holds paper.pdf, which is not a file of zoosplat",
    }
    for name in foreign:
        (url / name).parent.mkdir(exist_ok=True)
        (url / name).write_text("mine")
    elsewhere = tmp_path / "big disk"
    folder = Path(free.result("features").folder)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    data = Path(free.output_url("render"))
    data.rename(tmp_path / "renders")
    data.symlink_to(tmp_path / "renders")
    adopted = Path(free.result("embedding").file(DONE))
    adopted.write_text(json.dumps(json.loads(adopted.read_text()) | {"data": ""}))
    mine = three[1].path("figure.svg")
    Path(mine).write_text("mine")
    lines = gc(str(url), "--keep-last", "1")
    assert set(foreign.values()) <= set(lines)
    assert f"left results/features/{free.result('features').id}: is a symbolic link" in lines
    assert f"left results/render/{free.result('render').id}: holds renders, a symbolic link" in lines
    assert any(f"left results/embedding/{free.result('embedding').id}: was adopted" in line for line in lines)
    assert f"left runs/{three[1].id}/figure.svg: is not a file of zoosplat" in lines
    assert files(str(url)) >= set(foreign) | {f"runs/{three[1].id}/figure.svg"}
    assert (elsewhere / "features.zarr" / "part" / "block").exists()
    assert (tmp_path / "renders" / "part" / "block").exists()
    assert not Path(free.result("train").folder).exists()
    assert three[1].id in Project.at(str(url)).run_ids()  # its folder, no longer a run


@pytest.mark.parametrize("lease", ["lease", "shards/00000-of-00002.lease"])
def test_what_somebody_works_on_is_left(three: list[Run], lease: str) -> None:
    free = orphans(three)
    train = free.result("train")
    with leases.locked(train.file(*lease.split("/")), lambda: None):
        lines = gc(free.project.url)
        assert f"left results/train/{train.id}: a process works on it" in lines
        assert train.is_done()
    assert not any(line.startswith("left") for line in gc(free.project.url))
    assert not Path(train.folder).exists()


def test_a_run_that_comes_to_refer_to_a_result_meanwhile_keeps_it(three: list[Run], by_hand: ByHand) -> None:
    free = orphans(three)
    project, train = free.project, free.result("train")
    found = find_garbage(project, None)
    assert ("train", train.id) in found.results
    again = by_hand.begin(Path(project.url), free.experiment, state="begun")
    assert again.result("train").id == train.id
    lines = list(remove_garbage(project, found))
    assert f"results/train/{train.id}: left, a run uses it now" in lines
    assert Result.at(project.url, "train", train.id).is_done()
    assert Path(train.data_url, "part", "block").exists()


def test_what_a_killed_gc_has_left_is_not_complete_and_is_freed_by_the_next(three: list[Run]) -> None:
    free = orphans(three)
    train = free.result("train")
    code = (
        "import os, sys\n"
        "from zoosplat.storage import objects\n"
        "from zoosplat.stages.projects import Project\n"
        "from zoosplat_flows.commands import gc\n"
        "delete, deleted = objects.delete, []\n"
        "def stopping(url):\n"
        "    delete(url)\n"
        "    deleted.append(url)\n"
        "    if len(deleted) == 2: os._exit(9)\n"
        "objects.delete = stopping\n"
        "gc.free_space(Project.at(sys.argv[1]), None, False)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, free.project.url], env=os.environ, check=False)
    assert killed.returncode == 9
    half = [stage for stage in LATER if not Result.at(free.project.url, stage, free.result(stage).id).is_done()]
    assert half, "nothing was begun"
    gc(free.project.url)
    assert not Path(train.folder).exists()
    assert not any(Path(free.result(stage).folder).exists() for stage in LATER)


def test_what_a_training_begins_with_is_kept(three: list[Run], by_hand: ByHand, experiment: Experiment) -> None:
    free, project = three[0], three[0].project
    train = experiment.train.model_copy(update={"start_from": free.result("train").folder, "epochs": 9})
    by_hand.begin(Path(project.url), experiment.model_copy(update={"train": train}))
    orphans(three)
    gc(project.url)
    assert free.result("train").is_done()
    assert not Path(free.result("render").folder).exists()


def test_nothing_is_freed_where_a_run_cannot_be_read(three: list[Run]) -> None:
    free = orphans(three)
    Path(three[1].path("run.json")).write_text('{"id": ')
    before = files(free.project.url)
    with pytest.raises(UserError, match=r"run\.json: is damaged"):
        find_garbage(free.project, None)
    assert files(free.project.url) == before


def test_the_same_on_s3(three: list[Run], s3_here: S3) -> None:
    bucket = s3_here.bucket()
    local = three[0].project.url
    s3_here.put_folder(Path(local), bucket, "project")
    url = f"s3://{bucket}/project"
    objects.write_bytes(f"{url}/results/train/mine/x", b"mine")
    gone = {f"runs/{three[0].id}/"} | {f"results/{stage}/{three[0].result(stage).id}/" for stage in LATER}
    before = files(url)
    with leases.locked(f"{url}/runs/{three[1].id}/lease", lambda: None):
        lines = gc(url, "--keep-last", "1")
    assert f"left runs/{three[1].id}: a process works on it" in lines
    assert "left results/train/mine: is not a result of zoosplat" in lines
    assert files(url) == {name for name in before if not any(name.startswith(each) for each in gone)}


def test_bytes_read_well() -> None:
    sizes = (0, 999, 1000, 4120, 999_400, 999_600, 12_340_000, 1_230_000_000, 5_000_000_000_000_000)
    words = ["0 bytes", "999 bytes", "1 kB", "4.12 kB", "999 kB", "1 MB", "12.3 MB", "1.23 GB", "5e+03 TB"]
    assert [format_size(n) for n in sizes] == words
