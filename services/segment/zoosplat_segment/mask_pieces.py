"""Masks as pixels in pieces: which pieces are kept, the boxes round them, and how well two masks agree."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zoosplat_segment.windows import Box

SURE = 0.5  # value from which hull and mask count as the animal
FAINT = 0.25  # value of a prior from which the animal may be there
LEFT_OUT = 0.49  # value of a mask at most in pieces that are left out; below `SURE`
SPARE = 0.5, 4.0  # how far a box reaches beyond what the others tell: of its longer edge, and small pixels beside
LEAST_PIECE = 0.02  # area of a piece of a mask that is kept, of the largest piece


def soft_iou(mask: Tensor, prior: Tensor) -> float:
    """How much a soft mask and a prior [h, w] have in common, 0 to 1; 0 where both are empty.

    The prior counts where all other views agree: where one of them says no it is 0.5, a halo that no mask fills.
    """
    agreed = (2 * prior - 1).clamp_min(0)
    both, either = torch.minimum(mask, agreed).sum(), torch.maximum(mask, agreed).sum()
    return float(both / either.clamp_min(1e-6))


def keep_pieces(mask: npt.NDArray[np.float32], support: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float32]:
    """The soft mask [h, w] without small pieces, and without pieces that touch no support [h, w]; None: all may stay.

    What is left out is brought below `SURE`, so that it is not animal, and keeps its doubt.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask >= SURE).astype(np.uint8))
    if count <= 1:
        return mask
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    if support is not None:
        touched = np.bincount(labels[support], minlength=count)
        areas[touched == 0] = 0
    kept = areas >= max(1, LEAST_PIECE * areas.max())
    kept[0] = True
    return np.where(kept[labels], mask, np.minimum(mask, np.float32(LEFT_OUT)))


def box_of_piece(mask: npt.NDArray[np.float32], scale: int) -> Box | None:
    """The box of the largest piece of a small mask, in pixels of the whole picture."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask >= SURE).astype(np.uint8))
    if count <= 1:
        return None
    masses = np.bincount(labels.ravel(), weights=mask.ravel(), minlength=count)
    masses[0] = 0
    largest = int(masses.argmax())
    x, y, w, h = (int(stats[largest, i]) for i in range(4))
    return x * scale, (x + w) * scale, y * scale, (y + h) * scale


def box_of_prior(prior: npt.NDArray[np.float32], mask: npt.NDArray[np.float32], scale: int) -> Box | None:
    """The box of what the other views tell, and of what this view adds to it, in pixels of the whole picture."""
    there = prior > FAINT
    if not there.any():
        return None
    _, labels = cv2.connectedComponents(((mask >= SURE) | there).astype(np.uint8))
    pieces = np.unique(labels[there])
    rows, columns = np.nonzero(np.isin(labels, pieces[pieces > 0]))
    # A piece that reaches far beyond the prior is not the animal's alone, such as an arm.
    own_rows, own_columns = np.nonzero(there)
    spare = SPARE[0] * max(np.ptp(own_rows), np.ptp(own_columns)) + SPARE[1]
    left, right = max(columns.min(), own_columns.min() - spare), min(columns.max(), own_columns.max() + spare)
    top, bottom = max(rows.min(), own_rows.min() - spare), min(rows.max(), own_rows.max() + spare)
    return left * scale, (right + 1) * scale, top * scale, (bottom + 1) * scale
