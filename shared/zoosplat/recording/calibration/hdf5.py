"""Calibrations in HDF5: zoosplat's own format, which is also that of the classic tool."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.calibration.entries import CameraEntry, check_entry, first_value, to_array


def write_hdf5(cameras: Cameras, path: Path) -> None:
    """Write camera_parameters/{intrinsic, rotation, translation (m), distortion} and the attribute `names`.

    `read_cameras` returns the same floats, and the classic tool reads the first three.

    Raises:
        UserError: the file cannot be written.
    """
    import h5py

    try:
        with h5py.File(path, "w") as file:
            group = file.create_group("camera_parameters")
            group.attrs["names"] = list(cameras.names)
            group["intrinsic"] = cameras.intrinsics
            group["rotation"] = cameras.rotation
            group["translation"] = cameras.translation_m
            group["distortion"] = cameras.distortion
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def refuse_other_files(stored: Any, file: str) -> None:
    """Raise UserError where an open HDF5 file refers to other files, because those would be files of this machine."""
    import h5py

    def elsewhere(name: str, thing: Any) -> str | None:
        linked = isinstance(thing, h5py.ExternalLink)
        return name if linked or (isinstance(thing, h5py.Dataset) and (thing.external or thing.is_virtual)) else None

    name = stored.visititems_links(elsewhere) or stored.visititems(elsewhere)
    if name is not None:
        raise UserError(f"{file}: {name} lies in another file; save the calibration as one file")


def read_hdf5(data: bytes, file: str) -> list[CameraEntry]:
    """The cameras in the content of an HDF5 file. Raises UserError where it holds none."""
    import h5py

    try:
        with h5py.File(io.BytesIO(data), "r") as stored:
            refuse_other_files(stored, file)
            group = first_value(stored, ["camera_parameters"], file)
            values = {key: group[key][()] for key in group}
            names = [n.decode() if isinstance(n, bytes) else str(n) for n in group.attrs.get("names", [])]
    except UserError:
        raise
    # For a damaged file h5py raises exceptions of many kinds.
    except Exception as error:
        raise UserError(f"{file}: not a readable HDF5 file with the group camera_parameters ({error})") from error
    k, rotation, translation = (
        to_array(first_value(values, [key], f"{file}: camera_parameters"), None, f"{file}: {key}")
        for key in ("intrinsic", "rotation", "translation")
    )
    n = len(k) if k.ndim else 0
    distortion = to_array(values.get("distortion", np.zeros((n, 5))), None, f"{file}: distortion")
    counts = {"intrinsic": k, "rotation": rotation, "translation": translation, "distortion": distortion}
    for key, array in counts.items():
        if array.ndim < 2 or len(array) != n:
            raise UserError(f"{file}: camera_parameters/{key} has shape {list(array.shape)}, not [{n}, ...]")
    if names and len(names) != n:
        raise UserError(f"{file}: {len(names)} names for {n} cameras")
    return [
        check_entry(file, names[i] if names else None, i, k[i], rotation[i], translation[i], distortion[i])
        for i in range(n)
    ]
