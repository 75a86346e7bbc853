"""The `zoosplat` command and the list of its commands.

What is slow to import (Prefect, zarr, torch) is imported by the functions of the commands that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from zoosplat_flows.cli import inspect, maintain, plan, run
from zoosplat_flows.cli.cameras import cameras_app
from zoosplat_flows.cli.cluster import cluster_app
from zoosplat_flows.cli.config import config_app
from zoosplat_flows.cli.errors import CommandGroup
from zoosplat_flows.cli.masks import masks_app

# Title of a part of the help -> its commands, in the order in which the help lists them.
COMMANDS: dict[str, list[Callable[..., None]]] = {
    "Run": [run.run, run.demo, run.embed],
    "Look": [
        inspect.status,
        inspect.runs,
        inspect.compare,
        inspect.logs,
        inspect.report,
        inspect.view,
        inspect.doctor,
    ],
    "Keep": [maintain.gc, maintain.upgrade],
    "Prepare": [plan.plan],
}

app = typer.Typer(
    cls=CommandGroup,
    name="zoosplat",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="3D reconstruction of moving animals from the videos of several cameras.\n\n"
    "Start with [bold]zoosplat doctor[/] and [bold]zoosplat demo[/].",
)
for part, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=part)(command)
app.add_typer(config_app, name="config", rich_help_panel="Prepare")
app.add_typer(cameras_app, name="cameras", rich_help_panel="Prepare")
app.add_typer(masks_app, name="masks", rich_help_panel="Keep")
app.add_typer(cluster_app, name="cluster", rich_help_panel="Look")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(metadata.version("zoosplat"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return
