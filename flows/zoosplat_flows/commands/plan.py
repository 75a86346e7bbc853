"""`zoosplat plan`: the GPU memory that a training needs, what it is made of, and the smallest GPU that has it."""

from __future__ import annotations

import json
from importlib import resources

import typer
from rich.console import Console
from rich.table import Table

from zoosplat.config.experiment import Experiment
from zoosplat.config.serialization import parse_yaml
from zoosplat.errors import UserError
from zoosplat.stages import memory
from zoosplat.stages.runs import Project, Run, resolve

FOLDER = resources.files("zoosplat_flows") / "profiles"


def profile_overrides(name: str) -> list[str]:
    """A profile's keys as `--set` takes them. Raises UserError for a name that is none."""
    try:
        text = (FOLDER / f"{name}.yaml").read_text()
    except OSError:
        raise UserError(f"profile {name}: choose one of cpu, {', '.join(memory.PROFILES)}") from None
    return [f"{key}={json.dumps(value)}" for key, value in parse_yaml(text).items()]


def _measured(experiment: Experiment, project: Project) -> Run:
    """The run that the configuration would be in a project: what is done of it is found by its id."""
    draft = resolve(project, experiment)
    return Run(project, "planned", experiment, draft.results)


def show(experiment: Experiment, project: Project | None) -> None:
    """Print the prediction. Raises UserError where a project is given whose stages crop and pack are not done."""
    measured = None if project is None else memory.measured_sizes(_measured(experiment, project))
    sizes = measured or memory.sizes_of(experiment)
    parts = memory.training(experiment, sizes)
    peak = sum(parts.values())
    table = Table("GPU memory", "GiB", caption_justify="left")
    for name, size in reversed(parts.items()):
        table.add_row(name, f"{size / memory.GIB:.2f}")
    table.add_row("peak of training", f"{peak / memory.GIB:.2f}", style="bold")
    Console().print(table)
    typer.echo(
        f"{sizes.voxels} voxels, {sizes.views} observed views of {sizes.pixels} pixels, "
        f"{'as many frames as stay on the GPU' if sizes.frames is None else f'{sizes.frames} frames'}"
    )
    if project is None:
        typer.echo("at most: --project URL, once stages crop and pack are done, knows the crop and the windows")
    fitting = memory.smallest_fitting(experiment, memory.PROFILES, sizes)
    if fitting is not None:
        typer.echo(f"smallest profile that fits: {fitting}")
        return
    largest = memory.PROFILES[-1]
    advice = memory.advice(experiment, memory.USABLE * memory.gpu_gib(largest) * memory.GIB, measured)
    typer.echo(f"no profile fits; for {largest}, {advice}")
