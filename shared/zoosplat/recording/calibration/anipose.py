"""Calibrations of Anipose in TOML files."""

from __future__ import annotations

import tomllib

from zoosplat.errors import UserError
from zoosplat.recording.calibration.entries import CameraEntry, check_entry, first_value, to_array


def read_anipose(data: bytes, file: str) -> list[CameraEntry]:
    """The cameras in the content of a file of aniposelib's CameraGroup.dump. Raises UserError where it holds none.

    The file has a table cam_N a camera. Rotations are Rodrigues vectors, and pixels count from 0.
    """
    from scipy.spatial.transform import Rotation

    try:
        tables = tomllib.loads(data.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not a readable TOML file ({error})") from error
    cameras: list[CameraEntry] = []
    for key, table in tables.items():
        if key == "metadata" or not isinstance(table, dict):
            continue
        where = f"{file}: camera {table.get('name', key)}"
        if table.get("fisheye", False):
            raise UserError(f"{where}: fisheye lenses are not supported; undistort the videos first")
        vector = to_array(first_value(table, ["rotation"], where), (3,), f"{where}: rotation")
        rotation = Rotation.from_rotvec(vector).as_matrix()
        k, translation = first_value(table, ["matrix"], where), first_value(table, ["translation"], where)
        name = str(table.get("name", key))
        cameras.append(check_entry(file, name, len(cameras), k, rotation, translation, table.get("distortions", [])))
    return cameras
