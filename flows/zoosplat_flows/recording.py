"""`zoosplat config check` and `zoosplat cameras`: what a configuration and a calibration say about the recording."""

from __future__ import annotations

from typing import Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from zoosplat import dnerf, stores
from zoosplat.calibration import Format, Unit, read_cameras
from zoosplat.cameras import Cameras
from zoosplat.config import Experiment
from zoosplat.errors import UserError
from zoosplat.video import probe


def read(files: list[str], format: str = "auto", unit: str = "auto") -> Cameras:
    """Cameras of calibration files or URLs. Raises UserError also for an unknown format or unit."""
    for option, value, known in (("--format", format, get_args(Format)), ("--unit", unit, get_args(Unit))):
        if value not in known:
            raise UserError(f"{option} {value}: choose one of {', '.join(known)}")
    return read_cameras(files, format=cast(Any, format), unit=cast(Any, unit), open_bytes=_read)


def _read(url: str) -> bytes:
    try:
        return stores.read_bytes(stores.normalize(url))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{url}: no such file") from None


def show_cameras(cameras: Cameras) -> None:
    """Print a table of cameras."""
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


def check(experiment: Experiment) -> None:
    """Print what each camera's files hold. Raises UserError with a line for each problem found."""
    data = experiment.data
    if experiment.ingest.source == "dnerf":
        scene = dnerf.read_scene(stores.normalize(data.directory))
        experiment.check(len(dnerf.SPLITS), scene.width, scene.height)
        typer.echo(f"{len(scene.times)} times, pictures of {scene.width} x {scene.height} pixels")
        typer.echo("the configuration fits the scene")
        return
    names = data.camera_names
    files = [data.calibration] if isinstance(data.calibration, str) else list(data.calibration)
    cameras = read_cameras(
        [data.url(f) for f in files],
        format=data.calibration_format,
        unit=data.calibration_unit,
        names=names,
        open_bytes=_read,
    )
    problems: list[str] = []
    table = Table("camera", "video", "size", "frames", "frames per second", "held out")
    sizes, lengths = set(), set()
    for i, (video, mask) in enumerate(zip(data.videos, data.masks, strict=True)):
        for file, kind in ((video, "video"), (mask, "mask")):
            try:
                info = probe(data.url(file), f"{file} ({kind} of camera {cameras.names[i] if i < len(cameras) else i})")
            except UserError as error:
                problems.append(str(error))
                continue
            sizes.add((info.width, info.height))
            lengths.add(info.n_frames)
            held_out = "yes" if i in experiment.holdout_views else ""
            name = cameras.names[i] if i < len(cameras) else str(i)
            table.add_row(
                name, file, f"{info.width} x {info.height}", str(info.n_frames), f"{float(info.fps):.2f}", held_out
            )
    Console().print(table)
    if len(sizes) > 1:
        problems.append(f"videos and masks differ in size: {sorted(sizes)}")
    if len(lengths) > 1 and experiment.ingest.on_short == "error":
        problems.append(f"videos and masks differ in length: {sorted(lengths)} frames; or set ingest.on_short=truncate")
    if len(sizes) == 1:
        try:
            experiment.check(len(cameras), *sizes.pop())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    typer.echo("the configuration fits the recording")
