"""`zoosplat plan`: predicts the GPU memory of a training, and names the smallest profile that has it."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from zoosplat.config.experiment import Experiment
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.memory import (
    GIB,
    GPU_PROFILES,
    USABLE_SHARE,
    largest_sizes,
    measured_sizes,
    profile_gib,
    smallest_profile,
    training_memory,
)
from zoosplat.stages.memory_advice import suggest_smaller
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run


def _planned_run(experiment: Experiment, project: Project) -> Run:
    """The run that a project would get for a configuration. Results that are done already are found by their ids."""
    draft = draft_run(project, experiment)
    return Run(project, "planned", experiment, draft.results)


def show_plan(experiment: Experiment, project: Project | None) -> None:
    """Print the predicted GPU memory of a training, its parts, and the smallest profile that fits.

    Args:
        experiment: the configuration.
        project: the crop and the windows of this project count; None: the largest that they may be.

    Raises:
        UserError: stages crop and pack of the project are not done.
    """
    measured = None if project is None else measured_sizes(_planned_run(experiment, project))
    sizes = measured or largest_sizes(experiment)
    parts = training_memory(experiment, sizes)
    peak = sum(parts.values())
    table = Table("GPU memory", "GiB", caption_justify="left")
    for name, size in reversed(parts.items()):
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("peak of training", f"{peak / GIB:.2f}", style="bold")
    Console().print(table)
    typer.echo(
        f"{sizes.voxels} voxels, {sizes.views} observed views of {sizes.pixels} pixels, "
        f"{'as many frames as stay on the GPU' if sizes.frames is None else f'{sizes.frames} frames'}"
    )
    if project is None:
        typer.echo("at most: --project URL, once stages crop and pack are done, knows the crop and the windows")
    fitting = smallest_profile(experiment, GPU_PROFILES, sizes)
    if fitting is not None:
        typer.echo(f"smallest profile that fits: {fitting}")
        return
    largest = GPU_PROFILES[-1]
    advice = suggest_smaller(experiment, USABLE_SHARE * profile_gib(largest) * GIB, measured)
    typer.echo(f"no profile fits; for {largest}, {advice}")
