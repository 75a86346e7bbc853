"""Calibrations of DANNCE and Label3D in MATLAB files."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from zoosplat.errors import UserError
from zoosplat.recording.calibration.entries import CameraEntry, check_entry, first_value, to_array
from zoosplat.recording.calibration.hdf5 import refuse_other_files

# Variables of the file that are read.
MAT_KEYS = ("params", "camnames", "K", "r", "R", "t", "RDistort", "TDistort")


def read_dannce(data: bytes, file: str) -> list[CameraEntry]:
    """The cameras in the content of a MATLAB file. Raises UserError where it holds none.

    MATLAB multiplies row vectors from the left, so K and r are transposed. Its pixels count from 1.
    """
    mat = _load_mat(data, file)
    if "params" in mat:
        params, names, alias = _as_list(mat["params"]), [str(name) for name in _as_list(mat.get("camnames", []))], None
        if names and len(names) != len(params):
            raise UserError(f"{file}: {len(names)} camnames for {len(params)} cameras in params")
    else:
        params, names = [mat], []
        alias = PurePosixPath(file).stem.removeprefix("hires_").removesuffix("_params")
    cameras = []
    for i, table in enumerate(params):
        where = f"{file}: camera {names[i] if names else i!r}"
        if not isinstance(table, dict):
            raise UserError(f"{where}: params must be a cell array of structs")
        k = to_array(first_value(table, ["K"], where), (3, 3), f"{where}: K").T.copy()
        k[:2, 2] -= 1
        rotation = to_array(first_value(table, ["r", "R"], where), (3, 3), f"{where}: r").T
        radial = to_array(table.get("RDistort", []), None, f"{where}: RDistort").ravel()
        tangential = to_array(table.get("TDistort", []), None, f"{where}: TDistort").ravel()
        if len(radial) > 3 or len(tangential) > 2:
            raise UserError(
                f"{where}: {len(radial)} RDistort and {len(tangential)} TDistort values; at most 3 and 2 are read"
            )
        k1, k2, k3 = np.pad(radial, (0, 3 - len(radial)))
        p1, p2 = np.pad(tangential, (0, 2 - len(tangential)))
        name = names[i] if names else None
        camera = check_entry(file, name, i, k, rotation, first_value(table, ["t"], where), (k1, k2, p1, p2, k3))
        cameras.append(replace(camera, alias=alias))
    return cameras


def _as_list(value: object) -> list[Any]:
    """A MATLAB cell array as a list. scipy returns the bare element of a cell array that has only one."""
    return list(value) if isinstance(value, list | np.ndarray) and np.ndim(value) else [value]


def _load_mat(data: bytes, file: str) -> dict[str, Any]:
    import scipy.io

    try:
        loaded: dict[str, Any] = scipy.io.loadmat(io.BytesIO(data), simplify_cells=True, variable_names=MAT_KEYS)
    except NotImplementedError:
        return _load_mat_v73(data, file)
    # For a damaged file scipy raises exceptions of many kinds.
    except Exception as error:
        raise UserError(f"{file}: not a readable MATLAB file ({error})") from error
    return loaded


def _load_mat_v73(data: bytes, file: str) -> dict[str, Any]:
    """The variables of a MATLAB 7.3 file, which is HDF5 with reversed axes, cells as references and text as codes."""
    import h5py

    def value(item: Any) -> Any:
        if isinstance(item, h5py.Group):
            return {key: value(item[key]) for key in item}
        if h5py.check_ref_dtype(item.dtype):
            return [value(item.file[reference]) for reference in item[()].T.ravel()]
        if item.attrs.get("MATLAB_class") in (b"char", "char"):
            return "".join(chr(code) for code in item[()].T.ravel())
        return item[()].T

    try:
        with h5py.File(io.BytesIO(data), "r") as stored:
            refuse_other_files(stored, file)
            return {key: value(stored[key]) for key in MAT_KEYS if key in stored}
    except UserError:
        raise
    # For a damaged file h5py raises exceptions of many kinds.
    except Exception as error:
        raise UserError(f"{file}: not a readable MATLAB 7.3 file ({error}); save it with -v7") from error
