"""A stage that is told to stop ends with one line, within seconds, and all its processes with it.

This imports the standard library alone: what stages import takes seconds, in which they can be told to stop too.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from zoosplat.stages.spawning import kill_spawned

GRACE_S = 2.0  # Seconds in which a stage that was told to stop may release its leases and remove temporary files.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_stoppable(stage: str, main: Callable[[], int]) -> NoReturn:
    """Do all that a stage's process does, and exit. SIGINT and SIGTERM end it with one line on standard error.

    Spawned processes are killed. Here KeyboardInterrupt is raised, by which leases are released and temporary files
    removed; where that takes longer than GRACE_S, as within a long computation of PyTorch, it is not waited for. The
    exit status is then 128 + the signal's number, as that of a shell.

    Args:
        stage: its name, for the line.
        main: returns the exit status otherwise.
    """
    signals = _StopSignals(stage)
    status = None
    with suppress(KeyboardInterrupt):
        status = main()
    if status is None:
        gc.collect()  # semaphores that nobody removes are complained about by a helper of multiprocessing
        signals.leave()
    sys.exit(status)


class _StopSignals:
    """Hears the signals that end this process, in a thread: the main one may be far from the next line of Python."""

    def __init__(self, stage: str) -> None:
        self._stage, self._number = stage, int(signal.SIGINT)
        self._leaving = threading.Lock()
        self._wakeup, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._unwind)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._insist, daemon=True).start()

    def _unwind(self, number: int, frame: object) -> NoReturn:
        self._number = number
        for each in STOP_SIGNALS:  # once is enough: a second one would break off the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def _insist(self) -> None:
        number = 0
        while number not in STOP_SIGNALS:
            number = os.read(self._wakeup, 1)[0]
        self._number = number
        kill_spawned()  # the main thread would wait for them
        time.sleep(GRACE_S)
        self.leave()

    def leave(self) -> NoReturn:
        """End this process and what it may have spawned meanwhile."""
        self._leaving.acquire()  # for good: the other thread must not speak too
        kill_spawned()
        line = f"zoosplat {self._stage}: stopped; finished work is kept, the same command goes on from here\n"
        os.write(2, line.encode())  # whoever holds the lock of sys.stderr may never let it go
        os._exit(128 + self._number)
