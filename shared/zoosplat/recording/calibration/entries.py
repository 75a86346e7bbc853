"""One camera as a calibration file describes it, and the checks of its numbers that all formats share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoosplat.errors import UserError
from zoosplat.geometry.rotations import FloatArray


@dataclass(frozen=True, eq=False)
class CameraEntry:
    """One camera as read from a file, in OpenCV's conventions.

    Attributes:
        file: path or URL of the file.
        name: the camera's name in the file; None where it has none.
        intrinsics: [3, 3] K, pixels.
        rotation: [3, 3] world to camera.
        translation: [3] world to camera, in the unit of the file.
        distortion: [5] k1 k2 p1 p2 k3.
        alias: the name that the file's own name suggests, where a file holds one camera.
    """

    file: str
    name: str | None
    intrinsics: FloatArray
    rotation: FloatArray
    translation: FloatArray
    distortion: FloatArray
    alias: str | None = None

    @property
    def known_name(self) -> str | None:
        """The name in the file, or else the alias."""
        return self.alias if self.name is None else self.name


def check_entry(
    file: str, name: str | None, number: int, k: object, rotation: object, translation: object, distortion: object
) -> CameraEntry:
    """A camera whose shapes are checked.

    Args:
        file: path or URL of the file.
        name: the camera's name in the file, or None.
        number: place of the camera in the file, from 0. Messages name a camera without a name by it.
        k: [3, 3].
        rotation: [3, 3].
        translation: [3], [3, 1] or [1, 3].
        distortion: up to 5 numbers k1 k2 p1 p2 k3.

    Raises:
        UserError: a value does not consist of numbers or has another shape.
    """
    where = f"{file}: camera {name if name is not None else number!r}"
    coefficients = to_array(distortion, None, f"{where}: distortion").ravel()
    if coefficients[5:].any():
        raise UserError(f"{where}: {len(coefficients)} distortion coefficients; only k1 k2 p1 p2 k3 are supported")
    coefficients = coefficients[:5]
    return CameraEntry(
        file=file,
        name=name,
        intrinsics=to_array(k, (3, 3), f"{where}: K"),
        rotation=to_array(rotation, (3, 3), f"{where}: rotation"),
        translation=to_array(translation, (3,), f"{where}: translation"),
        distortion=np.pad(coefficients, (0, 5 - len(coefficients))),
    )


def to_array(value: object, shape: tuple[int, ...] | None, what: str) -> FloatArray:
    """A float64 array of this shape, or of any shape with None. [3, 1] and [1, 3] count as [3].

    Raises:
        UserError: beginning with `what`: it does not consist of numbers or has another shape.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} does not consist of numbers") from error
    if shape is None:
        return array
    if array.squeeze().shape != shape:
        raise UserError(f"{what} has shape {list(array.shape)}, expected {list(shape)}")
    return array.reshape(shape)


def first_value(table: Mapping[str, Any], keys: Iterable[str], where: str) -> Any:
    """The value of the first of `keys` that the table has. Raises UserError, beginning with `where`, if it has none."""
    wanted = list(keys)
    for key in wanted:
        if key in table:
            return table[key]
    raise UserError(f"{where} has no {' or '.join(wanted)}")
