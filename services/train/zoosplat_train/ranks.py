"""Ranks: the processes of one training, a GPU each, which share the frames of a step and sum their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.errors import TransientError, UserError
from zoosplat.stages.contract import Context, Outcome
from zoosplat_model.devices import pick_device

T = TypeVar("T")
RESUMABLE = "the last checkpoint is kept, and the same command goes on from there"


@dataclass(frozen=True)
class Ranks:
    """This process, which is number `rank` of the `size` processes that train together; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, values: Sequence[T]) -> Sequence[T]:
        """Those of the values that fall to this rank: every `size`-th one."""
        return values[self.rank :: self.size]

    def all_reduce(self, values: Tensor) -> None:
        """Put the sum over all ranks in place of the values; it has the same bits in every rank.

        Raises:
            TransientError: another rank cannot be reached.
        """
        if self.size > 1:
            with _lost_ranks_are_transient():
                dist.all_reduce(values)

    def broadcast_scalar(self, value: float) -> float:
        """The first rank's value. It is what all ranks go by where their own would differ, as those of clocks do.

        Raises:
            TransientError: another rank cannot be reached.
        """
        if self.size == 1:
            return value
        scalar = torch.tensor(value, dtype=torch.float64)
        with _lost_ranks_are_transient():
            dist.broadcast(scalar, 0)
        return float(scalar)

    def broadcast_tensors(self, values: Iterable[Tensor]) -> None:
        """Put the first rank's tensors in place of the values.

        Raises:
            TransientError: another rank cannot be reached.
        """
        if self.size > 1:
            with _lost_ranks_are_transient():
                for value in values:
                    whole = value.contiguous()
                    dist.broadcast(whole, 0)
                    value.copy_(whole)


TrainFunction = Callable[[Context, torch.device, Ranks], Outcome]  # what each of the ranks runs


@contextmanager
def _lost_ranks_are_transient() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TransientError(f"lost touch with the other processes of this training; {RESUMABLE}") from error


def count_ranks(experiment: Experiment) -> int:
    """How many ranks a training has.

    Raises:
        UserError: `train.gpus` is more than the GPUs of this machine.
    """
    gpus, frames = experiment.train.gpus, experiment.train.batch_frames
    if pick_device(experiment.train.device).type == "cpu":
        return 1 if gpus == "auto" else gpus
    there = torch.cuda.device_count()
    if gpus == "auto":
        return min(there, frames)
    if gpus > there:
        raise UserError(f"train.gpus = {gpus}: there are {there} here; set it to auto, or to {there} at most")
    return gpus


def claim_device(experiment: Experiment, local_rank: int) -> torch.device:
    """The device of a rank of this machine, which becomes the current device of this process."""
    device = pick_device(experiment.train.device)
    if device.type == "cpu":
        return device
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(device: torch.device, **options: Any) -> Iterator[Ranks]:
    """Make this process a rank of its training.

    Args:
        device: of this rank.
        options: of `torch.distributed.init_process_group`: where the ranks meet. torchrun says it in the environment.
    """
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", **options)
    else:
        dist.init_process_group("gloo", **options)
    # After a failure the group is left as it is, because destroying it would wait for the other ranks.
    yield Ranks(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()
