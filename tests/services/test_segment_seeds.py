"""Keypoints as seeds of masks."""

from __future__ import annotations

import numpy as np
import torch

from zoosplat_segment.seeds import CONFIDENT, seed
from zoosplat_segment.windows import Window

SIZE = 1000, 800  # A disc is 15 pixels wide.


def points(*rows: tuple[float, float, float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(rows, np.float32)


def test_discs_lie_round_confident_keypoints_alone() -> None:
    window = Window(100, 200, 1, 96, 64)
    mask = torch.full((64, 96), 0.2)
    nan = float("nan")
    keypoints = points((130, 230, 0.9), (160, 230, CONFIDENT - 0.01), (nan, nan, nan), (9e9, -9e9, 1), (150, 199, 0.8))
    found = seed(mask, keypoints, window, SIZE).numpy()
    rows, columns = np.mgrid[:64, :96]
    distance = np.minimum(np.hypot(columns - 30, rows - 30), np.hypot(columns - 50, rows + 1))
    assert (found[distance < 6.5] == 1).all()
    np.testing.assert_allclose(found[distance > 9], 0.2)
    assert (mask == 0.2).all()


def test_in_averaged_pixels() -> None:
    window = Window(-40, 0, 4, 64, 32)
    found = seed(torch.zeros(32, 64), points((121.5, 61.5, 1)), window, SIZE).numpy()
    rows, columns = np.nonzero(found)
    assert (columns.mean(), rows.mean()) == (40, 15)
    assert 4 * np.ptp(columns) + 4 in range(12, 21)


def test_without_confident_keypoints_a_mask_stays() -> None:
    mask = torch.rand(8, 8)
    assert seed(mask, points((4, 4, 0.1)), Window(0, 0, 1, 8, 8), SIZE) is mask
