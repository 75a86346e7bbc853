"""The point that most views agree on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rigs import make_cameras

from zoosplat_segment.localization import locate, pieces
from zoosplat_segment.rig import Rig

SIZE, SCALE = (320, 240), 2
ELL = 0.25  # metres
TRUE = torch.tensor([0.03, -0.04, 0.02])  # metres


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(make_cameras(5, SIZE), SIZE, torch.device("cpu"))


def draw(mask: torch.Tensor, place: torch.Tensor, radius: float) -> None:
    """A disc at a place of the whole picture."""
    y, x = torch.meshgrid(torch.arange(mask.shape[0]), torch.arange(mask.shape[1]), indexing="ij")
    middle = (place + 0.5) / SCALE - 0.5
    mask[torch.hypot(x - middle[0], y - middle[1]) < radius] = 0.95


@pytest.fixture
def masks(rig: Rig) -> torch.Tensor:
    """A ball at the true place, seen by all views."""
    out = torch.zeros(5, SIZE[1] // SCALE, SIZE[0] // SCALE)
    pixels, _ = rig.project(TRUE[None])
    for mask, place in zip(out, pixels[:, 0], strict=True):
        draw(mask, place, 10)
    return out


def test_the_animal_is_found_though_a_view_sees_something_larger(rig: Rig, masks: torch.Tensor) -> None:
    draw(masks[2], torch.tensor([40.0, 30]), 18)
    found = locate(rig, masks, SCALE, list(range(5)), ELL, None)
    assert found is not None
    np.testing.assert_allclose(found, TRUE, atol=0.005)
    # Also where that view does not see the animal at all.
    masks[2] = 0
    draw(masks[2], torch.tensor([40.0, 30]), 18)
    found = locate(rig, masks, SCALE, list(range(5)), ELL, None)
    assert found is not None
    np.testing.assert_allclose(found, TRUE, atol=0.005)


def test_views_that_do_not_take_part_have_no_say(rig: Rig, masks: torch.Tensor) -> None:
    before = locate(rig, masks, SCALE, [0, 1, 3], ELL, None)
    masks[[2, 4]] = torch.rand(2, *masks.shape[1:])
    after = locate(rig, masks, SCALE, [0, 1, 3], ELL, None)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_nothing_is_below_the_floor(rig: Rig, masks: torch.Tensor) -> None:
    assert locate(rig, masks, SCALE, list(range(5)), ELL, float(TRUE[2]) - 0.02) is not None
    assert locate(rig, masks, SCALE, list(range(5)), ELL, float(TRUE[2]) + 0.05) is None


def test_one_view_alone_tells_no_place(rig: Rig, masks: torch.Tensor) -> None:
    masks[1:] = 0
    assert locate(rig, masks, SCALE, list(range(5)), ELL, None) is None
    assert locate(rig, torch.zeros_like(masks), SCALE, list(range(5)), ELL, None) is None


def test_pieces_by_hand() -> None:
    mask = np.zeros((20, 30), np.float32)
    mask[2:5, 3:9] = 0.5  # mass 9
    mask[10:14, 20:24] = 1  # mass 16
    mask[18, 0:3] = 1  # three pixels are noise
    found = pieces(mask)
    assert [piece[0] for piece in found] == pytest.approx([16, 9])
    assert found[0][1:] == (21.5, 11.5)
    assert found[1][1:] == (5.5, 3)
