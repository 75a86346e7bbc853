"""Adopting the results of a project of the layout before runs, without moving a file."""

from __future__ import annotations

import json
from typing import Any

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages import dependencies
from zoosplat.stages.drafts import Draft, draft_run
from zoosplat.stages.legacy import legacy_run
from zoosplat.stages.projects import LEGACY_RUN, Project
from zoosplat.stages.registry import SEGMENT, STAGES, StageSpec, pipeline_of
from zoosplat.stages.results import DONE, REQUEST, Mark, Result, json_digest
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runs import Run
from zoosplat.storage import fingerprints, objects

# The sections and keys that the digest of a stage was made from; those with a `-` are taken out of their sections.
SETTINGS = {
    "ingest": (
        "data.camera_names",
        "data.calibration_format",
        "data.calibration_unit",
        "data.up",
        "data.fps",
        "data.image_width",
        "data.image_height",
        "ingest",
    ),
    "center_rotation": ("center_rotation", "holdout_views", "unit", "adaptive_camera"),
    "crop": ("crop", "holdout_views", "unit"),
    "pack": ("pack",),
    "train": ("model", "dynamic", "train", "-train.device", "-train.gpus", "holdout_views"),
    "evaluate": ("evaluate", "-evaluate.device"),
    "render": ("render", "-render.device"),
    "features": ("features", "-features.device"),
    "embedding": ("embedding",),
}


def upgrade(project: Project) -> tuple[Run, dict[str, str]]:
    """Adopt the results of a project of the layout before runs: write a run that refers to them where they are.

    If the digest in the mark of a result shows that it was made from the present files and settings, the result gets
    the id that a new run would give it, and the next run takes it as done. Any other result gets an id of its own: it
    can be looked at, and the next run makes a new one beside it.

    Returns:
        The run, and stage -> why its result keeps an id of its own.

    Raises:
        UserError: the project is not of the earlier layout, or its configuration cannot be read.
    """
    if not project.is_legacy():
        raise UserError(f"{project.url}: is not of the earlier layout; there is nothing to upgrade")
    old = legacy_run(project)
    draft = draft_run(project, old.experiment)
    kept: dict[str, str] = {}
    results: dict[str, Result] = {}
    pipeline = pipeline_of(old.experiment)
    for spec in pipeline:
        found = old.results[spec.name]
        mark = found.mark()
        if mark is None:
            if spec.name in draft.results and not set(spec.reads) & kept.keys():
                results[spec.name] = draft.results[spec.name]
            continue
        why = _why_not_current(spec, mark, old, draft, kept)
        if why:
            kept[spec.name] = why
            request = _request_of(spec, mark, results)
        else:
            request = draft.requests[spec.name].to_json()
        results[spec.name] = _adopt(project, mark, request, found)
    current = {stage: request for stage, request in draft.requests.items() if stage in results and stage not in kept}
    adopted = Draft(project, old.experiment, current, results, frozenset(), {})
    return record_run(adopted, [spec.name for spec in pipeline], "adopted"), kept


def _why_not_current(spec: StageSpec, mark: Mark, old: Run, draft: Draft, kept: dict[str, str]) -> str:
    """Why a new run would not make this very result; empty if it would."""
    above = [name for name in spec.reads if name in kept]
    if above:
        return f"was made from a result of stage {above[0]} that is not of today's files and settings"
    if spec.name not in draft.requests:
        return draft.missing[spec.name]
    if mark["version"] != spec.version:
        return f"is of version {mark['version']} of the stage; this is version {spec.version}"
    inputs = {name: (old.read_mark(name) or {}).get("digest") for name in spec.reads}
    sources = [fingerprints.legacy_fingerprint(url) for url in _source_urls(spec.name, old.experiment)]
    settings = _settings(spec.name, old.experiment)
    if json_digest([spec.name, spec.version, settings, inputs, sources]) != mark["digest"]:
        return "was made from other files or settings than those of today"
    return ""


def _settings(stage: str, experiment: Experiment) -> dict[str, Any]:
    whole = experiment.model_dump(mode="json")
    # Keys that have come since were in no digest. They change nothing where they are as they are by default.
    for key, effect in dependencies.declared_effects().items():
        section, _, leaf = key.partition(".")
        if leaf and effect.neutral and whole[section].get(leaf) in effect.neutral:
            del whole[section][leaf]
    chosen: dict[str, Any] = {}
    for key in SETTINGS[stage]:
        if key.startswith("-"):
            section, leaf = key[1:].split(".")
            chosen[section] = {k: v for k, v in chosen[section].items() if k != leaf}
            continue
        value: Any = whole
        for part in key.split("."):
            value = value[part]
        chosen[key] = value
    chosen.pop({"pose_splatter": "dynamic", "dynamic": "model"}[experiment.train.method], None)
    return dict(json.loads(json.dumps(chosen)))


def _source_urls(stage: str, experiment: Experiment) -> list[str]:
    """The files whose fingerprints a digest was made from, in the order of then."""
    files = dependencies.outside_files(stage, experiment)
    if stage == "ingest" and experiment.ingest.source == "dnerf":
        return [url for key, url in files.items() if key.endswith(".json")]
    order = {
        "ingest": ("data.masks", "data.calibration", "data.up"),
        "pack": ("data.videos",),
        "features": ("features.weights",),
    }
    return [url for start in order.get(stage, ()) for key, url in files.items() if key.startswith(start)]


def _request_of(spec: StageSpec, mark: Mark, results: dict[str, Result]) -> Mark:
    """The request of a result that no new run would make, as far as its mark tells."""
    return {
        "stage": spec.name,
        "id": f"adopted-{mark['digest'][:16]}",
        "version": mark["version"],
        "settings": mark["settings"],
        "inputs": {name: results[name].id for name in spec.reads if name in results},
        "sources": {},
        "attempt": 0,
    }


def _adopt(project: Project, mark: Mark, request: Mark, found: Result) -> Result:
    """Write the request and the mark of a result that stays where it is."""
    result = Result.at(project.url, request["stage"], request["id"])
    place = "" if found.data_folder == project.url else found.data_folder
    new = {**mark, **request, "run": LEGACY_RUN, "data": place}
    for key in ("digest", "location"):
        new.pop(key, None)
    objects.write_json(result.file(REQUEST), request)
    objects.write_json(result.file(DONE), new)
    return Result.at(project.url, request["stage"], request["id"])


# No project of that layout has stage segment.
assert set(SETTINGS) == set(STAGES) - {SEGMENT}
