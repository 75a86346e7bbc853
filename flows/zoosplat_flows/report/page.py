"""The report of a run: one self-contained page that shows what is done so far."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.run_state import describe_run_state, find_run_state
from zoosplat.stages.runs import Run
from zoosplat.storage import objects, urls
from zoosplat_flows.execution.stage_states import StageState, stage_failures, stage_states, wall_seconds
from zoosplat_flows.formatting import format_duration, format_peak_memory
from zoosplat_flows.report import sections
from zoosplat_flows.report.behaviour import Section, behaviour_section
from zoosplat_flows.report.masks import masks_section
from zoosplat_flows.report.values import check_result_files

TEMPLATES = importlib.resources.files("zoosplat_flows.report") / "templates"
# Name of each section in the template, the stage whose result it shows, and the function that makes its values.
SECTIONS: tuple[tuple[str, str, Callable[[Run, Experiment, dict[str, StageState]], Section]], ...] = (
    ("recording", "ingest", sections.recording_section),
    ("masks", "segment", masks_section),
    ("tracking", "center_rotation", sections.tracking_section),
    ("crop", "crop", sections.crop_section),
    ("training", "train", sections.training_section),
    ("evaluation", "evaluate", sections.evaluation_section),
    ("renders", "render", sections.renders_section),
    ("behaviour", "embedding", behaviour_section),
)


def build_report(run: Run, state: str = "") -> str:
    """Write the page of a run. In place of a section whose stage is not done, or cannot be read, a line says so.

    Args:
        run: the run whose results are shown.
        state: state of the run, for the head of the page; default: what the run's record says.

    Returns:
        URL of the page, see `report_url`.

    Raises:
        UserError: the page cannot be written.
    """
    experiment, record = run.experiment, run.record()
    stages = {s.stage: s for s in stage_states(run)}
    parts: dict[str, Section | None] = {}
    missing: dict[str, str] = {}
    for name, stage, make in SECTIONS:
        if stage not in stages:
            continue
        parts[name] = None
        if stages[stage].state == "damaged":
            missing[name] = f"What stage {stage} has made cannot be read: {stages[stage].reason}"
            continue
        if stages[stage].mark is None:
            missing[name] = f"Stage {stage} has not finished."
            continue
        try:
            check_result_files(run, stage)
            parts[name] = make(run, experiment, stages)
        except Exception as error:
            # A damaged or half-removed result leads to any error. It must not cost the page, which helps to find it.
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            missing[name] = f"Stage {stage} is marked as done, but its output cannot be read: {what}"
    if record:
        state = describe_run_state(state or find_run_state(run.project, record), record)
    page = render_page(
        "report.html.j2",
        experiment=experiment,
        run=run,
        state=state,
        parts=parts,
        missing=missing,
        stages=[_stage_row(s, run) for s in stages.values()],
        tiles=_tiles(stages),
        longest_s=max((wall_seconds(s.mark) for s in stages.values() if s.mark), default=0.0) or 1.0,
        failures=sorted(stage_failures(run).items()),
        warnings=[(s.stage, w) for s in stages.values() if s.mark for w in s.mark["warnings"]],
        provenance=_provenance(stages),
        config=experiment.describe(),
        built=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )
    url = report_url(run)
    objects.write_bytes(url, page.encode())
    return url


def report_url(run: Run) -> str:
    """URL of the page of a run: in the run's folder, or in the project's where its layout is the one before runs."""
    home = run.project.path("report") if run.project.is_legacy() else run.path("report")
    return urls.join(home, "index.html")


# Metrics of the figures at the top of the page, their labels and forms; those that an evaluation lacks are left out.
TILES = (
    ("iou", "IoU", "{:.3f}"),
    ("psnr", "PSNR", "{:.1f} dB"),
    ("ssim", "SSIM", "{:.3f}"),
    ("raw_psnr", "raw PSNR", "{:.1f} dB"),
)


def render_page(template: str, **values: Any) -> str:
    """A self-contained page from a template of this package. Raises jinja2.UndefinedError for a missing value."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    style = (TEMPLATES / "page.css").read_text()
    return environment.from_string((TEMPLATES / template).read_text()).render(style=style, **values)


def _tiles(stages: dict[str, StageState]) -> list[tuple[str, str]]:
    """Value and label of the figures at the top of the page: means of the evaluation, held-out views first."""
    mark = stages["evaluate"].mark
    found = []
    for group in ("held_out", "observed"):
        means = mark["figures"].get(group, {}) if mark else {}
        for key, label, form in TILES:
            if means.get(key) is not None:
                found.append((form.format(means[key]), f"{label}, {group.replace('_', '-')} views"))
    return found


def _stage_row(s: StageState, run: Run) -> Section:
    """The values of a stage in the table of time and memory."""
    mark = s.mark
    return {
        "stage": s.stage,
        "state": s.state,
        "reason": s.reason or (f"reused from {run.results[s.stage].folder}" if s.state == "reused" else ""),
        "shards": f"{s.shards_done}/{s.shards}" if s.shards else "",
        "seconds": wall_seconds(mark) if mark else 0.0,
        "time": format_duration(wall_seconds(mark)) if mark else "",
        "work": format_duration(mark["cpu_seconds"]) if mark else "",
        "memory": format_peak_memory(mark) if mark else "",
        "finished": f"{datetime.fromtimestamp(mark['finished']):%Y-%m-%d %H:%M}" if mark else "",
    }


def _provenance(stages: dict[str, StageState]) -> Section:
    """Versions and ids of the results, and the versions of the packages that made them."""
    marks = {name: s.mark for name, s in stages.items() if s.mark}
    packages = sorted({package for mark in marks.values() for package in mark["versions"]})
    return {
        "stages": [(name, mark["version"], mark["id"]) for name, mark in marks.items()],
        "packages": [
            (package, ", ".join(sorted({m["versions"][package] for m in marks.values() if package in m["versions"]})))
            for package in packages
        ],
    }
