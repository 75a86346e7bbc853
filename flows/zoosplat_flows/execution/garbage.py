"""Finds and removes the results that no run refers to, and old runs.

Other processes may begin runs meanwhile. So the success mark of a result is removed first: then nobody takes a result
that is half removed for complete. After that the runs are read again. Where a new run refers to the result, its mark is
written back. A run that is recorded later finds no mark, waits for the lease of the result, which is held here, and
makes the result anew.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from zoosplat.errors import UserError
from zoosplat.stages.projects import RUNS, Project
from zoosplat.stages.registry import STAGES
from zoosplat.stages.results import DONE, MANIFEST, PLAN, REQUEST, RESULTS, SHARDS, Mark
from zoosplat.stages.run_state import is_run_alive
from zoosplat.stages.runs import CONFIG, RECORD
from zoosplat.stages.sources import SOURCES
from zoosplat.storage import leases, listing, objects, urls
from zoosplat_flows.formatting import format_size

LEASE = "lease"  # name of the lease in the folder of a run or result
LEASE_WAIT_S = 2 * leases.LEASE_S  # seconds after which the lease of a process that was killed elsewhere has ended
# Patterns of the names directly below the folder of a run; run.json is not among them, since it is removed first.
RUN_FILES = (CONFIG, "events.jsonl", "logs", "report", "compare-*.html", LEASE, "*.partial")


@dataclass
class Garbage:
    """What can be removed of a project, and what is left.

    Attributes:
        runs: id of each run that is to be removed -> its size in bytes.
        results: stage and id of each result that is to be removed -> its size in bytes.
        left: path of what is left although no run refers to it -> why.
        records: id of each run that stays -> its run.json. What a run refers to never changes.
    """

    runs: dict[str, int] = field(default_factory=dict)
    results: dict[tuple[str, str], int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    records: dict[str, Mark] = field(default_factory=dict)


def find_garbage(project: Project, keep_last: int | None) -> Garbage:
    """Find what can be removed of a project. Writes nothing.

    Args:
        project: the project.
        keep_last: how many of the newest runs to keep; None: all. The latest run and runs that a process works on are
            kept in any case.

    Raises:
        UserError: there is no run, or the record of a run cannot be read, so that what it refers to is not known.
    """
    if project.is_legacy():
        raise UserError(
            f"{project.url}: has the layout of an earlier version, in which nothing is kept beside what is used"
        )
    found = Garbage()
    records = _new_records(project, found)
    latest = project.latest_id()
    if not records:
        raise UserError(f"{project.url}: holds no run; nothing is removed")
    if keep_last is not None:
        for run_id in sorted(records)[: max(0, len(records) - keep_last)]:
            if run_id == latest:
                continue
            if is_run_alive(project, run_id):
                found.left[path_in_project(RUNS, run_id)] = "a process works on it"
                continue
            foreign = _foreign(project.path(RUNS, run_id), (*RUN_FILES, RECORD))
            found.left |= {path_in_project(RUNS, run_id, name): "is not a file of zoosplat" for name in foreign}
            found.runs[run_id] = _size_bytes(project.path(RUNS, run_id), foreign)
    found.records = {run_id: record for run_id, record in records.items() if run_id not in found.runs}
    wanted = _referred_results(found.records, project)
    for stage in listing.list_names(project.path(RESULTS)):
        if stage not in STAGES:
            found.left[path_in_project(RESULTS, stage)] = "is not a file of zoosplat"
            continue
        for name in listing.list_names(project.path(RESULTS, stage)):
            if (stage, name) in wanted:
                continue
            why = _why_left(project, stage, name)
            if why:
                found.left[path_in_project(RESULTS, stage, name)] = why
            else:
                found.results[stage, name] = _size_bytes(project.path(RESULTS, stage, name))
    return found


def remove_garbage(project: Project, found: Garbage) -> Iterator[str]:
    """Remove what `find_garbage` has found, except what another process has begun to use meanwhile.

    Yields:
        A line for each run and result, when it has been removed or left.
    """
    for run_id, size in found.runs.items():
        if is_run_alive(project, run_id) or run_id == project.latest_id():
            yield f"{path_in_project(RUNS, run_id)}: left, a process works on it"
            continue
        folder = project.path(RUNS, run_id)
        objects.delete(urls.join(folder, RECORD))  # from now on the folder is no run
        _remove(folder, RUN_FILES)
        _remove_empty(folder)
        yield f"{path_in_project(RUNS, run_id)}: {format_size(size)}"
    for (stage, name), size in found.results.items():
        done = _remove_result(project, stage, name, found)
        yield f"{path_in_project(RESULTS, stage, name)}: {format_size(size) if done else 'left, a run uses it now'}"


def _remove_result(project: Project, stage: str, name: str, found: Garbage) -> bool:
    """Remove a result unless a process works on it or a new run refers to it. Returns whether it was removed."""
    folder = project.path(RESULTS, stage, name)
    with contextlib.suppress(_Busy), _leased(urls.join(folder, LEASE)):
        done = urls.join(folder, DONE)
        mark = objects.read_bytes(done) if objects.exists(done) else None
        objects.delete(done)
        found.records |= _new_records(project, found)
        if (stage, name) in _referred_results(found.records, project):
            if mark is not None:
                objects.write_bytes(done, mark)
            return False
        # The request is removed last, because from it the next call knows what a killed call has left.
        for part in ((*_data_names(stage), MANIFEST, PLAN, SHARDS, "*.partial"), (REQUEST, LEASE)):
            _remove(folder, part)
        _remove_empty(folder)
        return True
    return False


class _Busy(Exception):
    """Another process holds the lease."""


@contextmanager
def _leased(url: str) -> Iterator[None]:
    """Hold a result's lease while the block runs.

    Raises:
        _Busy: another process holds it, and still does when the lease of a killed process would have ended.
    """
    until = time.monotonic() + LEASE_WAIT_S

    def waiting() -> None:
        if not urls.is_s3(url) or time.monotonic() > until:
            raise _Busy

    with leases.locked(url, waiting):
        yield


# -- what runs refer to, and what is not zoosplat's ----------------------------------------------------------------
def _new_records(project: Project, found: Garbage) -> dict[str, Mark]:
    """run.json of every run that `found` does not know yet. Other things among the runs are noted there as left.

    Raises:
        UserError: the record of a run cannot be read.
    """
    records: dict[str, Mark] = {}
    for name in listing.list_names(project.path(RUNS)):
        if name == SOURCES or name in found.records or fnmatch.fnmatch(name, "*.partial"):
            continue
        url = project.path(RUNS, name, RECORD)
        record = objects.read_json(url)
        if record is None:
            found.left[path_in_project(RUNS, name)] = "is not a run of zoosplat"
        elif record.get("id") != name or "results" not in record:
            raise UserError(f"{url}: is not the record of this run, so what it refers to is not known; repair it first")
        else:
            records[name] = record
    return records


def _referred_results(records: dict[str, Mark], project: Project) -> set[tuple[str, str]]:
    """Stage and id of each result of this project that runs refer to, also as the model that a training starts from."""
    found: set[tuple[str, str]] = set()
    ours = project.path(RESULTS) + "/"
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
    """Why something among the results of a stage is not removed; an empty string where it may be removed."""
    folder = project.path(RESULTS, stage, name)
    if _is_link(folder):
        return "is a symbolic link"
    request = objects.read_json(urls.join(folder, REQUEST))
    if request is None or (request.get("stage"), request.get("id")) != (stage, name):
        return "is not a result of zoosplat"
    mark = objects.read_json(urls.join(folder, DONE))
    if mark is not None and "data" in mark:
        return "was adopted from an earlier layout, where its data lies; remove it by hand"
    foreign = _foreign(folder, (*_data_names(stage), DONE, MANIFEST, PLAN, SHARDS, REQUEST, LEASE, "*.partial"))
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


def _data_names(stage: str) -> tuple[str, ...]:
    """Names of what a stage writes into the folder of its result."""
    return (STAGES[stage].writes, *STAGES[stage].also)


def _is_link(url: str) -> bool:
    return not urls.is_s3(url) and os.path.islink(url)


def _foreign(folder: str, ours: tuple[str, ...]) -> list[str]:
    """Names directly below a folder that match none of the patterns `ours`."""
    return [name for name in listing.list_names(folder) if not any(fnmatch.fnmatch(name, each) for each in ours)]


def _size_bytes(folder: str, without: list[str] | tuple[str, ...] = ()) -> int:
    """Size of all files below a folder, without what the names `without` directly below it hold."""
    return sum(size for name, size in listing.manifest(folder).items() if name.partition("/")[0] not in without)


def _remove(folder: str, names: tuple[str, ...]) -> None:
    """Remove what lies directly below a folder and matches one of the patterns `names`."""
    for name in listing.list_names(folder):
        if any(fnmatch.fnmatch(name, each) for each in names):
            objects.delete(urls.join(folder, name))


def _remove_empty(folder: str) -> None:
    if not urls.is_s3(folder):
        with contextlib.suppress(OSError):  # the folder still holds files that are not zoosplat's
            os.rmdir(folder)


def path_in_project(*parts: str) -> str:
    """The path of something in a project, as messages show it."""
    return "/".join(parts)
