"""The history of a training: a row of figures for each finished epoch."""

from __future__ import annotations

from collections.abc import Sequence

from zoosplat.formats.csv_table import encode_csv

Row = dict[str, float]


def history_csv(history: Sequence[Row]) -> bytes:
    """The history as a CSV file; what was not computed in an epoch is an empty cell."""
    keys = list(dict.fromkeys(key for row in history for key in row))
    return encode_csv(keys, ([row.get(key) for key in keys] for row in history))
