"""Pieces of masks and boxes round them, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoosplat_segment.mask_pieces import box_of_piece, box_of_prior, keep_pieces, soft_iou


def blank() -> np.ndarray:
    return np.zeros((60, 80), np.float32)


def test_small_pieces_and_those_without_support_are_left_out() -> None:
    mask = blank()
    mask[10:30, 10:30] = 0.9  # 400 pixels
    mask[40:50, 50:60] = 0.8  # 100
    mask[2:4, 70:72] = 0.9  # 4: less than 2% of the largest
    mask[50, :] = 0.3  # doubt stays
    kept = keep_pieces(mask, None)
    assert (kept >= 0.5).sum() == 500
    np.testing.assert_allclose(kept[50, :40], 0.3)
    assert kept[2, 70] == pytest.approx(0.49)
    support = np.zeros(mask.shape, bool)
    support[49, 59] = True
    kept = keep_pieces(mask, support)
    assert (kept >= 0.5).sum() == 100
    assert kept[20, 20] == pytest.approx(0.49)
    np.testing.assert_array_equal(keep_pieces(blank(), support), blank())


def test_box_of_the_heaviest_piece() -> None:
    mask = blank()
    mask[10:20, 10:20] = 0.6  # mass 60
    mask[40:48, 50:59] = 1  # mass 72
    assert box_of_piece(mask, 3) == (150, 177, 120, 144)
    assert box_of_piece(blank(), 3) is None


def test_box_of_what_the_others_tell_with_what_the_view_adds() -> None:
    prior, mask = blank(), blank()
    assert box_of_prior(prior, mask, 2) is None
    prior[20:31, 30:41] = 0.6
    assert box_of_prior(prior, mask, 2) == (60, 82, 40, 62)
    mask[25:28, 35:44] = 0.9  # a tail that reaches out
    mask[50:55, 70:75] = 0.9  # something else
    assert box_of_prior(prior, mask, 2) == (60, 88, 40, 62)
    mask[25:28, 0:35] = 0.9  # an arm: half of the prior's edge and 4 pixels are added
    assert box_of_prior(prior, mask, 2) == (42, 88, 40, 62)


def test_soft_iou_by_hand() -> None:
    # Half of a prior is a view that says no: the prior counts as 0.5, 0.5, 0.
    mask, prior = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[0.75, 0.75, 0.5]])
    assert soft_iou(mask, prior) == pytest.approx(1 / 1.5)
    assert soft_iou(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
