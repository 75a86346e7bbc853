"""`zoosplat logs`: prints what the stages of a run have printed."""

from __future__ import annotations

import sys
import time

import typer

from zoosplat.errors import UserError
from zoosplat.stages.registry import pipeline_of, require_stage
from zoosplat.stages.run_state import find_run_state
from zoosplat.stages.runs import Run
from zoosplat.storage import objects

POLL_S = 1.0  # seconds between looks for new lines, with --follow


class _LogReader:
    """Reads the log of a stage, which may still grow."""

    def __init__(self, run: Run, stage: str) -> None:
        self.stage, self._url = stage, run.path("logs", f"{stage}.log")
        self._n_read, self._unfinished = 0, b""  # bytes read, and the line at their end that has no end yet

    def read_new_lines(self) -> list[str]:
        """The lines that have been completed since the last call; none before the stage has printed anything."""
        try:
            with objects.open_read(self._url) as file:
                file.seek(self._n_read)
                new = file.read()
        except FileNotFoundError:
            return []
        self._n_read += len(new)
        *lines, self._unfinished = (self._unfinished + new).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def show_logs(run: Run, stage: str | None, follow: bool) -> None:
    """Print the log of a stage, or the lines of all stages by time, each with its stage's name.

    Args:
        run: the run whose stages have printed the lines.
        stage: name of a stage; None: all stages.
        follow: go on with new lines until the run has ended.

    Raises:
        UserError: there is no such stage, or it has printed nothing.
    """
    if stage is not None:
        require_stage(stage, run.experiment)
    stages = [stage] if stage else [spec.name for spec in pipeline_of(run.experiment)]
    logs = [_LogReader(run, name) for name in stages]
    printed = 0
    while True:
        state = find_run_state(run.project, run.record()) if run.record() else ""
        # Lines begin with their time. The sort is stable, so lines of one time and stage keep their order.
        lines = sorted(
            ((line, log.stage) for log in logs for line in log.read_new_lines()),
            key=lambda each: each[0].partition(" ")[0],
        )
        for line, name in lines:
            typer.echo(line if stage else f"{name:<16} {line}")
        sys.stdout.flush()
        printed += len(lines)
        if not follow or state != "running":
            break
        time.sleep(POLL_S)
    if not printed:
        raise UserError(f"{run.project.url}: {_explain_no_lines(run, stage)}")


def _explain_no_lines(run: Run, stage: str | None) -> str:
    if stage is None:
        return f"no stage has printed anything in run {run.id}"
    maker = str((run.read_mark(stage) or {}).get("run", run.id))
    if maker == run.id or run.results[stage].reused:
        return f"stage {stage} has printed nothing in run {run.id}"
    return (
        f"stage {stage} has printed nothing in run {run.id}, for its result is of run {maker}; see `zoosplat logs "
        f"{run.project.url} {stage} --run {maker}`"
    )
