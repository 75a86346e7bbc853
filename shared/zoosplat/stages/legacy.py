"""Reading projects of the layout before runs, as one run each.

Such a project has `experiment.yaml`, the groups and folders of the stages beside it, and `_marks/<stage>.json` with the
digest of settings, inputs and source files that a result was made from.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.projects import LEGACY_CONFIG, LEGACY_RUN, Project
from zoosplat.stages.registry import pipeline_of
from zoosplat.stages.results import Mark, Result
from zoosplat.stages.runs import Run
from zoosplat.storage import objects

MARKS = "_marks"  # The folder of the stages' marks.


@dataclass(frozen=True)
class LegacyResult(Result):
    """The result of a stage in a project of the layout before runs, with the mark that was found there."""

    def is_done(self) -> bool:
        return "done" in self._mark

    def mark(self) -> Mark | None:
        return self._mark.get("done")

    def plan(self) -> Mark | None:
        return None


def legacy_run(project: Project) -> Run:
    """The one run that a project of the layout before runs amounts to. Nothing is written.

    Raises:
        UserError: its configuration cannot be read.
    """
    experiment = _read_experiment(project)
    results: dict[str, Result] = {}
    pipeline = pipeline_of(experiment)
    for spec in pipeline:
        mark = objects.read_json(project.path(MARKS, f"{spec.name}.json"))
        folder = project.url
        location = None if mark is None else mark.get("location")
        if location is not None:
            folder = str(location).rpartition("/")[0]
        found = {} if mark is None else {"done": {"figures": {}, "warnings": [], **mark, "id": mark["digest"]}}
        name = LEGACY_RUN if mark is None else str(mark["digest"])
        results[spec.name] = LegacyResult(spec.name, name, folder, folder, location is not None, found)
    return Run(project, LEGACY_RUN, experiment, results, {}, {spec.name: spec.version for spec in pipeline})


def _read_experiment(project: Project) -> Experiment:
    where = project.path(LEGACY_CONFIG)
    try:
        return Experiment.from_yaml(objects.read_bytes(where).decode())
    except FileNotFoundError:
        raise UserError(f"{project.url}: holds neither a run nor {LEGACY_CONFIG}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not text in UTF-8; write it again") from None
    except UserError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
