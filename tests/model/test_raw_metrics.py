"""Metrics on raw pictures: windows and errors worked out by hand, and what masks cannot change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from zoosplat.recording import background as in_numpy
from zoosplat_model.background import lay_over, lit_plate
from zoosplat_model.raw_metrics import RAW_METRICS, compare_windows, judged_windows, raw_errors

RNG = np.random.default_rng(0)


def test_background_is_that_of_numpy() -> None:
    plate = RNG.integers(0, 256, (2, 6, 9, 3)).astype(np.uint8)
    light = np.array([1, 0.2, -0.1, 3], np.float32) + 0.1 * RNG.random((2, 3, 4), np.float32)
    origin = np.array([[7, 3], [0, 11]])
    expected = in_numpy.lit_plate(plate, light, origin, (40, 20)) / 255
    tensors = torch.from_numpy(plate), torch.from_numpy(light), torch.from_numpy(origin).float()
    np.testing.assert_allclose(lit_plate(*tensors, (40, 20)), expected, atol=1e-5)


def test_windows_by_hand() -> None:
    # A camera at the origin that looks along +z, 100 px of focal length; the animal 2 m ahead and 0.2 m to the right.
    k = torch.tensor([[100.0, 0, 49.6], [0, 200, 39.7], [0, 0, 1]])
    views = k.expand(3, 3, 3), torch.eye(4).repeat(3, 1, 1)
    views[1][2, :3, :3] = torch.diag(torch.tensor([-1.0, 1, -1]))  # looks the other way
    views[1][1, 0, 3] = 0.95  # the animal is farther to the right
    windows = judged_windows(torch.tensor([0.2, 0, 2]), 0.4, *views, 110, 90)
    # Half of 0.4 m is 10 px wide and 20 px high there; the centre is at (59.6, 39.7).
    assert windows.tolist()[0] == [50, 20, 70, 60]
    assert windows.tolist()[1] == [98, 20, 110, 60]  # cut at the border of the picture: its centre is at 107.1
    x0, y0, x1, y1 = windows.tolist()[2]
    assert (x1 - x0) * (y1 - y0) == 0


@pytest.mark.parametrize("d", [1, 2])
def test_errors_by_hand(d: int) -> None:
    truth = torch.rand(2, 40, 50, 3)
    picture = (truth + 0.1).clamp(0, 1)
    truth[:, :10] = 0.77  # outside of the windows: plays no part
    windows = torch.tensor([[5, 10, 31, 33], [0, 20, 50, 25]])
    origin = torch.tensor([[3, 4], [0, 0]])
    found = compare_windows(picture, truth, windows, origin, d, raw_errors, len(RAW_METRICS))
    # Squares of the whole frame, whose first column and row in the window are even for d = 2.
    left, top, right, bottom = (5, 10, 31, 33) if d == 1 else (5, 10, 31, 32)
    one, other = (
        torch.nn.functional.avg_pool2d(v[:1, top:bottom, left:right].double().permute(0, 3, 1, 2), d)
        for v in (picture, truth)
    )
    assert found[0, 0] == pytest.approx(float((one - other).abs().mean()))
    assert found[0, 1] == pytest.approx(-10 * math.log10(float((one - other).square().mean())))
    expected = structural_similarity_index_measure(one, other, data_range=1.0)
    assert isinstance(expected, torch.Tensor)
    assert found[0, 2] == pytest.approx(float(expected))
    assert found[1].isnan().all()  # 5 rows are too few


def test_what_is_right_has_no_error_and_masks_play_no_part() -> None:
    # A half transparent animal of known colour before a known background: the photograph follows from both.
    plate = torch.rand(1, 24, 24, 3)
    alpha, color = torch.zeros(1, 24, 24), torch.rand(1, 24, 24, 3)
    alpha[:, 6:18, 6:18] = 0.5
    alpha[:, 8:16, 8:16] = 1
    photo = color * alpha[..., None] + plate * (1 - alpha[..., None])
    on_white = color * alpha[..., None] + (1 - alpha[..., None])
    over_plate = lay_over(on_white, alpha, plate)
    torch.testing.assert_close(over_plate, photo)
    window, origin = torch.tensor([[2, 2, 22, 22]]), torch.zeros(1, 2, dtype=torch.int64)
    right = compare_windows(photo, photo, window, origin, 1, raw_errors, 3)
    assert right.tolist() == [[0, 100, 1]]
    found = compare_windows(over_plate, photo, window, origin, 1, raw_errors, 3)[0]
    assert found[1] > 99
    # An animal that lacks a part shows the plate there.
    alpha[:, 8:12, 8:12] = 0
    lacking = lay_over(torch.where(alpha[..., None] > 0, on_white, 1.0), alpha, plate)
    error = float((plate - photo)[:, 8:12, 8:12].square().sum())
    found = compare_windows(lacking, photo, window, origin, 1, raw_errors, 3)[0]
    assert found[1] == pytest.approx(-10 * math.log10(error / (3 * 400)), abs=1e-3)
