"""The process of a stage and those that it spawns: told to stop, they end with one line, within seconds, all of them.

Imports the standard library alone: what stages import takes seconds, in which they can be told to stop too.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, NoReturn

GRACE_S = 2.0  # for what runs to be unwound
ENDING = (signal.SIGINT, signal.SIGTERM)


# -- the stage's own ----------------------------------------------------------------------------------------------
def service(stage: str) -> NoReturn:
    """`__main__` of a service: the command line of the stage that `zoosplat_<stage>` has as `stage.STAGE`."""

    def main() -> int:
        command = importlib.import_module("zoosplat.stages.command")
        status: int = command.main(importlib.import_module(f"zoosplat_{stage}.stage").STAGE)
        return status

    run_stoppable(stage, main)


def run_stoppable(stage: str, main: Callable[[], int]) -> NoReturn:
    """Do all that a stage's process does, and exit. SIGINT and SIGTERM end it with one line on standard error.

    Spawned processes are killed. Here KeyboardInterrupt is raised, by which leases are released and temporary files
    removed; where that takes longer than GRACE_S, as within a long computation of PyTorch, it is not waited for. The
    exit status is then 128 + the signal's number, as that of a shell.

    Args:
        stage: its name, for the line.
        main: returns the exit status otherwise.
    """
    told = _Told(stage)
    status = None
    with suppress(KeyboardInterrupt):
        status = main()
    if status is None:
        gc.collect()  # semaphores that nobody removes are complained about by a helper of multiprocessing
        told.leave()
    sys.exit(status)


class _Told:
    """Hears the signals that end this process, in a thread: the main one may be far from the next line of Python."""

    def __init__(self, stage: str) -> None:
        self._stage, self._number = stage, int(signal.SIGINT)
        self._leaving = threading.Lock()
        self._wakeup, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in ENDING:
            signal.signal(number, self._unwind)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._insist, daemon=True).start()

    def _unwind(self, number: int, frame: object) -> NoReturn:
        self._number = number
        for each in ENDING:  # once is enough: a second one would break off the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def _insist(self) -> None:
        number = 0
        while number not in ENDING:
            number = os.read(self._wakeup, 1)[0]
        self._number = number
        _kill_spawned()  # the main thread would wait for them
        time.sleep(GRACE_S)
        self.leave()

    def leave(self) -> NoReturn:
        """End this process and what it may have spawned meanwhile."""
        self._leaving.acquire()  # for good: the other thread must not speak too
        _kill_spawned()
        line = f"zoosplat {self._stage}: stopped; finished work is kept, the same command goes on from here\n"
        os.write(2, line.encode())  # whoever holds the lock of sys.stderr may never let it go
        os._exit(128 + self._number)


# -- those that it spawns -----------------------------------------------------------------------------------------
@contextmanager
def spawning() -> Iterator[None]:
    """Around the start of processes: Ctrl-C on a terminal then reaches the stage alone, which ends them."""
    resource_tracker.ensure_running()  # multiprocessing's helper: its start would undo the next line
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # they inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepared(function: Callable[..., None], *arguments: Any) -> bytes:
    """What `run_spawned` is to do, packed: what it needs is imported when the new process is already watched."""
    return pickle.dumps((function, arguments))


def run_spawned(work: bytes, *handles: Any) -> None:
    """In a spawned process: call a function with its arguments and handles, and end as soon as the parent has ended.

    A stage that is killed would leave it waiting for ever, or writing beside the processes of the next run.

    Args:
        work: of `prepared`.
        handles: further arguments, queues and pipes, which can be handed over only when a process starts.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    function, arguments = pickle.loads(work)
    function(*arguments, *handles)


def _kill_spawned() -> None:
    for process in multiprocessing.active_children():
        process.kill()
