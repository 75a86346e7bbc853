"""The commands that compute: `zoosplat run`, `demo` and `embed`."""

from __future__ import annotations

from typing import Annotated

import typer

from zoosplat.errors import UserError
from zoosplat_flows.cli.errors import storage_errors
from zoosplat_flows.cli.options import ConfigFile, Overrides, Profile, Workers, load_with_profile, print_notes


def run(
    config: ConfigFile,
    project: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where results go. [dim]default: the project_directory of a JSON config[/]"),
    ] = None,
    overrides: Overrides = None,
    profile: Profile = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="First stage to run; what is before must be done.")
    ] = None,
    until_stage: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Compute this stage again, and all made from it; repeatable."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Run the pipeline, ingest, center_rotation, crop, pack, train, evaluate, render, features, embedding, and report.

    Where data.masks is auto, stage segment comes first.

    What is done with the same configuration is skipped, so the same command resumes a run that was stopped.

    [bold]Examples[/]

    zoosplat run mouse.yaml --project runs/mouse

    zoosplat run mouse.yaml --project s3://lab/mouse --set train.epochs=20 --from train

    zoosplat run mouse.yaml --project runs/mouse --profile 24gb

    zoosplat run classic/config.json --until crop
    """
    from zoosplat_flows.commands.run import run_stages

    loaded = load_with_profile(config, overrides, profile)
    url = project or loaded.project
    if url is None:
        raise UserError(f"{config}: say where results go with --project URL")
    print_notes(loaded)
    with storage_errors(url):
        run_stages(url, loaded.experiment, from_stage, until_stage, force or [], workers)


def demo(
    project: Annotated[str, typer.Option(metavar="URL", help="Where results go.")] = "demo",
    frames: Annotated[int, typer.Option(min=12, metavar="N", help="Frames of the synthetic recording.")] = 120,
    overrides: Overrides = None,
    workers: Workers = None,
) -> None:
    """Make a synthetic recording of a walking animal with six cameras and run the whole pipeline on its raw videos.

    The recording's true masks tell at the end how good the masks are that the pipeline has made.

    [bold]Examples[/]

    zoosplat demo

    zoosplat demo --project s3://lab/demo --frames 60
    """
    from zoosplat_flows.commands.demo import run_demo

    with storage_errors(project):
        run_demo(project, frames, overrides or [], workers)


def embed(
    projects: Annotated[
        list[str],
        typer.Argument(metavar="URL[@RUN]...", help="Projects with stage features done; RUN: default the latest."),
    ],
    output: Annotated[str, typer.Option(metavar="URL", help="Folder or s3:// prefix for embedding.zarr and .csv.")],
) -> None:
    """Embed recordings together: one space, one map, states and neighbours across all of them.

    Settings are those of the first project. Its frames come first; embedding.csv says which recording a row is of.

    [bold]Examples[/]

    zoosplat embed runs/mouse1 runs/mouse2 --output runs/mice

    zoosplat embed s3://lab/mouse1 s3://lab/mouse2@20250317-0912 --output s3://lab/mice
    """
    from zoosplat_flows.commands.embed import embed_runs

    with storage_errors(output):
        embed_runs(projects, output)
