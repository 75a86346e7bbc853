"""Runs: which results a configuration leads to, in a record of its own that no other run replaces.

    PROJECT/runs/<run id>/config.yaml   the configuration, with every path resolved
    PROJECT/runs/<run id>/run.json      stage -> result id; state and times of the stages
    PROJECT/runs/<run id>/report/       the page
    PROJECT/runs/<run id>/logs/         what the stages printed

A stage is given the project and the run, and it reads everything else from the run's record.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages import dependencies
from zoosplat.stages.projects import RUNS, Project
from zoosplat.stages.registry import STAGES, reads_of
from zoosplat.stages.results import RESULTS, Mark, Request, Result, Source, is_result_id, parse_attempt
from zoosplat.storage import groups, listing, objects, urls

# Names in a run's folder.
CONFIG, RECORD, REPORT, LOGS = "config.yaml", "run.json", "report", "logs"


@dataclass(frozen=True)
class Run:
    """One run: a configuration, and the result that each stage has, or is to make, with that configuration.

    Attributes:
        project: The project that it lies in.
        id: Its id.
        experiment: Its configuration.
        results: stage -> result. A stage is absent if a file that determines its result could not be read.
        sources: stage -> key of the configuration -> file outside the project that determines the stage's result.
        versions: stage -> version of the stage whose result it is.
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
        """The run of a record. Raises UserError if the record is missing or damaged."""
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
        for stage in STAGES:  # The order is that of the pipeline.
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
        """What `run.json` holds: the results, and the states and times of the stages."""
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
        """What determines the result of a stage. Raises UserError like `result`."""
        result = self.result(stage)
        base = result.id.partition("-")[0]
        return Request(
            stage,
            self.versions[stage],
            dependencies.settings_of(stage, self.experiment),
            {name: self.result(name).id for name in reads_of(stage, self.experiment)},
            dict(self.sources.get(stage, {})),
            parse_attempt(result.id, base) or 0,
        )

    def older_version(self, stage: str) -> int | None:
        """The newest earlier version of a stage with a finished result for the same request; None if there is none."""
        request = self.request(stage)
        for version in range(request.version - 1, 0, -1):
            older = replace(request, version=version, attempt=0)
            if any(
                Result.at(self.project.url, stage, replace(older, attempt=attempt).id).is_done()
                for attempt in attempts(self.project, older)
            ):
                return version
        return None

    def find_sibling(self, stage: str, ignoring: Collection[str]) -> Result | None:
        """A finished result of a stage whose request differs from this run's in some keys at most, or None.

        Args:
            stage: The name of the stage.
            ignoring: The dotted keys of the configuration that may differ.
        """

        def rest(request: Mark) -> Mark:
            kept = {key: value for key, value in request["settings"].items() if key not in ignoring}
            contents = {key: source["fingerprint"] for key, source in request["sources"].items()}
            return {**{key: request[key] for key in ("version", "inputs")}, "settings": kept, "contents": contents}

        wanted = rest(json.loads(json.dumps(self.request(stage).to_json())))
        for name in filter(is_result_id, listing.list_folders(self.project.path(RESULTS, stage))):
            result = Result.at(self.project.url, stage, name)
            mark = result.mark()
            if mark is not None and rest(mark) == wanted:
                return result
        return None

    def read_mark(self, stage: str) -> Mark | None:
        """The success mark of a stage's result; None before it is finished."""
        return self.results[stage].mark() if stage in self.results else None

    def output_url(self, stage: str) -> str:
        """The URL of the group or folder that a stage writes, finished or not."""
        return self.result(stage).data_url

    def input_url(self, stage: str) -> str:
        """The URL of what a stage has written. Raises UserError if the stage has not finished."""
        result = self.result(stage)
        result.require()
        return result.data_url

    def open_input(self, stage: str) -> zarr.Group:
        """The zarr group of a finished stage, for reading. A missing block is an error, and never read as fill values.

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


def attempts(project: Project, request: Request) -> list[int]:
    """Numbers of the attempts at a request that a project has, finished or not, whatever `request.attempt` is."""
    names = listing.list_folders(project.path(RESULTS, request.stage))
    return [n for n in (parse_attempt(name, request.base) for name in names) if n is not None]
