"""Calibrations in pickles, which are read without running code of the file."""

from __future__ import annotations

import io
import pickle
from typing import Any, NoReturn

import numpy as np

from zoosplat.errors import UserError
from zoosplat.recording.calibration.entries import CameraEntry, check_entry, first_value


def read_pickle(data: bytes, file: str) -> list[CameraEntry]:
    """The cameras in the content of a pickle. Raises UserError where it holds none or asks for other types."""
    try:
        loaded = _NumpyUnpickler(io.BytesIO(data), file).load()
    except UserError:
        raise
    # For a damaged pickle exceptions of many kinds are raised.
    except Exception as error:
        raise UserError(f"{file}: not a readable pickle ({error})") from error
    named: list[tuple[str | None, Any]] = []
    if isinstance(loaded, dict):
        named = [(str(key), table) for key, table in loaded.items()]
    elif isinstance(loaded, list | tuple):
        named = [(None, table) for table in loaded]
    if not named or not all(isinstance(table, dict) for _, table in named):
        raise UserError(f"{file}: must hold a list or dict of cameras, each a dict with K, R and T")
    cameras = []
    for i, (name, table) in enumerate(named):
        where = f"{file}: camera {name if name is not None else i}"
        k, rotation, translation = (first_value(table, [key, key.lower()], where) for key in ("K", "R", "T"))
        distortion: Any = next((table[key] for key in ("distortion", "distortions", "dist", "D") if key in table), [])
        cameras.append(check_entry(file, name, i, k, rotation, translation, distortion))
    return cameras


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for `codecs.encode`, by which protocols 0 to 2 make bytes, without the other codecs."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode("latin1")


class _NumpyUnpickler(pickle.Unpickler):
    """An unpickler of plain containers, text, numbers and numpy arrays. Other types are refused before an import."""

    def __init__(self, data: io.BytesIO, file: str) -> None:
        # numpy needs this encoding for arrays that Python 2 pickled.
        super().__init__(data, encoding="latin1")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        # Arrays are in numpy.core for numpy 1 and in numpy._core for numpy 2.
        match module.replace("numpy.core", "numpy._core"), name:
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "numpy._core.multiarray", "_reconstruct" | "scalar":
                return getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
            case "numpy._core.numeric", "_frombuffer":
                return np._core.numeric._frombuffer  # type: ignore[attr-defined]
            case "_codecs", "encode":
                return _latin1
        self._refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        self._refuse("a persistent object")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(
            f"{self._file}: the pickle asks for {what}; only numpy arrays, lists, dicts, text and numbers are read. "
            "Do not trust this file, or save the cameras as HDF5"
        )
