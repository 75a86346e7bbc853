"""Keeps the results that were asked for last, within a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

CACHE_BYTES = 256 << 20  # pictures, hulls and Gaussians of a few hundred frames


class ResultCache:
    """The results that were asked for last, up to a number of bytes, but always the newest one."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max, self._held = max_bytes, 0
        self._results: OrderedDict[object, tuple[Any, int]] = OrderedDict()

    def get(self, key: object, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """The result of a key.

        Args:
            key: hashable; stands for one result.
            make: computes the result where it is not kept.
            size: bytes of the result.
        """
        if key in self._results:
            self._results.move_to_end(key)
        else:
            made = make()
            self._results[key] = made, size(made)
            self._held += self._results[key][1]
            while self._held > self._max and len(self._results) > 1:
                self._held -= self._results.popitem(last=False)[1][1]
        found: T = self._results[key][0]
        return found
