"""`zoosplat cameras`: shows and converts calibrations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoosplat_flows.cli.errors import CommandGroup, storage_errors

CalibrationFormat = Annotated[str, typer.Option("--format", help="auto, hdf5, dannce, anipose or pickle.")]
CalibrationUnit = Annotated[str, typer.Option("--unit", help="Unit of the translations: auto, m or mm.")]
CalibrationFiles = Annotated[list[str], typer.Argument(metavar="IN...", help="One file, or one a camera (DANNCE).")]

cameras_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Show and convert calibrations.")


@cameras_app.command()
def show(files: CalibrationFiles, format: CalibrationFormat = "auto", unit: CalibrationUnit = "auto") -> None:
    """Print the cameras of a calibration: focal lengths, principal points, distortion, positions in metres."""
    from zoosplat_flows.commands.recording import load_cameras, show_cameras

    with storage_errors(files[0]):
        show_cameras(load_cameras(files, format, unit))


@cameras_app.command()
def convert(
    files: CalibrationFiles,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="HDF5 file to write.")],
    format: CalibrationFormat = "auto",
    unit: CalibrationUnit = "auto",
) -> None:
    """Write a calibration of any known format as HDF5, in metres."""
    from zoosplat.recording.calibration.hdf5 import write_hdf5
    from zoosplat_flows.commands.recording import load_cameras

    with storage_errors(files[0]):
        write_hdf5(load_cameras(files, format, unit), out)
    typer.echo(str(out))
