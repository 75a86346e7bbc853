"""The box round the animal, from the voxels of its visual hulls."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


def index_counts(cells: I64, grid_size: int) -> I64:
    """Voxels per grid index and axis: [3, grid_size], from the grid indices [n, 3] of a frame's hull."""
    return np.stack([np.bincount(cells[:, k], minlength=grid_size) for k in range(3)]).astype(np.int64)


def index_range(counts: I64, min_voxels: int, multiple: int) -> tuple[int, int]:
    """The smallest range [start, end), a multiple long and inside the grid, that holds every index with enough voxels.

    Args:
        counts: [n] voxels per index, summed over frames.
        min_voxels: smallest number of voxels of an index that counts.
        multiple: the length is a multiple of this; n is at least one multiple.

    Returns:
        The range, as nearly centred on the animal as the grid allows. Where the animal is longer than the last whole
        multiple of the grid, it is the range that holds most voxels.

    Raises:
        ValueError: no index has enough voxels.
    """
    there = np.flatnonzero(counts >= min_voxels)
    if not len(there):
        raise ValueError("no voxels")
    n, low, high = len(counts), int(there[0]), int(there[-1]) + 1
    length = min(-(-(high - low) // multiple), n // multiple) * multiple
    if length < high - low:
        sums = np.convolve(counts, np.ones(length, np.int64), mode="valid")
        start = int(np.argmax(sums))
    else:
        start = min(max(0, (low + high - length) // 2), n - length)
    return start, start + length
