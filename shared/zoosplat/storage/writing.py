"""What must hold while this process writes results: it is asked before each write.

A process that was asleep for long may have lost its lease, and the result may be finished by another one meanwhile.
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
    """Raise what a condition raises that holds no more. For the functions that write."""
    for condition in tuple(_conditions):
        condition()
