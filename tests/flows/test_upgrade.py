"""A project that the release before made, with its layout: read as it is, adopted, and gone on with."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pipelines import FILES_PIPELINE
from typer.testing import CliRunner

from zoosplat.errors import UserError
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PREPROCESSING
from zoosplat.stages.results import Result
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat.stages.upgrade import upgrade
from zoosplat.storage import groups, objects, schema
from zoosplat_flows.cli.app import app
from zoosplat_flows.execution.stage_states import stage_states

MADE = Path(__file__).parents[1] / "data" / "project-0.1.0"
NAMES = [spec.name for spec in FILES_PIPELINE]
# Today's evaluation has columns that the one of then has not.
CURRENT = [name for name in NAMES if name != "evaluate"]
FROM_TRAIN = NAMES[len(PREPROCESSING) :]


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "150", "TERM": "dumb"}).invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A copy, beside a copy of its recording."""
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "project" / "experiment.yaml"
    config.write_text(config.read_text().replace("/where/it/was/recording", str(tmp_path / "recording")))
    return Project.at(str(tmp_path / "project"))


def files(project: Project) -> dict[str, str]:
    folder = Path(project.url)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(path: str, **changes: Any) -> None:
    value = objects.read_json(path)
    assert value is not None
    objects.write_json(path, value | changes)


def check_shown(project: Project) -> None:
    """Status, report and viewer show all of it."""
    assert {s.stage: s.state for s in stage_states(open_run(project))} == dict.fromkeys(NAMES, "done")
    status, out, err = call("status", project.url)
    assert (status, err, out.count("│ done")) == (0, "", len(NAMES)), out
    page = Path(call("report", project.url)[1].strip()).read_text()
    assert 'class="missing"' not in page
    assert page.count("truth, render and error of camera") == 4
    viewer = pytest.importorskip("zoosplat_flows.viewer.project_data")
    scene = viewer.ProjectData(project.url)
    scene.load_model("cpu")
    assert (scene.notes, scene.n_frames, scene.training) == ([], 12, False)
    assert scene.embedding is not None
    assert scene.has_gaussians(5)


def test_read_as_it_is_and_nothing_written_but_the_report(project: Project, tmp_path: Path) -> None:
    before = files(project)
    check_shown(project)
    assert files(project).keys() - before.keys() == {"report/index.html"}  # where it was in that layout
    assert before.items() <= files(project).items()
    status, out, _ = call("runs", project.url)
    assert status == 0
    assert "before-runs" in out
    assert "zoosplat upgrade" in out
    assert call("status", project.url, "--run", "before-runs")[0] == 0
    assert call("status", project.url, "--run", "2026")[0] == 2
    status, out, err = call("embed", project.url, project.url, "--output", str(tmp_path / "together"))
    assert status == 0, err
    assert len(schema.read(groups.open_group(str(tmp_path / "together" / "embedding.zarr")), "valid")) == 24
    status, _, err = call("gc", project.url)
    assert (status, "layout of an earlier version" in err) == (2, True)


def test_a_run_is_refused_with_the_line_that_helps(project: Project) -> None:
    before = files(project)
    status, _, err = call("run", project.path("experiment.yaml"), "--project", project.url)
    assert status == 2
    assert f"`zoosplat upgrade {project.url}`" in err
    assert err.count("\n") == 1
    assert files(project) == before


def test_upgraded_it_is_done_and_gone_on_with(project: Project) -> None:
    before = files(project)
    status, out, _ = call("upgrade", project.url)
    assert status == 0
    assert [line for line in out.splitlines() if line.endswith(": done")] == [f"{name}: done" for name in CURRENT]
    assert "evaluate: can be looked at, and is made again by the next run: it is of version 2 of the stage" in out
    assert before.items() <= files(project).items()
    adopted = open_run(project)
    assert call("runs", project.url)[1].count("adopted") == 1
    check_shown(project)
    with pytest.raises(UserError, match="nothing to upgrade"):
        upgrade(project)

    config = project.path("experiment.yaml")
    status, out, err = call("run", config, "--project", project.url)
    assert status == 0, err
    skipped = {line.partition(" (")[0] for line in out.splitlines() if "skipped" in line}
    assert skipped == {f"{name}: skipped, was done" for name in CURRENT}
    results = open_run(project).results
    assert {name for name in NAMES if results[name].id == adopted.results[name].id} == set(CURRENT)
    train = adopted.experiment.train.model_copy(update={"epochs": 2})
    draft = draft_run(project, adopted.experiment.model_copy(update={"train": train}))
    assert draft.todo(NAMES) == FROM_TRAIN
    run = record_run(draft, NAMES)
    stage = pytest.importorskip("zoosplat_train.stage").STAGE
    assert run_stage(stage, run)
    assert run.result("train").folder == project.path("results", "train", run.result("train").id)
    assert before.items() <= files(project).items()
    assert call("runs", project.url)[1].count("train.epochs 1 -> 2") == 1
    # What was adopted is not what `gc` frees.
    assert call("gc", project.url, "--keep-last", "1")[0] == 0
    assert before.items() <= files(project).items()
    assert Result.at(project.url, "train", adopted.result("train").id).is_done()


def test_without_its_recording_it_can_still_be_looked_at(project: Project, tmp_path: Path) -> None:
    before = files(project)
    shutil.rmtree(tmp_path / "recording")
    status, out, _ = call("upgrade", project.url)
    assert status == 0
    assert out.count("no such file") == 1
    assert out.count("can be looked at, and is made again by the next run") == len(NAMES)
    assert {result.id.partition("-")[0] for result in open_run(project).results.values()} == {"adopted"}
    check_shown(project)
    assert before.items() <= files(project).items()
    status, _, err = call("run", project.path("experiment.yaml"), "--project", project.url)
    assert status == 2
    assert "recording: no such folder; check data.directory" in err


def test_what_an_earlier_version_of_a_stage_made_is_kept_and_said(project: Project) -> None:
    edit(project.path("_marks", "train.json"), version=4)
    status, out, _ = call("upgrade", project.url)
    assert status == 0
    assert "is made again by the next run: it is of version 4 of the stage; this is version 5" in out
    assert "evaluate: can be looked at, and is made again by the next run: it was made from a result of stage" in out
    run = open_run(project)
    assert [name for name, result in run.results.items() if result.id.startswith("adopted-")] == FROM_TRAIN
    assert draft_run(project, run.experiment).todo(NAMES) == FROM_TRAIN


def test_what_is_of_other_settings_keeps_its_own(project: Project) -> None:
    config = Path(project.path("experiment.yaml"))
    config.write_text(config.read_text().replace("  lr: 0.001", "  lr: 0.002"))
    assert call("upgrade", project.url)[0] == 0
    run = open_run(project)
    mark = run.read_mark("train")
    assert mark is not None
    assert mark["settings"]["train"]["lr"] == 0.001
    assert json.loads(Path(run.result("train").file("request.json")).read_text())["settings"] == mark["settings"]
    # Metrics of another model are not taken for those of the one that is to be trained.
    again = record_run(draft_run(project, run.experiment), NAMES)
    assert again.find_sibling("evaluate", ignoring=["evaluate.gallery_frames"]) is None
