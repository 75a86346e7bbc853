"""`zoosplat logs`: what the stages of a run have printed."""

from __future__ import annotations

import sys
import time

import typer

from zoosplat.errors import UserError
from zoosplat.stages.registry import PIPELINE, STAGES
from zoosplat.stages.run_state import run_state
from zoosplat.stages.runs import Run
from zoosplat.storage import objects

LOOK_S = 1.0  # between looks for more, with --follow


class _Log:
    """The log of a stage, of which each call of `more` gives what has been added since."""

    def __init__(self, run: Run, stage: str) -> None:
        self.stage, self._url = stage, run.path("logs", f"{stage}.log")
        self._read, self._rest = 0, b""

    def more(self) -> list[str]:
        """Whole lines; none before the stage has printed anything."""
        try:
            with objects.open_read(self._url) as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return []
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def show(run: Run, stage: str | None, follow: bool) -> None:
    """Print the log of a stage, or the logs of all by time, each line with its stage.

    Args:
        run: of which.
        stage: its name; None: all.
        follow: go on until the run has ended.

    Raises:
        UserError: there is no such stage, or nothing was printed.
    """
    if stage is not None and stage not in STAGES:
        raise UserError(f"there is no stage {stage}; the stages are {', '.join(STAGES)}")
    logs = [_Log(run, name) for name in ([stage] if stage else [spec.name for spec in PIPELINE])]
    printed = 0
    while True:
        state = run_state(run.project, run.record()) if run.record() else ""
        # Lines begin with their time. The sort is stable: those of one time and stage keep their order.
        lines = sorted(
            ((line, log.stage) for log in logs for line in log.more()), key=lambda each: each[0].partition(" ")[0]
        )
        for line, name in lines:
            typer.echo(line if stage else f"{name:<16} {line}")
        sys.stdout.flush()
        printed += len(lines)
        if not follow or state != "running":
            break
        time.sleep(LOOK_S)
    if not printed:
        raise UserError(f"{run.project.url}: {_why_nothing(run, stage)}")


def _why_nothing(run: Run, stage: str | None) -> str:
    if stage is None:
        return f"no stage has printed anything in run {run.id}"
    maker = str((run.read_mark(stage) or {}).get("run", run.id))
    if maker == run.id or run.results[stage].reused:
        return f"stage {stage} has printed nothing in run {run.id}"
    return (
        f"stage {stage} has printed nothing in run {run.id}, for its result is of run {maker}; see `zoosplat logs "
        f"{run.project.url} {stage} --run {maker}`"
    )
