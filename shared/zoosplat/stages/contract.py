"""The stage contract: what a stage is given, what it must do, and what it says of its work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zoosplat.config.experiment import Experiment
from zoosplat.stages.registry import STAGES, StageSpec
from zoosplat.stages.runs import Run

StageProgress = Callable[[int, int, str], None]  # Takes frames or steps done, their total, and a message.


@dataclass(frozen=True)
class Shard:
    """A shard of work: kept frames `start` to `stop`, the `index`-th of `count`."""

    index: int
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What `prepare` decided: the bounds of the shards (ascending, from 0) and values that shards and finish need."""

    bounds: tuple[int, ...]
    values: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def shard(self, index: int) -> Shard:
        """The `index`-th shard, from 0."""
        return Shard(index, len(self.bounds) - 1, self.bounds[index], self.bounds[index + 1])

    @property
    def n_shards(self) -> int:
        return len(self.bounds) - 1


def shard_bounds(n_frames: int, per_shard: int, multiple: int) -> tuple[int, ...]:
    """Bounds of shards of about `per_shard` frames whose inner bounds are multiples of `multiple`."""
    step = max(1, per_shard // multiple) * multiple
    return (*range(0, n_frames, step), n_frames)


@dataclass(frozen=True)
class Outcome:
    """What a shard or finish reports into its mark: frames done, warnings, and figures worth keeping."""

    frames: int = 0
    warnings: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a stage is given: the run that it works for, and where to report progress."""

    run: Run
    progress: StageProgress

    @property
    def experiment(self) -> Experiment:
        """The configuration of the run."""
        return self.run.experiment

    def open_input(self, stage: str) -> Any:
        """The zarr.Group of a finished earlier stage. Raises UserError where it is missing."""
        # Not typed as such: what zarr says of attributes and members would have to be narrowed wherever they are read.
        return self.run.open_input(stage)


class Stage(ABC):
    """A stage: a spec from `zoosplat.stages.registry` and three functions.

    `run_shard` must give the same bytes whenever it is run for the same result, and write nothing outside its shard.
    """

    def __init__(self, name: str) -> None:
        self.spec: StageSpec = STAGES[name]

    @property
    def name(self) -> str:
        return self.spec.name

    @abstractmethod
    def prepare(self, ctx: Context) -> Plan:
        """Check the input, create the empty output, return the plan."""

    @abstractmethod
    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        """Compute and write one shard."""

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        """Write what needs all shards."""
        return Outcome()
