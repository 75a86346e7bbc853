"""What all runners of stages have in common: their interface, and how a stage's try may end."""

from __future__ import annotations

from typing import Protocol

from zoosplat.stages.contract import StageProgress
from zoosplat.stages.runs import Run


class Interrupted(Exception):
    """The stage was stopped because its pipeline ends; another try would be wrong."""


class Exhausted(RuntimeError):
    """Shards failed although the runner tried them again: another try of the stage would only repeat that."""


class Log(Protocol):
    """Takes a line that a stage has printed, where it comes from, and when (ISO 8601; default: now)."""

    def __call__(self, line: str, source: str = "", at: str = "", /) -> None: ...


class Runner(Protocol):
    """A place where stages run. Leaving its `with` block ends the stages that still run."""

    def run(self, stage: str, run: Run, *, workers: int | None, progress: StageProgress, log: Log) -> None:
        """Run a whole stage and wait for it.

        Args:
            stage: name in `zoosplat.stages.registry.STAGES`.
            run: the recorded run whose result the stage makes.
            workers: processes for its shards; None: as many as the runner finds right.
            progress: called with frames (or steps, or shards) done, their total and a message.
            log: called with every line that the stage prints.

        Raises:
            UserError: the stage found bad input, or the place lacks something that the user can mend.
            Exhausted: shards failed although they were tried again.
            RuntimeError: the stage failed otherwise; the last lines that it printed are quoted.
            Interrupted: the pipeline ended meanwhile.
        """

    def stop(self) -> None:
        """End every stage that runs, and refuse new ones."""
