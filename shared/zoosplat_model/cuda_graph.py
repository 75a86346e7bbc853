"""Functions of tensors as CUDA graphs; launched one by one, thousands of small kernels would leave a GPU idle."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoosplat_model.rasterize import PairBuffer

CAPACITY_STEP = 4096  # pairs; the capacity of a pair buffer is rounded up to a multiple of this


class CudaGraph:
    """A function captured as a CUDA graph. Capturing does not run it.

    The function must have run before, so that libraries have chosen their kernels. It must not wait for the GPU, and no
    shape may depend on a value. Graphs of one memory `pool` share their memory, so each result has to be used up before
    another of them runs. Everything else that the function reads or writes must keep its address.

    Attributes:
        inputs: the graph's own copies of the function's arguments.
        output: what the function returns; each call overwrites it.
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
        # Other threads read frames meanwhile, which a global capture mode would forbid.
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The function of these inputs, on the current stream; the result is `output`."""
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.output


class CudaGraphPool:
    """Runs the functions of a training; on a GPU each is captured at its second call, all in one memory pool.

    The first call runs the function as it is. In it libraries choose their kernels, and the rasteriser counts the pairs
    of Gaussians and tiles.

    Attributes:
        capture: False, as on a CPU, means that every call runs the function as it is.
        pair_buffer: what the functions have to give to the rasteriser; its `required` is that of the call that needed
            most.
    """

    def __init__(self, device: torch.device, headroom: int) -> None:
        """The capacity of captured functions is `headroom` times the pairs that the first calls required."""
        self.device, self.headroom, self.capture = device, headroom, device.type == "cuda"
        self.pair_buffer = PairBuffer(0, torch.zeros((), dtype=torch.int64, device=device))
        self._graphs: dict[Hashable, CudaGraph] = {}
        self._warm: set[Hashable] = set()
        self._pool: Any = None

    def __call__(self, name: Hashable, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """The function of the inputs, on whatever device these are.

        Args:
            name: stands for the function and for the shapes of its inputs.
            function: what to run or to capture.
            inputs: its arguments.
        """
        if name not in self._graphs:
            if not self.capture or name not in self._warm:
                self._warm.add(name)
                return function(*(value.to(self.device) for value in inputs))
            if not self._graphs:
                capacity = self.headroom * int(self.pair_buffer.required)
                self.pair_buffer = self.pair_buffer._replace(capacity=-(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[name] = CudaGraph(function, inputs, self.device, pool=self._pool)
        return self._graphs[name](inputs)

    def clear(self) -> None:
        """Drop all graphs, because a tensor has another address or size now; later calls capture them again."""
        if self._graphs:
            torch.cuda.synchronize(self.device)  # one may be running
        self._graphs.clear()
        self._warm.clear()

    def ensure_capacity(self, pairs: int) -> None:
        """Drop all graphs if Gaussians now cover more tiles, `pairs` in all, than the pair buffer has capacity for."""
        if self._graphs and pairs > self.pair_buffer.capacity:
            self.clear()
