"""The state of a run and of each of its stages, read from its record and its results."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoosplat.errors import UserError
from zoosplat.stages.registry import PIPELINE, StageSpec
from zoosplat.stages.results import Mark
from zoosplat.stages.run_state import in_words, run_state
from zoosplat.stages.runs import Run

COLOURS = {"done": "green", "reused": "green", "partial": "yellow", "damaged": "red", "missing": "dim"}
RUN_COLOURS = {"done": "green", "adopted": "green", "running": "cyan", "failed": "red"}


@dataclass(frozen=True)
class StageState:
    """A stage of a run.

    Attributes:
        stage: its name.
        state: done, reused (its result lies in another project), partial (begun), damaged (its mark cannot be read) or
            missing.
        shards_done, shards: of its work; 0 before it is prepared.
        mark: its success mark, if it has one.
        reason: what else is to be said of it, such as why it cannot be made.
    """

    stage: str
    state: str
    shards_done: int = 0
    shards: int = 0
    mark: Mark | None = None
    reason: str = ""


def seconds(mark: Mark) -> float:
    """Time a stage took: its begin to its end, or the time it worked where that is less, as after a stop overnight."""
    return min(float(mark["finished"]) - float(mark["started"]), float(mark["cpu_seconds"]))


def states(run: Run) -> list[StageState]:
    """The state of every stage of a run."""
    return [_state(run, spec) for spec in PIPELINE]


def _state(run: Run, spec: StageSpec) -> StageState:
    result = run.results.get(spec.name)
    if result is None:
        return StageState(spec.name, "missing", reason="what it is made from could not be read when the run was begun")
    try:
        mark = result.mark()
    except UserError as error:
        return StageState(spec.name, "damaged", reason=str(error))
    done, count = result.shards_done()
    if mark is not None:
        return StageState(spec.name, "reused" if result.reused else "done", count, count, mark)
    older = run.older_version(spec.name)
    reason = (
        "" if older is None else f"the result of version {older} of the stage is kept; this is version {spec.version}"
    )
    return StageState(spec.name, "partial" if count else "missing", done, count, reason=reason)


def duration(s: float) -> str:
    """`42.0 s`, `3 min 05 s`, `2 h 07 min`."""
    if s < 60:
        return f"{s:.1f} s"
    if s < 3600:
        return f"{int(s) // 60} min {int(s) % 60:02d} s"
    return f"{int(s) // 3600} h {int(s) % 3600 // 60:02d} min"


def memory(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def peak_memory(mark: Mark) -> str:
    """Of the largest process of a stage, and of its GPU where it used one."""
    gpu = mark["figures"].get("peak_gpu_bytes")
    return memory(mark["peak_memory_bytes"]) + (f", GPU {memory(gpu)}" if gpu else "")


def failures(run: Run) -> dict[str, str]:
    """What the stages said that failed in a run and have no result since; `report` may be among them."""
    ended = run.record().get("stages", {})
    failed = {stage: str(entry.get("message", "")) for stage, entry in ended.items() if entry.get("state") == "failed"}
    return {stage: text for stage, text in failed.items() if stage not in run.results or not _has_mark(run, stage)}


def _has_mark(run: Run, stage: str) -> bool:
    try:
        return run.read_mark(stage) is not None
    except UserError:
        return False


def show(run: Run) -> None:
    """Print the table of `zoosplat status`, and below it what is to be said of the stages."""
    record, console = run.record(), Console()
    title = f"{run.project.url}, run {run.id}"
    if record:
        state = run_state(run.project, record)
        title += f": [{RUN_COLOURS.get(state, 'yellow')}]{in_words(state, record)}[/]"
    console.print(title, soft_wrap=True, highlight=False)
    table = Table()
    for column in ("stage", "state", "shards", "time", "peak memory", "finished"):
        table.add_column(column, justify="right" if column in ("shards", "time", "peak memory") else "left")
    notes: list[tuple[str, str]] = []
    for s in states(run):
        mark = s.mark
        notes += [(s.stage, s.reason)] if s.reason else []
        notes += [(s.stage, f"reused from {run.results[s.stage].folder}")] if s.state == "reused" else []
        notes += [(s.stage, warning) for warning in mark["warnings"]] if mark else []
        table.add_row(
            s.stage,
            f"[{COLOURS[s.state]}]{s.state}",
            f"{s.shards_done}/{s.shards}" if s.shards else "",
            duration(seconds(mark)) if mark else "",
            peak_memory(mark) if mark else "",
            f"{datetime.fromtimestamp(mark['finished']):%Y-%m-%d %H:%M}" if mark else "",
        )
    console.print(table)
    # Not in a column of the table, which a narrow terminal would leave ten letters.
    notes += [(stage, f"failed: {text}") for stage, text in failures(run).items()]
    for stage, text in notes:
        console.print(f"[bold]{stage}[/]: {escape(text)}", soft_wrap=True, highlight=False)
