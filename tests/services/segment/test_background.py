"""The light on a plate: found though a part of the picture is covered, and the same in small pictures and windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoosplat.recording.background import lit_plate
from zoosplat_segment.background import apply_light, fit_light, light_window, remove_light
from zoosplat_segment.windows import Window

LIGHT = torch.tensor([[[0.9, 0.12, -0.08, 4.0], [1.05, -0.1, 0.05, -3.0], [0.97, 0.06, 0.1, 2.0]]])


def random_plates(height: int, width: int) -> torch.Tensor:
    return 60 + 120 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_light_is_found_though_a_fifth_is_covered() -> None:
    height, width = 96, 128
    plates = random_plates(height, width)
    frames = apply_light(plates, LIGHT, (width, height))
    covered = frames.clone()
    covered[..., 20:68, 30:82] = 15  # 20% of the pixels
    found = fit_light(covered, plates, (width, height))
    # In grey levels everywhere in the picture.
    error = (apply_light(plates, found, (width, height)) - frames).abs()
    assert float(error.max()) < 1.0
    assert float(error.mean()) < 0.2
    np.testing.assert_allclose(found[..., :3], LIGHT[..., :3], atol=0.01)
    np.testing.assert_allclose(found[..., 3], LIGHT[..., 3], atol=0.5)


def test_a_picture_that_tells_nothing_has_the_light_of_the_plate() -> None:
    plates = random_plates(40, 40)
    burnt_out = torch.full_like(plates, 255)
    neutral = torch.tensor([1.0, 0, 0, 0]).expand(1, 3, 4)
    np.testing.assert_allclose(fit_light(burnt_out, plates, (40, 40)), neutral, atol=1e-4)
    np.testing.assert_allclose(fit_light(plates, plates, (40, 40)), neutral, atol=1e-4)


def test_a_margin_beside_the_picture_does_not_stretch_the_light() -> None:
    """Small pictures have a margin to the right and below, up to a multiple of the network's."""
    plates = random_plates(96, 160)
    extent = 131.0, 80.0
    frames = apply_light(plates, LIGHT, extent)
    np.testing.assert_allclose(fit_light(frames, plates, extent)[..., :3], LIGHT[..., :3], atol=0.01)


def test_light_is_taken_away_again() -> None:
    plates = random_plates(30, 40)
    frames = apply_light(plates, LIGHT, (40, 30))
    np.testing.assert_allclose(remove_light(frames, LIGHT, (40, 30)), plates, atol=1e-3)
    rows = remove_light(frames[:, :, 11:20], LIGHT, (40, 30), 11)
    np.testing.assert_allclose(rows, plates[:, :, 11:20], atol=1e-3)


@pytest.mark.parametrize("window", [Window(16, 8, 1, 64, 32), Window(-12, -6, 3, 32, 32), Window(30, 20, 2, 32, 32)])
def test_light_of_windows_is_that_of_the_stored_formula(window: Window) -> None:
    """`lit_plate` is what readers of segments.zarr use."""
    size = 120, 90
    plate = random_plates(window.height, window.width)[0]
    found = light_window(plate, LIGHT[0], window, size)
    # The middle of an averaged pixel; the formula counts from the corner of the first pixel.
    origin = (window.x + (window.scale - 1) / 2) / window.scale, (window.y + (window.scale - 1) / 2) / window.scale
    small = size[0] / window.scale, size[1] / window.scale
    stored = lit_plate(plate.permute(1, 2, 0), LIGHT[0], origin, small)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.permute(1, 2, 0), stored, atol=0.35)
