"""Errors that a user can mend, and how several of them are reported together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input, configuration or storage: one clear line that names the file, camera, frame or key and what to do.

    Every entry point prints it without a traceback and exits with status 2.
    """


class TransientError(UserError):
    """A failure that may be gone at the next try: a stage exits with status 1, so that it is tried again."""


class Unreachable(TransientError):
    """A storage server does not answer."""


class LockLost(TransientError):
    """Another process has taken over the work that this process had locked."""


class Problems:
    """Collects what a user can mend, so that all of it is reported together.

    Attributes:
        lines: A line for each problem found so far.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect a UserError of the block and go on after the block. A TransientError is raised on."""
        try:
            yield
        except TransientError:
            raise
        except UserError as error:
            self.lines += str(error).splitlines()

    def report(self) -> None:
        """Raise a UserError of the lines, each of them once, unless there are none."""
        if self.lines:
            raise UserError("\n".join(dict.fromkeys(self.lines)))
