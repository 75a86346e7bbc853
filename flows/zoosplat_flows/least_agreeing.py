"""The views whose masks agree least with the others, which a person should look at first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def least_agreeing_views(agreement: npt.NDArray[np.float32], count: int, apart: int) -> list[tuple[int, int]]:
    """Views (kept frame and camera) in the order of their agreement, the least agreeing one first.

    What goes wrong in a frame mostly goes wrong in the next frames too, so frames of a camera that are close to one
    another are told once.

    Args:
        agreement: [T, C] of segments.zarr; NaN where a view took no part.
        count: views at most.
        apart: frames at least between two views of a camera.
    """
    left = np.where(np.isfinite(agreement), agreement, np.float32(np.inf))
    views: list[tuple[int, int]] = []
    while len(views) < count:
        t, c = (int(i) for i in np.unravel_index(left.argmin(), left.shape))
        if np.isinf(left[t, c]):
            break
        views.append((t, c))
        left[max(0, t - apart + 1) : t + apart, c] = np.inf
    return views
