"""The flow and the local runner, with small fake stages as real subprocesses."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.testing.utilities import prefect_test_harness

from zoosplat.errors import UserError
from zoosplat.stages.registry import PIPELINE
from zoosplat_flows import pipeline as flow_module
from zoosplat_flows.pipeline import Event, listening, pipeline, run_stage, select, with_followers
from zoosplat_flows.runners.local import Interrupted, Processes

# What every fake stage does: skip if marked, else follow its script and leave a mark. The log is the truth of a test.
FAKE = """
import json, os, pathlib, subprocess, sys, time
stage = __spec__.parent.removeprefix("zoosplat_")
project = pathlib.Path(sys.argv[sys.argv.index("--project") + 1])
force = "--force" in sys.argv
mark = project / "_marks" / f"{stage}.json"
log = lambda what: (project / "log").open("a").write(f"{what} {stage}{' forced' if force else ''}\\n")
if mark.exists() and not force:
    log("skip")
    sys.exit(0)
log("start")
script = project / f"{stage}.py"
if script.exists():
    exec(script.read_text())
print("a line of some library")
print(json.dumps({"event": "progress", "stage": stage, "done": 3, "total": 4, "message": "nearly"}), flush=True)
mark.parent.mkdir(exist_ok=True)
mark.write_text(json.dumps({"digest": "d", "finished": time.time()}))
log("end")
"""
NAMES = [spec.name for spec in PIPELINE]


@pytest.fixture(scope="session", autouse=True)
def _prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose stages are fakes; a file `<stage>.py` in it is executed by that stage."""
    for name in NAMES:
        package = tmp_path / "packages" / f"zoosplat_{name}"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setattr(run_stage, "retry_delay_seconds", 0)
    monkeypatch.setattr("zoosplat_flows.report.build_report", lambda project: f"{project.url}/report")
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def _log(project: Path) -> list[str]:
    return (project / "log").read_text().splitlines()


def test_order_follows_what_stages_read_and_pack_runs_beside_tracking(project: Path) -> None:
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
    events: list[Event] = []
    with listening(events.append):
        result = pipeline(str(project), workers=3)
    assert result == {**dict.fromkeys(NAMES, "done"), "report": f"{project}/report"}
    log = _log(project)
    for spec in PIPELINE:
        for name in spec.reads:
            assert log.index(f"end {name}") < log.index(f"start {spec.name}")
    assert Event("train", "running", 3, 4, "nearly") in events
    assert [e.state for e in events if e.stage == "crop"] == ["started", "running", "done"]

    (project / "log").unlink()
    again: Any = pipeline(str(project), return_state=True)
    assert again.result() == {**dict.fromkeys(NAMES, "skipped"), "report": f"{project}/report"}
    # Prefect shows what was not computed again, some moments later.
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[again.state_details.flow_run_id]))

    def states() -> dict[str, str | None]:
        with get_client(sync_client=True) as client:
            return {run.name: run.state_name for run in client.read_task_runs(flow_run_filter=chosen)}

    _until(lambda: states() == {**dict.fromkeys(NAMES, "Cached"), "report": "Completed"})

    (project / "log").unlink()
    forced = ["crop", "train", "evaluate", "render", "features", "embedding"]
    result = pipeline(str(project), force=["crop"])
    assert {name for name in NAMES if result[name] == "done"} == set(forced)
    starts = [line for line in _log(project) if line.startswith("start")]
    assert starts[:2] == ["start crop forced", "start train forced"]


def test_a_user_error_is_not_retried_and_stops_what_follows(project: Path) -> None:
    (project / "crop.py").write_text(
        "print('a warning', file=sys.stderr)\n"
        "print('zoosplat crop: crop.ell = 0.1: too small\\nsecond line', file=sys.stderr)\n"
        "sys.exit(2)\n"
    )
    events: list[Event] = []
    with listening(events.append), pytest.raises(UserError) as caught:
        pipeline(str(project))
    assert str(caught.value) == "crop: crop.ell = 0.1: too small\nsecond line"
    log = _log(project)
    assert log.count("start crop") == 1
    assert not any(name in line for line in log for name in ("train", "evaluate", "render", "features"))
    # What does not depend on it has been finished.
    assert "end pack" in log
    assert [e.state for e in events if e.stage == "crop"] == ["started", "failed"]


def test_other_failures_are_tried_again_and_force_holds_until_the_old_result_is_gone(project: Path) -> None:
    (project / "_marks").mkdir()
    (project / "_marks" / "ingest.json").write_text('{"digest": "old", "finished": 0}')
    (project / "ingest.py").write_text(
        "attempt = (project / 'log').read_text().count('start ingest')\n"
        "if attempt == 1: sys.exit('lost connection')\n"
        "mark.unlink(missing_ok=True)\n"
        "if attempt == 2: os.kill(os.getpid(), 9)\n"
    )
    events: list[Event] = []
    with listening(events.append):
        result = pipeline(str(project), until_stage="ingest", force=["ingest"])
    assert result["ingest"] == "done"
    starts = [line for line in _log(project) if line.startswith("start")]
    assert starts == ["start ingest forced", "start ingest forced", "start ingest"]
    retries = [e.message for e in events if e.state == "retrying"]
    assert retries[0] == "ingest: exit status 1\nlost connection"
    assert retries[1].startswith("ingest: ended by SIGKILL; out of memory?")

    (project / "ingest.py").write_text("sys.exit('still lost')\n")
    (project / "log").unlink()
    with pytest.raises(RuntimeError, match="still lost"):
        pipeline(str(project), until_stage="ingest", force=["ingest"])
    assert len(_log(project)) == 3


def test_stages_can_be_chosen_by_range(project: Path) -> None:
    result = pipeline(str(project), from_stage="crop", until_stage="pack")
    assert list(result) == ["crop", "pack", "report"]
    assert [spec.name for spec in select(None, "center_rotation")] == ["ingest", "center_rotation"]
    with pytest.raises(UserError, match="there is no stage trian"):
        select("trian")
    with pytest.raises(UserError, match="comes before train"):
        select("train", "ingest")
    assert with_followers(["train"]) == {"train", "evaluate", "render", "features", "embedding"}
    assert with_followers(["ingest"]) == set(NAMES)
    with pytest.raises(UserError, match="there is no stage all"):
        with_followers(["all"])


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited 30 s in vain")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_stopping_ends_a_stage_with_its_workers(project: Path) -> None:
    (project / "ingest.py").write_text(
        "worker = subprocess.Popen(['sleep', '600'])\n"
        "(project / 'pids.partial').write_text(json.dumps([os.getpid(), worker.pid]))\n"
        "(project / 'pids.partial').rename(project / 'pids')\n"
        "time.sleep(600)\n"
    )
    raised: list[BaseException] = []

    def run(processes: Processes) -> None:
        try:
            processes.run("ingest", str(project), progress=lambda done, total, message: None)
        except BaseException as error:
            raised.append(error)

    with Processes() as processes:
        thread = threading.Thread(target=run, args=(processes,))
        thread.start()
        _until((project / "pids").exists)
    thread.join(30)
    assert isinstance(raised[0], Interrupted)
    pids = json.loads((project / "pids").read_text())
    _until(lambda: not any(_alive(pid) for pid in pids))
    with pytest.raises(Interrupted):
        processes.run("ingest", str(project), progress=lambda done, total, message: None)


def test_a_killed_stage_leaves_no_workers(project: Path) -> None:
    (project / "ingest.py").write_text(
        "worker = subprocess.Popen(['sleep', '600'])\n"
        "(project / 'pid').write_text(str(worker.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with Processes() as processes, pytest.raises(RuntimeError, match="SIGKILL"):
        processes.run("ingest", str(project), progress=lambda done, total, message: None)
    pid = int((project / "pid").read_text())
    _until(lambda: not _alive(pid))


def test_a_missing_package_is_a_user_error(project: Path) -> None:
    (project / "train.py").write_text("import no_such_package\n")
    expected = r"no_such_package is missing; pip install 'zoosplat\[train\]'"
    with Processes() as processes, pytest.raises(UserError, match=expected):
        processes.run("train", str(project), progress=lambda done, total, message: None)


def test_a_stage_is_run_by_this_python_with_the_given_workers(project: Path) -> None:
    (project / "ingest.py").write_text("(project / 'seen').write_text(json.dumps([sys.executable, sys.argv[1:]]))")
    with Processes() as processes:
        state = processes.run("ingest", f"{project}/", workers=5, progress=lambda done, total, message: None)
    assert state == "done"
    executable, arguments = json.loads((project / "seen").read_text())
    assert os.path.samefile(executable, sys.executable)
    assert arguments == ["--project", str(project), "--workers", "5"]
    assert flow_module.RETRIES == 2
