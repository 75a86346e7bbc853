"""How a run stands: whether it works now, and how it ended."""

from __future__ import annotations

from zoosplat.stages.projects import RUNS, Project
from zoosplat.stages.registry import PIPELINE, SEGMENT
from zoosplat.stages.results import DONE, Mark, Result
from zoosplat.storage import leases, objects


def is_run_alive(project: Project, run_id: str) -> bool:
    """Whether a process, of any machine, works on a run now."""
    return leases.is_held(project.path(RUNS, run_id, "lease"))


def find_run_state(project: Project, record: Mark) -> str:
    """How a run stands, by what its run.json holds.

    Returns:
        running; interrupted where the run was to go on and no process works on it; done, failed or stopped as it ended;
        begun where its stages are run one by one and are not all done; adopted from a project of the earlier layout.
    """
    state = str(record["state"])
    if state not in ("begun", "running"):
        return state
    if is_run_alive(project, record["id"]):
        return "running"
    if state == "running":
        return "interrupted"
    entries = {stage: record["results"].get(stage) for stage in record["selected"]}
    finished = all(
        entry is not None
        and objects.exists(Result.at(entry.get("project") or project.url, stage, entry["id"]).file(DONE))
        for stage, entry in entries.items()
    )
    return "done" if finished else "begun"


def describe_run_state(state: str, record: Mark) -> str:
    """A run's state, with the stages that it was to make unless those are all."""
    selected = record["selected"]
    everything = [spec for spec in PIPELINE if spec.name != SEGMENT or SEGMENT in record["results"]]
    if len(selected) in (0, len(everything)):
        return state
    return f"{state} ({selected[0]})" if len(selected) == 1 else f"{state} ({selected[0]} to {selected[-1]})"
