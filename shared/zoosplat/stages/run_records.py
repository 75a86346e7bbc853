"""Writing the record of a run, and going on with a run that is recorded."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from zoosplat.errors import UserError
from zoosplat.stages.drafts import Draft
from zoosplat.stages.latest_links import link_latest
from zoosplat.stages.projects import LATEST, RUNS
from zoosplat.stages.registry import pipeline_of
from zoosplat.stages.results import RESULTS
from zoosplat.stages.runs import CONFIG, RECORD, Run
from zoosplat.stages.sources import remember
from zoosplat.storage import leases, objects

MAX_RUNS_SEARCHED = 10  # The newest runs, among which a command finds the run that it goes on with.


def _record_content(draft: Draft) -> tuple[str, dict[str, Any]]:
    """The text of config.yaml, and the value of `results` in run.json."""
    entries: dict[str, Any] = {}
    for stage, result in draft.results.items():
        request = draft.requests.get(stage)
        entries[stage] = {
            "id": result.id,
            "version": result.require()["version"] if request is None else request.version,
            "sources": {} if request is None else {key: vars(source) for key, source in request.sources.items()},
        }
        if result.reused:
            entries[stage]["project"] = result.folder.removesuffix(f"/{RESULTS}/{stage}/{result.id}")
    return draft.experiment.to_yaml(), entries


def record_run(draft: Draft, stages: Collection[str], state: str = "begun") -> Run:
    """Write a new run's record and make it the project's latest.

    Args:
        draft: What the run is to make.
        stages: The stages that the run is to make; they are kept for display.
        state: The state of the run in its record.
    """
    project = draft.project
    text, entries = _record_content(draft)
    # The last four digits are the part of the second, so that ids ascend with time and hardly ever meet.
    now = datetime.now(UTC)
    run_id = f"{now:%Y%m%d-%H%M%S}-{now.microsecond * 0x10000 // 1_000_000:04x}"
    for stage in draft.forced & draft.requests.keys():
        # The attempt is claimed now, so that it is found by the next run if this run stops before the stage begins.
        draft.results[stage].claim(draft.requests[stage])
    objects.write_bytes(project.path(RUNS, run_id, CONFIG), text.encode())
    objects.write_json(
        project.path(RUNS, run_id, RECORD),
        {
            "id": run_id,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "forced": sorted(draft.forced),
            "selected": [spec.name for spec in pipeline_of(draft.experiment) if spec.name in stages],
            "results": entries,
            "state": state,
            "stages": {},
        },
    )
    objects.write_json(project.path(LATEST), {"run": run_id})
    remember(project, draft.sources())
    return Run.load(project, run_id)


@contextmanager
def hold_run(draft: Draft, stages: Collection[str]) -> Iterator[Run]:
    """Record a run, or take a recorded run of the same draft on which no other process works, and hold its lease.

    So the same command, given again after a crash, goes on with the same run, which becomes the latest again. While the
    block runs, other processes see that the run is alive.
    """
    with contextlib.ExitStack() as held:
        run = next(filter(lambda run: held.enter_context(leases.try_locked(run.path("lease"))), _runs_of(draft)), None)
        if run is None:
            run = record_run(draft, stages)
            held.enter_context(leases.try_locked(run.path("lease")))
        elif draft.project.latest_id() != run.id:
            objects.write_json(draft.project.path(LATEST), {"run": run.id})
        objects.remove_partials(run.path())
        remember(draft.project, draft.sources())
        link_latest(run)
        yield run


def _runs_of(draft: Draft) -> Iterator[Run]:
    """The recorded runs of a draft, the newest first. Only the newest runs of the project are searched."""
    for run_id in reversed(draft.project.run_ids()[-MAX_RUNS_SEARCHED:]):
        with contextlib.suppress(UserError):  # A damaged record is reported to whoever opens that run.
            run = Run.load(draft.project, run_id)
            if is_run_of(run, draft):
                yield run


def is_run_of(run: Run, draft: Draft) -> bool:
    """Whether a recorded run has the configuration and the results of a draft."""
    text, entries = _record_content(draft)
    stored = run.record()["results"]
    ids = {stage: (entry["id"], entry.get("project")) for stage, entry in stored.items()}
    return run.experiment.to_yaml() == text and ids == {s: (e["id"], e.get("project")) for s, e in entries.items()}
