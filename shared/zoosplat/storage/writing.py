"""Conditions that are checked before each write of this process, such as that it still holds its lock.

A process that was suspended may have lost its lock, and another process may have finished the result meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_conditions: list[Callable[[], None]] = []


@contextmanager
def only_while(condition: Callable[[], None]) -> Iterator[None]:
    """While the block runs, nothing is written or removed, by any thread of this process, before `condition` returns.

    Args:
        condition: raises where nothing may be written any more. It is called for every file, so it must be quick.
    """
    _conditions.append(condition)
    try:
        yield
    finally:
        _conditions.remove(condition)


def check() -> None:
    """Call all conditions, which raise where nothing may be written any more. Functions that write call this."""
    for condition in tuple(_conditions):
        condition()
