"""The state of each stage of a run, read from the run's record and its results."""

from __future__ import annotations

from dataclasses import dataclass

from zoosplat.errors import UserError
from zoosplat.stages.registry import StageSpec, pipeline_of
from zoosplat.stages.results import Mark
from zoosplat.stages.runs import Run


@dataclass(frozen=True)
class StageState:
    """The state of a stage in a run.

    Attributes:
        stage: name of the stage.
        state: done, reused (the result lies in another project), partial (begun), damaged (the success mark cannot be
            read) or missing.
        shards_done, shards: of the stage's work; 0 before the stage is prepared.
        mark: the success mark of the stage's result; None where there is none.
        reason: what a user has to know besides, such as why the result cannot be made; may be empty.
    """

    stage: str
    state: str
    shards_done: int = 0
    shards: int = 0
    mark: Mark | None = None
    reason: str = ""


def wall_seconds(mark: Mark) -> float:
    """Seconds from a stage's begin to its end, without pauses: at most the time that its processes worked."""
    return min(float(mark["finished"]) - float(mark["started"]), float(mark["cpu_seconds"]))


def stage_states(run: Run) -> list[StageState]:
    """The state of every stage of a run, in the order of the pipeline."""
    return [_stage_state(run, spec) for spec in pipeline_of(run.experiment)]


def _stage_state(run: Run, spec: StageSpec) -> StageState:
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


def stage_failures(run: Run) -> dict[str, str]:
    """Messages of the stages that failed in a run and have no result since, by stage; `report` may be among them."""
    entries = run.record().get("stages", {})
    failed = {name: str(entry.get("message", "")) for name, entry in entries.items() if entry.get("state") == "failed"}
    return {stage: text for stage, text in failed.items() if stage not in run.results or not _has_mark(run, stage)}


def _has_mark(run: Run, stage: str) -> bool:
    try:
        return run.read_mark(stage) is not None
    except UserError:
        return False


def stage_warnings(run: Run) -> list[str]:
    """The warnings of all stages of a run, a line each, which begins with the stage's name."""
    found = []
    for stage in run.results:
        for warning in (run.read_mark(stage) or {}).get("warnings", ()):
            found.append(f"{stage}: {warning}")
    return found
