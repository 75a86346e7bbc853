"""Stages in the order of the pipeline, here and as a Prefect flow, with small fake stages as real subprocesses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from pipelines import FILES_PIPELINE

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.errors import LockLost, Unreachable, UserError
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import downstream
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runs import Run
from zoosplat.storage import objects
from zoosplat_flows.execution import executor, stage_states
from zoosplat_flows.execution.executor import StagesFailed, execute_stages, is_worth_retrying, select_stages
from zoosplat_flows.execution.recorder import StageEvent, keep_record
from zoosplat_flows.report.refresh import ensure_report
from zoosplat_flows.runners.local import LocalRunner
from zoosplat_flows.runners.protocol import Exhausted, Interrupted

if TYPE_CHECKING:
    from tests.conftest import Recording

# What every fake stage does: follow its script and leave the mark of the run's result. The log is the truth of a test.
FAKE = """
import json, os, pathlib, subprocess, sys, time
stage = __spec__.parent.removeprefix("zoosplat_")
project = pathlib.Path(sys.argv[sys.argv.index("--project") + 1])
run = sys.argv[sys.argv.index("--run") + 1]
result = json.loads((project / "runs" / run / "run.json").read_text())["results"][stage]["id"]
mark = project / "results" / stage / result / "done.json"
log = lambda what: (project / "log").open("a").write(f"{what} {stage}\\n")
done_by = lambda who: (mark.parent.mkdir(parents=True, exist_ok=True),
                       mark.write_text(json.dumps({"id": result, "run": who, "warnings": [f"careful with {stage}"]})))
log("start")
script = project / f"{stage}.py"
if script.exists():
    exec(script.read_text())
print("a line of some library")
print(json.dumps({"event": "progress", "stage": stage, "done": 3, "total": 4, "message": "nearly"}), flush=True)
if not mark.exists():
    done_by(run)
log("end")
"""
NAMES = [spec.name for spec in FILES_PIPELINE]


class Perform(Protocol):
    """Runs stages of a run, and says what became of them."""

    def __call__(
        self,
        run: Run,
        stages: list[str] | None = None,
        heard: Callable[[StageEvent], None] = ...,
        workers: int | None = None,
    ) -> dict[str, str]: ...


def _here(
    run: Run,
    stages: list[str] | None = None,
    heard: Callable[[StageEvent], None] = lambda event: None,
    workers: int | None = None,
) -> dict[str, str]:
    with keep_record(run, stages or NAMES) as recorder:

        def tell(event: StageEvent) -> None:
            recorder(event)
            heard(event)

        with LocalRunner() as processes:
            states = execute_stages(run, stages or NAMES, processes, workers, recorder, tell)
        return {**states, "report": ensure_report(run, recorder, tell)}


def _with_prefect(
    run: Run,
    stages: list[str] | None = None,
    heard: Callable[[StageEvent], None] = lambda event: None,
    workers: int | None = None,
) -> dict[str, str]:
    from zoosplat_flows.pipeline import listening, pipeline

    chosen = stages or NAMES
    with listening(heard):
        return pipeline(run.project.url, chosen[0], chosen[-1], workers=workers, run=run.id)


@pytest.fixture(scope="session")
def _prefect() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(params=["here", "prefect"])
def perform(request: pytest.FixtureRequest) -> Perform:
    """Both ways to run the stages of a run."""
    if request.param == "here":
        return _here
    request.getfixturevalue("_prefect")
    return _with_prefect


def _no_page(run: Run, state: str) -> str:
    """In place of the report, which fakes leave nothing to show in."""
    url = run.path("report", "index.html")
    objects.write_bytes(url, state.encode())
    return url


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose stages are fakes; a file `<stage>.py` in it is executed by that stage."""
    for name in NAMES:
        package = tmp_path / "packages" / f"zoosplat_{name}"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(executor, "RETRY_DELAY_S", 0.0)
    monkeypatch.setattr("zoosplat_flows.report.page.build_report", _no_page)
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture
def experiment(recording: Recording, project: Path) -> Experiment:
    (project / "config.json").write_text(json.dumps(recording.config()))
    return read_config(str(project / "config.json"))


@pytest.fixture
def run(project: Path, experiment: Experiment) -> Run:
    return _begin(project, experiment)


def _begin(project: Path, experiment: Experiment, *force: str) -> Run:
    """A recorded run; what it needs to be a run, not what `begun` would check."""
    return record_run(draft_run(Project.at(str(project)), experiment, force), NAMES)


def _log(project: Path) -> list[str]:
    return (project / "log").read_text().splitlines()


def _states(events: list[StageEvent], stage: str) -> list[str]:
    return [event.state for event in events if event.stage == stage]


def test_order_follows_what_stages_read_and_pack_runs_beside_tracking(
    project: Path, run: Run, perform: Perform
) -> None:
    # Each of the two waits until the other has started: one after the other would fail.
    meet = (
        "(project / f'{stage}.here').touch()\n"
        "for _ in range(600):\n"
        "    if (project / 'OTHER.here').exists(): break\n"
        "    time.sleep(0.05)\n"
        "else: sys.exit(2)\n"
    )
    (project / "pack.py").write_text(meet.replace("OTHER", "center_rotation"))
    (project / "center_rotation.py").write_text(meet.replace("OTHER", "pack"))
    events: list[StageEvent] = []
    result = perform(run, heard=events.append, workers=3)
    page = run.path("report", "index.html")
    assert result == {**dict.fromkeys(NAMES, "done"), "report": page}
    log = _log(project)
    for spec in FILES_PIPELINE:
        for name in spec.reads:
            assert log.index(f"end {name}") < log.index(f"start {spec.name}")
    assert StageEvent("train", "running", 3, 4, "nearly") in events
    assert _states(events, "crop") == ["started", "running", "done"]
    assert stage_states.stage_warnings(run)[0] == "ingest: careful with ingest"

    # The same run again starts no process, and builds no report.
    (project / "log").unlink()
    events.clear()
    assert perform(run, heard=events.append) == {**dict.fromkeys(NAMES, "skipped"), "report": page}
    assert not (project / "log").exists()
    assert _states(events, "report") == ["started", "skipped"]


def test_what_is_forced_and_what_is_made_from_it_is_made_anew_beside_the_old(
    project: Path, experiment: Experiment, perform: Perform
) -> None:
    first = _begin(project, experiment)
    perform(first)
    second = _begin(project, experiment, "crop")
    result = perform(second)
    again = {"crop", "train", "evaluate", "render", "features", "embedding"}
    assert {name for name in NAMES if result[name] == "done"} == again == downstream(["crop"])
    for name in NAMES:
        assert (first.result(name).id != second.result(name).id) == (name in again)
        assert first.result(name).is_done()
    assert second.result("crop").id == first.result("crop").id + "-2"


def test_a_user_error_is_not_retried_and_stops_what_follows(project: Path, run: Run, perform: Perform) -> None:
    (project / "crop.py").write_text(
        "print('a warning', file=sys.stderr)\n"
        "print('zoosplat crop: crop.ell = 0.1: too small\\nsecond line', file=sys.stderr)\n"
        "sys.exit(2)\n"
    )
    events: list[StageEvent] = []
    with pytest.raises(UserError) as caught:
        perform(run, heard=events.append)
    assert str(caught.value) == "crop: crop.ell = 0.1: too small\nsecond line"
    log = _log(project)
    assert log.count("start crop") == 1
    assert not any(name in line for line in log for name in ("train", "evaluate", "render", "features"))
    # What does not depend on it has been finished.
    assert "end pack" in log
    assert _states(events, "crop") == ["started", "failed"]
    assert _states(events, "train")[-1] == "blocked"
    record = run.record()
    assert record["state"] == "failed"
    assert record["stages"]["crop"]["message"].startswith("crop: crop.ell = 0.1")
    assert record["stages"]["pack"]["state"] == "done"


def test_every_stage_that_failed_is_named(project: Path, run: Run, perform: Perform) -> None:
    for stage in ("center_rotation", "pack"):
        (project / f"{stage}.py").write_text(f"print('zoosplat {stage}: is wrong', file=sys.stderr); sys.exit(2)")
    with pytest.raises(UserError) as caught:
        perform(run)
    assert str(caught.value).splitlines() == ["center_rotation: is wrong", "pack: is wrong"]


def test_other_failures_are_tried_again(project: Path, run: Run) -> None:
    (project / "ingest.py").write_text(
        "attempt = (project / 'log').read_text().count('start ingest')\n"
        "if attempt == 1: sys.exit('lost connection')\n"
        "if attempt == 2: os.kill(os.getpid(), 9)\n"
    )
    events: list[StageEvent] = []
    assert _here(run, ["ingest"], events.append)["ingest"] == "done"
    assert _log(project).count("start ingest") == 3
    retries = [e.message for e in events if e.state == "retrying"]
    assert retries[0] == "ingest: exit status 1\nlost connection"
    assert retries[1].startswith("ingest: ended by SIGKILL; out of memory? Lower --workers")


def test_a_failure_that_stays_is_the_runs(project: Path, run: Run) -> None:
    (project / "ingest.py").write_text("sys.exit('still lost')\n")
    with pytest.raises(StagesFailed, match="still lost"):
        _here(run, ["ingest"])
    assert len(_log(project)) == 3


def test_the_advice_for_a_killed_training_is_one_that_helps(project: Path, run: Run) -> None:
    (project / "train.py").write_text("os.kill(os.getpid(), 9)\n")
    with pytest.raises(RuntimeError) as caught, LocalRunner() as processes:
        processes.run("train", run, progress=lambda *of: None, log=lambda *of: None)
    assert len(str(caught.value).splitlines()) == 1
    assert "crop.grid_size" in str(caught.value)
    assert "--workers" not in str(caught.value)


def test_what_another_run_did_is_said_to_be_its_work(project: Path, run: Run, perform: Perform) -> None:
    (project / "ingest.py").write_text("done_by('another-run')\n")
    assert perform(run, ["ingest"])["ingest"] == "shared"


def test_logs_hold_what_stages_print_with_time_and_host(project: Path, run: Run, perform: Perform) -> None:
    (project / "ingest.py").write_text("print('zoosplat ingest: is bad', file=sys.stderr); sys.exit(2)")
    with pytest.raises(UserError):
        perform(run, ["ingest"])
    (project / "ingest.py").unlink()
    perform(run, ["ingest"])
    lines = (Path(run.path("logs", "ingest.log"))).read_text().splitlines()
    texts = [line.split(" ", 2)[2] for line in lines]
    assert texts[:2] == ["zoosplat ingest: is bad", "exit status 2"]
    assert texts[-3:-1] == ["a line of some library", texts[-2]]
    assert texts[-1] == "exit status 0"
    assert all(line.startswith("20") and line.split(" ")[1] == os.uname().nodename for line in lines)
    events = [json.loads(line) for line in Path(run.path("events.jsonl")).read_text().splitlines()]
    assert [event["state"] for event in events if event["stage"] == "ingest"] == [
        "started",
        "failed",
        "started",
        "running",
        "done",
    ]


def test_stages_can_be_chosen_by_range(experiment: Experiment) -> None:
    assert select_stages(experiment, "crop", "pack") == ["crop", "pack"]
    assert select_stages(experiment, None, "center_rotation") == ["ingest", "center_rotation"]
    with pytest.raises(UserError, match="there is no stage trian"):
        select_stages(experiment, "trian")
    with pytest.raises(UserError, match="comes before train"):
        select_stages(experiment, "train", "ingest")
    with pytest.raises(UserError, match="this experiment has no stage segment, because"):
        select_stages(experiment, "segment")
    made = experiment.model_copy(update={"data": experiment.data.model_copy(update={"masks": "auto"})})
    assert select_stages(made, None, "crop") == ["segment", "ingest", "center_rotation", "crop"]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Unreachable("s3"), True),
        (LockLost("taken over"), True),
        (UserError("bad"), False),
        (Interrupted("x"), False),
        (Exhausted("x"), False),
        (RuntimeError("x"), True),
        (OSError("x"), True),
    ],
)
def test_what_is_worth_another_try(error: Exception, again: bool) -> None:
    assert is_worth_retrying(error) == again


@pytest.mark.usefixtures("_prefect")
def test_prefect_shows_what_was_not_computed_again(project: Path, run: Run) -> None:
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    from zoosplat_flows.pipeline import pipeline

    _with_prefect(run, ["ingest", "center_rotation"])
    again: Any = pipeline(run.project.url, "ingest", "crop", run=run.id, return_state=True)
    assert again.result()["crop"] == "done"
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[again.state_details.flow_run_id]))

    def states() -> dict[str, str | None]:
        with get_client(sync_client=True) as client:
            return {task.name: task.state_name for task in client.read_task_runs(flow_run_filter=chosen)}

    expected = {"ingest": "Cached", "center_rotation": "Cached", "crop": "Completed", "report": "Completed"}
    _until(lambda: states() == expected)  # some moments later


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited 30 s in vain")


def _alone(processes: LocalRunner, stage: str, run: Run, workers: int | None = None) -> None:
    processes.run(stage, run, workers=workers, progress=lambda *of: None, log=lambda *of: None)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_stopping_ends_a_stage_with_its_workers(project: Path, run: Run) -> None:
    (project / "ingest.py").write_text(
        "worker = subprocess.Popen(['sleep', '600'])\n"
        "(project / 'pids.partial').write_text(json.dumps([os.getpid(), worker.pid]))\n"
        "(project / 'pids.partial').rename(project / 'pids')\n"
        "time.sleep(600)\n"
    )
    raised: list[BaseException] = []

    def work(processes: LocalRunner) -> None:
        try:
            _alone(processes, "ingest", run)
        except BaseException as error:
            raised.append(error)

    with LocalRunner() as processes:
        thread = threading.Thread(target=work, args=(processes,))
        thread.start()
        _until((project / "pids").exists)
    thread.join(30)
    assert isinstance(raised[0], Interrupted)
    pids = json.loads((project / "pids").read_text())
    _until(lambda: not any(_alive(pid) for pid in pids))
    with pytest.raises(Interrupted):
        _alone(processes, "ingest", run)


def test_a_killed_stage_leaves_no_workers(project: Path, run: Run) -> None:
    (project / "ingest.py").write_text(
        "worker = subprocess.Popen(['sleep', '600'])\n"
        "(project / 'pid').write_text(str(worker.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with LocalRunner() as processes, pytest.raises(RuntimeError, match="SIGKILL"):
        _alone(processes, "ingest", run)
    pid = int((project / "pid").read_text())
    _until(lambda: not _alive(pid))


def test_a_missing_package_is_a_user_error(project: Path, run: Run) -> None:
    (project / "train.py").write_text("import no_such_package\n")
    expected = r"no_such_package is missing; pip install 'zoosplat\[train\]'"
    with LocalRunner() as processes, pytest.raises(UserError, match=expected):
        _alone(processes, "train", run)


def test_a_stage_is_run_by_this_python_with_the_given_workers(project: Path, run: Run) -> None:
    (project / "ingest.py").write_text("(project / 'seen').write_text(json.dumps([sys.executable, sys.argv[1:]]))")
    with LocalRunner() as processes:
        _alone(processes, "ingest", run, workers=5)
    executable, arguments = json.loads((project / "seen").read_text())
    assert os.path.samefile(executable, sys.executable)
    assert arguments == ["--project", str(project), "--run", run.id, "--workers", "5"]


def test_a_stage_ends_with_its_killed_parent(project: Path, run: Run) -> None:
    """The parent is killed, by SIGKILL: nothing of the stage is left seconds later, whatever it was at."""
    (project / "ingest.py").write_text(
        "worker = subprocess.Popen(['sleep', '600'])\n"
        "(project / 'pids.partial').write_text(json.dumps([os.getpid(), worker.pid]))\n"
        "(project / 'pids.partial').rename(project / 'pids')\n"
        "time.sleep(600)\n"
    )
    code = (
        "import sys\n"
        "from zoosplat.stages.lookup import open_run\n"
        "from zoosplat.stages.projects import Project\n"
        "from zoosplat_flows.runners.local import LocalRunner\n"
        "with LocalRunner() as processes:\n"
        "    run = open_run(Project.at(sys.argv[1]))\n"
        "    processes.run('ingest', run, progress=lambda *of: None, log=lambda *of: None)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(project)])
    _until((project / "pids").exists)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    pids = json.loads((project / "pids").read_text())
    _until(lambda: not any(_alive(pid) for pid in pids))
