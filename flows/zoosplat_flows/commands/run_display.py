"""Shows the progress of a run: a bar for each stage on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from zoosplat_flows.execution.recorder import END_STATES, StageEvent

LINE_EVERY_S = 15.0  # seconds between lines of progress of a stage, where there is no terminal
# What is shown of a state, with its colour as rich writes it.
STATE_TEXTS = {
    "done": "[green]done",
    "skipped": "[dim]skipped, was done",
    "reused": "[green]reused",
    "shared": "[green]done by another run",
    "blocked": "[dim]not begun",
    "stopped": "[yellow]stopped",
    "failed": "[red]failed",
    "retrying": "[yellow]failed, trying again",
    "started": "",
}


class RunDisplay:
    """Shows what happens to the stages of a run. It may be called from any thread.

    Attributes:
        progress: the bars, live while its `with` block runs.
    """

    def __init__(self, stages: list[str]) -> None:
        self._console = Console()
        self._lock = threading.Lock()
        self._started: dict[str, float] = {}  # stage -> when it was started, by time.monotonic
        self._last_line: dict[str, float] = {}  # stage -> when its progress was printed last
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._bars: dict[str, TaskID] = {
            stage: self.progress.add_task(stage, total=None, start=False, note="[dim]waiting") for stage in stages
        }

    def __call__(self, event: StageEvent) -> None:
        """Show an event."""
        with self._lock:
            if event.state == "started":
                self._started.setdefault(event.stage, time.monotonic())
            (self._update_bar if self._console.is_terminal else self._print_line)(event)

    def _update_bar(self, event: StageEvent) -> None:
        bar = self._bars[event.stage]
        if event.state == "running":
            self.progress.update(bar, completed=event.done, total=event.total, note=escape(event.message))
            return
        if event.state == "started":
            self.progress.start_task(bar)
        elif event.state in ("done", "skipped", "reused", "shared"):
            total = self.progress.tasks[bar].total or 1
            self.progress.update(bar, completed=total, total=total)
            self.progress.stop_task(bar)
        elif event.state in END_STATES:
            self.progress.stop_task(bar)
        self.progress.update(bar, note=STATE_TEXTS[event.state])

    def _print_line(self, event: StageEvent) -> None:
        now = time.monotonic()
        if event.state == "running":
            if now - max(self._last_line.get(event.stage, 0.0), self._started.get(event.stage, now)) > LINE_EVERY_S:
                self._last_line[event.stage] = now
                typer.echo(f"{event.stage}: {event.done}/{event.total} {event.message}".rstrip())
        elif event.state == "started":
            typer.echo(f"{event.stage}: started")
        else:
            reason = event.message.splitlines()[-1] if event.state == "retrying" and event.message else ""
            text = STATE_TEXTS[event.state].partition("]")[2]
            seconds = now - self._started.get(event.stage, now)
            typer.echo(f"{event.stage}: {text} ({seconds:.1f} s) {reason}".rstrip())
