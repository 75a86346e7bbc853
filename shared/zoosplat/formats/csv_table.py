"""Tables as CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np


def encode_csv(header: Sequence[str], rows: Iterable[Sequence[object]], digits: int | None = None) -> bytes:
    """The bytes of a CSV file; None becomes an empty cell.

    Args:
        header: names of the columns.
        rows: values of the cells.
        digits: significant digits of floats, of which NaN becomes an empty cell too; default: as Python writes floats.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(row if digits is None else [_rounded(value, digits) for value in row])
    return text.getvalue().encode()


def _rounded(value: object, digits: int) -> object:
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.{digits}g}"
    return value
