"""Finding a run of a project."""

from __future__ import annotations

from zoosplat.errors import UserError
from zoosplat.stages.legacy import legacy_run
from zoosplat.stages.projects import LEGACY_RUN, Project
from zoosplat.stages.runs import Run


def open_run(project: Project, run_id: str | None = None) -> Run:
    """The run of a project with a given id. A project of the layout before runs is read as if it held one run.

    Args:
        project: Where the run lies.
        run_id: Its id, or the beginning of the id; None stands for the run that was begun last.

    Raises:
        UserError: There is no such run, or there are several.
    """
    if run_id is None:
        latest = project.latest_id()
        if latest is not None:
            return Run.load(project, latest)
    if run_id in (None, LEGACY_RUN) and project.is_legacy():
        return legacy_run(project)
    if run_id is None:
        raise UserError(f"{project.url}: holds no run; start with `zoosplat run CONFIG --project URL`")
    found = [name for name in project.run_ids() if name.startswith(run_id)]
    if run_id in found:
        found = [run_id]
    if len(found) != 1:
        what = "there is no run" if not found else f"{len(found)} runs begin with"
        raise UserError(f"{project.url}: {what} {run_id}; `zoosplat runs {project.url}` lists them")
    return Run.load(project, found[0])
