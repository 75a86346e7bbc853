"""Reading the cameras of a calibration file of any format. Bytes come from the caller, so any storage works.

| format  | file                                                        | unit "auto" |
|---------|-------------------------------------------------------------|-------------|
| hdf5    | camera_parameters/{intrinsic, rotation, translation}        | m           |
| dannce  | label3d_dannce.mat, or one hires_cam*_params.mat per camera | mm          |
| anipose | aniposelib TOML                                             | mm          |
| pickle  | list or dict of dicts with K, R, T                          | m           |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras, validate_cameras
from zoosplat.recording.calibration.anipose import read_anipose
from zoosplat.recording.calibration.dannce import read_dannce
from zoosplat.recording.calibration.entries import CameraEntry
from zoosplat.recording.calibration.hdf5 import read_hdf5
from zoosplat.recording.calibration.pickles import read_pickle

Format = Literal["auto", "hdf5", "dannce", "anipose", "pickle"]
Unit = Literal["auto", "m", "mm"]
OpenBytes = Callable[[str], bytes]

SUFFIXES: dict[str, Format] = {
    **{".h5": "hdf5", ".hdf5": "hdf5", ".mat": "dannce", ".toml": "anipose"},
    **{".pkl": "pickle", ".pickle": "pickle", ".p": "pickle"},
}
IN_MILLIMETRES = ("dannce", "anipose")
# Smallest and largest plausible distance in metres of a camera from the mean camera centre. They span rigs for flies
# and rigs for flocks; outside of them the unit of the calibration must be wrong.
PLAUSIBLE_EXTENT_M = (0.01, 100.0)


def read_cameras(
    paths: str | Sequence[str],
    *,
    format: Format = "auto",
    unit: Unit = "auto",
    names: Sequence[str] | None = None,
    open_bytes: OpenBytes,
) -> Cameras:
    """The cameras of a calibration, with translations in metres.

    Args:
        paths: one file, or several files of DANNCE with one camera each.
        format: "auto" goes by the suffix of the first file.
        unit: "auto" goes by the format (table above) and refuses rigs smaller than 1 cm or larger than 100 m, for which
            the unit must be given.
        names: the cameras wanted, in the order of the videos. Where the file names its cameras (Anipose, camnames of
            DANNCE, the names of zoosplat's own HDF5), cameras are picked by name and every name must exist. Where it
            does not, names are given to the cameras in file order and the numbers must agree; hires_cam1_params.mat
            counts as named cam1 if all names match so. None keeps the order of the file.
        open_bytes: returns the content of a path or URL.

    Raises:
        UserError: naming file and camera, for anything that cannot be read or cannot be a camera.
    """
    files = [paths] if isinstance(paths, str) else list(paths)
    if not files:
        raise UserError("calibration: no file given")
    kind = _format_of(files[0]) if format == "auto" else format
    if len(files) > 1 and kind != "dannce":
        raise UserError(f"{files[1]}: {kind} calibration is one file for all cameras, {len(files)} were given")
    read = {"hdf5": read_hdf5, "dannce": read_dannce, "anipose": read_anipose, "pickle": read_pickle}[kind]
    found = [camera for file in files for camera in read(open_bytes(file), file)]
    if len({camera.alias for camera in found}) < len(found):
        found = [replace(camera, alias=None) for camera in found]
    if names is not None:
        found = _select_by_name(found, list(names), files)
    millimetres = unit == "mm" or (unit == "auto" and kind in IN_MILLIMETRES)
    stack = {
        "intrinsics": [camera.intrinsics for camera in found],
        "rotation": [camera.rotation for camera in found],
        "translation_m": [camera.translation * (1e-3 if millimetres else 1.0) for camera in found],
        "distortion": [camera.distortion for camera in found],
    }
    cameras = Cameras(
        names=tuple(camera.known_name or str(i) for i, camera in enumerate(found)),
        **{key: np.array(values, dtype=np.float64) for key, values in stack.items()},
    )
    validate_cameras(cameras, [camera.file for camera in found] or files)
    if unit == "auto":
        centers = cameras.centers_m
        extent = float(np.linalg.norm(centers - centers.mean(axis=0), axis=1).max())
        if not PLAUSIBLE_EXTENT_M[0] <= extent <= PLAUSIBLE_EXTENT_M[1]:
            raise UserError(
                f"{files[0]}: read in {'millimetres' if millimetres else 'metres'}, the cameras are {extent:.3g} m "
                "from their mean position; state the unit of the calibration (m or mm)"
            )
    return cameras


def _format_of(file: str) -> Format:
    suffix = PurePosixPath(file).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{file}: unknown suffix {suffix!r}; name its format: hdf5, dannce, anipose or pickle")
    return SUFFIXES[suffix]


def _select_by_name(found: list[CameraEntry], names: list[str], files: list[str]) -> list[CameraEntry]:
    """The cameras called `names`, in that order, see `read_cameras`."""
    by_name = {camera.known_name: camera for camera in found}
    missing = [name for name in names if name not in by_name]
    if any(camera.name is not None for camera in found):
        held = ", ".join(str(camera.name) for camera in found)
        if len(by_name) < len(found):
            raise UserError(f"{files[0]}: camera names occur twice ({held}); give every camera its own")
        if missing:
            raise UserError(f"{files[0]}: no camera {missing[0]!r}; the file has {held}: name the videos' cameras so")
    if not missing:
        return [by_name[name] for name in names]
    if len(found) != len(names):
        raise UserError(
            f"{files[0]}: {len(found)} cameras without names for {len(names)} videos; the numbers must be equal"
        )
    return [replace(camera, name=name) for camera, name in zip(found, names, strict=True)]
