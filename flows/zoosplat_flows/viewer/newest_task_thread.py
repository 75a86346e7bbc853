"""A thread that does only the newest task of each kind."""

from __future__ import annotations

import threading
from collections.abc import Callable


class NewestTaskThread:
    """Does tasks one after the other. A task replaces an earlier one of its kind that has not begun.

    Args:
        failed: called, in the thread, with the exception of a task that fails.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._tasks: dict[str, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._busy = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="viewer", daemon=True)
        self._thread.start()

    def request(self, kind: str, task: Callable[[], None]) -> None:
        """Have a task done. Returns at once."""
        with self._changed:
            self._tasks[kind] = task
            self._changed.notify_all()

    def is_requested(self, *kinds: str) -> bool:
        """Whether a task of one of these kinds waits. A running task asks so whether it is out of date."""
        return any(kind in self._tasks for kind in kinds)

    def wait(self, timeout_s: float) -> bool:
        """Wait until no task is left. Returns False where that takes longer than the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._tasks and not self._busy, timeout_s)

    def stop(self) -> None:
        """End the thread when its current task has ended; tasks that wait are dropped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._tasks or self._stopped)
                if self._stopped:
                    return
                task = self._tasks.pop(next(iter(self._tasks)))
                self._busy = True
            try:
                task()
            except Exception as error:
                self._failed(error)
