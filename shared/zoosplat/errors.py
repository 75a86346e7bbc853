"""Errors that a user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input, configuration or storage: one clear line that names the file, camera, frame or key and what to do.

    Every entry point prints it without a traceback and exits with status 2.
    """


class TransientError(UserError):
    """What may pass: a stage exits with status 1, so that it is tried again."""


class Unreachable(TransientError):
    """A storage server that does not answer."""


class LockLost(TransientError):
    """Another process has taken over the work that this one had locked."""


class Problems:
    """Collects what a user can mend, so that all of it is reported together.

    Attributes:
        lines: a line for each problem found so far.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a UserError of this block and go on after it; what may pass (`TransientError`) is raised on."""
        try:
            yield
        except TransientError:
            raise
        except UserError as error:
            self.lines += str(error).splitlines()

    def report(self) -> None:
        """Raise UserError with the lines, each once, unless there are none."""
        if self.lines:
            raise UserError("\n".join(dict.fromkeys(self.lines)))
