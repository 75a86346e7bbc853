"""The state of each stage of a project, read from its marks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoosplat import stores
from zoosplat.config import Experiment
from zoosplat.pipeline import PIPELINE, StageSpec
from zoosplat.project import Mark, Project, settings_of

COLOURS = {"done": "green", "reused": "green", "partial": "yellow", "stale": "yellow", "missing": "dim"}


@dataclass(frozen=True)
class StageState:
    """A stage of a project.

    Attributes:
        stage: its name.
        state: done, reused (its output lies in another project), partial (begun), stale (its configuration, version or
            input has changed since) or missing. Whether a source video has changed is seen only by running.
        shards_done, shards: of its work; 0 before it is prepared.
        mark: its success mark, if it has one.
        reason: why it is stale.
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


def states(project: Project) -> list[StageState]:
    """The state of every stage. Raises UserError when the project holds no experiment.yaml."""
    experiment = project.read_experiment()
    found: dict[str, StageState] = {}
    for spec in PIPELINE:
        found[spec.name] = _state(project, experiment, spec, found)
    return list(found.values())


def _state(project: Project, experiment: Experiment, spec: StageSpec, before: dict[str, StageState]) -> StageState:
    mark = project.read_mark(spec.name)
    if mark is None:
        plan = stores.read_json(project.plan_url(spec.name))
        if plan is None:
            return StageState(spec.name, "missing")
        count = len(plan["bounds"]) - 1
        marks = [stores.read_json(project.shard_mark_url(spec.name, i, count)) for i in range(count)]
        done = sum(m is not None and m["digest"] == plan["digest"] for m in marks)
        return StageState(spec.name, "partial", done, count)
    now: dict[str, Any] = json.loads(json.dumps(settings_of(spec, experiment)))
    changed = sorted(key for key in now if now[key] != mark["settings"].get(key, now))
    shards = int(mark.get("shards", 0))
    reason = ""
    if changed or mark["version"] != spec.version:
        reason = f"{', '.join(changed) or 'the version of the stage'} changed"
    for name in spec.reads:
        upstream = before[name]
        if not reason and (upstream.mark is None or upstream.state == "stale"):
            reason = f"{name} is {upstream.state}"
        elif not reason and upstream.mark and upstream.mark["digest"] != mark.get("inputs", {}).get(name):
            reason = f"{name} was computed again with other settings"
    state = "stale" if reason else "reused" if mark.get("location") else "done"
    return StageState(spec.name, state, shards, shards, mark, reason)


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


def show(project: Project) -> None:
    """Print the table of `zoosplat status`."""
    table = Table(title=project.url, title_justify="left")
    for column in ("stage", "state", "shards", "time", "peak memory", "finished", "notes"):
        table.add_column(column, justify="right" if column in ("shards", "time", "peak memory") else "left")
    for s in states(project):
        mark = s.mark
        notes = [s.reason] if s.reason else []
        notes += [f"reused from {mark['location']}"] if mark and mark.get("location") else []
        notes += mark["warnings"] if mark else []
        table.add_row(
            s.stage,
            f"[{COLOURS[s.state]}]{s.state}",
            f"{s.shards_done}/{s.shards}" if s.shards else "",
            duration(seconds(mark)) if mark else "",
            peak_memory(mark) if mark else "",
            f"{datetime.fromtimestamp(mark['finished']):%Y-%m-%d %H:%M}" if mark else "",
            escape("; ".join(notes)),
        )
    Console().print(table)
