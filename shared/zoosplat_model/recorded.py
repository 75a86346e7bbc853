"""Functions of tensors as CUDA graphs: launched one by one, thousands of small kernels keep a GPU waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Recorded:
    """A function as a CUDA graph. Recording it does not run it.

    The function must have run before, so that libraries have chosen their kernels, and must neither wait for the GPU
    nor make shapes of values. Graphs of one `pool` share their memory: each result has to be used up before another of
    them runs. Whatever else the function reads or writes has to stay where it is.

    Attributes:
        inputs: the graph's own copies of the function's arguments.
        output: what the function returns, overwritten by each call.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        device: torch.device,
        *,
        pool: Any = None,
        stream: Any = None,
    ) -> None:
        self.inputs = [value.to(device, copy=True) for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # Other threads read frames meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.output
