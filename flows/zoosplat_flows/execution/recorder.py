"""What a run leaves of itself: state and times in run.json, events in events.jsonl, what stages printed in logs/."""

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

FLUSH_S = 5.0  # between writes to S3, where an object cannot be appended to
PROGRESS_S = 10.0  # between lines of progress of a stage in its log
ENDED = ("done", "skipped", "reused", "shared", "failed", "blocked", "stopped")  # states of a stage that has ended


@dataclass(frozen=True)
class Event:
    """What happens to a stage.

    Attributes:
        stage: its name, or `report`.
        state: started, running, retrying, or one of `ENDED`: done (computed by this run), skipped (was done before),
            reused (lies in another project), shared (another run computed it meanwhile), failed, blocked (a stage that
            it reads has failed), stopped.
        done, total: frames or steps.
        message: what the stage says of its progress, or why it failed.
    """

    stage: str
    state: str
    done: int = 0
    total: int = 0
    message: str = ""


def utc() -> str:
    """The time now, as records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _as_utc(at: str) -> str:
    """A time in ISO 8601, of whatever precision and zone, as `utc` writes it."""
    return datetime.fromisoformat(at).astimezone(UTC).isoformat(timespec="milliseconds")


class _Text:
    """A text that grows: a file that is appended to, or an S3 object that is put again every few seconds."""

    def __init__(self, url: str) -> None:
        self._url, self._lock = url, threading.Lock()
        self._file: IO[str] | None = None
        self._kept, self._put = "", 0.0
        if urls.is_s3(url):
            with contextlib.suppress(FileNotFoundError):
                self._kept = objects.read_bytes(url).decode(errors="replace")
        else:
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(url, "a", errors="replace")  # noqa: SIM115 (closed by `close`)

    def add(self, line: str) -> None:
        with self._lock:
            if self._file is not None:
                self._file.write(line + "\n")
                self._file.flush()
                return
            self._kept += line + "\n"
            if time.monotonic() - self._put > FLUSH_S:
                self._send()

    def _send(self) -> None:
        # A log is not worth a stage: where the server is away for a moment, the next line brings it all.
        with contextlib.suppress(Exception):
            objects.write_bytes(self._url, self._kept.encode())
        self._put = time.monotonic()

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
            elif self._kept:
                self._send()


class Recorder:
    """Writes the record of a run that this process works on. Methods may be called from any thread."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.RLock()
        self._record = run.record()
        self._host = platform.node()
        self._texts: dict[str, _Text] = {}
        self._shown: dict[str, float] = {}
        self._written = 0.0

    def start(self, stages: list[str]) -> None:
        """The run begins, or goes on."""
        with self._lock:
            self._record |= {"state": "running", "started": utc(), "host": self._host, "ended": None}
            self._record["selected"] = stages
            self._write()

    def __call__(self, event: Event) -> None:
        """Record an event; of progress one every few seconds."""
        with self._lock:
            now = time.monotonic()
            if event.state == "running":
                if now - self._shown.get(event.stage, 0.0) < PROGRESS_S:
                    return
                self._shown[event.stage] = now
            self._text("events.jsonl").add(json.dumps({"time": utc(), **asdict(event)}))
            entry = self._record["stages"].setdefault(event.stage, {})
            if event.state == "started":
                entry |= {"state": "running", "started": utc(), "ended": None, "message": ""}
            elif event.state in ENDED:
                entry |= {"state": event.state, "ended": utc(), "message": event.message}
            else:
                entry |= {"message": event.message or f"{event.done}/{event.total}"}
                return
            self._write()

    def log(self, stage: str, line: str, source: str = "", at: str = "") -> None:
        """Keep a line that a stage has printed.

        Args:
            stage: its name.
            line: without its end.
            source: where it comes from, such as a pod; default: this machine.
            at: when it was printed, ISO 8601; default: now.
        """
        with self._lock:
            self._text(f"logs/{stage}.log").add(f"{_as_utc(at) if at else utc()} {source or self._host} {line}")

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
        """The run ends: done, failed or stopped."""
        with self._lock:
            for entry in self._record["stages"].values():
                if entry.get("state") == "running":
                    entry |= {"state": "stopped", "ended": utc()}
            self._record |= {"state": state, "ended": utc()}
            self._write()
            for text in self._texts.values():
                text.close()
            self._texts.clear()

    def _text(self, name: str) -> _Text:
        if name not in self._texts:
            self._texts[name] = _Text(self.run.path(*name.split("/")))
        return self._texts[name]

    def _write(self) -> None:
        objects.write_json(self.run.path(RECORD), self._record)


@contextmanager
def recording(run: Run, stages: list[str]) -> Iterator[Recorder]:
    """Record a run while the block runs; it is marked as done, failed or stopped as the block ends."""
    recorder = Recorder(run)
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


Listener = Callable[[Event], None]
