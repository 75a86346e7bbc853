"""`zoosplat masks`: takes masks out of a project, to be corrected elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from zoosplat_flows.cli.errors import CommandGroup, storage_errors
from zoosplat_flows.cli.options import ProjectUrl, RunId

masks_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Take masks out of a project.")


# Without it, Typer would take a single command for the group itself.
@masks_app.callback()
def _group() -> None:
    return


@masks_app.command()
def export(
    project: ProjectUrl,
    out: Annotated[str, typer.Argument(metavar="OUT", help="New or empty folder on this machine.")],
    run_id: RunId = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="video: one a camera, by FFV1, if all frames are kept; or png: pictures that are numbered by the "
            "frames of the videos. [dim]default: video where it can be[/]",
        ),
    ] = None,
) -> None:
    """Write the masks that stage segment made, as the cameras saw them, without loss.

    They can be corrected in any program, and read back through data.masks in the configuration. Pictures of the
    cameras' backgrounds are written beside them, for data.backgrounds.

    [bold]Example[/]

    zoosplat masks export runs/mouse recordings/mouse/corrected
    """
    from zoosplat.stages.lookup import open_run
    from zoosplat.stages.projects import Project
    from zoosplat_flows.commands.masks import export_masks

    with storage_errors(project):
        export_masks(open_run(Project.at(project), run_id), out, format)
