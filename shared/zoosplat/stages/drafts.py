"""From a configuration to result ids: what a run would make, before anything is written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages import dependencies
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import SEGMENT, pipeline_of
from zoosplat.stages.results import Request, Result, Source, parse_attempt
from zoosplat.stages.runs import attempts
from zoosplat.stages.sources import FingerprintCache
from zoosplat.stages.start_from import no_training, pin_start_from

REUSABLE_STAGES = (SEGMENT, "ingest", "pack")  # Their results may be read from the project that `reuse` names.


@dataclass(frozen=True)
class Draft:
    """A run that is not recorded yet: nothing of it has been written.

    Attributes:
        project: The project that it will lie in.
        experiment: Its configuration, in which `train.start_from` is the very result that a project's name stood for.
        requests: stage -> what determines its result. A stage is absent if an outside file is missing.
        results: stage -> the result of that request.
        forced: The stages that are to be made again although they have been made before.
        missing: stage -> a line for the user about an outside file that is missing.
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
            for spec in pipeline_of(self.experiment)
            if spec.name in stages and not (spec.name in self.results and self.results[spec.name].is_done())
        ]

    def sources(self) -> list[Source]:
        """The outside files that determine its results, each as often as it does so."""
        return [source for request in self.requests.values() for source in request.sources.values()]

    def require(self, stages: Collection[str]) -> None:
        """Raise UserError, a line for each file, if an outside file that one of the stages needs is missing."""
        lines = [self.missing[stage] for stage in stages if stage in self.missing]
        if lines:
            raise UserError("\n".join(dict.fromkeys(lines)))


def draft_run(
    project: Project,
    experiment: Experiment,
    force: Collection[str] = (),
    fingerprints: FingerprintCache | None = None,
) -> Draft:
    """Find which result each stage has with a configuration. This reads outside files, and writes nothing.

    Of several attempts at a result the newest one is taken, finished or not.

    Args:
        project: The project that the results lie in.
        experiment: The configuration.
        force: The stages to be made again. If `--force` began the newest attempt at a stage and the attempt has not
            finished, that attempt is taken, so that the same command resumes it.
        fingerprints: The fingerprints of outside files; default: those that the project remembers.

    Raises:
        UserError: The storage cannot be read, or `reuse` names no project.
    """
    fingerprints = fingerprints or FingerprintCache(project)
    experiment, model = pin_start_from(project, experiment)
    other = Project.at(experiment.reuse) if experiment.reuse else None
    requests: dict[str, Request] = {}
    results: dict[str, Result] = {}
    missing: dict[str, str] = {}
    for spec in pipeline_of(experiment):
        unknown = [name for name in spec.reads if name not in requests]
        sources: dict[str, Source] = {}
        for key, url in dependencies.outside_files(spec.name, experiment).items():
            if key == "train.start_from" and model is not None:
                sources[key] = model
                continue
            source = fingerprints.source(url)
            if source is None and key == "train.start_from" and not url.endswith(".safetensors"):
                missing[spec.name] = no_training(experiment.train.start_from)
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
        tried = attempts(project, request)
        if spec.name in force and tried:
            newest = replace(request, attempt=max(tried))
            unfinished = newest.attempt > 0 and not Result.at(project.url, spec.name, newest.id).is_done()
            request = newest if unfinished else replace(request, attempt=newest.attempt + 1)
        elif tried:
            request = replace(request, attempt=max(tried))
        result = Result.at(project.url, spec.name, request.id)
        if other is not None and spec.name in REUSABLE_STAGES and spec.name not in force and not result.is_done():
            found = _find_reusable(other, request)
            if found is not None:
                result, request = found
        requests[spec.name], results[spec.name] = request, result
    return Draft(project, experiment, requests, results, frozenset(force), missing)


def _find_reusable(other: Project, request: Request) -> tuple[Result, Request] | None:
    """The newest finished attempt at a request in another project, or in the project that the other one reuses."""
    for attempt in sorted(attempts(other, request), reverse=True):
        tried = replace(request, attempt=attempt)
        result = Result.at(other.url, request.stage, tried.id, reused=True)
        if result.is_done():
            return result, tried
    try:
        further = open_run(other).results.get(request.stage)
    except UserError:
        return None
    attempt_there = None if further is None else parse_attempt(further.id, request.base)
    if further is None or attempt_there is None or not further.reused or not further.is_done():
        return None
    return further, replace(request, attempt=attempt_there)
