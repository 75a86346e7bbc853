"""PLY files of points: binary, little endian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TYPES = {
    **{"char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "<i2", "int16": "<i2", "ushort": "<u2"},
    **{"uint16": "<u2", "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4"},
    **{"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8"},
}
END = b"end_header\n"


class Header(NamedTuple):
    """What a file's header declares.

    Attributes:
        n: number of vertices.
        fields: name and numpy type of each property of a vertex, in their order.
        size: bytes of the header, after which the vertices begin.
    """

    n: int
    fields: tuple[tuple[str, str], ...]
    size: int

    @property
    def n_bytes(self) -> int:
        """Bytes that the file must have for all vertices to be there."""
        return self.size + self.n * np.dtype(list(self.fields)).itemsize


def encode(columns: Mapping[str, npt.NDArray[np.floating]]) -> bytes:
    """A file of float32 properties, [N] each, in the order given."""
    properties = "".join(f"property float {name}\n" for name in columns)
    n = len(next(iter(columns.values())))
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {n}\n{properties}end_header\n"
    return header.encode() + np.stack(list(columns.values()), axis=1).astype("<f4").tobytes()


def read_header(data: bytes) -> Header:
    """The header at the beginning of a file, of which `data` may be the first part.

    Raises:
        ValueError: not a binary little-endian PLY file whose first element is vertices of single values.
    """
    text, end, _ = data.partition(END)
    lines = [line.split() for line in text.decode("ascii", "replace").splitlines()]
    lines = [line for line in lines if line and line[0] not in ("comment", "obj_info")]
    if not end or lines[:2] != [["ply"], ["format", "binary_little_endian", "1.0"]]:
        raise ValueError("not a binary little-endian PLY file")
    if len(lines) < 3 or lines[2][:2] != ["element", "vertex"] or not (len(lines[2]) == 3 and lines[2][2].isdigit()):
        raise ValueError("the first element is not a number of vertices")
    fields: list[tuple[str, str]] = []
    for line in lines[3:]:
        if line[0] == "element":
            break
        if len(line) != 3 or line[1] not in TYPES or line[2] in dict(fields):
            raise ValueError(f"unknown property {' '.join(line[1:])}")
        fields.append((line[2], TYPES[line[1]]))
    return Header(int(lines[2][2]), tuple(fields), len(text) + len(end))


def decode(data: bytes) -> dict[str, npt.NDArray[np.float64]]:
    """The properties of the vertices, [N] each; other elements are left out.

    Raises:
        ValueError: not a binary little-endian PLY file whose first element is vertices of single values, or cut off.
    """
    header = read_header(data)
    if len(data) < header.n_bytes:
        raise ValueError(f"cut off: {len(data)} of at least {header.n_bytes} bytes")
    rows = np.frombuffer(data, np.dtype(list(header.fields)), header.n, header.size)
    return {name: rows[name].astype(np.float64) for name, _ in header.fields}
