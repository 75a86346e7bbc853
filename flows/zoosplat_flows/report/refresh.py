"""Builds the report of a run again when it does not show what is done."""

from __future__ import annotations

from importlib.metadata import version

from zoosplat.stages.latest_links import link_latest
from zoosplat.stages.runs import Run
from zoosplat.storage import objects
from zoosplat_flows.execution.recorder import EventListener, RunRecorder, StageEvent


def _shown_results(run: Run) -> list[str]:
    """What the report of a run shows: the version of zoosplat, and the ids of the results that are done."""
    return [version("zoosplat"), *(f"{stage}/{result.id}" for stage, result in run.results.items() if result.is_done())]


def ensure_report(run: Run, recorder: RunRecorder, tell: EventListener) -> str:
    """Build the report page of what is done, unless the page that exists shows just that. Returns its URL."""
    shown, url = _shown_results(run), run.path("report", "index.html")
    tell(StageEvent("report", "started"))
    if recorder.get("report") == shown and objects.exists(url):
        tell(StageEvent("report", "skipped"))
        return url
    # Imported here: it loads matplotlib, which `zoosplat run` needs only at its end.
    from zoosplat_flows.report.page import build_report

    try:
        build_report(run, "done")
    except Exception as error:
        tell(StageEvent("report", "failed", message=str(error)))
        raise
    recorder.set("report", shown)
    link_latest(run)
    tell(StageEvent("report", "done"))
    return url
