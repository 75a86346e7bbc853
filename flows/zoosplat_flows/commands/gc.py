"""`zoosplat gc`: removes results that no run refers to, and old runs."""

from __future__ import annotations

import typer

from zoosplat.stages.projects import RUNS, Project
from zoosplat.stages.results import RESULTS
from zoosplat_flows.execution.garbage import find_garbage, path_in_project, remove_garbage
from zoosplat_flows.formatting import format_size


def free_space(project: Project, keep_last: int | None, dry_run: bool) -> None:
    """Remove, or with `dry_run` only name, what no run refers to.

    Args:
        project: the project.
        keep_last: how many of the newest runs to keep; None: all.
        dry_run: remove nothing.

    Raises:
        UserError: as `find_garbage`.
    """
    found = find_garbage(project, keep_last)
    sizes = {path_in_project(RUNS, run_id): size for run_id, size in found.runs.items()}
    sizes |= {path_in_project(RESULTS, stage, name): size for (stage, name), size in found.results.items()}
    planned = (f"{name}: {format_size(size)}" for name, size in sizes.items())
    for line in planned if dry_run else remove_garbage(project, found):
        typer.echo(line)
    for name, why in found.left.items():
        typer.echo(f"left {name}: {why}")
    if not sizes:
        typer.echo("nothing to free: every result is one that a run refers to")
    else:
        typer.echo(f"{'would free' if dry_run else 'freed'} about {format_size(sum(sizes.values()))}")
