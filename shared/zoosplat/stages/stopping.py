"""Stopping a stage: on SIGINT or SIGTERM it ends within seconds, with one line, and its processes end with it.

This module imports the standard library alone, because a stage can also be stopped while it imports its packages, which
takes seconds.
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
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what `kill`, Kubernetes and batch systems send.


def run_stoppable(stage: str, main: Callable[[], int]) -> NoReturn:
    """Run the whole of a stage's process, and exit. SIGINT and SIGTERM end it with one line on standard error.

    On such a signal the spawned processes are killed, and KeyboardInterrupt is raised in the main thread, so that
    leases are released and temporary files are removed. If that takes longer than GRACE_S, as it can in a long
    computation of PyTorch, the process exits without it. The exit status is 128 + the signal's number, as in shells.

    Args:
        stage: The stage's name, for the line.
        main: Does the work and returns the exit status.
    """
    signals = _StopSignals(stage)
    status = None
    with suppress(KeyboardInterrupt):
        status = main()
    if status is None:
        gc.collect()  # Otherwise a helper of multiprocessing would complain about semaphores that are left.
        signals.leave()
    sys.exit(status)


class _StopSignals:
    """Receives the signals that stop this process, in a thread, because the main thread may be busy in C code."""

    def __init__(self, stage: str) -> None:
        self._stage, self._number = stage, int(signal.SIGINT)
        self._leaving = threading.Lock()
        self._wakeup, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._unwind)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._wait_for_signal, daemon=True).start()

    def _unwind(self, number: int, frame: object) -> NoReturn:
        self._number = number
        for each in STOP_SIGNALS:  # A second signal would interrupt the cleaning up.
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def _wait_for_signal(self) -> None:
        number = 0
        while number not in STOP_SIGNALS:
            number = os.read(self._wakeup, 1)[0]
        self._number = number
        kill_spawned()  # The main thread may be waiting for them.
        time.sleep(GRACE_S)
        self.leave()

    def leave(self) -> NoReturn:
        """Print the line, kill what this process may have spawned meanwhile, and exit."""
        self._leaving.acquire()  # It is never released, so that only one thread prints the line.
        kill_spawned()
        line = f"zoosplat {self._stage}: stopped; finished work is kept, the same command goes on from here\n"
        os.write(2, line.encode())  # Not by sys.stderr, whose lock another thread may hold for ever.
        os._exit(128 + self._number)
