"""CSV files of tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def encode_csv(header: Sequence[str], rows: Iterable[Sequence[Any]], digits: int | None = None) -> bytes:
    """A CSV file with a header line and lines that end in a line feed. None is an empty cell.

    Args:
        header: names of the columns.
        rows: as many values each as there are columns.
        digits: significant digits of floating-point numbers, with NaN as an empty cell; None: all digits.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(row if digits is None else [_cell(value, digits) for value in row])
    return text.getvalue().encode()


def _cell(value: Any, digits: int) -> Any:
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.{digits}g}"
    return value
