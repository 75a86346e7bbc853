"""The runner, on a stage that only counts: skipping, resuming, marking, shards, versions, sources."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zoosplat.errors import LockLost, UserError
from zoosplat.stages import command, dependencies, registry, runner, steps
from zoosplat.stages.begin import begin_run
from zoosplat.stages.command import select_run, service_parser
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage, shard_bounds
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import STAGES
from zoosplat.stages.results import Result
from zoosplat.stages.runs import Run
from zoosplat.storage import leases, listing, objects, schema, urls, writing

if TYPE_CHECKING:
    from tests.conftest import S3, Recording


@dataclass
class Counting(Stage):
    """Stands in for ingest: ten frames of empty masks and a file a shard; fails in the shards it is told to."""

    failing: set[int] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__("ingest")

    def prepare(self, ctx: Context) -> Plan:
        self.calls.append("prepare")
        attributes = {"full_width": 96, "full_height": 80, "image_downsample": 1, "frame_jump": 1}
        group = schema.create(
            ctx.run.output_url("ingest"), "masks.zarr", {"T": 10, "C": 4, "h": 2, "w": 2}, 64, attributes
        )
        for key, array in group.arrays():
            array[...] = schema.read(group, key)
        return Plan((0, 4, 8, 10), {"x": 1}, ("careful",))

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        self.calls.append(f"shard {shard.index}")
        if shard.index in self.failing:
            raise UserError(f"frame {shard.start} is bad")
        objects.write_bytes(
            urls.join(ctx.run.output_url("ingest"), "box", f"{shard.index}"), b"%d-%d" % (shard.start, shard.stop)
        )
        figures = {f"figure_{shard.index}": plan.values}
        return Outcome(shard.stop - shard.start, (f"slow {shard.index // 2}",), figures)

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        self.calls.append("finish")
        return Outcome(warnings=("careful", "late"), figures={"total": 10})


def begin(url: str, *force: str) -> Run:
    """The run of the configuration in a project's folder; as --config, and --force, do it."""
    project = Project.at(url)
    args = service_parser("ingest").parse_args(
        ["--project", url, "--config", project.path("tested.yaml"), *(["--force"] if force else [])]
    )
    return select_run("ingest", args)


@pytest.fixture
def url(recording: Recording, tmp_path: Path) -> str:
    return recording.write_project(tmp_path / "project")


def test_a_whole_run(url: str) -> None:
    run, counting = begin(url), Counting()
    assert run.read_mark("ingest") is None
    assert runner.run_stage(counting, run)
    assert counting.calls == ["prepare", "shard 0", "shard 1", "shard 2", "finish"]
    mark = open_run(Project.at(url)).read_mark("ingest")
    assert mark is not None
    assert (mark["frames"], mark["shards"], mark["run"]) == (10, 3, run.id)
    assert mark["warnings"] == ["careful", "slow 0", "slow 1", "late"]
    assert mark["figures"] == {"figure_0": {"x": 1}, "figure_1": {"x": 1}, "figure_2": {"x": 1}, "total": 10}
    manifest = run.result("ingest").manifest()
    assert manifest is not None
    assert {"masks.zarr/box/0", "masks.zarr/box/1", "masks.zarr/box/2", "masks.zarr/zarr.json"} < manifest.keys()
    assert (mark["files"], mark["bytes"]) == (len(manifest), sum(manifest.values()))
    assert not runner.run_stage(counting, run)
    assert len(counting.calls) == 5
    forced = begin(url, "ingest")
    assert runner.run_stage(counting, forced)
    assert len(counting.calls) == 10
    assert forced.result("ingest").folder == f"{run.result('ingest').folder}-2"


def test_a_failed_shard_is_all_that_runs_again(url: str) -> None:
    counting = Counting(failing={1})
    with pytest.raises(UserError, match="frame 4 is bad"):
        runner.run_stage(counting, begin(url))
    assert counting.calls == ["prepare", "shard 0", "shard 1"]
    assert open_run(Project.at(url)).read_mark("ingest") is None
    counting = Counting()
    assert runner.run_stage(counting, begin(url))
    assert counting.calls == ["shard 1", "shard 2", "finish"]
    assert len(Project.at(url).run_ids()) == 1


def test_of_shards_that_fail_side_by_side_the_first_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for the processes here."""

    def fail(counting: Stage, url: str, run_id: str, index: int, plan: Plan) -> None:
        time.sleep(0.0 if index else 0.5)  # the second is quicker
        raise UserError(f"shard {index} is bad")

    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    monkeypatch.setattr(runner, "_shard_in_worker", fail)
    with pytest.raises(UserError, match="shard 0 is bad"):
        runner.run_stage(Counting(), begin(url), workers=2)


def test_exit_statuses(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--project", url, "--config", f"{url}/tested.yaml", "--workers", "1"]
    assert command.main(Counting(failing={2}), args) == 2
    assert capsys.readouterr().err == "zoosplat ingest: frame 8 is bad; in shard 2/3, kept frames 8 to 9\n"
    assert command.main(Counting(), args) == 0
    assert command.main(Counting(failing={0}), args) == 0  # skipped
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as usage:
        command.main(Counting(), ["--project", url, "--shrad", "1/3"])
    assert usage.value.code == 2
    # A defect is not dressed up as the user's mistake: python ends with its traceback and status 1.
    monkeypatch.setattr(Counting, "finish", lambda self, ctx, plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main(Counting(), [*args, "--force"])


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
    assert shard_bounds(n, per_shard, multiple) == expected


# -- versions and sources -----------------------------------------------------------------------------------------
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this is version 99 of stage ingest, here and in the pipeline."""
    spec = replace(STAGES["ingest"], version=99)
    monkeypatch.setitem(STAGES, "ingest", spec)
    monkeypatch.setattr(registry, "PIPELINE", tuple(STAGES.values()))


def test_another_version_makes_a_result_beside_the_old_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoosplat_flows.execution import stage_states

    old = begin(url)
    assert runner.run_stage(Counting(), old)
    before = listing.manifest(old.result("ingest").folder)
    with monkeypatch.context() as patch:
        newer(patch)
        run = begin(url)
        assert run.id != old.id
        assert run.result("ingest").id != old.result("ingest").id
        state = stage_states.stage_states(run)[0]
        assert (state.state, state.shards) == ("missing", 0)
        assert state.reason == "the result of version 1 of the stage is kept; this is version 99"
        assert runner.run_stage(Counting(), run)
        assert stage_states.stage_states(run)[0].reason == ""
        assert run.result("center_rotation").id != old.result("center_rotation").id
        # The run of the old version still reads what it made, and is not gone on with.
        assert open_run(Project.at(url), old.id).input_url("ingest") == old.input_url("ingest")
        assert listing.manifest(old.result("ingest").folder) == before
    assert begin(url).result("ingest").is_done()


def test_a_run_of_another_version_is_not_gone_on_with(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(url)
    newer(monkeypatch)
    counting = Counting()
    with pytest.raises(UserError, match=r"begun with version 1 of stage ingest, this is version 99; begin a new run"):
        runner.run_stage(counting, run)
    assert counting.calls == []
    assert run.result("ingest").plan() is None


def test_a_run_whose_settings_are_read_otherwise_now_is_not_gone_on_with(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a release gives a stage a new key: what it would make is not what the recorded id says."""
    run = begin(url)
    settings_of = dependencies.settings_of
    monkeypatch.setattr(dependencies, "settings_of", lambda stage, e: {**settings_of(stage, e), "ingest.new_key": 1})
    with pytest.raises(UserError, match=r"begun by another version of zoosplat; begin a new run"):
        runner.run_stage(Counting(), run)
    assert run.result("ingest").plan() is None
    assert runner.run_stage(Counting(), begin(url))


def test_a_file_that_is_changed_while_a_stage_reads_it(recording: Recording, tmp_path: Path) -> None:
    data = recording.copy(tmp_path / "data")
    url = recording.write_project(tmp_path / "project", data)
    run = begin(url)

    class Meanwhile(Counting):
        def finish(self, ctx: Context, plan: Plan) -> Outcome:
            with (data / "masks/2.mp4").open("ab") as file:
                file.write(b"\x00\x00\x00\x08free")
            return super().finish(ctx, plan)

    with pytest.raises(UserError, match=r"masks/2\.mp4: was changed while stage ingest read it; run again"):
        runner.run_stage(Meanwhile(), run)
    assert run.read_mark("ingest") is None
    again = begin(url)
    assert again.result("ingest").id != run.result("ingest").id
    counting = Counting()
    assert runner.run_stage(counting, again)
    assert counting.calls[0] == "prepare"


def test_a_file_that_is_only_touched_is_the_same(recording: Recording, tmp_path: Path) -> None:
    data = recording.copy(tmp_path / "data")
    url = recording.write_project(tmp_path / "project", data)
    run = begin(url)
    (data / "masks/2.mp4").touch()
    assert runner.run_stage(Counting(), run)
    (data / "masks/1.mp4").touch()
    assert not runner.run_stage(Counting(), begin(url))
    assert Project.at(url).run_ids() == [run.id]


# -- complete or not at all ---------------------------------------------------------------------------------------
def test_a_block_that_is_lost_before_the_end_is_named(url: str) -> None:
    run = begin(url)

    class Losing(Counting):
        def finish(self, ctx: Context, plan: Plan) -> Outcome:
            objects.delete(urls.join(ctx.run.output_url("ingest"), "box", "c", "0", "0", "0"))
            return super().finish(ctx, plan)

    with pytest.raises(UserError, match=r"masks\.zarr/box/c/0/0/0: is missing, .*run stage ingest with --force"):
        runner.run_stage(Losing(), run)
    assert run.read_mark("ingest") is None


def test_what_is_not_finished_is_not_read(url: str) -> None:
    with pytest.raises(UserError, match="frame 8 is bad"):
        runner.run_stage(Counting(failing={2}), begin(url))
    run = open_run(Project.at(url))
    assert run.result("ingest").shards_done() == (2, 3)
    for read in (run.open_input, run.input_url):
        with pytest.raises(UserError, match=r"masks\.zarr is not complete; run stage ingest first"):
            read("ingest")
    with (
        pytest.raises(UserError, match=r"masks\.zarr is not complete; run stage ingest first, or leave --from out"),
        begin_run(Project.at(url), run.experiment, ["center_rotation"], []),
    ):
        raise AssertionError


def test_a_result_whose_folder_was_renamed_is_not_taken_for_another(url: str) -> None:
    run = begin(url)
    assert runner.run_stage(Counting(), run)
    old = Path(run.result("ingest").folder)
    old.rename(old.with_name("0123456789abcdef"))
    with pytest.raises(UserError, match="the folder was renamed or mixed up"):
        Result.at(url, "ingest", "0123456789abcdef").mark()
    assert runner.run_stage(Counting(), begin(url))


# -- one that was taken for dead ----------------------------------------------------------------------------------
@dataclass
class Asleep(Counting):
    """Stands in for a process on S3 that is stopped at a step for longer than its leases last, and then goes on."""

    step: str = ""
    s3: S3 | None = None
    bucket: str = ""
    after: dict[str, object] = field(default_factory=dict)

    def _sleep(self, step: str) -> None:
        if step != self.step:
            return
        assert self.s3 is not None
        for key in self.s3.objects(self.bucket):
            if key.endswith("lease"):
                self.s3.client.delete_object(Bucket=self.bucket, Key=key)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "_conditions", [])  # the other process has none of ours
            assert runner.run_stage(Counting(), open_run(Project.at(f"s3://{self.bucket}/p")))
        self.after = dict(self.s3.objects(self.bucket))

    def prepare(self, ctx: Context) -> Plan:
        self._sleep("prepare")
        return super().prepare(ctx)

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        self._sleep(f"shard {shard.index}")
        return super().run_shard(ctx, shard, plan)

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        self._sleep("finish")
        return super().finish(ctx, plan)


def test_what_a_killed_process_has_left_of_its_lease_goes(url: str) -> None:
    """It was killed between the mark of its shard and the end of its lease; nobody takes that lease any more."""
    stage, run = Counting(), begin(url)
    ctx, result = Context(run, lambda done, total, message: None), run.result("ingest")
    plan = steps.prepare(stage, ctx)
    assert plan is not None
    for index in range(3):
        steps.run_shard(stage, ctx, index, plan)
    left = Path(result.shard_lease_url(1, 3))
    left.touch()
    steps.finish(stage, ctx, plan)
    assert result.is_done()
    assert not left.exists()


@pytest.mark.parametrize("step", ["prepare", "shard 1", "finish"])
def test_who_was_taken_for_dead_writes_nothing_more(
    step: str, s3_here: S3, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the same bytes again: the result is finished then, and may be read."""
    bucket = s3_here.bucket()
    url = f"s3://{bucket}/p"
    objects.write_json(f"{url}/tested.yaml", recording.config(recording.folder))
    run = begin(url)
    monkeypatch.setattr(leases, "LEASE_S", 0)  # so that a lease is renewed whenever it is checked
    asleep = Asleep(step=step, s3=s3_here, bucket=bucket)
    with pytest.raises(LockLost, match="another run has taken this work over; run again, finished work is kept"):
        runner.run_stage(asleep, run)
    assert run.read_mark("ingest") is not None
    assert s3_here.objects(bucket) == asleep.after
