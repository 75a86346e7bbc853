"""Beginning a run: all that can be checked is checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.drafts import Draft, draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.ownership import foreign_names
from zoosplat.stages.prechecks import check_before_run, check_project_place
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import require_stage, upstream
from zoosplat.stages.run_records import hold_run, is_run_of
from zoosplat.stages.runs import Run
from zoosplat.stages.sources import FingerprintCache
from zoosplat.storage import urls


@contextmanager
def begin_run(
    project: Project,
    experiment: Experiment,
    stages: list[str],
    force: list[str],
    hashing: Callable[[str], None] = lambda url: None,
) -> Iterator[Run]:
    """Check all that can be checked, and begin a run of the stages. While the block runs, the run is alive.

    The same command, given again, goes on with the same run.

    Args:
        project: Where the results go.
        experiment: The configuration.
        stages: The stages that the run is to make. The stages that they read must be among them, or be done.
        force: The stages whose results are made again. What is made from those results follows.
        hashing: Called with the URL of each file whose content is about to be read for its fingerprint.

    Yields:
        The run.

    Raises:
        UserError: Files of another program are in the way, an earlier stage is not done, or the configuration or a
            file that it names cannot be used.
    """
    check_forced(experiment, force, stages)
    _check_folder(project)
    check_project_place(project.url, experiment)
    draft = _draft(project, experiment, stages, force, FingerprintCache(project, hashing))
    todo = draft.todo(stages)
    earlier = draft.todo(upstream(todo, draft.experiment) - set(stages))
    if earlier:
        draft.require(earlier)
        result = draft.results[earlier[0]]
        raise UserError(f"{result.data_url} is not complete; run stage {earlier[0]} first, or leave --from out")
    masks = draft.results.get("ingest")
    masks_url = masks.data_url if masks is not None and masks.is_done() else None
    check_before_run(draft.experiment, todo, masks_url)
    # This comes after the checks, because they name every fault of the recording, and this only one missing file.
    draft.require(stages)
    with hold_run(draft, stages) as run:
        yield run


def _draft(
    project: Project, experiment: Experiment, stages: list[str], force: list[str], fingerprints: FingerprintCache
) -> Draft:
    """The draft of a run, whose forced stages are made again.

    Where the latest run was begun by the very same command with `--force` and has not come to its end, nothing is to be
    made once more: the command goes on with that run, whichever stage it was stopped in.
    """
    if force and (run := _latest_of_command(project, stages, force)) is not None:
        draft = draft_run(project, experiment, (), fingerprints)
        ended = run.record()["state"] not in ("running", "failed", "stopped") and not draft.todo(stages)
        if is_run_of(run, draft) and not ended:
            return draft
    return draft_run(project, experiment, force, fingerprints)


def _latest_of_command(project: Project, stages: list[str], force: list[str]) -> Run | None:
    """The project's latest run, if its stages and those that it was to make again are these; else None."""
    try:
        run = open_run(project)
        record = run.record()
    except UserError:
        return None
    if record.get("forced") != sorted(force) or set(record["selected"]) != set(stages):
        return None
    return run


def check_forced(experiment: Experiment, force: list[str], stages: list[str]) -> None:
    """Raise UserError if the experiment has no stage of a name in `force`, or if it is not among those that run."""
    for name in force:
        require_stage(name, experiment)
        if name not in stages:
            raise UserError(f"--force {name}: this run is of the stages {', '.join(stages)} alone; let it reach {name}")


def _check_folder(project: Project) -> None:
    """Raise UserError if results cannot be written there: a file is in the way, or another program's files are."""
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
    """Raise UserError if a project has the earlier layout, which can be read but to which no stage writes."""
    if project.is_legacy():
        raise UserError(
            f"{project.url}: has the layout of an earlier version; `zoosplat upgrade {project.url}` adopts its "
            "results, and moves nothing"
        )
