"""Windows of pictures: cutting and pasting, over borders and at odd scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoosplat.recording.video import Planes
from zoosplat_segment.network import MULTIPLE
from zoosplat_segment.windows import COARSE, Window, pixels_of, whole_picture, windows_round

SIZE = 101, 83  # width, height
PICTURE = np.random.default_rng(0).integers(0, 256, (83, 101), np.uint8)
WINDOWS = [
    Window(20, 10, 1, 32, 32),
    Window(-16, -8, 1, 64, 32),
    Window(60, 60, 1, 64, 64),
    Window(21, 12, 3, 32, 32),
    Window(-15, -10, 5, 32, 32),
]


def slow_cut(window: Window) -> np.ndarray:
    """The mean of the squares; squares beyond the picture's last whole ones show the nearest of these."""
    out = np.zeros((window.height, window.width))
    s = window.scale
    last_row, last_column = (SIZE[1] - window.y) // s - 1, (SIZE[0] - window.x) // s - 1
    for row in range(window.height):
        for column in range(window.width):
            y = window.y + s * min(max(row, -(window.y // s)), last_row)
            x = window.x + s * min(max(column, -(window.x // s)), last_column)
            out[row, column] = PICTURE[y : y + s, x : x + s].mean()
    return out


@pytest.mark.parametrize("window", WINDOWS)
def test_cuts_are_means_of_squares(window: Window) -> None:
    expected = slow_cut(window)
    colour = np.repeat(PICTURE[..., None], 3, 2)
    np.testing.assert_allclose(window.cut_picture(colour, SIZE), np.repeat(expected[..., None], 3, 2), atol=0.51)
    grey = Planes(PICTURE, None, None, True, 601)
    np.testing.assert_allclose(window.cut(grey, SIZE)[..., 0], expected, atol=1.01)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_mask_comes_back_where_it_was_cut(window: Window) -> None:
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[30:75, 40:90] = 255
    cut = np.divide(window.cut_picture(np.repeat(mask[..., None], 3, 2), SIZE)[..., 0], 255, dtype=np.float32)
    pasted = window.paste(cut, SIZE)
    assert pasted.shape == mask.shape
    left, right, top, bottom = window.inner(SIZE)
    s = window.scale
    rows = slice(window.y + top * s, window.y + bottom * s)
    columns = slice(window.x + left * s, window.x + right * s)
    shown = np.zeros_like(mask, bool)
    shown[rows, columns] = True
    assert not pasted[~shown].any()
    if s == 1:
        np.testing.assert_array_equal(pasted[shown], mask[shown])
    else:  # edges are soft over a square
        wrong = (pasted >= 128) != (mask >= 128)
        assert not wrong[31 + s : 74 - s, 41 + s : 89 - s][shown[31 + s : 74 - s, 41 + s : 89 - s]].any()
        outside = np.ones_like(shown)
        outside[30 - s : 75 + s, 40 - s : 90 + s] = False
        assert not wrong[outside].any()


@pytest.mark.parametrize("size", [(96, 80), (289, 100), (1152, 1024), (640, 2000)])
def test_the_whole_picture(size: tuple[int, int]) -> None:
    whole = whole_picture(size)
    assert max(size) / whole.scale <= COARSE
    assert whole.scale == 1 or max(size) / (whole.scale - 1) > COARSE
    for edge, pixels in zip((whole.width, whole.height), size, strict=True):
        assert edge % MULTIPLE == 0
        assert 0 <= edge * whole.scale - pixels < MULTIPLE * whole.scale
    assert whole.extent(size) == (size[0] / whole.scale, size[1] / whole.scale)


def test_windows_hold_their_boxes_and_have_one_size() -> None:
    boxes = {0: (10.0, 60.0, 20.0, 40.0), 3: (500.0, 1400.0, 300.0, 700.0), 4: (0.0, 5.0, 0.0, 5.0)}
    windows = windows_round(boxes, 0.15, 320)
    assert list(windows) == [0, 3, 4]
    assert len({(w.width, w.height) for w in windows.values()}) == 1
    assert [w.scale for w in windows.values()] == [1, 4, 1]
    for c, (left, right, top, bottom) in boxes.items():
        window = windows[c]
        assert window.width % MULTIPLE == window.height % MULTIPLE == 0
        assert window.x % window.scale == window.y % window.scale == 0
        assert window.x <= left
        assert window.x + window.width * window.scale >= right
        assert window.y <= top
        assert window.y + window.height * window.scale >= bottom
    assert windows_round({}, 0.15, 320) == {}


def test_places_of_averaged_pixels() -> None:
    window = Window(30, -9, 3, 32, 64)
    places = pixels_of(window, 1.0, torch.device("cpu"))
    assert places.shape == (64, 32, 2)
    assert places[0, 0].tolist() == [31, -8]  # the middle of pixels 30 to 32 and -9 to -7
    assert places[2, 5].tolist() == [46, -2]
    every_fourth = pixels_of(window, 4.0, torch.device("cpu"))
    assert every_fourth.shape == (16, 8, 2)
    np.testing.assert_allclose(every_fourth[1, 2], places[4:8, 8:12].mean((0, 1)))
