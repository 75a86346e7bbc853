"""Functions of tensors as CUDA graphs: launched one by one, thousands of small kernels keep a GPU waiting."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoosplat_model.rasterize import Pairs

ROUNDED = 4096  # to which the room for pairs is rounded up


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


class Recorder:
    """The functions of a training: on a GPU each is recorded at its second call, all in the same memory.

    At the first, libraries choose their kernels, and the rasteriser tells how many pairs of Gaussians and tiles there
    are.

    Attributes:
        record: False, as on a CPU, runs all as they are.
        pairs: what the functions are to give to the rasteriser; `pairs.needed` is of the call that needed most.
    """

    def __init__(self, device: torch.device, room: int) -> None:
        """`room` for pairs in what is recorded, over those of the first calls."""
        self.device, self.room, self.record = device, room, device.type == "cuda"
        self.pairs = Pairs(0, torch.zeros((), dtype=torch.int64, device=device))
        self._recorded: dict[Hashable, Recorded] = {}
        self._warm: set[Hashable] = set()
        self._pool: Any = None

    def __call__(self, name: Hashable, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """The function of the inputs, wherever they are; `name` stands for it and for the shapes of its inputs."""
        if name not in self._recorded:
            if not self.record or name not in self._warm:
                self._warm.add(name)
                return function(*(value.to(self.device) for value in inputs))
            if not self._recorded:
                most = self.room * int(self.pairs.needed)
                self.pairs = self.pairs._replace(most=-(-most // ROUNDED) * ROUNDED)
                self._pool = torch.cuda.graph_pool_handle()
            self._recorded[name] = Recorded(function, inputs, self.device, pool=self._pool)
        return self._recorded[name](inputs)

    def forget(self) -> None:
        """Record anew: something is not where it was, or has another size."""
        if self._recorded:
            torch.cuda.synchronize(self.device)  # one may be running
        self._recorded.clear()
        self._warm.clear()

    def make_room(self, pairs: int) -> None:
        """Record anew where Gaussians have come to cover more tiles than there is room for."""
        if self._recorded and pairs > self.pairs.most:
            self.forget()
