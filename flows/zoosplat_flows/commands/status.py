"""`zoosplat status`: a table of the stages of a run."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoosplat.stages.run_state import describe_run_state, find_run_state
from zoosplat.stages.runs import Run
from zoosplat_flows.execution.stage_states import stage_failures, stage_states, wall_seconds
from zoosplat_flows.formatting import format_duration, format_peak_memory

# Colours of the states of stages and of runs, as rich names them. Runs of other states are shown in `OTHER_COLOUR`.
STAGE_COLOURS = {"done": "green", "reused": "green", "partial": "yellow", "damaged": "red", "missing": "dim"}
RUN_COLOURS = {"done": "green", "adopted": "green", "running": "cyan", "failed": "red"}
OTHER_COLOUR = "yellow"


def show_status(run: Run) -> None:
    """Print the stages of a run as a table, and below it reasons, warnings and failures."""
    record, console = run.record(), Console()
    title = f"{run.project.url}, run {run.id}"
    if record:
        state = find_run_state(run.project, record)
        title += f": [{RUN_COLOURS.get(state, OTHER_COLOUR)}]{describe_run_state(state, record)}[/]"
    console.print(title, soft_wrap=True, highlight=False)
    table = Table()
    for column in ("stage", "state", "shards", "time", "peak memory", "finished"):
        table.add_column(column, justify="right" if column in ("shards", "time", "peak memory") else "left")
    notes: list[tuple[str, str]] = []
    for s in stage_states(run):
        mark = s.mark
        notes += [(s.stage, s.reason)] if s.reason else []
        notes += [(s.stage, f"reused from {run.results[s.stage].folder}")] if s.state == "reused" else []
        notes += [(s.stage, warning) for warning in mark["warnings"]] if mark else []
        table.add_row(
            s.stage,
            f"[{STAGE_COLOURS[s.state]}]{s.state}",
            f"{s.shards_done}/{s.shards}" if s.shards else "",
            format_duration(wall_seconds(mark)) if mark else "",
            format_peak_memory(mark) if mark else "",
            f"{datetime.fromtimestamp(mark['finished']):%Y-%m-%d %H:%M}" if mark else "",
        )
    console.print(table)
    # Below the table: in a narrow terminal a column for them would be ten letters wide.
    notes += [(stage, f"failed: {text}") for stage, text in stage_failures(run).items()]
    for stage, text in notes:
        console.print(f"[bold]{stage}[/]: {escape(text)}", soft_wrap=True, highlight=False)
