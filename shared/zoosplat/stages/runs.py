"""Runs: which results a configuration leads to, in a record of its own that no other run replaces.

    PROJECT/runs/<run id>/config.yaml   the configuration, with every path resolved
    PROJECT/runs/<run id>/run.json      stage -> result id; state and times of the stages
    PROJECT/latest.json                 the run that is shown when none is named
    PROJECT/latest/                     on local disks: links to that run's results under their plain names

A stage is told the project and the run, and knows everything else from the run's record.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.config.training import ANIMALS, RANDOM
from zoosplat.errors import UserError
from zoosplat.stages import dependencies
from zoosplat.stages.registry import PIPELINE, STAGES
from zoosplat.stages.results import FOLDER, REQUEST, Mark, Request, Result, Source, attempt_of, is_id
from zoosplat.storage import fingerprints, groups, leases, listing, objects, urls

RUNS, LATEST, LINKS, SOURCES = "runs", "latest.json", "latest", "sources.json"
CONFIG, RECORD, REPORT, LOGS = "config.yaml", "run.json", "report", "logs"  # in a run's folder
LEGACY_CONFIG = "experiment.yaml"
LEGACY_RUN = "before-runs"  # id of the one run that a project of the layout before amounts to
LOOKED_AT = 10  # runs, the newest, among which the same command finds the one to go on with
REUSABLE = ("ingest", "pack")  # stages whose results may be read from the project that `reuse` names


@dataclass(frozen=True)
class Project:
    """A folder or S3 prefix that holds the runs and results of an experiment."""

    url: str

    @classmethod
    def at(cls, url: str) -> Project:
        """The project at a path or URL, whether or not anything is there. Raises UserError as `urls.normalize`."""
        return cls(urls.normalize(url))

    def path(self, *parts: str) -> str:
        return urls.join(self.url, *parts)

    def run_ids(self) -> list[str]:
        """Ids of all runs, the oldest first: an id begins with the time when the run was begun."""
        return sorted(name for name in listing.list_folders(self.path(RUNS)) if not name.startswith("."))

    def exists(self) -> bool:
        """Whether there is a project, of today's layout or of the one before."""
        return self.latest_id() is not None or is_legacy(self)

    def latest_id(self) -> str | None:
        """Id of the run that was begun last; None where there is none."""
        latest = objects.read_json(self.path(LATEST))
        return None if latest is None else str(latest["run"])

    def run(self, run_id: str | None = None) -> Run:
        """A run by its id or the beginning of it; None: the latest one.

        A project of the layout before runs is read as if it held one run.

        Raises:
            UserError: there is no such run.
        """
        if run_id is None:
            latest = self.latest_id()
            if latest is not None:
                return Run.load(self, latest)
        if run_id in (None, LEGACY_RUN) and is_legacy(self):
            from zoosplat.stages.legacy import legacy_run

            return legacy_run(self)
        if run_id is None:
            raise UserError(f"{self.url}: holds no run; start with `zoosplat run CONFIG --project URL`")
        found = [name for name in self.run_ids() if name.startswith(run_id)]
        if run_id in found:
            found = [run_id]
        if len(found) != 1:
            what = "there is no run" if not found else f"{len(found)} runs begin with"
            raise UserError(f"{self.url}: {what} {run_id}; `zoosplat runs {self.url}` lists them")
        return Run.load(self, found[0])


def is_legacy(project: Project) -> bool:
    """Whether a project is of the layout before runs: one experiment.yaml, and marks in `_marks`."""
    return objects.read_json(project.path(LATEST)) is None and objects.exists(project.path(LEGACY_CONFIG))


@dataclass(frozen=True)
class Run:
    """One run: a configuration and the result that each stage has, or is to make, under it.

    Attributes:
        project: where it lies.
        id: its id.
        experiment: its configuration.
        results: stage -> result; a stage is absent where a file that determines its result could not be read.
        sources: stage -> files outside the project that determine its result.
        versions: stage -> version of the stage that the result is of.
    """

    project: Project
    id: str
    experiment: Experiment
    results: Mapping[str, Result]
    sources: Mapping[str, Mapping[str, Source]] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    _opened: dict[str, zarr.Group] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, project: Project, run_id: str) -> Run:
        """A run from its record. Raises UserError where the record is missing or damaged."""
        where = project.path(RUNS, run_id)
        record = objects.read_json(urls.join(where, RECORD))
        try:
            text = objects.read_bytes(urls.join(where, CONFIG)).decode()
        except FileNotFoundError:
            text = None
        if record is None or text is None:
            raise UserError(
                f"{where}: holds no complete record of a run; `zoosplat runs {project.url}` lists those there are"
            )
        try:
            experiment = Experiment.from_yaml(text)
        except UserError as error:
            raise UserError("\n".join(f"{where}/{CONFIG}: {line}" for line in str(error).splitlines())) from None
        results, sources, versions = {}, {}, {}
        for stage in STAGES:  # in the order of the pipeline
            entry = record["results"].get(stage)
            if entry is None:
                continue
            home = entry.get("project")
            where_made = project.url if home is None else urls.normalize(home)
            results[stage] = Result.at(where_made, stage, entry["id"], reused=home is not None)
            sources[stage] = {key: Source(**value) for key, value in entry["sources"].items()}
            versions[stage] = int(entry["version"])
        return cls(project, run_id, experiment, results, sources, versions)

    def path(self, *parts: str) -> str:
        """URL of a file of the run's own folder."""
        return self.project.path(RUNS, self.id, *parts)

    def record(self) -> dict[str, Any]:
        """What `run.json` holds: results, and state and times of the stages."""
        return objects.read_json(self.path(RECORD)) or {}

    def result(self, stage: str) -> Result:
        """The result of a stage, finished or not.

        Raises:
            UserError: a file that determines it could not be read when the run was begun.
        """
        if stage not in self.results:
            raise UserError(
                f"{self.project.url}: what stage {stage} is made from could not be read when run {self.id} was begun; "
                "run again"
            )
        return self.results[stage]

    def request(self, stage: str) -> Request:
        """What determines the result of a stage. Raises UserError as `result`."""
        result = self.result(stage)
        base = result.id.partition("-")[0]
        return Request(
            stage,
            self.versions[stage],
            dependencies.settings_of(stage, self.experiment),
            {name: self.result(name).id for name in STAGES[stage].reads},
            dict(self.sources.get(stage, {})),
            attempt_of(result.id, base) or 0,
        )

    def older_version(self, stage: str) -> int | None:
        """The newest earlier version of a stage that has a finished result of this request; None: none has."""
        request = self.request(stage)
        for version in range(request.version - 1, 0, -1):
            older = replace(request, version=version, attempt=0)
            if any(
                Result.at(self.project.url, stage, replace(older, attempt=attempt).id).is_done()
                for attempt in _attempts(self.project, older)
            ):
                return version
        return None

    def sibling(self, stage: str, ignoring: Collection[str]) -> Result | None:
        """A finished result of a stage that differs from this run's in some keys of the configuration alone.

        Args:
            stage: its name.
            ignoring: dotted keys that may differ.
        """

        def rest(request: Mark) -> Mark:
            kept = {key: value for key, value in request["settings"].items() if key not in ignoring}
            contents = {key: source["fingerprint"] for key, source in request["sources"].items()}
            return {**{key: request[key] for key in ("version", "inputs")}, "settings": kept, "contents": contents}

        wanted = rest(json.loads(json.dumps(self.request(stage).to_json())))
        for name in filter(is_id, listing.list_folders(self.project.path(FOLDER, stage))):
            result = Result.at(self.project.url, stage, name)
            mark = result.mark()
            if mark is not None and rest(mark) == wanted:
                return result
        return None

    def read_mark(self, stage: str) -> Mark | None:
        """Success mark of a stage's result; None before it is finished."""
        return self.results[stage].mark() if stage in self.results else None

    def output_url(self, stage: str) -> str:
        """URL of the group or folder that a stage writes, finished or not."""
        return self.result(stage).data_url

    def input_url(self, stage: str) -> str:
        """URL of what a stage has written. Raises UserError where it has not finished."""
        result = self.result(stage)
        result.require()
        return result.data_url

    def open_input(self, stage: str) -> zarr.Group:
        """A finished stage's zarr group, for reading; a block of it that is missing is an error, never a fill value.

        Raises:
            UserError: the stage has not finished, or its group is gone.
        """
        if stage not in self._opened:
            result = self.result(stage)
            complete = result.require().get("files") is not None
            try:
                self._opened[stage] = groups.open_group(result.data_url, complete=complete)
            except FileNotFoundError:
                raise UserError(
                    f"{result.data_url}: gone, though its mark is there; run stage {stage} with --force"
                ) from None
        return self._opened[stage]


# -- from a configuration to result ids ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Draft:
    """A run that is not recorded yet: nothing has been written.

    Attributes:
        project: where it will lie.
        experiment: its configuration, `train.start_from` resolved to the very result that it names.
        requests: stage -> what determines its result; absent where an outside file is missing.
        results: stage -> the result of that id.
        forced: stages that are asked for again although they have been made before.
        missing: stage -> outside file that is missing, as a line for the user.
    """

    project: Project
    experiment: Experiment
    requests: dict[str, Request]
    results: dict[str, Result]
    forced: frozenset[str]
    missing: dict[str, str]

    def todo(self, stages: Collection[str]) -> list[str]:
        """Those of the stages that are not done yet, in the order of the pipeline."""
        return [
            spec.name
            for spec in PIPELINE
            if spec.name in stages and not (spec.name in self.results and self.results[spec.name].is_done())
        ]

    def require(self, stages: Collection[str]) -> None:
        """Raise UserError, a line a file, where an outside file that one of the stages needs is missing."""
        lines = [self.missing[stage] for stage in stages if stage in self.missing]
        if lines:
            raise UserError("\n".join(dict.fromkeys(lines)))


def resolve(
    project: Project,
    experiment: Experiment,
    force: Collection[str] = (),
    hashing: Callable[[str], None] = lambda url: None,
) -> Draft:
    """Which result each stage has under a configuration. Reads outside files that are not known yet; writes nothing.

    An id of an attempt that `--force` began is taken up by the runs after it, finished or not.

    Args:
        project: where results lie.
        experiment: the configuration.
        force: stages to be made again. The newest attempt is gone on with where `--force` began it and it has not
            finished, so that the same command resumes.
        hashing: told the URL of each file whose content is about to be read.

    Raises:
        UserError: the storage cannot be read, or `reuse` names no project.
    """
    contents = _Contents(project, hashing)
    experiment, model = _pinned(project, experiment)
    other = Project.at(experiment.reuse) if experiment.reuse else None
    requests: dict[str, Request] = {}
    results: dict[str, Result] = {}
    missing: dict[str, str] = {}
    for spec in PIPELINE:
        unknown = [name for name in spec.reads if name not in requests]
        sources: dict[str, Source] = {}
        for key, url in dependencies.outside_files(spec.name, experiment).items():
            if key == "train.start_from" and model is not None:
                sources[key] = model
                continue
            source = contents.of(url)
            if source is None and key == "train.start_from" and not url.endswith(".safetensors"):
                missing[spec.name] = (
                    f"{key}: {url}: no project with a finished training; name one, a .safetensors file, {ANIMALS} or "
                    f"{RANDOM}"
                )
                break
            if source is None:
                missing[spec.name] = f"{key}: {url}: no such file; check it and data.directory in the config"
                break
            sources[key] = source
        if unknown and spec.name not in missing:
            missing[spec.name] = missing[unknown[0]]
        if spec.name in missing:
            continue
        settings = dependencies.settings_of(spec.name, experiment)
        inputs = {name: requests[name].id for name in spec.reads}
        request = Request(spec.name, spec.version, settings, inputs, sources)
        attempts = _attempts(project, request)
        if spec.name in force and attempts:
            newest = replace(request, attempt=max(attempts))
            unfinished = newest.attempt > 0 and not Result.at(project.url, spec.name, newest.id).is_done()
            request = newest if unfinished else replace(request, attempt=newest.attempt + 1)
        elif attempts:
            request = replace(request, attempt=max(attempts))
        result = Result.at(project.url, spec.name, request.id)
        if other is not None and spec.name in REUSABLE and spec.name not in force and not result.is_done():
            found = _in_other_project(other, request)
            if found is not None:
                result, request = found
        requests[spec.name], results[spec.name] = request, result
    return Draft(project, experiment, requests, results, frozenset(force), missing)


def _attempts(project: Project, request: Request) -> list[int]:
    names = listing.list_folders(project.path(FOLDER, request.stage))
    return [n for n in (attempt_of(name, request.base) for name in names) if n is not None]


def _in_other_project(other: Project, request: Request) -> tuple[Result, Request] | None:
    """The newest finished attempt of a request in another project, or in the one that this reuses in turn."""
    for attempt in sorted(_attempts(other, request), reverse=True):
        tried = replace(request, attempt=attempt)
        result = Result.at(other.url, request.stage, tried.id, reused=True)
        if result.is_done():
            return result, tried
    try:
        further = other.run().results.get(request.stage)
    except UserError:
        return None
    attempt_there = None if further is None else attempt_of(further.id, request.base)
    if further is None or attempt_there is None or not further.reused or not further.is_done():
        return None
    return further, replace(request, attempt=attempt_there)


class _Contents:
    """Fingerprints of outside files: those of files that were not written since they were hashed are remembered."""

    def __init__(self, project: Project, hashing: Callable[[str], None]) -> None:
        self._hashing = hashing
        self._known: dict[str, Any] = objects.read_json(project.path(RUNS, SOURCES)) or {}

    def of(self, url: str) -> Source | None:
        """A file's fingerprint; that of its last content where it is no longer there; None where it never was."""
        known = self._known.get(url)
        try:
            state = str(fingerprints.stat(url))
            if known is None or known["state"] != state:
                self._hashing(url)
                known = self._known[url] = {"state": state, "fingerprint": fingerprints.content_fingerprint(url)}
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None if known is None else Source(url, known["fingerprint"])
        return Source(url, known["fingerprint"], state)


def _pinned(project: Project, experiment: Experiment) -> tuple[Experiment, Source | None]:
    """The configuration with `train.start_from` as the very result that it names, and that result's identity.

    It is left as it is, and the identity None, where it names no project, or one without a finished training.
    """
    files = dependencies.outside_files("train", experiment)
    url = files.get("train.start_from")
    if url is None or url.endswith(".safetensors"):
        return experiment, None
    source = _begun_from(project, experiment, url)
    if source is None:
        result = trained_result(url)
        if result is None:
            return experiment, None
        source = Source(result.folder, f"train/{result.id}")
    return _starting_from(experiment, source.url), source


def _starting_from(experiment: Experiment, url: str) -> Experiment:
    train = experiment.train.model_copy(update={"start_from": url})
    return experiment.model_copy(update={"train": train})


def _begun_from(project: Project, experiment: Experiment, url: str) -> Source | None:
    """What the latest run's training began from, where that is the same training and has not ended; else None.

    The same command then goes on with it, whatever has been trained since in the project at `url`.
    """
    latest = project.latest_id()
    try:
        run = None if latest is None else Run.load(project, latest)
    except UserError:
        return None
    if run is None or "train" not in run.results or run.results["train"].is_done():
        return None
    source = run.sources["train"].get("train.start_from")
    if source is None or not source.url.startswith(urls.join(url, FOLDER, "train") + "/"):
        return None
    return source if run.experiment.to_yaml() == _starting_from(experiment, source.url).to_yaml() else None


def trained_result(url: str) -> Result | None:
    """The finished training that a URL names, of a result's folder or of a project; None: there is none.

    Of a project it is that of the newest run which has one.
    """
    url = urls.normalize(url)
    parent, _, name = url.rpartition("/")
    home, _, kind = parent.rpartition("/")
    if kind == "train" and home.endswith(f"/{FOLDER}"):
        result = Result.at(home.removesuffix(f"/{FOLDER}"), "train", name)
        return result if result.is_done() else None
    project = Project.at(url)
    for run_id in (None, *reversed(project.run_ids())):  # None is the latest, or what an earlier version left
        with contextlib.suppress(UserError):  # a damaged record, or no run at all
            found = project.run(run_id).results.get("train")
            if found is not None and found.is_done():
                return found
    return None


# -- recording a run ----------------------------------------------------------------------------------------------
def _content(draft: Draft) -> tuple[str, dict[str, Any]]:
    """Text of config.yaml and the entry `results` of run.json."""
    entries: dict[str, Any] = {}
    for stage, result in draft.results.items():
        request = draft.requests.get(stage)
        entries[stage] = {
            "id": result.id,
            "version": result.require()["version"] if request is None else request.version,
            "sources": {} if request is None else {key: vars(source) for key, source in request.sources.items()},
        }
        if result.reused:
            entries[stage]["project"] = result.folder.removesuffix(f"/{FOLDER}/{stage}/{result.id}")
    return draft.experiment.to_yaml(), entries


def record(draft: Draft, stages: Collection[str], state: str = "begun") -> Run:
    """Write a new run's record and make it the project's latest.

    Args:
        draft: from `resolve`.
        stages: those that the run is to make; kept for display.
        state: of the run.
    """
    project = draft.project
    text, entries = _content(draft)
    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    for stage in draft.forced & draft.requests.keys():
        # The attempt is taken now: a run that is stopped before this stage begins leaves it to the next one.
        claim(draft.results[stage], draft.requests[stage])
    objects.write_bytes(project.path(RUNS, run_id, CONFIG), text.encode())
    objects.write_json(
        project.path(RUNS, run_id, RECORD),
        {
            "id": run_id,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "forced": sorted(draft.forced),
            "selected": [spec.name for spec in PIPELINE if spec.name in stages],
            "results": entries,
            "state": state,
            "stages": {},
        },
    )
    objects.write_json(project.path(LATEST), {"run": run_id})
    _remember(draft)
    return Run.load(project, run_id)


def _remember(draft: Draft) -> None:
    """Keep the fingerprints of a run's outside files, so that the next run does not hash them again."""
    url = draft.project.path(RUNS, SOURCES)
    known = objects.read_json(url) or {}
    found = {
        source.url: {"state": source.state, "fingerprint": source.fingerprint}
        for request in draft.requests.values()
        for source in request.sources.values()
        if source.state and fingerprints.is_settled(source.url)
    }
    if any(known.get(key) != value for key, value in found.items()):
        objects.write_json(url, {**known, **found})


def claim(result: Result, request: Request) -> None:
    """Write a result's request, unless it is there: from then on its id is taken."""
    if not objects.exists(result.file(REQUEST)):
        objects.write_json(result.file(REQUEST), request.to_json())


@contextmanager
def working(draft: Draft, stages: Collection[str]) -> Iterator[Run]:
    """A recorded run that no other process works on: a new one, or one of the newest that was to do the same.

    So the same command, given again after a crash, goes on with the same run, which is then the latest again. While the
    block runs, others see that the run is alive.
    """
    with contextlib.ExitStack() as held:
        run = next(
            filter(lambda run: held.enter_context(leases.try_locked(run.path("lease"))), _same_runs(draft)), None
        )
        if run is None:
            run = record(draft, stages)
            held.enter_context(leases.try_locked(run.path("lease")))
        elif draft.project.latest_id() != run.id:
            objects.write_json(draft.project.path(LATEST), {"run": run.id})
        objects.remove_partials(run.path())
        _remember(draft)
        link_latest(run)
        yield run


def _same_runs(draft: Draft) -> Iterator[Run]:
    """Recorded runs with the configuration and the results of a draft, the newest first, among the newest."""
    for run_id in reversed(draft.project.run_ids()[-LOOKED_AT:]):
        with contextlib.suppress(UserError):  # a damaged record is left to whoever looks at it
            run = Run.load(draft.project, run_id)
            if _is_same(run, draft):
                yield run


def forced_before(project: Project, experiment: Experiment, stages: Collection[str], force: Collection[str]) -> bool:
    """Whether the latest run was begun by the very same command with `--force`, and has not come to its end.

    Then the command is not to make its stages once more: it goes on with that run, whichever stage it was stopped in.
    """
    try:
        run = project.run()
        record = run.record()
        draft = resolve(project, experiment)
    except UserError:
        return False
    if record.get("forced") != sorted(force) or set(record["selected"]) != set(stages) or not _is_same(run, draft):
        return False
    return record["state"] in ("running", "failed", "stopped") or bool(draft.todo(stages))


def _is_same(run: Run, draft: Draft) -> bool:
    text, entries = _content(draft)
    stored = run.record()["results"]
    ids = {stage: (entry["id"], entry.get("project")) for stage, entry in stored.items()}
    return run.experiment.to_yaml() == text and ids == {s: (e["id"], e.get("project")) for s, e in entries.items()}


# -- plain names on local disks -----------------------------------------------------------------------------------
def link_latest(run: Run) -> None:
    """Point PROJECT/latest/ to the finished results of a run, if that is the project's latest and on a local disk.

    Only symbolic links are made, replaced or removed; anything else in that folder is left as it is.
    """
    project = run.project
    if urls.is_s3(project.url) or project.latest_id() != run.id:
        return
    folder = Path(project.path(LINKS))
    targets = {name: run.path(name) for name in (REPORT, LOGS, CONFIG)}
    for stage, result in run.results.items():
        if result.is_done():
            for name in (STAGES[stage].writes, *STAGES[stage].also):
                targets[name] = urls.join(result.data_folder, name)
    # A file system without links costs the plain names, not the run; so does another process that does the same.
    with contextlib.suppress(OSError, NotImplementedError):
        folder.mkdir(exist_ok=True)
        here = os.path.realpath(folder)
        there = {name for name, target in targets.items() if os.path.exists(target)}
        for name in there:
            with contextlib.suppress(FileNotFoundError):
                _link(folder / name, os.path.relpath(os.path.realpath(targets[name]), here))
        for entry in folder.iterdir():
            if entry.is_symlink() and entry.name not in there:
                entry.unlink(missing_ok=True)


def _link(link: Path, target: str) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    if link.exists() and not link.is_symlink():
        return
    new = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    new.symlink_to(target)
    new.replace(link)
