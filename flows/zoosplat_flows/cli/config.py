"""`zoosplat config`: shows, converts and checks configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoosplat_flows.cli.errors import CommandGroup, storage_errors
from zoosplat_flows.cli.options import ConfigFile, Overrides, print_notes

config_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Show, convert and check configurations.")


@config_app.command()
def show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a configuration with every key, its meaning and unit."""
    from zoosplat.config.load import load_config

    with storage_errors(config):
        loaded = load_config(config, overrides or [])
    print_notes(loaded)
    typer.echo(loaded.experiment.describe(), nl=False)


@config_app.command()
def convert(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="YAML file to write.")],
    overrides: Overrides = None,
) -> None:
    """Write a JSON file of the published tool, or any configuration, as documented YAML."""
    from zoosplat.config.load import load_config
    from zoosplat.storage import objects

    with storage_errors(config):
        loaded = load_config(config, overrides or [])
    with storage_errors(str(out)):
        objects.write_bytes(str(out.absolute()), loaded.experiment.describe().encode())
    print_notes(loaded)
    typer.echo(str(out))


@config_app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a configuration against the recording: videos, masks, calibration, sizes. Decodes nothing."""
    from zoosplat.config.load import load_config
    from zoosplat_flows.commands.recording import check_experiment

    with storage_errors(config):
        loaded = load_config(config, overrides or [])
    print_notes(loaded)
    with storage_errors(loaded.experiment.data.directory):
        check_experiment(loaded.experiment)
