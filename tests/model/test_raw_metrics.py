"""Metrics on raw pictures: windows and errors worked out by hand, and what masks cannot change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from zoosplat.recording import background as in_numpy
from zoosplat_model.background import lay_over, lit_plate
from zoosplat_model.raw_metrics import Box, compare_windows, judged_windows, raw_errors, white_beyond

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
    truth = torch.rand(3, 40, 50, 3)
    picture = (truth + 0.1).clamp(0, 1)
    origin = torch.tensor([[3, 4], [0, 0], [200, 200]])
    # Inside of the picture; in part beyond its left and lower border; beside it, and too flat.
    windows = torch.tensor([[8, 14, 34, 37], [0, 25, 40, 60], [10, 10, 40, 15]])
    plate = torch.rand(80, 90, 3)
    found = compare_windows(
        picture, truth, origin, windows, lambda c, box: plate[box[1] : box[3], box[0] : box[2]], d, raw_errors, 3
    )
    whole = plate.repeat(2, 2, 1, 1, 1)  # of camera 0 and 1, what is shown and the truth
    for c, (x, y) in enumerate(origin[:2].tolist()):
        whole[c, 0, y : y + 40, x : x + 50], whole[c, 1, y : y + 40, x : x + 50] = picture[c], truth[c]
    # Squares of the whole frame, which begin at even pixels for d = 2.
    boxes = [(8, 14, 34, 37), (0, 25, 40, 60)] if d == 1 else [(8, 14, 34, 36), (0, 26, 40, 60)]
    for c, (x0, y0, x1, y1) in enumerate(boxes):
        small = torch.nn.functional.avg_pool2d(whole[c, :, y0:y1, x0:x1].double().permute(0, 3, 1, 2), d)
        one, other = small[:1], small[1:]
        assert found[c, 0] == pytest.approx(float((one - other).abs().mean()))
        assert found[c, 1] == pytest.approx(-10 * math.log10(float((one - other).square().mean())))
        expected = structural_similarity_index_measure(one, other, data_range=1.0)
        assert isinstance(expected, torch.Tensor)
        assert found[c, 2] == pytest.approx(float(expected))
    assert found[2].isnan().all()  # 5 rows are too few


def test_larger_pictures_change_nothing_if_they_show_nothing_more() -> None:
    """A wrong mask makes a smaller window of the recording, which must not make the figures better or worse."""
    plate, photo = torch.rand(1, 60, 60, 3), torch.rand(1, 12, 12, 3)
    picture, truth = plate.clone(), plate.clone()
    picture[:, 20:32, 25:37], truth[:, 20:32, 25:37] = (photo + 0.2).clamp(0, 1), photo
    window = torch.tensor([[10, 8, 50, 48]])

    def beyond(camera: int, box: Box) -> torch.Tensor:
        return plate[camera, box[1] : box[3], box[0] : box[2]]

    found = []
    for x0, y0, x1, y1 in ((25, 20, 37, 32), (12, 6, 40, 36), (0, 0, 60, 60)):
        pictures = picture[:, y0:y1, x0:x1], truth[:, y0:y1, x0:x1]
        origin = torch.tensor([[x0, y0]])
        found.append(compare_windows(*pictures, origin, window, beyond, 1, raw_errors, 3))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    nothing = compare_windows(*pictures, origin + 100, window, beyond, 1, raw_errors, 3)
    assert nothing.tolist() == [[0, 100, 1]]


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
    right = compare_windows(photo, photo, origin, window, white_beyond, 1, raw_errors, 3)
    assert right.tolist() == [[0, 100, 1]]
    found = compare_windows(over_plate, photo, origin, window, white_beyond, 1, raw_errors, 3)[0]
    assert found[1] > 99
    # An animal that lacks a part shows the plate there.
    alpha[:, 8:12, 8:12] = 0
    lacking = lay_over(torch.where(alpha[..., None] > 0, on_white, 1.0), alpha, plate)
    error = float((plate - photo)[:, 8:12, 8:12].square().sum())
    found = compare_windows(lacking, photo, origin, window, white_beyond, 1, raw_errors, 3)[0]
    assert found[1] == pytest.approx(-10 * math.log10(error / (3 * 400)), abs=1e-3)
