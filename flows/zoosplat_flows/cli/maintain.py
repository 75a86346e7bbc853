"""The commands that tidy a project: `zoosplat gc` and `upgrade`."""

from __future__ import annotations

from typing import Annotated

import typer

from zoosplat_flows.cli.errors import storage_errors
from zoosplat_flows.cli.options import ProjectUrl


def gc(
    project: ProjectUrl,
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Remove all but the newest N runs first. [dim]default: keep all[/]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
) -> None:
    """Free the space of results that no run of the project refers to.

    Runs that are at work, the latest one, and whatever is not zoosplat's are left, and so is the data of a project of
    an earlier layout. That another project reuses a result (reuse: in its configuration, or train.start_from) is not
    seen: such a project makes the result anew, or says that it is gone.
    """
    from zoosplat.stages.projects import Project
    from zoosplat_flows.commands.gc import free_space

    with storage_errors(project):
        free_space(Project.at(project), keep_last, dry_run)


def upgrade(project: ProjectUrl) -> None:
    """Adopt the results of a project of an earlier version; nothing is moved or changed.

    What was made from the files and settings of today counts as done. Anything else can still be looked at, and the
    next run makes a new result beside it.
    """
    from zoosplat.stages.projects import Project
    from zoosplat.stages.upgrade import upgrade as adopt_results

    with storage_errors(project):
        adopted, kept = adopt_results(Project.at(project))
    for stage, result in adopted.results.items():
        if result.is_done():
            note = f"can be looked at, and is made again by the next run: it {kept[stage]}" if stage in kept else "done"
            typer.echo(f"{stage}: {note}")
    typer.echo(f"run: {adopted.id}")
