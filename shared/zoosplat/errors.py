"""Errors that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, configuration or storage: one clear line that names the file, camera, frame or key and what to do.

    Every entry point prints it without a traceback and exits with status 2.
    """


class Passing(UserError):
    """What may pass: a stage exits with status 1, so that it is tried again."""


class Unreachable(Passing):
    """A storage server that does not answer."""


class LockLost(Passing):
    """Another process has taken over the work that this one had locked."""
