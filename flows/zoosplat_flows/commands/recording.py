"""`zoosplat config check` and `zoosplat cameras`: shows what the files of a recording hold."""

from __future__ import annotations

from typing import Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from zoosplat.config.experiment import Experiment
from zoosplat.errors import Problems, UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.calibration.reader import Format, Unit, read_cameras
from zoosplat.recording.facts import kept_frames
from zoosplat.recording.sources import open_source
from zoosplat.stages.outside_file_checks import check_outside_files
from zoosplat.stages.prechecks import check_kept_frames
from zoosplat.stages.registry import STAGES
from zoosplat.storage import objects, urls


def load_cameras(files: list[str], format: str = "auto", unit: str = "auto") -> Cameras:
    """Read the cameras of a calibration.

    Args:
        files: paths or URLs: one file, or one for each camera.
        format: one of `zoosplat.recording.calibration.reader.Format`.
        unit: unit of the translations, one of `zoosplat.recording.calibration.reader.Unit`.

    Raises:
        UserError: a file, the format or the unit is not valid.
    """
    for option, value, known in (("--format", format, get_args(Format)), ("--unit", unit, get_args(Unit))):
        if value not in known:
            raise UserError(f"{option} {value}: choose one of {', '.join(known)}")
    return read_cameras(files, format=cast(Any, format), unit=cast(Any, unit), open_bytes=_read_bytes)


def _read_bytes(url: str) -> bytes:
    try:
        return objects.read_bytes(urls.normalize(url))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{url}: no such file") from None


def show_cameras(cameras: Cameras) -> None:
    """Print cameras as a table: focal lengths, principal points, distortion, and positions in metres."""
    table = Table(caption="pixels; positions in the calibration's world, metres", caption_justify="left")
    for column in ("camera", "fx, fy", "cx, cy", "distortion k1 k2 p1 p2 k3", "position x, y, z"):
        table.add_column(column)
    for i, name in enumerate(cameras.names):
        k = cameras.intrinsics[i]
        distortion = cameras.distortion[i]
        table.add_row(
            name,
            f"{k[0, 0]:.1f}, {k[1, 1]:.1f}",
            f"{k[0, 2]:.1f}, {k[1, 2]:.1f}",
            " ".join(f"{d:.3g}" for d in distortion) if distortion.any() else "none",
            ", ".join(f"{x:.3f}" for x in cameras.centers_m[i]),
        )
    Console().print(table)


def check_experiment(experiment: Experiment) -> None:
    """Check a configuration against its recording, and print what each camera's files hold.

    Raises:
        UserError: there are problems; a line for each.
    """
    problems, facts = Problems(), None
    with problems.collect():
        facts = open_source(experiment).check()
    with problems.collect():
        check_outside_files(experiment, STAGES)
    if facts is not None:
        with problems.collect():
            check_kept_frames(experiment, STAGES, kept_frames(experiment, facts.n_frames))
    problems.report()
    assert facts is not None
    for warning in facts.warnings:
        typer.echo(f"note: {warning}", err=True)
    if not facts.videos:
        typer.echo(f"{facts.n_frames} times, pictures of {facts.width} x {facts.height} pixels")
        typer.echo("the configuration fits the scene")
        return
    table = Table("camera", "file", "size", "frames", "frames per second", "held out")
    for i, name in enumerate(facts.cameras.names):
        held_out = "yes" if i in experiment.holdout_views else ""
        files = [(experiment.data.videos[i], facts.videos[i])]
        if facts.masks:
            files.append((experiment.data.masks[i], facts.masks[i]))
        for file, info in files:
            frames = str(info.n_frames) if info.n_frames == info.n_declared else f"{info.n_frames} of {info.n_declared}"
            table.add_row(name, file, f"{info.width} x {info.height}", frames, f"{info.fps:.2f}", held_out)
    Console().print(table)
    if experiment.data.masks_are_made:
        typer.echo("stage segment makes the masks from the videos")
    typer.echo("the configuration fits the recording")
