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
import time
from collections import deque
from types import TracebackType
from typing import IO

from zoosplat.errors import UserError
from zoosplat.stages.registry import STAGES
from zoosplat.stages.runs import Run
from zoosplat_flows.execution.executor import Interrupted, Log, Progress

KEPT_LINES = 40
GRACE_S = 3.0  # for a stage to end by itself
PROGRESS_S = 10.0  # between lines of progress in the log


class Processes:
    """The stage processes of one pipeline run; leaving the `with` block ends those that still run.

    Where this process is killed, a guard beside each stage ends it.
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

    def run(self, stage: str, run: Run, *, workers: int | None = None, progress: Progress, log: Log) -> None:
        """Run a whole stage as `python -m zoosplat_<stage>` and wait for it.

        Args:
            stage: name in `zoosplat.stages.registry.STAGES`.
            run: the recorded run that it works for.
            workers: processes for its shards; None: a core each.
            progress: called with frames (or steps) done, their total and a message.
            log: called with every line that it prints.

        Raises:
            UserError: exit status 2, with the stage's line.
            RuntimeError: any other failure, with the last lines of its stderr.
            Interrupted: the pipeline ended meanwhile.
        """
        command = [sys.executable, "-m", f"zoosplat_{stage}", "--project", run.project.url, "--run", run.id]
        command += ["--workers", str(workers)] if workers else []
        self._wait(stage, command, progress, log)

    def _wait(self, stage: str, command: list[str], progress: Progress, log: Log) -> None:
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
        guard = _guard(process)
        helpers = [
            threading.Thread(target=_keep_last, args=(process.stderr, last, log), daemon=True),
            threading.Thread(target=_clear_up, args=(process,), daemon=True),
        ]
        for helper in helpers:
            helper.start()
        try:
            shown = float("-inf")
            for line in process.stdout:
                is_progress = _report(line, progress)
                if not is_progress or time.monotonic() - shown > PROGRESS_S:
                    log(line.rstrip())
                    shown = time.monotonic() if is_progress else shown
            status = process.wait()
        finally:
            if process.returncode is None:
                _end_group(process)
            for helper in helpers:
                helper.join(timeout=GRACE_S)
            guard.kill()
            guard.communicate()
            with self._lock:
                self._running.discard(process)
        log(f"exit status {status}")
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


def _guard(process: subprocess.Popen[str]) -> subprocess.Popen[bytes]:
    """A process that ends a stage, its workers included, as soon as this one has ended, however it was ended."""
    return subprocess.Popen(
        ["sh", "-c", f"cat >/dev/null; kill -KILL -{process.pid} 2>/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _keep_last(stream: IO[str], last: deque[str], log: Log) -> None:
    for line in stream:
        if line.strip():
            last.append(line.rstrip())
            log(line.rstrip())


def _report(line: str, progress: Progress) -> bool:
    """Hand a JSON progress line on; whether it was one. Other lines, of libraries too, are for the log alone."""
    try:
        event = json.loads(line)
        if event["event"] == "progress":
            progress(int(event["done"]), int(event["total"]), str(event["message"]))
            return True
    except (ValueError, KeyError, TypeError):
        pass
    return False


def out_of_memory(stage: str) -> str:
    """What to do where the system has killed a stage, most likely for its memory."""
    if STAGES[stage].gpu:
        return "out of memory? Close other programs, raise ingest.image_downsample, or lower crop.grid_size"
    return "out of memory? Lower --workers, or scheduling.frames_per_shard"


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
        hint = f"; {out_of_memory(stage)}" if -status == signal.SIGKILL else ""
        return RuntimeError(f"{stage}: ended by {name}{hint}")
    return RuntimeError(f"{stage}: exit status {status}\n{text}".rstrip())
