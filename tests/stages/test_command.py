"""The command line of a stage: shards, configurations, what it refuses, and what runs again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zoosplat.errors import UserError
from zoosplat.stages.command import parse_shard
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PREPROCESSING
from zoosplat.storage import groups, schema

if TYPE_CHECKING:
    from tests.conftest import Recording, Stages

CPU = [spec.name for spec in PREPROCESSING]


def run_all(stages: Stages, project: Path) -> list[str]:
    """Run the stages; the names of those that did not skip."""
    computed = []
    for name in CPU:
        outcome = stages(name, str(project))
        assert (outcome.status, outcome.err) == (0, "")
        computed += [name] if outcome.out else []
    return computed


def copied(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished, folder, symlinks=True)
    return folder


@pytest.mark.parametrize(("text", "expected"), [("0/1", (0, 1)), ("3/18", (3, 18)), ("17/18", (17, 18))])
def test_shards_are_parsed(text: str, expected: tuple[int, int]) -> None:
    assert parse_shard(text) == expected


@pytest.mark.parametrize("text", ["", "3", "3/", "a/b", "18/18", "-1/3", "1/0", "1/2/3", "1.5/3"])
def test_wrong_shards(text: str) -> None:
    with pytest.raises(UserError, match="--shard"):
        parse_shard(text)


def test_shards_that_the_plan_does_not_have(recording: Recording, stages: Stages, tmp_path: Path) -> None:
    url = recording.write_project(tmp_path / "project")
    assert stages("ingest", url, "--prepare").status == 0
    for shard in ("0/7", "3/3", "x/3"):
        outcome = stages("ingest", url, "--shard", shard)
        assert outcome.status == 2
        assert len(outcome.err.splitlines()) == 1
        assert f"--shard {shard}" in outcome.err


def test_keys_without_effect_skip_everything(
    recording: Recording, stages: Stages, finished: Path, files_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    project = copied(finished, tmp_path / "project")
    before = files_of(project)
    for changes in (
        {"name": "another", "scheduling__frames_per_shard": 7},
        {"train__keep_last": 5, "train__plot_every": 3, "train__save_every": 2, "train__lr": 0.5},
        {"train__device": "cpu", "train__gpus": 1, "render__orbit_frames": 3, "model__num_unets": 1},
    ):
        recording.write_project(project, **changes)
        assert run_all(stages, project) == []
    after = files_of(project)
    before.pop("latest.json"), after.pop("latest.json")
    assert after == before


def test_what_comes_earlier_changes_all_after_and_going_back_changes_nothing(
    recording: Recording, stages: Stages, files_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Each setting, and the stages that it makes run; what was made before stays byte for byte, and is found again."""
    recording.write_project(tmp_path, ingest__max_frames=8)
    assert run_all(stages, tmp_path) == CPU
    assert run_all(stages, tmp_path) == []
    changes: dict[str, Any] = {}
    for more, expected in (
        ({"pack__window": "full"}, ["pack"]),
        ({"crop__min_voxels": 2}, ["crop"]),
        ({"center_rotation__grid_size": 40}, ["center_rotation", "crop"]),
        ({"holdout_views": [1]}, ["center_rotation", "crop"]),
        ({"ingest__max_frames": 9}, CPU),
    ):
        changes |= more
        before = files_of(tmp_path)
        recording.write_project(tmp_path, **{"ingest__max_frames": 8, **changes})
        assert run_all(stages, tmp_path) == expected
        after = files_of(tmp_path)
        assert {name: after[name] for name in before if name != "latest.json"}.items() <= before.items()
    recording.write_project(tmp_path, ingest__max_frames=8)
    assert run_all(stages, tmp_path) == []


def test_other_videos_under_the_same_names(
    recording: Recording, stages: Stages, finished: Path, check_same: Callable[..., None], tmp_path: Path
) -> None:
    data, project = recording.copy(tmp_path / "elsewhere"), copied(finished, tmp_path / "project")
    recording.write_project(project, data)
    assert run_all(stages, project) == []
    with (data / "masks/2.mp4").open("ab") as file:
        file.write(b"\x00\x00\x00\x08free")
    # A stage whose input is of these masks says so, rather than to read what was made of the ones before.
    outcome = stages("crop", str(project))
    assert outcome.status == 2
    assert "is not complete; run stage ingest first" in outcome.err
    assert run_all(stages, project) == CPU
    for name in CPU:
        check_same(name, project, finished)


def test_a_run_is_named_by_its_id_or_its_beginning(stages: Stages, finished: Path, tmp_path: Path) -> None:
    project = copied(finished, tmp_path / "project")
    (name,) = Project.at(str(project)).run_ids()
    for run in (name, name[:15]):
        outcome = stages("crop", str(project), "--run", run)
        assert (outcome.status, outcome.out, outcome.err) == (0, "", "")
    outcome = stages("crop", str(project), "--run", "1999")
    assert outcome.status == 2
    assert f"{project}: there is no run 1999; `zoosplat runs {project}` lists them" in outcome.err


def test_a_folder_that_holds_no_run(stages: Stages, tmp_path: Path) -> None:
    outcome = stages("crop", str(tmp_path / "nowhere"))
    assert outcome.status == 2
    assert f"{tmp_path}/nowhere: holds no run; start with `zoosplat run CONFIG --project URL`" in outcome.err
    assert not (tmp_path / "nowhere").exists()


def test_a_project_of_the_earlier_layout_is_not_written_to(
    recording: Recording, stages: Stages, tmp_path: Path
) -> None:
    (tmp_path / "experiment.yaml").write_text(json.dumps(recording.config()))
    (tmp_path / "_marks").mkdir()
    for with_config in (False, True):
        if with_config:
            recording.write_project(tmp_path)
        outcome = stages("ingest", str(tmp_path))
        assert outcome.status == 2
        assert f"`zoosplat upgrade {tmp_path}` adopts its results, and moves nothing" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_marks", "experiment.yaml", "tested.yaml"]


# -- memory -------------------------------------------------------------------------------------------------------
def test_long_recording(recording: Recording, stages: Stages, finished: Path, tmp_path: Path, loop: Any) -> None:
    """2,880 frames in one shard: memory is that of a short recording, and far below 1 GiB."""
    data = tmp_path / "data"
    for kind in ("masks", "videos"):
        (data / kind).mkdir(parents=True)
        for path in (recording.folder / kind).glob("*.mp4"):
            loop(path, data / kind / path.name, 20)
    for name in ("camera_params.h5", "vertical_lines.npz"):
        shutil.copy(recording.folder / name, data)
    project = tmp_path / "project"
    recording.write_project(project, data, scheduling__frames_per_shard=10_000)
    short_run = open_run(Project.at(str(finished)))
    for name in ("ingest", "pack"):
        assert stages(name, str(project)).status == 0
        mark, short_mark = open_run(Project.at(str(project))).read_mark(name), short_run.read_mark(name)
        assert mark is not None
        assert short_mark is not None
        assert (mark["frames"], mark["shards"]) == (20 * 144, 1)
        assert mark["peak_memory_bytes"] < 1 << 30
        assert mark["peak_memory_bytes"] < short_mark["peak_memory_bytes"] + (50 << 20)
    long, short = (
        schema.array(groups.open_group(run.output_url("ingest")), "mask")
        for run in (open_run(Project.at(str(project))), short_run)
    )
    assert (np.asarray(long[19 * 144 :]) == np.asarray(short[...])).all()
