"""`zoosplat gc`: removes results that no run refers to, and old runs; nothing that is not zoosplat's.

Others may begin runs meanwhile. Of a result the mark `done.json` goes first, so that nothing half removed is taken for
complete; then the runs are looked at again, and where one has come to refer to it, the mark is put back. A run that is
recorded later finds no mark, and makes the result anew once its lease, which is held here, is free.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import typer

from zoosplat.errors import UserError
from zoosplat.stages.registry import STAGES
from zoosplat.stages.results import DONE, FOLDER, MANIFEST, PLAN, REQUEST, SHARDS, Mark
from zoosplat.stages.run_state import is_alive
from zoosplat.stages.runs import CONFIG, RECORD, RUNS, SOURCES, Project, is_legacy
from zoosplat.storage import leases, listing, objects, urls

LEASE = "lease"
WAIT_S = 2 * leases.LEASE_S  # for the lease of a process on another machine that was killed
RUN_FILES = (CONFIG, "events.jsonl", "logs", "report", "compare-*.html", LEASE, "*.partial")  # and run.json


@dataclass
class Found:
    """What `zoosplat gc` removes of a project, and what it leaves.

    Attributes:
        runs: id of each run that goes -> bytes.
        results: stage and id of each result that goes -> bytes.
        left: what is left although no run refers to it -> why.
        records: of each run that stays, its run.json: what it refers to never changes.
    """

    runs: dict[str, int] = field(default_factory=dict)
    results: dict[tuple[str, str], int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    records: dict[str, Mark] = field(default_factory=dict)


def look(project: Project, keep_last: int | None) -> Found:
    """What there is to be removed. Writes nothing.

    Args:
        project: a project.
        keep_last: runs to be kept, the newest; None: all. The latest one, and one that is at work, are kept besides.

    Raises:
        UserError: there is no run, or the record of one cannot be read, so that what it refers to is not known.
    """
    if is_legacy(project):
        raise UserError(
            f"{project.url}: has the layout of an earlier version, in which nothing is kept beside what is used"
        )
    found = Found()
    records = _new_records(project, found)
    latest = project.latest_id()
    if not records:
        raise UserError(f"{project.url}: holds no run; nothing is removed")
    if keep_last is not None:
        for run_id in sorted(records)[: max(0, len(records) - keep_last)]:
            if run_id == latest:
                continue
            if is_alive(project, run_id):
                found.left[_name(RUNS, run_id)] = "a process works on it"
                continue
            foreign = _foreign(project.path(RUNS, run_id), (*RUN_FILES, RECORD))
            found.left |= {_name(RUNS, run_id, name): "is not a file of zoosplat" for name in foreign}
            found.runs[run_id] = _bytes(project.path(RUNS, run_id), foreign)
    found.records = {run_id: record for run_id, record in records.items() if run_id not in found.runs}
    wanted = _referred(found.records, project)
    for stage in listing.list_names(project.path(FOLDER)):
        if stage not in STAGES:
            found.left[_name(FOLDER, stage)] = "is not a file of zoosplat"
            continue
        for name in listing.list_names(project.path(FOLDER, stage)):
            if (stage, name) in wanted:
                continue
            why = _why_left(project, stage, name)
            if why:
                found.left[_name(FOLDER, stage, name)] = why
            else:
                found.results[stage, name] = _bytes(project.path(FOLDER, stage, name))
    return found


def collect(project: Project, found: Found) -> Iterator[str]:
    """Remove what `look` has found, and say so, a line each.

    What another process has begun to use meanwhile is left, and said.
    """
    for run_id, size in found.runs.items():
        if is_alive(project, run_id) or run_id == project.latest_id():
            yield f"{_name(RUNS, run_id)}: left, a process works on it"
            continue
        folder = project.path(RUNS, run_id)
        objects.delete(urls.join(folder, RECORD))  # from now on it is no run
        _remove(folder, RUN_FILES)
        _remove_empty(folder)
        yield f"{_name(RUNS, run_id)}: {in_bytes(size)}"
    for (stage, name), size in found.results.items():
        done = _remove_result(project, stage, name, found)
        yield f"{_name(FOLDER, stage, name)}: {in_bytes(size) if done else 'left, a run uses it now'}"


def _remove_result(project: Project, stage: str, name: str, found: Found) -> bool:
    """Remove a result unless somebody works on it, or a run has come to refer to it; whether it was removed."""
    folder = project.path(FOLDER, stage, name)
    with contextlib.suppress(_Busy), _leased(urls.join(folder, LEASE)):
        done = urls.join(folder, DONE)
        mark = objects.read_bytes(done) if objects.exists(done) else None
        objects.delete(done)
        found.records |= _new_records(project, found)
        if (stage, name) in _referred(found.records, project):
            if mark is not None:
                objects.write_bytes(done, mark)
            return False
        # The request last: what is left by a crash is known by it the next time.
        for part in ((*_data_of(stage), MANIFEST, PLAN, SHARDS, "*.partial"), (REQUEST, LEASE)):
            _remove(folder, part)
        _remove_empty(folder)
        return True
    return False


class _Busy(Exception):
    """Another process has the lease."""


@contextmanager
def _leased(url: str) -> Iterator[None]:
    """Hold a result's lease; raises _Busy where another process does, also after the lease of a dead one is over."""
    until = time.monotonic() + WAIT_S

    def waiting() -> None:
        if not urls.is_s3(url) or time.monotonic() > until:
            raise _Busy

    with leases.locked(url, waiting):
        yield


# -- what is whose ------------------------------------------------------------------------------------------------
def _new_records(project: Project, found: Found) -> dict[str, Mark]:
    """run.json of every run that is not known yet. What else lies among the runs is noted as left.

    Raises:
        UserError: one cannot be read.
    """
    records: dict[str, Mark] = {}
    for name in listing.list_names(project.path(RUNS)):
        if name == SOURCES or name in found.records or fnmatch.fnmatch(name, "*.partial"):
            continue
        url = project.path(RUNS, name, RECORD)
        record = objects.read_json(url)
        if record is None:
            found.left[_name(RUNS, name)] = "is not a run of zoosplat"
        elif record.get("id") != name or "results" not in record:
            raise UserError(f"{url}: is not the record of this run, so what it refers to is not known; repair it first")
        else:
            records[name] = record
    return records


def _referred(records: dict[str, Mark], project: Project) -> set[tuple[str, str]]:
    """Stage and id of each result of this project that runs refer to, also as what a training begins with."""
    found: set[tuple[str, str]] = set()
    ours = project.path(FOLDER) + "/"
    for record in records.values():
        for stage, entry in record["results"].items():
            if entry.get("project") in (None, project.url):
                found.add((stage, str(entry["id"])))
            for source in entry["sources"].values():
                if source["url"].startswith(ours):
                    stage_there, _, rest = source["url"].removeprefix(ours).partition("/")
                    found.add((stage_there, rest.partition("/")[0]))
    return found


def _why_left(project: Project, stage: str, name: str) -> str:
    """Why something among the results of a stage is not to be removed; empty where it is."""
    folder = project.path(FOLDER, stage, name)
    if _is_link(folder):
        return "is a symbolic link"
    request = objects.read_json(urls.join(folder, REQUEST))
    if request is None or (request.get("stage"), request.get("id")) != (stage, name):
        return "is not a result of zoosplat"
    mark = objects.read_json(urls.join(folder, DONE))
    if mark is not None and "data" in mark:
        return "was adopted from an earlier layout, where its data lies; remove it by hand"
    foreign = _foreign(folder, (*_data_of(stage), DONE, MANIFEST, PLAN, SHARDS, REQUEST, LEASE, "*.partial"))
    if foreign:
        return f"holds {foreign[0]}, which is not a file of zoosplat"
    linked = [each for each in listing.list_names(folder) if _is_link(urls.join(folder, each))]
    if linked:
        return f"holds {linked[0]}, a symbolic link"
    shards = urls.join(folder, SHARDS)
    held = [urls.join(shards, each) for each in listing.list_names(shards) if each.endswith(".lease")]
    if any(leases.is_held(each) for each in (urls.join(folder, LEASE), *held)):
        return "a process works on it"
    return ""


def _data_of(stage: str) -> tuple[str, ...]:
    return (STAGES[stage].writes, *STAGES[stage].also)


def _is_link(url: str) -> bool:
    return not urls.is_s3(url) and os.path.islink(url)


def _foreign(folder: str, ours: tuple[str, ...]) -> list[str]:
    """Names directly below a folder that match none of these patterns."""
    return [name for name in listing.list_names(folder) if not any(fnmatch.fnmatch(name, each) for each in ours)]


def _bytes(folder: str, but: list[str] | tuple[str, ...] = ()) -> int:
    """Size of all files below a folder, without those of these names directly below it."""
    return sum(size for name, size in listing.manifest(folder).items() if name.partition("/")[0] not in but)


def _remove(folder: str, names: tuple[str, ...]) -> None:
    """Remove what matches these patterns directly below a folder."""
    for name in listing.list_names(folder):
        if any(fnmatch.fnmatch(name, each) for each in names):
            objects.delete(urls.join(folder, name))


def _remove_empty(folder: str) -> None:
    if not urls.is_s3(folder):
        with contextlib.suppress(OSError):  # it holds what is not ours
            os.rmdir(folder)


def _name(*parts: str) -> str:
    return "/".join(parts)


# -- the command --------------------------------------------------------------------------------------------------
def in_bytes(n: int) -> str:
    """`312 bytes`, `4.1 kB`, `1.23 GB`."""
    if n < 1000:
        return f"{n} bytes"
    power = next((power for power in (1, 2, 3) if n < 999.5 * 1000**power), 4)
    return f"{n / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def show(project: Project, keep_last: int | None, dry_run: bool) -> None:
    """Remove, or with `dry_run` only name, what no run refers to. Raises UserError as `look`."""
    found = look(project, keep_last)
    sizes = {_name(RUNS, run_id): size for run_id, size in found.runs.items()}
    sizes |= {_name(FOLDER, *of): size for of, size in found.results.items()}
    lines = (f"{name}: {in_bytes(size)}" for name, size in sizes.items()) if dry_run else collect(project, found)
    for line in lines:
        typer.echo(line)
    for name, why in found.left.items():
        typer.echo(f"left {name}: {why}")
    if not sizes:
        typer.echo("nothing to free: every result is one that a run refers to")
    else:
        typer.echo(f"{'would free' if dry_run else 'freed'} about {in_bytes(sum(sizes.values()))}")
