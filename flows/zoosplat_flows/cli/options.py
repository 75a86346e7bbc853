"""Arguments and options that several commands have, and what they do with a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zoosplat_flows.cli.errors import storage_errors

if TYPE_CHECKING:
    from zoosplat.config.load import Loaded

ProjectUrl = Annotated[str, typer.Argument(metavar="URL", help="Project: a folder, or s3://bucket/prefix.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the config, such as train.lr=5e-5; repeatable."),
]
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML, or a JSON file of the published tool.")]
Profile = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What a GPU allows: cpu, 12gb, 24gb, 48gb or 80gb; --set overrides its keys."),
]
RunId = Annotated[
    str | None,
    typer.Option("--run", metavar="ID", help="A run, or the beginning of its id. [dim]default: the latest[/]"),
]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Processes a stage. [dim]default: a core each[/]")
]


def load_with_profile(config: str, overrides: list[str] | None, profile: str | None) -> Loaded:
    """Load a configuration, with the keys of a profile and then the user's own changes.

    Raises:
        UserError: the configuration, the profile or a change is not valid.
    """
    from zoosplat.config.load import load_config
    from zoosplat_flows.profiles import profile_overrides

    with storage_errors(config):
        return load_config(config, [*(profile_overrides(profile) if profile else []), *(overrides or [])])


def print_notes(loaded: Loaded) -> None:
    """Print what the user should know about a configuration that was loaded, such as keys that were left out."""
    for note in loaded.notes:
        typer.echo(f"note: {note}", err=True)
