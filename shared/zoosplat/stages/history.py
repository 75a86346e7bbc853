"""The runs of a project: what each changed against the one before, how it stands, and what came of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from zoosplat.config.experiment import Experiment
from zoosplat.config.serialization import parse_yaml
from zoosplat.errors import UserError
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import RUNS, Project
from zoosplat.stages.registry import PIPELINE
from zoosplat.stages.results import Mark, Result
from zoosplat.stages.run_state import describe_run_state, find_run_state
from zoosplat.stages.runs import CONFIG, RECORD
from zoosplat.storage import objects

VIEW_GROUPS = ("held_out", "observed")  # The groups of cameras that an evaluation has means of.
SettingChange = tuple[str, str, str]  # The key, its value before and its value now.


@dataclass(frozen=True)
class HistoryEntry:
    """A run in the table.

    Attributes:
        id: of the run.
        created: when it was begun, in ISO format; empty where it is not known.
        changes: what differs from the run before; None for the first one, and where one of the two cannot be read.
        state: in words.
        means: of the evaluation, held_out and observed: metric -> mean; empty before that is done.
    """

    id: str
    created: str
    changes: list[str] | None
    state: str
    means: dict[str, dict[str, float | None]]


def flatten_settings(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested configuration and their values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def find_setting_changes(before: dict[str, Any], now: dict[str, Any]) -> list[SettingChange]:
    """Settings that differ between two configurations with dotted keys; of lists of one length, their items."""
    changes: list[SettingChange] = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            items = zip(old, new, strict=True)
            changes += [(f"{key}[{i}]", _text(a), _text(b)) for i, (a, b) in enumerate(items) if a != b]
        elif old != new:
            changes.append((key, _text(old), _text(new)))
    return changes


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def read_settings(project: Project, run_id: str) -> dict[str, Any]:
    """A run's configuration with dotted keys, of whatever version; keys that are newer than it have their defaults.

    Raises:
        UserError: it is damaged.
    """
    url = project.path(RUNS, run_id, CONFIG)
    try:
        values = parse_yaml(objects.read_bytes(url).decode(errors="replace"))
    except FileNotFoundError:
        raise UserError(f"{url}: is missing") from None
    if not isinstance(values, dict):
        raise UserError(f"{url}: is damaged: holds no settings")
    found = flatten_settings(values)
    return found | {key: value for key, value in _default_settings().items() if key not in found}


@cache
def _default_settings() -> dict[str, Any]:
    """The default of every key that has one, by its dotted name."""

    def walk(section: type[BaseModel], prefix: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                values |= walk(field.annotation, f"{prefix}{name}.")
            elif not field.is_required():
                values[prefix + name] = to_jsonable_python(field.get_default())
        return values

    return walk(Experiment, "")


def find_other_causes(before: Mark, now: Mark) -> list[str]:
    """Why results differ between two runs, by their run.json, though no setting does: versions, contents of files."""
    causes: list[str] = []
    for spec in PIPELINE:
        old, new = (record["results"].get(spec.name) for record in (before, now))
        if old is None or new is None:
            continue
        if old["version"] != new["version"]:
            causes.append(f"stage {spec.name}: version {old['version']} -> {new['version']}")
        for key, source in new["sources"].items():
            earlier = old["sources"].get(key)
            if earlier is None or earlier["url"] != source["url"]:
                continue  # Another URL is another setting, which is listed among the changes.
            if earlier["fingerprint"] != source["fingerprint"]:
                causes.append(f"{key}: other contents of {source['url']}")
    return list(dict.fromkeys(causes))


def evaluation_means(mark: Mark | None) -> dict[str, dict[str, float | None]]:
    """Means of the held-out and of the observed views, of an evaluation's mark; empty where there is none."""
    return {} if mark is None else {group: mark["figures"][group] for group in VIEW_GROUPS if group in mark["figures"]}


def read_history(project: Project) -> list[HistoryEntry]:
    """The runs of a project, the oldest first. Raises UserError where there is none."""
    if project.is_legacy():
        return [_read_legacy_entry(project)]
    found: list[HistoryEntry] = []
    before: tuple[Mark, dict[str, Any]] | None = None
    for run_id in project.run_ids():
        url = project.path(RUNS, run_id, RECORD)
        try:
            record = objects.read_json(url)
            if record is None:
                continue  # The folder is not that of a run, or its record is being written.
            now = record, read_settings(project, run_id)
            found.append(_read_entry(project, *now, before))
            before = now
        except (UserError, KeyError) as error:
            damaged = str(error) if isinstance(error, UserError) else f"{url}: is damaged: lacks {error}"
            found.append(HistoryEntry(run_id, "", None, damaged, {}))
            before = None
    if not found:
        raise UserError(f"{project.url}: holds no run; start with `zoosplat run CONFIG --project URL`")
    return found


def _read_entry(
    project: Project, record: Mark, values: dict[str, Any], before: tuple[Mark, dict[str, Any]] | None
) -> HistoryEntry:
    changes = [f"{stage}: made again" for stage in record["forced"]]
    if before is not None:
        changes += [f"{key} {old} -> {new}" for key, old, new in find_setting_changes(before[1], values)]
        changes += find_other_causes(before[0], record)
    state = describe_run_state(find_run_state(project, record), record)
    evaluated = record["results"].get("evaluate")
    mark = None
    if evaluated is not None:
        mark = Result.at(evaluated.get("project") or project.url, "evaluate", evaluated["id"]).mark()
    known = before is not None or bool(changes)
    return HistoryEntry(record["id"], record["created"], changes if known else None, state, evaluation_means(mark))


def _read_legacy_entry(project: Project) -> HistoryEntry:
    run = open_run(project)
    marks = [mark for stage in run.results if (mark := run.read_mark(stage)) is not None]
    finished = max((float(mark["finished"]) for mark in marks), default=None)
    created = "" if finished is None else datetime.fromtimestamp(finished).astimezone().isoformat()
    state = f"of an earlier layout; `zoosplat upgrade {project.url}` adopts it"
    return HistoryEntry(run.id, created, None, state, evaluation_means(run.read_mark("evaluate")))
