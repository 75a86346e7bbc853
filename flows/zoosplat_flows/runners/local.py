"""Runs stages as subprocesses of this machine, which end with whoever started them."""

from __future__ import annotations

import contextlib
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
from zoosplat.stages.contract import StageProgress
from zoosplat.stages.registry import SEGMENT, STAGES
from zoosplat.stages.runs import Run
from zoosplat_flows.runners.protocol import Interrupted, Log
from zoosplat_flows.runners.stage_output import BAD_INPUT_STATUS, PROGRESS_LOG_S, bad_input_error, parse_progress

MAX_QUOTED_LINES = 40  # last lines of a failed stage that its error quotes
STOP_GRACE_S = 3.0  # seconds between SIGTERM and SIGKILL of a stage


class LocalRunner:
    """Runs the stages of one pipeline run as processes; leaving the `with` block ends those that still run.

    Where this process is killed, a guard process beside each stage ends the stage.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> LocalRunner:
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

    def run(self, stage: str, run: Run, *, workers: int | None = None, progress: StageProgress, log: Log) -> None:
        """Run a whole stage as `python -m zoosplat_<stage>` and wait for it.

        Args:
            stage: name in `zoosplat.stages.registry.STAGES`.
            run: the recorded run whose result the stage makes.
            workers: processes for its shards; None: one for each core.
            progress: called with frames (or steps) done, their total and a message.
            log: called with every line that the stage prints.

        Raises:
            UserError: the stage ended with exit status 2; its own message.
            RuntimeError: any other failure, with the last lines of the stage's stderr.
            Interrupted: the pipeline ended meanwhile.
        """
        command = [sys.executable, "-m", f"zoosplat_{stage}", "--project", run.project.url, "--run", run.id]
        command += ["--workers", str(workers)] if workers else []
        self._run_command(stage, command, progress, log)

    def _run_command(self, stage: str, command: list[str], progress: StageProgress, log: Log) -> None:
        with self._lock:
            if self._closed:
                raise Interrupted(stage)
            # In a session of its own: Ctrl-C on the terminal then reaches this process alone, which ends the stage.
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
        last_lines: deque[str] = deque(maxlen=MAX_QUOTED_LINES)
        guard = _start_guard(process)
        helpers = [
            threading.Thread(target=_read_errors, args=(process.stderr, last_lines, log), daemon=True),
            threading.Thread(target=_end_workers, args=(process,), daemon=True),
        ]
        for helper in helpers:
            helper.start()
        try:
            last_logged = float("-inf")
            for line in process.stdout:
                event = parse_progress(line)
                if event is not None:
                    # What only shows the progress must not end the work.
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        progress(*event)
                if event is None or time.monotonic() - last_logged > PROGRESS_LOG_S:
                    log(line.rstrip())
                    last_logged = last_logged if event is None else time.monotonic()
            status = process.wait()
        finally:
            if process.returncode is None:
                _end_group(process)
            for helper in helpers:
                helper.join(timeout=STOP_GRACE_S)
            guard.kill()
            guard.communicate()
            with self._lock:
                self._running.discard(process)
        log(f"exit status {status}")
        if status != 0 and self._closed:
            raise Interrupted(stage)
        if status != 0:
            raise _explain_failure(stage, status, list(last_lines))


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a stage and its worker processes, which would outlive a stage that is killed."""
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(timeout=STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _end_workers(process: subprocess.Popen[str]) -> None:
    """Wait for a stage, then end the workers that it leaves: those of a killed stage keep its output open for ever."""
    process.wait()
    _end_group(process)


def _start_guard(process: subprocess.Popen[str]) -> subprocess.Popen[bytes]:
    """Start a process that ends a stage and its workers as soon as this process has ended, in whatever way."""
    # Its standard input is a pipe of this process, which the system closes when this process ends.
    return subprocess.Popen(
        ["sh", "-c", f"cat >/dev/null; kill -KILL -{process.pid} 2>/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _read_errors(stream: IO[str], last_lines: deque[str], log: Log) -> None:
    for line in stream:
        if line.strip():
            last_lines.append(line.rstrip())
            log(line.rstrip())


def out_of_memory_advice(stage: str) -> str:
    """What to do where the system has killed a stage, which it most likely did for the stage's memory."""
    if stage == SEGMENT:
        return "out of memory? Close other programs, or use a machine with more memory"
    if STAGES[stage].gpu:
        return "out of memory? Close other programs, raise ingest.image_downsample, or lower crop.grid_size"
    return "out of memory? Lower --workers, or scheduling.frames_per_shard"


def _explain_failure(stage: str, status: int, lines: list[str]) -> UserError | RuntimeError:
    if status == BAD_INPUT_STATUS and lines:
        return bad_input_error(stage, lines)
    missing = re.search(r"^ModuleNotFoundError: No module named '([\w.]+)'", lines[-1]) if lines else None
    if missing:
        return UserError(f"{stage}: the Python package {missing[1]} is missing; pip install 'zoosplat[{stage}]'")
    if status < 0:
        name = signal.Signals(-status).name
        hint = f"; {out_of_memory_advice(stage)}" if -status == signal.SIGKILL else ""
        return RuntimeError(f"{stage}: ended by {name}{hint}")
    text = "\n".join(lines)
    return RuntimeError(f"{stage}: exit status {status}\n{text}".rstrip())
