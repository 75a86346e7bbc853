"""The history of a training: a row of figures for each finished epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

Row = dict[str, float]


def history_csv(history: Sequence[Row]) -> bytes:
    """The history as a CSV file; what was not computed in an epoch is an empty cell."""
    keys = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()
