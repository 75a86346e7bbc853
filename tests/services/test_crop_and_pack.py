"""Index ranges and windows, worked out by hand and as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoosplat_crop import ops as crop
from zoosplat_pack import ops as pack


def counts(n: int, **at: int) -> np.ndarray:
    out = np.zeros(n, np.int64)
    for key, value in at.items():
        out[int(key[1:])] = value
    return out


def test_range_by_hand() -> None:
    # Indices 20 to 40 are 21 long: 32 holds them, centred: start (20 + 41 - 32) // 2 = 14.
    assert crop.index_range(counts(64, i20=5, i30=9, i40=1), 1, 16) == (14, 46)
    assert crop.index_range(counts(64, i20=5, i30=9, i40=1), 2, 16) == (17, 33)  # 40 has too few: 20 to 30
    assert crop.index_range(counts(64, i0=1, i3=1), 1, 16) == (0, 16)
    assert crop.index_range(counts(64, i63=1), 1, 16) == (48, 64)
    with pytest.raises(ValueError, match="no voxels"):
        crop.index_range(counts(64), 1, 16)


@given(st.integers(16, 130), st.data())
def test_range_holds_everything_that_fits(n: int, data: st.DataObject) -> None:
    there = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    values = np.zeros(n, np.int64)
    values[there] = 3
    start, end = crop.index_range(values, 1, 16)
    assert 0 <= start < end <= n
    assert (end - start) % 16 == 0
    if max(there) - min(there) < n // 16 * 16:
        assert values[start:end].sum() == values.sum()
        assert end - start - 16 < max(there) - min(there) + 1  # no shorter multiple would do


def test_counts_by_hand() -> None:
    cells = np.array([[0, 1, 2], [0, 1, 3], [2, 1, 3]])
    assert crop.index_counts(cells, 4).tolist() == [[2, 0, 1, 0], [0, 3, 0, 0], [0, 0, 1, 2]]


def test_window_by_hand() -> None:
    boxes = np.array([[[100, 50, 130, 60], [0, 0, 0, 0]], [[2, 3, 42, 90], [300, 200, 320, 220]]], np.int32)
    # Sides at most 40 x 87, with 8 px on each side 56 x 103: 64 x 112.
    size = pack.window_size(boxes, (320, 240))
    assert size == (64, 112)
    origins = pack.window_origins(boxes, size, (320, 240))
    assert origins.tolist() == [[[83, 0], [0, 0]], [[0, 0], [256, 128]]]
    assert pack.window_size(boxes, (60, 240)) == (60, 112)


@given(st.data())
def test_every_box_lies_in_its_window(data: st.DataObject) -> None:
    full = data.draw(st.tuples(st.integers(16, 200), st.integers(16, 200)))
    boxes = []
    for _ in range(4):
        x0, y0 = data.draw(st.integers(0, full[0] - 1)), data.draw(st.integers(0, full[1] - 1))
        boxes.append([x0, y0, data.draw(st.integers(x0 + 1, full[0])), data.draw(st.integers(y0 + 1, full[1]))])
    array = np.array(boxes, np.int32)
    size = pack.window_size(array, full)
    origins = pack.window_origins(array, size, full)
    assert (origins >= 0).all()
    assert (origins + size <= full).all()
    margin = np.minimum(pack.MARGIN, array[:, :2])
    assert (origins <= array[:, :2] - margin).all() or size[0] == full[0] or size[1] == full[1]
    assert (origins <= array[:, :2]).all()
    assert (origins + size >= array[:, 2:]).all()
