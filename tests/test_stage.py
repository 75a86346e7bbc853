"""The stage contract: digests, skipping, resuming, reuse, shards, exit statuses, memory."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zoosplat import schema, stage, stores
from zoosplat.config import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.registry import PREPROCESSING, STAGES
from zoosplat.project import Project

if TYPE_CHECKING:
    from tests.conftest import Recording, Stages

CPU = [spec.name for spec in PREPROCESSING]


def read_mark(project: Path, name: str) -> dict[str, Any]:
    mark: dict[str, Any] = json.loads((project / "_marks" / f"{name}.json").read_text())
    return mark


def digests(project: Path) -> dict[str, str]:
    return {name: read_mark(project, name)["digest"] for name in CPU}


def run_all(stages: Stages, project: Path) -> list[str]:
    """Run the stages; the names of those that did not skip."""
    computed = []
    for name in CPU:
        outcome = stages(name, str(project))
        assert (outcome.status, outcome.err) == (0, "")
        computed += [name] if outcome.out else []
    return computed


# -- digests ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"train__lr": 0.5, "train__seed": 3},
        {"model__num_unets": 1},
        {"render__orbit_frames": 3},
        {"name": "another"},
        {"scheduling__frames_per_shard": 7},
    ],
    ids=str,
)
def test_what_comes_later_changes_nothing(
    changes: dict[str, Any], recording: Recording, stages: Stages, finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project)
    recording.write_project(project, **changes)
    assert run_all(stages, project) == []


def test_what_comes_earlier_changes_all_after(recording: Recording, stages: Stages, tmp_path: Path) -> None:
    """Each setting, and the stages that it makes run again; the others keep their marks, times included."""
    recording.write_project(tmp_path, ingest__max_frames=8)
    assert run_all(stages, tmp_path) == CPU
    assert run_all(stages, tmp_path) == []
    for changes, expected in (
        ({"pack__window": "full"}, ["pack"]),
        ({"pack__window": "full", "crop__min_voxels": 2}, ["crop"]),
        (
            {"pack__window": "full", "crop__min_voxels": 2, "center_rotation__grid_size": 40},
            ["center_rotation", "crop"],
        ),
        (
            {"pack__window": "full", "crop__min_voxels": 2, "center_rotation__grid_size": 40, "holdout_views": [1]},
            ["center_rotation", "crop"],
        ),
    ):
        before = {name: read_mark(tmp_path, name) for name in CPU}
        recording.write_project(tmp_path, ingest__max_frames=8, **changes)
        assert run_all(stages, tmp_path) == expected
        for name in CPU:
            assert (read_mark(tmp_path, name) == before[name]) == (name not in expected)
    recording.write_project(tmp_path, ingest__max_frames=9)
    assert run_all(stages, tmp_path) == CPU


def test_a_stale_input_is_refused_naming_the_key(
    recording: Recording, stages: Stages, finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project)
    recording.write_project(project, ingest__frame_jump=2, crop__min_voxels=3)
    outcome = stages("crop", str(project))
    assert outcome.status == 2
    assert "masks.zarr was made before ingest changed; run stage ingest again" in outcome.err
    # A setting of the stage itself is no reason to refuse.
    recording.write_project(project, crop__min_voxels=3)
    assert stages("crop", str(project)).status == 0


def test_a_stale_chain_is_refused(recording: Recording, stages: Stages, finished: Path, tmp_path: Path) -> None:
    """Ingest made again from other videos, with the same settings: what was tracked on the old masks is not used."""
    data, project = recording.copy(tmp_path / "data"), tmp_path / "project"
    shutil.copytree(finished, project)
    for kind in ("masks", "videos"):
        shutil.copy(data / kind / "1.mp4", data / kind / "0.mp4")
    recording.write_project(project, data)
    assert stages("ingest", str(project)).out
    outcome = stages("crop", str(project))
    assert outcome.status == 2
    assert "tracking.zarr" in outcome.err
    assert "run stage center_rotation again" in outcome.err


def test_content_counts_and_place_does_not(
    recording: Recording, stages: Stages, finished: Path, tmp_path: Path
) -> None:
    data, project = recording.copy(tmp_path / "elsewhere"), tmp_path / "project"
    shutil.copytree(finished, project)
    recording.write_project(project, data)
    assert run_all(stages, project) == []
    # The RGB video alone: pack. Trailing bytes that a reader passes over are content all the same.
    with (data / "videos/2.mp4").open("ab") as file:
        file.write(b"\x00\x00\x00\x08free")
    assert run_all(stages, project) == ["pack"]
    with (data / "masks/2.mp4").open("ab") as file:
        file.write(b"\x00\x00\x00\x08free")
    assert run_all(stages, project) == CPU
    for name in CPU:
        group = STAGES[name].writes
        for path in stores.list_files(str(finished / group)):
            assert (project / group / path).read_bytes() == (finished / group / path).read_bytes()


def test_force(stages: Stages, finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project)
    before = read_mark(project, "crop")
    assert stages("crop", str(project), "--force").out
    after = read_mark(project, "crop")
    assert after["digest"] == before["digest"]
    assert after["started"] > before["finished"]


def test_reuse(recording: Recording, stages: Stages, finished: Path, tmp_path: Path) -> None:
    """Masks and images of another project are read where they lie, as long as they are the same."""
    recording.write_project(tmp_path, reuse=str(finished), crop__min_voxels=2)
    assert run_all(stages, tmp_path) == ["center_rotation", "crop"]
    assert read_mark(tmp_path, "ingest")["location"] == str(finished / "masks.zarr")
    assert read_mark(tmp_path, "pack")["location"] == str(finished / "images.zarr")
    assert not (tmp_path / "masks.zarr").exists()
    assert not (tmp_path / "images.zarr").exists()
    for path in stores.list_files(str(finished / "tracking.zarr")):
        assert (tmp_path / "tracking.zarr" / path).read_bytes() == (finished / "tracking.zarr" / path).read_bytes()
    # A reuse of the reuse points to where the data are.
    third = tmp_path / "third"
    recording.write_project(third, reuse=str(tmp_path))
    assert stages("ingest", str(third)).out == ""
    assert read_mark(third, "ingest")["location"] == str(finished / "masks.zarr")
    # Other settings: computed here, and the other project is left as it is.
    recording.write_project(tmp_path, reuse=str(finished), ingest__max_frames=8)
    before = read_mark(finished, "ingest")
    assert run_all(stages, tmp_path) == CPU
    assert "location" not in read_mark(tmp_path, "ingest")
    assert schema.read(stores.open_group(str(tmp_path / "masks.zarr")), "mask").shape[0] == 8
    assert read_mark(finished, "ingest") == before


def test_marks_hold_provenance(finished: Path) -> None:
    for name in CPU:
        mark = read_mark(finished, name)
        assert mark["stage"] == name
        assert {"python", "numpy", "zarr", "zoosplat"} <= set(mark["versions"])
        assert mark["inputs"] == {i: read_mark(finished, i)["digest"] for i in STAGES[name].reads}
        assert mark["started"] < mark["finished"]
        assert mark["frames"] == 144
        assert mark["shards"] == 3
        assert mark["peak_memory_bytes"] < 1 << 30
    assert read_mark(finished, "ingest")["settings"]["ingest"]["frame_jump"] == 1


# -- the runner, on a stage that only counts ----------------------------------------------------------------------
@dataclass
class Counting(stage.Stage):
    """Writes a file a shard; fails in the shards it is told to."""

    failing: set[int] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__("ingest")

    def prepare(self, ctx: stage.Context) -> stage.Plan:
        self.calls.append("prepare")
        return stage.Plan((0, 4, 8, 10), {"x": 1}, ("careful",))

    def run_shard(self, ctx: stage.Context, shard: stage.Shard, plan: stage.Plan) -> stage.Result:
        self.calls.append(f"shard {shard.index}")
        if shard.index in self.failing:
            raise UserError(f"frame {shard.start} is bad")
        stores.write_bytes(ctx.project.path("masks.zarr", f"{shard.index}"), b"%d-%d" % (shard.start, shard.stop))
        figures = {f"figure_{shard.index}": plan.values}
        return stage.Result(shard.stop - shard.start, (f"slow {shard.index // 2}",), figures)

    def finish(self, ctx: stage.Context, plan: stage.Plan) -> stage.Result:
        self.calls.append("finish")
        return stage.Result(warnings=("careful", "late"), figures={"total": 10})


@pytest.fixture
def project(recording: Recording, tmp_path: Path) -> Project:
    return Project.at(recording.write_project(tmp_path / "project"))


def test_a_whole_run(project: Project) -> None:
    counting = Counting()
    assert stage.run_stage(counting, project)
    assert counting.calls == ["prepare", "shard 0", "shard 1", "shard 2", "finish"]
    mark = project.read_mark("ingest")
    assert mark is not None
    assert (mark["frames"], mark["shards"]) == (10, 3)
    assert mark["warnings"] == ["careful", "slow 0", "slow 1", "late"]
    assert mark["figures"] == {"figure_0": {"x": 1}, "figure_1": {"x": 1}, "figure_2": {"x": 1}, "total": 10}
    assert not stage.run_stage(counting, project)
    assert len(counting.calls) == 5
    assert stage.run_stage(counting, project, force=True)
    assert len(counting.calls) == 10


def test_a_failed_shard_is_all_that_runs_again(project: Project) -> None:
    counting = Counting(failing={1})
    with pytest.raises(UserError, match="frame 4 is bad"):
        stage.run_stage(counting, project)
    assert counting.calls == ["prepare", "shard 0", "shard 1"]
    assert project.read_mark("ingest") is None
    counting = Counting()
    assert stage.run_stage(counting, project)
    assert counting.calls == ["shard 1", "shard 2", "finish"]


def test_of_shards_that_fail_side_by_side_the_first_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for the processes here."""

    def fail(counting: stage.Stage, url: str, digest: str, index: int, plan: stage.Plan) -> None:
        time.sleep(0.0 if index else 0.5)  # the second is quicker
        raise UserError(f"shard {index} is bad")

    monkeypatch.setattr(stage, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(stage, "_shard_in_worker", fail)
    with pytest.raises(UserError, match="shard 0 is bad"):
        stage.run_stage(Counting(), project, workers=2)


def test_another_version_runs_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage.run_stage(Counting(), project)
    with monkeypatch.context() as patch:
        from dataclasses import replace

        newer = replace(STAGES["ingest"], version=99)
        patch.setitem(STAGES, "ingest", newer)
        with pytest.raises(UserError, match="before the version of the stage changed"):
            project.input_url("ingest", project.read_experiment())
        assert stage.run_stage(Counting(), project)
    with pytest.raises(UserError, match="before the version of the stage changed"):
        project.input_url("ingest", project.read_experiment())


def test_exit_statuses(project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = project.url
    assert stage.main(Counting(failing={2}), ["--project", url, "--workers", "1"]) == 2
    assert capsys.readouterr().err == "zoosplat ingest: frame 8 is bad; in shard 2/3, kept frames 8 to 9\n"
    assert stage.main(Counting(), ["--project", url, "--workers", "1"]) == 0
    assert stage.main(Counting(failing={0}), ["--project", url, "--workers", "1"]) == 0  # skipped
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as usage:
        stage.main(Counting(), ["--project", url, "--shrad", "1/3"])
    assert usage.value.code == 2
    # A defect is not dressed up as the user's mistake: python ends with its traceback and status 1.
    monkeypatch.setattr(Counting, "finish", lambda self, ctx, plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.main(Counting(), ["--project", url, "--force", "--workers", "1"])


@pytest.mark.parametrize(("text", "expected"), [("0/1", (0, 1)), ("3/18", (3, 18)), ("17/18", (17, 18))])
def test_shards_are_parsed(text: str, expected: tuple[int, int]) -> None:
    assert stage.parse_shard(text) == expected


@pytest.mark.parametrize("text", ["", "3", "3/", "a/b", "18/18", "-1/3", "1/0", "1/2/3", "1.5/3"])
def test_wrong_shards(text: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--shard"):
        stage.parse_shard(text)
    if text:
        stage.main(Counting(), ["--project", project.url, "--prepare"])
        assert stage.main(Counting(), ["--project", project.url, f"--shard={text}"]) == 2
    assert stage.main(Counting(), ["--project", project.url, "--prepare"]) == 0
    assert stage.main(Counting(), ["--project", project.url, "--shard", "0/7"]) == 2
    assert "the plan has 3 shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("n", "per_shard", "multiple", "expected"),
    [
        (144, 48, 64, (0, 64, 128, 144)),
        (144, 1000, 64, (0, 144)),
        (1000, 130, 64, (0, 128, 256, 384, 512, 640, 768, 896, 1000)),
        (128, 64, 64, (0, 64, 128)),
        (1, 1, 64, (0, 1)),
        (5, 2, 1, (0, 2, 4, 5)),
    ],
)
def test_split(n: int, per_shard: int, multiple: int, expected: tuple[int, ...]) -> None:
    assert stage.split(n, per_shard, multiple) == expected


def test_blocks_are_written_whole(tmp_path: Path) -> None:
    """A write that is not whole storage blocks would read and rewrite a neighbour's: refused."""
    sizes = {"T": 150, "C": 2, "h": 4, "w": 6}
    group = schema.create(str(tmp_path / "masks.zarr"), "masks.zarr", sizes, 64, {})
    masks = np.random.default_rng(0).random((150, 2, 4, 6)) < 0.5
    for start, stop in ((0, 63), (1, 64), (64, 100), (128, 149)):
        with pytest.raises(ValueError, match="whole blocks"):
            schema.write_block(group, "mask", start, masks[start:stop])
    for start, stop in ((128, 150), (0, 128)):
        schema.write_block(group, "mask", start, masks[start:stop])
    assert (schema.read(group, "mask") == masks).all()
    assert (schema.read(group, "mask", 60, 70) == masks[60:70]).all()
    schema.validate(group, "masks.zarr", "here")
    del group["box"]
    with pytest.raises(UserError, match="here: array box is missing"):
        schema.validate(group, "masks.zarr", "here")


@pytest.mark.parametrize(("n_bytes", "frames"), [(1, 64), (48 << 20, 1), (1 << 20, 32), (3 << 18, 64), (10**9, 1)])
def test_block_sizes(n_bytes: int, frames: int) -> None:
    assert schema.block_frames(n_bytes) == frames


# -- memory -------------------------------------------------------------------------------------------------------
def test_long_recording(recording: Recording, stages: Stages, finished: Path, tmp_path: Path, loop: Any) -> None:
    """Over 6,000 frames in one shard: memory is that of a short recording, and far below 1 GiB."""
    data = tmp_path / "data"
    for kind in ("masks", "videos"):
        (data / kind).mkdir(parents=True)
        for path in (recording.folder / kind).glob("*.mp4"):
            loop(path, data / kind / path.name, 42)
    for name in ("camera_params.h5", "vertical_lines.npz"):
        shutil.copy(recording.folder / name, data)
    project = tmp_path / "project"
    recording.write_project(project, data, scheduling__frames_per_shard=10_000)
    for name in ("ingest", "pack"):
        assert stages(name, str(project)).status == 0
        mark = read_mark(project, name)
        assert (mark["frames"], mark["shards"]) == (42 * 144, 1)
        assert mark["peak_memory_bytes"] < 1 << 30
        assert mark["peak_memory_bytes"] < read_mark(finished, name)["peak_memory_bytes"] + (100 << 20)
    long, short = (schema.array(stores.open_group(str(p / "masks.zarr")), "mask") for p in (project, finished))
    assert (np.asarray(long[41 * 144 :]) == np.asarray(short[...])).all()


def test_experiment_is_written_as_it_is_read(project: Project) -> None:
    experiment = project.read_experiment()
    project.write_experiment(experiment)
    assert project.read_experiment() == experiment
    assert isinstance(experiment, Experiment)
