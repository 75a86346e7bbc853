"""Cells of CSV files."""

from __future__ import annotations

import math

import numpy as np

from zoosplat.formats.csv_table import encode_csv


def test_cells() -> None:
    rows: list[list[object]] = [["a, b", 1 / 3], ["c", math.nan], ["d", 7], ["e", np.float32(0.25)], ["f", None]]
    assert encode_csv(["name", "value"], rows, 6).decode() == 'name,value\n"a, b",0.333333\nc,\nd,7\ne,0.25\nf,\n'


def test_all_digits() -> None:
    assert encode_csv(["x", "y"], [[0.1, None], [1 / 3, 2]]).decode() == "x,y\n0.1,\n0.3333333333333333,2\n"
