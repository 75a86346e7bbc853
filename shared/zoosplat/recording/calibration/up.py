"""The up direction of a recording."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.geometry.rotations import FloatArray, unit
from zoosplat.recording.calibration.reader import OpenBytes


def read_up(spec: str | Sequence[float] | FloatArray, cameras: Cameras | None, open_bytes: OpenBytes) -> FloatArray:
    """Unit vector [3] float64 from floor to ceiling in the calibration frame.

    Args:
        spec: "auto" for the mean over the cameras of their negative y axis, -R^T e_y; three numbers; or the path of an
            npz file whose `up` is the NEGATIVE of up, as the classic tool writes it.
        cameras: needed for "auto" alone.
        open_bytes: returns the content of a path or URL.

    Raises:
        UserError: the value is no direction, or the file cannot be read.
    """
    where = f"up direction {spec}"
    value: object = spec
    if isinstance(spec, str) and spec == "auto":
        if cameras is None:
            raise ValueError("up direction auto is that of cameras")
        up = -cameras.rotation[:, 1].mean(axis=0)
        if np.linalg.norm(up) < 0.1:
            raise UserError("up direction auto: the cameras do not share an upright; give up as a vector or npz")
        return unit(up)
    if isinstance(spec, str):
        where = f"{spec}: up"
        data = open_bytes(spec)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                value = -stored["up"]
        # For a damaged file numpy and zipfile raise exceptions of many kinds.
        except Exception as error:
            raise UserError(f"{spec}: cannot read the key 'up' of an npz file ({error})") from error
    try:
        up = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} must be 3 numbers") from error
    if up.shape != (3,) or not np.isfinite(up).all() or np.linalg.norm(up) < 1e-6:
        raise UserError(f"{where} must be 3 finite numbers, not all 0; got {np.array2string(up)}")
    return unit(up)
