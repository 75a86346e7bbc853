"""Runs: what a configuration leads to, attempts, reuse, ids, links, and that nothing finished is ever touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pipelines import FILES_PIPELINE

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.begin import begin_run
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage
from zoosplat.stages.latest_links import link_latest
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import STAGES, reads_of
from zoosplat.stages.run_state import describe_run_state, find_run_state
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import groups, listing, objects, schema, urls

if TYPE_CHECKING:
    from tests.conftest import Recording

ALL = [spec.name for spec in FILES_PIPELINE]


class Quick(Stage):
    """Stands in for any stage: an empty group or folder, and in it which results it was made from."""

    def prepare(self, ctx: Context) -> Plan:
        url = ctx.run.output_url(self.name)
        for name in reads_of(self.name, ctx.experiment):
            ctx.run.input_url(name)
        if self.name == "ingest":
            sizes = {"T": 144, "C": 4, "h": 2, "w": 2}
            attributes = {"full_width": 96, "full_height": 80, "image_downsample": 1, "frame_jump": 1}
            group = schema.create(url, "masks.zarr", sizes, 64, attributes)
            for key, array in group.arrays():
                array[...] = schema.read(group, key)
        elif url.endswith(".zarr"):
            groups.create_group(url, {})
        return Plan((0, 144))

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        made_from = {name: ctx.run.result(name).id for name in reads_of(self.name, ctx.experiment)}
        objects.write_json(urls.join(ctx.run.output_url(self.name), "made_from.json"), made_from)
        for name in self.spec.also:
            objects.write_bytes(urls.join(ctx.run.result(self.name).folder, name), b"")
        return Outcome(144)


def make(run: Run, *stages: str) -> list[str]:
    """Run stages for a run; the names of those that did not skip."""
    return [stage for stage in stages or ALL if run_stage(Quick(stage), run)]


def ids(run: Run) -> dict[str, str]:
    return {stage: result.id for stage, result in run.results.items()}


@pytest.fixture
def begin(recording: Recording, tmp_path: Path) -> Callable[..., Run]:
    """Begin a run in ./project, or go on with it; the stages that it selects are all, unless told otherwise."""

    def begin_or_go_on(
        *force: str, stages: list[str] = ALL, project: Path | None = None, directory: Path | None = None, **changes: Any
    ) -> Run:
        experiment = Experiment.model_validate(recording.config(directory, **changes))
        with begin_run(Project.at(str(project or tmp_path / "project")), experiment, stages, list(force)) as run:
            return run

    return begin_or_go_on


# -- going on and beginning anew ----------------------------------------------------------------------------------
def test_the_same_command_goes_on_with_the_same_run(begin: Callable[..., Run], tmp_path: Path) -> None:
    run = begin()
    assert make(run, "ingest", "pack") == ["ingest", "pack"]
    again = begin()
    assert again.id == run.id
    assert make(again) == [name for name in ALL if name not in ("ingest", "pack")]
    assert begin().id == run.id
    other = begin(train__epochs=7)
    assert other.id != run.id
    assert make(other) == ["train", "evaluate", "render", "features", "embedding"]
    project = Project.at(str(tmp_path / "project"))
    assert project.run_ids() == sorted([run.id, other.id])
    assert project.latest_id() == open_run(project).id == other.id
    assert open_run(project, run.id).experiment == run.experiment
    assert ids(open_run(project, run.id)) == ids(run)
    # Back to the first configuration: its run is the latest again, and there is nothing to do.
    back = begin()
    assert back.id == run.id == project.latest_id()
    assert make(back) == []


def test_a_run_that_another_process_works_on_is_not_gone_on_with(begin: Callable[..., Run], tmp_path: Path) -> None:
    """Two processes at one record would overwrite each other's; they share the results."""
    run = begin()
    project = Project.at(str(tmp_path / "project"))
    with begin_run(project, run.experiment, ALL, []) as held:
        assert held.id == run.id
        with begin_run(project, run.experiment, ALL, []) as second:
            assert second.id != run.id
            assert ids(second) == ids(run)
    assert begin().id in (run.id, second.id)  # begun within one second, either is the newest


def test_runs_by_the_beginning_of_their_ids(begin: Callable[..., Run], tmp_path: Path) -> None:
    first, second = begin(), begin(train__epochs=7)
    project = Project.at(str(tmp_path / "project"))
    assert open_run(project, second.id[:-1]).id in (first.id, second.id)
    assert open_run(project, first.id).id == first.id
    with pytest.raises(UserError, match=rf"{project.url}: there is no run 1999; `zoosplat runs {project.url}` lists"):
        open_run(project, "1999")
    with pytest.raises(UserError, match="2 runs begin with 20"):
        open_run(project, "20")
    shutil.copytree(tmp_path / "project/runs" / first.id, tmp_path / "project/runs" / f"{first.id}0")
    assert open_run(project, first.id).id == first.id  # a whole id is not the beginning of another


def test_a_record_that_is_damaged_is_named(begin: Callable[..., Run], tmp_path: Path) -> None:
    run = begin()
    Path(run.path("config.yaml")).write_text("{]")
    with pytest.raises(UserError, match=rf"runs/{run.id}/config\.yaml: "):
        open_run(Project.at(str(tmp_path / "project")))
    record = Path(run.path("run.json"))
    whole = record.read_bytes()
    record.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=rf"runs/{run.id}/run\.json: is damaged: holds no JSON object"):
        open_run(Project.at(str(tmp_path / "project")))
    record.write_bytes(whole)
    Path(run.path("config.yaml")).unlink()
    with pytest.raises(UserError, match=rf"runs/{run.id}: holds no complete record"):
        open_run(Project.at(str(tmp_path / "project")), run.id)
    assert begin().id != run.id


def test_a_sibling_differs_in_what_is_ignored_alone(begin: Callable[..., Run], tmp_path: Path) -> None:
    """Folders that are no results of ours, such as a copy, are passed over."""
    first = begin()
    make(first)
    folder = Path(first.result("evaluate").folder)
    shutil.copytree(folder, folder.with_name(f"{folder.name} copy"))
    for changes, found in (
        ({"evaluate__gallery_frames": 2}, True),
        ({"evaluate__gallery_frames": 2, "evaluate__split": "train"}, False),
        ({"evaluate__gallery_frames": 2, "train__epochs": 7}, False),
    ):
        sibling = begin(**changes).find_sibling("evaluate", ["evaluate.gallery_frames"])
        assert sibling == (first.result("evaluate") if found else None)


# -- attempts -----------------------------------------------------------------------------------------------------
def test_force_makes_a_new_result_beside_the_old_one_and_downstream_follows(
    begin: Callable[..., Run], files_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    run = begin()
    assert make(run) == ALL
    before = files_of(tmp_path / "project")
    forced = begin("train")
    assert forced.result("train").id == f"{run.result('train').id}-2"
    follows = ["train", "evaluate", "render", "features", "embedding"]
    assert [stage for stage in ALL if forced.result(stage).id != run.result(stage).id] == follows
    assert make(forced, "train") == ["train"]
    # Stopped after the training: what comes next is of the new model, whichever command goes on.
    for next_run in (begin("train"), begin()):
        assert ids(next_run) == ids(forced)
        assert next_run.id == forced.id
    assert make(begin()) == follows[1:]
    made_from = objects.read_json(urls.join(forced.output_url("evaluate"), "made_from.json"))
    assert made_from is not None
    assert made_from["train"] == forced.result("train").id
    # It has come to its end: from here on the command means a third training.
    third = begin("train")
    assert third.result("train").id == f"{run.result('train').id}-3"
    after = files_of(tmp_path / "project")
    assert {name: after[name] for name in before if name != "latest.json"}.items() <= before.items()


def test_a_forced_attempt_that_was_interrupted_is_gone_on_with(begin: Callable[..., Run]) -> None:
    run = begin()
    make(run)
    forced = begin("crop")
    result = forced.result("crop")
    # Nothing of it is there but its request, since its stage has not begun.
    assert sorted(listing.list_files(result.folder)) == ["request.json"]
    assert begin("crop").result("crop") == result
    assert begin().result("crop") == result
    other_training = begin("crop", train__epochs=7)
    assert other_training.result("crop") == result
    assert make(begin(), "crop") == ["crop"]
    assert begin(train__epochs=7).result("crop") == result


def test_force_of_what_was_never_made_is_its_first_attempt(begin: Callable[..., Run]) -> None:
    assert ids(begin("train")) == ids(begin())


def test_force_of_a_stage_that_is_none(begin: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no stage trian; the stages are ingest, "):
        begin("trian")
    assert not (tmp_path / "project").exists()


# -- nothing finished is ever touched -----------------------------------------------------------------------------
MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "start_from": (
        {"train__start_from": "/nope.safetensors"},
        ["train"],
        "train.start_from",
    ),
    "fewer_videos": (
        {"data__videos": ["videos/0.mp4", "videos/1.mp4"], "data__masks": ["masks/0.mp4", "masks/1.mp4"]},
        ["ingest"],
        "cameras",
    ),
    "render_frame": ({"render__frame": 999}, ["render"], "render.frame = 999"),
    "mask_missing": (
        {"data__masks": ["masks/0.mp4", "masks/1.mp4", "masks/2.mp4", "masks/nope.mp4"]},
        ["ingest"],
        "masks/nope.mp4",
    ),
    "stage": ({}, ["trian"], "trian"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_touches_nothing(
    mistake: str, begin: Callable[..., Run], files_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    changes, force, words = MISTAKES[mistake]
    run = begin()
    make(run)
    before = files_of(tmp_path / "project")
    everything = listing.manifest(str(tmp_path / "project"))
    for forced in ([], force):
        if mistake == "stage" and not forced:
            continue
        with pytest.raises(UserError) as refused:
            begin(*forced, **changes)
        assert words in str(refused.value)
        assert listing.manifest(str(tmp_path / "project")) == everything
    assert files_of(tmp_path / "project") == before
    assert Project.at(str(tmp_path / "project")).run_ids() == [run.id]


def test_a_folder_that_holds_files_of_others_is_refused_and_untouched(
    begin: Callable[..., Run], tmp_path: Path
) -> None:
    project = tmp_path / "project"
    (project / "model").mkdir(parents=True)
    (project / "model" / "weights.pt").write_text("mine")
    (project / "report").mkdir()
    (project / "report" / "index.html").write_text("mine too")
    before = listing.manifest(str(project))
    with pytest.raises(UserError) as refused:
        begin()
    assert f"{project}: holds files that are not of a zoosplat project (model/weights.pt, report/index.html)" in str(
        refused.value
    )
    assert listing.manifest(str(project)) == before
    shutil.rmtree(project / "model")
    shutil.rmtree(project / "report")
    # Notes, and a recording in a folder of its own, are in nobody's way.
    (project / "notes.txt").write_text("mine")
    make(begin())
    assert (project / "notes.txt").read_text() == "mine"


def test_the_results_that_a_run_refers_to_are_never_written(
    begin: Callable[..., Run], files_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    make(begin())
    before = files_of(tmp_path / "project")
    for changes in ({"train__epochs": 7}, {"ingest__max_frames": 100}, {}):
        make(begin(**changes))
        make(begin("embedding", **changes))
    after = files_of(tmp_path / "project")
    assert {name: after[name] for name in before if name != "latest.json"}.items() <= before.items()


# -- reuse --------------------------------------------------------------------------------------------------------
def test_reuse_reads_the_same_result_where_it_lies(
    begin: Callable[..., Run], files_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Masks and images of another project; what else that project does later changes nothing here."""
    other, ours = tmp_path / "other", tmp_path / "project"
    there = begin(project=other)
    make(there)
    run = begin(reuse=str(other), crop__min_voxels=2)
    for stage in ("ingest", "pack"):
        assert run.result(stage).reused
        assert run.output_url(stage) == there.output_url(stage)
    assert make(run) == [stage for stage in ALL if stage not in ("ingest", "pack")]
    assert sorted(path.name for path in (ours / "results").iterdir()) == sorted({*ALL} - {"ingest", "pack"})
    assert os.path.realpath(ours / "latest/masks.zarr") == there.output_url("ingest")
    before = files_of(other)
    # The other project goes on with every second frame; ours still reads what it was made from.
    make(begin(project=other, ingest__frame_jump=2))
    assert begin(reuse=str(other), crop__min_voxels=2).id == run.id
    assert open_run(Project.at(str(ours))).input_url("ingest") == there.output_url("ingest")
    assert {name: digest for name, digest in files_of(other).items() if name in before and name != "latest.json"} == {
        name: digest for name, digest in before.items() if name != "latest.json"
    }
    # A reuse of the reuse points to where the data are.
    third = begin(project=tmp_path / "third", reuse=str(ours))
    assert third.output_url("ingest") == there.output_url("ingest")
    assert third.result("ingest").reused
    # Other settings: computed here.
    fewer = begin(reuse=str(other), ingest__max_frames=8)
    assert not fewer.result("ingest").reused
    assert make(fewer, "ingest") == ["ingest"]


def test_masks_that_were_made_are_reused_too(begin: Callable[..., Run], tmp_path: Path) -> None:
    other = tmp_path / "other"
    made = begin(stages=["segment", *ALL], project=other, data__masks="auto")
    make(made, "segment", *ALL)
    again = begin(reuse=str(other), data__masks="auto", crop__min_voxels=2)
    assert [stage for stage in again.results if again.result(stage).reused] == ["segment", "ingest", "pack"]
    assert again.output_url("segment") == made.output_url("segment")
    assert find_run_state(again.project, again.record()) == "begun"
    assert describe_run_state("begun", again.record()) == "begun (ingest to embedding)"
    # Of mask files no stage segment is known, and the whole pipeline is without it.
    files = begin()
    assert "segment" not in files.results
    assert describe_run_state("begun", files.record()) == "begun"


def test_a_reused_result_that_is_gone_is_one_line_that_names_it(begin: Callable[..., Run], tmp_path: Path) -> None:
    other = tmp_path / "other"
    make(begin(project=other), "ingest", "pack")
    run = begin(reuse=str(other))
    make(run, "center_rotation")
    gone = run.result("ingest").folder
    shutil.rmtree(other)
    again = open_run(Project.at(str(tmp_path / "project")))
    with pytest.raises(UserError) as missing:
        again.open_input("ingest")
    (line,) = str(missing.value).splitlines()
    assert line.startswith(f"{gone}: this result of stage ingest, which is reused from another project, is gone")
    # A new run finds it nowhere, and makes it here; what was tracked on the same masks is still good.
    anew = begin()
    assert make(anew, "ingest", "center_rotation") == ["ingest"]


def test_a_result_that_is_reused_must_be_finished(begin: Callable[..., Run], tmp_path: Path) -> None:
    other = tmp_path / "other"
    there = begin(project=other)
    objects.write_json(there.result("ingest").file("plan.json"), {"bounds": [0, 144], "values": {}, "warnings": []})
    run = begin(reuse=str(other))
    assert not run.result("ingest").reused


# -- places -------------------------------------------------------------------------------------------------------
def linked(project: Path) -> dict[str, str]:
    return {path.name: os.path.realpath(path) for path in (project / "latest").iterdir()}


def test_latest_has_the_results_under_their_plain_names(begin: Callable[..., Run], tmp_path: Path) -> None:
    project = tmp_path / "project"
    run = begin()
    first = ["ingest", "center_rotation", "crop", "pack"]
    make(run, *first, "train")
    names = {STAGES[stage].writes: run.output_url(stage) for stage in (*first, "train")}
    assert linked(project) == {**names, "config.yaml": run.path("config.yaml")}
    objects.write_bytes(run.path("report", "index.html"), b"page")
    link_latest(run)
    assert (project / "latest/report/index.html").read_bytes() == b"page"
    # What a newer run does not have yet is not shown as if it were its own, and what is no link of ours stays.
    (project / "latest/notes.txt").write_text("mine")
    other = begin(train__epochs=7)
    names.pop("model")
    expected = {**names, "config.yaml": other.path("config.yaml"), "notes.txt": str(project / "latest/notes.txt")}
    assert linked(project) == expected
    # The older run does not take the links back when it goes on.
    make(run, "evaluate")
    assert linked(project) == expected
    make(other, "train")
    assert linked(project)["model"] == other.output_url("train")
    # They hold when the project is moved as a whole.
    assert not any(os.path.isabs(os.readlink(path)) for path in (project / "latest").iterdir() if path.is_symlink())
    project.rename(tmp_path / "moved")
    assert (tmp_path / "moved/latest/model/made_from.json").exists()


def test_a_folder_latest_that_cannot_be_written_costs_the_links_alone(
    begin: Callable[..., Run], tmp_path: Path
) -> None:
    run = begin()
    shutil.rmtree(tmp_path / "project/latest")
    (tmp_path / "project/latest").write_text("a file")
    assert make(run) == ALL


@pytest.mark.parametrize("name", ["with spaces and (brackets) [1]", "größe-マウス-🐭", "100%?*#&=x"])
def test_project_folders_of_any_name(name: str, begin: Callable[..., Run], tmp_path: Path) -> None:
    run = begin(project=tmp_path / name)
    assert make(run) == ALL
    assert begin(project=tmp_path / name).id == run.id
    assert set(linked(tmp_path / name)) >= {spec.writes for spec in FILES_PIPELINE}


def test_a_project_below_a_file(begin: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for place in ("notes.txt", "notes.txt/project"):
        with pytest.raises(UserError, match=rf"{tmp_path}/notes\.txt is a file; choose another folder"):
            begin(project=tmp_path / place)
        with pytest.raises(UserError, match="holds no run"):
            open_run(Project.at(str(tmp_path / place)))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "parent", "dangling", "other_disk"])
def test_projects_behind_links(kind: str, begin: Callable[..., Run], tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if kind == "other_disk":
        target = Path("/dev/shm") / f"zoosplat-test-{os.getpid()}"
        if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("no other disk on this machine")
    if kind != "dangling":
        target.mkdir()
    try:
        link.symlink_to(target)
        project = link / "project" if kind == "parent" else link
        run = begin(project=project)
        assert make(run) == ALL
        assert begin(project=project).id == run.id
        assert link.is_symlink()
        assert (project / "latest/masks.zarr/zarr.json").exists()
        # By its other name it is the same project.
        assert ids(begin(project=Path(os.path.realpath(project)))) == ids(run)
        assert Project.at(os.path.realpath(project)).run_ids() == [run.id]
    finally:
        if kind == "other_disk":
            shutil.rmtree(target)
