"""Whether Triton's kernels can be had: plain PyTorch does their part where not, slower."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

try:
    import triton
except ImportError:  # CPU builds of torch come without
    triton = None


def take(attempt: Callable[[torch.device], object], values: torch.Tensor) -> bool:
    """Whether kernels of float32, of which `attempt` tells whether they run, can work on these."""
    return values.is_cuda and values.dtype == torch.float32 and work(attempt, values.get_device())


@functools.cache
def work(attempt: Callable[[torch.device], object], device: int) -> bool:
    """Whether `attempt`, given a CUDA device by its number, compiles and runs: that takes a C compiler besides the GPU.

    It is made once for each device; a failure is a warning.
    """
    if triton is None:
        return False
    try:
        attempt(torch.device("cuda", device))
    except Exception as error:
        warnings.warn(f"Triton does not work ({error}): this is slower; install a C compiler", stacklevel=3)
        return False
    return True
