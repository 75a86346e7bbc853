"""Keeps the record of a run: its state in run.json, events in events.jsonl, what stages print in logs/."""

from __future__ import annotations

import contextlib
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from zoosplat.stages.runs import RECORD, Run
from zoosplat.storage import objects, urls
from zoosplat_flows.runners.stage_output import PROGRESS_LOG_S

FLUSH_S = 5.0  # seconds between writes of a growing text to S3, where nothing can be appended to an object
END_STATES = ("done", "skipped", "reused", "shared", "failed", "blocked", "stopped")  # of a stage that has ended


@dataclass(frozen=True)
class StageEvent:
    """What happens to a stage.

    Attributes:
        stage: name of the stage, or `report`.
        state: started, running, retrying, or one of `END_STATES`: done (this run has computed the result), skipped (it
            existed before), reused (it lies in another project), shared (another run has computed it meanwhile),
            failed, blocked (a stage that this one reads has failed), stopped.
        done, total: frames or steps.
        message: what the stage says of its progress, or why it failed.
    """

    stage: str
    state: str
    done: int = 0
    total: int = 0
    message: str = ""


EventListener = Callable[[StageEvent], None]


def utc_now() -> str:
    """The time now, as records have it: ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _to_utc(at: str) -> str:
    """A time in ISO 8601, of whatever precision and zone, in the form of `utc_now`."""
    return datetime.fromisoformat(at).astimezone(UTC).isoformat(timespec="milliseconds")


class _GrowingText:
    """A text that lines are added to: a file, or an S3 object that is written anew every few seconds."""

    def __init__(self, url: str) -> None:
        self._url, self._lock = url, threading.Lock()
        self._file: IO[str] | None = None
        self._text, self._last_write = "", 0.0  # of an S3 object
        if urls.is_s3(url):
            with contextlib.suppress(FileNotFoundError):
                self._text = objects.read_bytes(url).decode(errors="replace")
        else:
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(url, "a", errors="replace")  # noqa: SIM115 (closed by `close`)

    def add(self, line: str) -> None:
        with self._lock:
            if self._file is not None:
                self._file.write(line + "\n")
                self._file.flush()
                return
            self._text += line + "\n"
            if time.monotonic() - self._last_write > FLUSH_S:
                self._write_object()

    def _write_object(self) -> None:
        # A stage must not fail because of its log. When a write fails, a later one brings all lines.
        with contextlib.suppress(Exception):
            objects.write_bytes(self._url, self._text.encode())
        self._last_write = time.monotonic()

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
            elif self._text:
                self._write_object()


class RunRecorder:
    """Writes the record of a run that this process works on. Its methods may be called from any thread."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.RLock()
        self._record = run.record()
        self._host = platform.node()
        self._texts: dict[str, _GrowingText] = {}
        self._last_progress: dict[str, float] = {}  # stage -> when its progress was recorded last, by time.monotonic

    def start(self, stages: list[str]) -> None:
        """Record that the run begins, or goes on, with these stages."""
        with self._lock:
            self._record |= {"state": "running", "started": utc_now(), "host": self._host, "ended": None}
            self._record["selected"] = stages
            self._write()

    def __call__(self, event: StageEvent) -> None:
        """Record an event; of a stage's progress one event every few seconds."""
        with self._lock:
            now = time.monotonic()
            if event.state == "running":
                if now - self._last_progress.get(event.stage, 0.0) < PROGRESS_LOG_S:
                    return
                self._last_progress[event.stage] = now
            self._growing_text("events.jsonl").add(json.dumps({"time": utc_now(), **asdict(event)}))
            entry = self._record["stages"].setdefault(event.stage, {})
            if event.state == "started":
                entry |= {"state": "running", "started": utc_now(), "ended": None, "message": ""}
            elif event.state in END_STATES:
                entry |= {"state": event.state, "ended": utc_now(), "message": event.message}
            else:
                entry |= {"message": event.message or f"{event.done}/{event.total}"}
                return
            self._write()

    def log(self, stage: str, line: str, source: str = "", at: str = "") -> None:
        """Keep a line that a stage has printed.

        Args:
            stage: name of the stage.
            line: the line, without its end.
            source: where the line comes from, such as a pod; default: this machine.
            at: when the line was printed, ISO 8601; default: now.
        """
        with self._lock:
            time_printed = _to_utc(at) if at else utc_now()
            self._growing_text(f"logs/{stage}.log").add(f"{time_printed} {source or self._host} {line}")

    def set(self, key: str, value: Any) -> None:
        """Keep a value in run.json."""
        with self._lock:
            self._record[key] = value
            self._write()

    def get(self, key: str) -> Any:
        """A value of run.json; None where it has none."""
        with self._lock:
            return self._record.get(key)

    def end(self, state: str) -> None:
        """Record how the run ends: done, failed or stopped."""
        with self._lock:
            for entry in self._record["stages"].values():
                if entry.get("state") == "running":
                    entry |= {"state": "stopped", "ended": utc_now()}
            self._record |= {"state": state, "ended": utc_now()}
            self._write()
            for text in self._texts.values():
                text.close()
            self._texts.clear()

    def _growing_text(self, name: str) -> _GrowingText:
        if name not in self._texts:
            self._texts[name] = _GrowingText(self.run.path(*name.split("/")))
        return self._texts[name]

    def _write(self) -> None:
        objects.write_json(self.run.path(RECORD), self._record)


@contextmanager
def keep_record(run: Run, stages: list[str]) -> Iterator[RunRecorder]:
    """Record a run while the block runs; the run is recorded as done, failed or stopped as the block ends."""
    recorder = RunRecorder(run)
    recorder.start(stages)
    state = "failed"
    try:
        yield recorder
        state = "done"
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        state = "stopped"
        raise
    finally:
        with contextlib.suppress(Exception) if state != "done" else contextlib.nullcontext():
            recorder.end(state)
