"""Which weights a training ends with: the best in validation, blended with as much of the last as is not worse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def is_significantly_worse(losses: Sequence[float], least: Sequence[float]) -> bool:
    """Whether the mean loss of frames exceeds that of `least`, of the same frames, by more than its standard error.

    This is the one-standard-error rule (Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 7.10) for
    the frames' differences.
    """
    differences = np.subtract(losses, least)
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return bool(differences.mean() > deviation / math.sqrt(len(differences)))


def blend(early: Mapping[str, Tensor], late: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights between those of one network at two times of its training.

    Late weights are better in poses like those of the training frames, early ones in other poses; a blend has much of
    both (Wortsman et al. 2022, Robust fine-tuning of zero-shot models, arXiv 2109.01903, eq. 1).

    Args:
        early: weights by name.
        late: weights by name, later in the training.
        share: of the late weights, 0 to 1. Tensors of integers, such as counts, are the late ones.
    """
    return {k: torch.lerp(early[k], v, share) if v.is_floating_point() else v.clone() for k, v in late.items()}
