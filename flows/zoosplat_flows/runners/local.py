"""Stages as subprocesses of this machine, which die with whoever started them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import IO

from zoosplat.errors import UserError
from zoosplat.project import Project

Progress = Callable[[int, int, str], None]
KEPT_LINES = 40
GRACE_S = 10.0


class Interrupted(Exception):
    """The stage was stopped because its pipeline ends; trying again would be wrong."""


class Processes:
    """The stage processes of one pipeline run; leaving the `with` block ends those that still run.

    A killed parent cannot end them: then a stage's next progress line finds no reader and the stage stops there.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process and refuse new ones."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            _signal_group(process, signal.SIGTERM)

    def run(
        self, stage: str, project_url: str, *, workers: int | None = None, force: bool = False, progress: Progress
    ) -> str:
        """Run a whole stage as `python -m zoosplat_<stage>` and wait for it.

        Args:
            stage: name in `zoosplat.pipeline.STAGES`.
            project_url: the project, which holds experiment.yaml.
            workers: processes for its shards; None: a core each.
            force: compute again although it is done.
            progress: called with frames (or steps) done, their total and a message.

        Returns:
            `done`, `skipped` (it was done before) or `reused` (taken from another project).

        Raises:
            UserError: exit status 2, with the stage's line.
            RuntimeError: any other failure, with the last lines of its stderr.
            Interrupted: the pipeline ended meanwhile.
        """
        project = Project.at(project_url)
        before = project.read_mark(stage)
        command = [sys.executable, "-m", f"zoosplat_{stage}", "--project", project.url]
        command += ["--workers", str(workers)] if workers else []
        command += ["--force"] if force else []
        self._wait(stage, command, progress)
        after = project.read_mark(stage)
        if after is None:
            raise RuntimeError(f"{stage}: ended without its success mark {project.mark_url(stage)}")
        if before == after:
            return "skipped"
        return "reused" if after.get("location") else "done"

    def _wait(self, stage: str, command: list[str], progress: Progress) -> None:
        with self._lock:
            if self._closed:
                raise Interrupted(stage)
            # A session of its own: Ctrl-C on the terminal reaches the parent alone, which then ends the whole group.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                env={"OMP_WAIT_POLICY": "passive", **os.environ},
            )
            self._running.add(process)
        assert process.stdout is not None
        assert process.stderr is not None
        last: deque[str] = deque(maxlen=KEPT_LINES)
        helpers = [
            threading.Thread(target=_keep_last, args=(process.stderr, last), daemon=True),
            threading.Thread(target=_clear_up, args=(process,), daemon=True),
        ]
        for helper in helpers:
            helper.start()
        try:
            for line in process.stdout:
                _report(line, progress)
            status = process.wait()
        finally:
            if process.returncode is None:
                _end_group(process)
            for helper in helpers:
                helper.join(timeout=GRACE_S)
            with self._lock:
                self._running.discard(process)
        if status != 0 and self._closed:
            raise Interrupted(stage)
        if status != 0:
            raise _failure(stage, status, list(last))


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a stage and its worker processes, which outlive it when it is killed."""
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _clear_up(process: subprocess.Popen[str]) -> None:
    """End what a stage leaves behind, also because workers of a killed stage would hold its output open for ever."""
    process.wait()
    _end_group(process)


def _keep_last(stream: IO[str], last: deque[str]) -> None:
    for line in stream:
        if line.strip():
            last.append(line.rstrip())


def _report(line: str, progress: Progress) -> None:
    """Hand a JSON progress line on; libraries may print other things, which are no concern of ours."""
    try:
        event = json.loads(line)
        if event["event"] == "progress":
            progress(int(event["done"]), int(event["total"]), str(event["message"]))
    except (ValueError, KeyError, TypeError):
        return


def _failure(stage: str, status: int, lines: list[str]) -> UserError | RuntimeError:
    text = "\n".join(lines)
    if status == 2 and lines:
        # A message of several lines starts at the last line that bears the stage's name.
        starts = [i for i, line in enumerate(lines) if line.startswith(f"zoosplat {stage}: ")]
        return UserError("\n".join(lines[starts[-1] if starts else -1 :]).removeprefix("zoosplat "))
    missing = re.search(r"^ModuleNotFoundError: No module named '([\w.]+)'", lines[-1]) if lines else None
    if missing:
        return UserError(f"{stage}: the Python package {missing[1]} is missing; pip install 'zoosplat[{stage}]'")
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; out of memory? Lower --workers" if -status == signal.SIGKILL else ""
        return RuntimeError(f"{stage}: ended by {name}{hint}\n{text}".rstrip())
    return RuntimeError(f"{stage}: exit status {status}\n{text}".rstrip())
