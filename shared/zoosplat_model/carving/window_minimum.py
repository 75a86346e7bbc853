"""The minimum of a tensor over a sliding window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat_model.carving import triton_backend


def window_minimum(values: Tensor, size: int, axes: Sequence[int] = (-1, -2)) -> Tensor:
    """The minimum over the window of `size` (odd) elements each way along the axes; what is outside does not count.

    `-F.max_pool2d(-values, size, 1, size // 2)` gives the same for two axes. But that also finds where the minima are,
    and takes 0.1 ms of the 2.4 ms of a frame on an H200.

    Args:
        values: [...] of any shape.
        axes: counted from the last, which is -1.
    """
    if triton_backend.supports(values):
        return triton_backend.window_minimum(values, size, axes)
    for axis in axes:
        wide = F.pad(values, [*[0, 0] * (-1 - axis), size // 2, size // 2], value=torch.inf)
        n = values.shape[axis]
        values = wide.narrow(axis, 0, n)
        for k in range(1, size):
            values = torch.minimum(values, wide.narrow(axis, k, n))
    return values
