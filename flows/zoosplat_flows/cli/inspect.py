"""The commands that look at runs and at this machine: `zoosplat status`, `runs`, `compare`, `logs`, `report`, `view`
and `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from zoosplat.errors import UserError
from zoosplat_flows.cli.errors import ended_by_ctrl_c, storage_errors
from zoosplat_flows.cli.options import ProjectUrl, RunId


def status(project: ProjectUrl, run_id: RunId = None) -> None:
    """Which stages of a run are done, partial or missing."""
    from zoosplat.stages.lookup import open_run
    from zoosplat.stages.projects import Project
    from zoosplat_flows.commands.status import show_status

    with storage_errors(project):
        show_status(open_run(Project.at(project), run_id))


def runs(project: ProjectUrl) -> None:
    """List the runs of a project: what each changed against the one before, its state, and what came of it."""
    from zoosplat.stages.projects import Project
    from zoosplat_flows.commands.runs import show_runs

    with storage_errors(project):
        show_runs(Project.at(project))


def compare(
    project: ProjectUrl,
    first: Annotated[str, typer.Argument(metavar="RUN", help="A run, or the beginning of its id.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Another one; the page is put into its folder.")],
) -> None:
    """Compare two runs: settings that differ, metrics, and a page with truth and both renders side by side.

    [bold]Example[/]

    zoosplat compare runs/mouse 20250317-0912 20250318-1740
    """
    from zoosplat.stages.lookup import open_run
    from zoosplat.stages.projects import Project
    from zoosplat_flows.commands.compare import compare_runs

    with storage_errors(project):
        where = Project.at(project)
        typer.echo(compare_runs(open_run(where, first), open_run(where, second)))


def logs(
    project: ProjectUrl,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Only this one. [dim]default: all[/]")] = None,
    run_id: RunId = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, or Ctrl-C.")] = False,
) -> None:
    """Print what the stages of a run have printed, with time and host, wherever they ran."""
    from zoosplat.stages.lookup import open_run
    from zoosplat.stages.projects import Project
    from zoosplat_flows.commands.logs import show_logs

    with storage_errors(project), ended_by_ctrl_c():
        show_logs(open_run(Project.at(project), run_id), stage, follow)


def report(project: ProjectUrl, run_id: RunId = None) -> None:
    """Build the report page of what is done: one self-contained HTML file."""
    from zoosplat.stages.lookup import open_run
    from zoosplat.stages.projects import Project
    from zoosplat_flows.report.page import build_report

    with storage_errors(project):
        typer.echo(build_report(open_run(Project.at(project), run_id)))


def view(
    project: ProjectUrl,
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Or the next one that is free.")] = 8080,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="0.0.0.0: also for other machines. There is no password.")
    ] = "localhost",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:0.")] = "auto",
    run_id: RunId = None,
) -> None:
    """Look at a project in the browser, while it runs or when it is done. Ctrl-C ends it.

    Cameras with their pictures, hull, path and Gaussians of each frame, held-out views beside their renderings, masks
    that were made from the videos over the raw pictures, and the map of the embedding: a click in it goes to that
    frame.
    """
    with storage_errors(project), ended_by_ctrl_c():
        try:
            from zoosplat_flows.viewer.app import serve
        except ModuleNotFoundError as error:
            raise UserError(f'view: {error.name} is not installed; pip install "zoosplat[view]"') from None
        serve(project, host, port, device, run_id)


def doctor(
    project: Annotated[
        str | None, typer.Argument(metavar="[URL]", help="A folder or s3:// URL that must be readable and writable.")
    ] = None,
    build_kernels: Annotated[
        bool,
        typer.Option("--build-kernels", help="First compile gsplat's kernels for the GPU, without a CUDA toolkit."),
    ] = False,
) -> None:
    """Check this machine: Python, torch, GPU, rasteriser, video libraries, Prefect, S3.

    Exit status 0 unless something that every run needs is broken.
    """
    from zoosplat_flows.commands.doctor import compile_kernels, print_findings

    if build_kernels:
        compile_kernels()
    raise typer.Exit(0 if print_findings(project) else 1)
