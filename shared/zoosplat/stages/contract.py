"""The contract of a stage: what a stage is given, what it must do, and what it reports."""

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
    """A shard of work: the kept frames from `start` up to but not including `stop`; it is the `index`-th of `count`."""

    index: int
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What `prepare` decided.

    Attributes:
        bounds: Shard i is the kept frames from bounds[i] up to but not including bounds[i + 1]; they ascend from 0.
        values: Values that shards and `finish` need, as JSON has them.
        warnings: Lines for the user about what is odd.
    """

    bounds: tuple[int, ...]
    values: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def shard(self, index: int) -> Shard:
        """The `index`-th shard, from 0."""
        return Shard(index, len(self.bounds) - 1, self.bounds[index], self.bounds[index + 1])

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return len(self.bounds) - 1


def shard_bounds(n_frames: int, per_shard: int, multiple: int) -> tuple[int, ...]:
    """Bounds of shards of about `per_shard` frames each; the bounds between shards are multiples of `multiple`."""
    step = max(1, per_shard // multiple) * multiple
    return (*range(0, n_frames, step), n_frames)


@dataclass(frozen=True)
class Outcome:
    """What a shard or `finish` reports; it is kept in the mark.

    Attributes:
        frames: How many frames were worked on.
        warnings: Lines for the user about what is odd.
        figures: Names and JSON values of what is worth keeping, such as a peak of memory.
    """

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
        # The return type is Any, because zarr's own types would have to be narrowed at every read of an attribute.
        return self.run.open_input(stage)


class Stage(ABC):
    """A stage: a spec from `zoosplat.stages.registry` and three functions.

    `run_shard` must give the same bytes whenever it is run for the same result, and write nothing outside its shard.
    """

    def __init__(self, name: str) -> None:
        self.spec: StageSpec = STAGES[name]

    @property
    def name(self) -> str:
        """The name of the stage and of its service."""
        return self.spec.name

    @abstractmethod
    def prepare(self, ctx: Context) -> Plan:
        """Check the input, create the empty output and return the plan. Raises UserError for what a user can mend."""

    @abstractmethod
    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        """Compute and write one shard."""

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        """Write what needs all shards."""
        return Outcome()
