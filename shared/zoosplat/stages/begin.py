"""The one door through which runs begin: everything that can be checked is checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages import runs
from zoosplat.stages.ownership import foreign_names
from zoosplat.stages.prechecks import check_before_run, check_project_place
from zoosplat.stages.registry import STAGES, upstream
from zoosplat.stages.runs import Project, Run
from zoosplat.storage import urls


@contextmanager
def begun(
    project: Project,
    experiment: Experiment,
    stages: list[str],
    force: list[str],
    hashing: Callable[[str], None] = lambda url: None,
) -> Iterator[Run]:
    """A run of the stages, begun after everything that can be checked has been; while the block runs, it is alive.

    Args:
        project: where its results go.
        experiment: its configuration.
        stages: that it is to make; what they read must be done.
        force: stages whose results are made again; what is made from them follows.
        hashing: told the URL of each file whose content is about to be read for its fingerprint.

    Raises:
        UserError: files that are not ours are in the way, an earlier stage is not done, or the configuration or a file
            that it names cannot be used.
    """
    check_forced(force, stages)
    _check_folder(project)
    check_project_place(project.url, experiment)
    if force and runs.forced_before(project, experiment, stages, force):
        force = []
    draft = runs.resolve(project, experiment, force, hashing)
    todo = draft.todo(stages)
    earlier = draft.todo(upstream(todo) - set(stages))
    if earlier:
        draft.require(earlier)
        result = draft.results[earlier[0]]
        raise UserError(f"{result.data_url} is not complete; run stage {earlier[0]} first, or leave --from out")
    masks = draft.results.get("ingest")
    masks_url = masks.data_url if masks is not None and masks.is_done() else None
    check_before_run(draft.experiment, todo, masks_url)
    draft.require(stages)  # after what names all that is wrong with the recording, and not its first file alone
    with runs.working(draft, stages) as run:
        yield run


def check_forced(force: list[str], stages: list[str]) -> None:
    """Raise UserError where a stage that is to be made again is none, or not among those that run."""
    for name in force:
        if name not in STAGES:
            raise UserError(f"there is no stage {name}; the stages are {', '.join(STAGES)}")
        if name not in stages:
            raise UserError(f"--force {name}: this run is of the stages {', '.join(stages)} alone; let it reach {name}")


def _check_folder(project: Project) -> None:
    if not urls.is_s3(project.url):
        place = next(each for each in (Path(project.url), *Path(project.url).parents) if each.exists())
        if not place.is_dir():
            raise UserError(f"{project.url}: {place} is a file; choose another folder")
    check_layout(project)
    foreign = foreign_names(project.url)
    if foreign:
        raise UserError(
            f"{project.url}: holds files that are not of a zoosplat project ({', '.join(foreign)}); choose an empty "
            "folder, or move them"
        )


def check_layout(project: Project) -> None:
    """Raise UserError where a project is of the earlier layout: it can be looked at, and no stage writes to it."""
    if runs.is_legacy(project):
        raise UserError(
            f"{project.url}: has the layout of an earlier version; `zoosplat upgrade {project.url}` adopts its "
            "results, and moves nothing"
        )
