"""`zoosplat plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from zoosplat_flows.cli.errors import storage_errors
from zoosplat_flows.cli.options import ConfigFile, Overrides, Profile, load_with_profile


def plan(
    config: ConfigFile,
    project: Annotated[
        str | None, typer.Option(metavar="URL", help="Project whose crop and windows count, not the most they may be.")
    ] = None,
    overrides: Overrides = None,
    profile: Profile = None,
) -> None:
    """Predict the GPU memory of a training, and the smallest profile that has it or the key to change."""
    from zoosplat.stages.projects import Project
    from zoosplat_flows.commands.plan import show_plan

    experiment = load_with_profile(config, overrides, profile).experiment
    with storage_errors(project or config):
        show_plan(experiment, Project.at(project) if project else None)
