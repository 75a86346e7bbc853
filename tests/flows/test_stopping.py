"""The command is told to stop, or killed: one line, and within seconds no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project

if TYPE_CHECKING:
    from tests.conftest import Recording

STOPPED = "zoosplat: stopped; finished work is kept, the same command goes on from here"
LEFT_AFTER_S = 5.0


def _start(*arguments: str) -> subprocess.Popen[str]:
    code = "from zoosplat_flows.cli.entry import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _processes_that_name(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command, state = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
            except OSError:
                continue
            if text.encode() in command and state.rsplit(")", 1)[1].split()[0] not in "ZX":
                found.append(int(entry.name))
    return found


def _until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _has_begun(project: Path, stage: str) -> bool:
    latest = Project.at(str(project)).latest_id()
    return latest is not None and bool(_processes_that_name(f"zoosplat_{stage}\0--project\0{project}"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stage", ["ingest", "train"])
def test_a_run_that_is_ended_leaves_no_process(
    number: signal.Signals, stage: str, recording: Recording, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    config = Path(recording.write_project(tmp_path / "config", train__epochs=500)) / "tested.yaml"
    command = _start("run", str(config), "--project", str(project), "--until", "train")
    _until(lambda: _has_begun(project, stage) or command.poll() is not None, 240, f"{stage} has not begun")
    assert command.poll() is None, command.communicate()
    command.send_signal(number)
    began = time.monotonic()
    _, err = command.communicate(timeout=60)
    _until(lambda: not _processes_that_name(str(project)), began + LEFT_AFTER_S - time.monotonic() + 1, "left over")
    if number == signal.SIGKILL:
        assert command.returncode == -number
    else:
        assert (command.returncode, err.strip().splitlines()) == (130, [STOPPED])
        assert open_run(Project.at(str(project))).record()["state"] == "stopped"


@pytest.mark.parametrize("after_s", [0.8, 2.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_during_imports_and_filming_is_one_line(number: signal.Signals, after_s: float, tmp_path: Path) -> None:
    command = _start("demo", "--project", str(tmp_path / "demo"), "--frames", "600")
    time.sleep(after_s)
    command.send_signal(number)
    out, err = command.communicate(timeout=10)
    lines = [line for line in err.splitlines() if line.strip() and "filming" not in line]
    if "in <module>\n    import" not in err and command.returncode != -number:  # Python itself was not yet up
        assert (command.returncode, lines) == (130, [STOPPED]), err
    assert "Exception ignored" not in out + err
