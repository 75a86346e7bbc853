"""Whether Triton's kernels run on a device; where they do not, slower PyTorch functions take their place."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

try:
    import triton
except ImportError:  # CPU builds of torch come without Triton
    triton = None


def supports(probe: Callable[[torch.device], object], values: torch.Tensor) -> bool:
    """Whether the float32 kernels that `probe` tries out can compute with these values."""
    return values.is_cuda and values.dtype == torch.float32 and runs_on(probe, values.get_device())


@functools.cache
def runs_on(probe: Callable[[torch.device], object], device: int) -> bool:
    """Whether the kernels that `probe` calls compile and run on a CUDA device, which also needs a C compiler.

    The probe runs once for each device. A failure is a warning.

    Args:
        probe: calls the kernels on the device that it is given.
        device: number of the CUDA device.
    """
    if triton is None:
        return False
    try:
        probe(torch.device("cuda", device))
    except Exception as error:
        warnings.warn(f"Triton does not work ({error}): this is slower; install a C compiler", stacklevel=3)
        return False
    return True
