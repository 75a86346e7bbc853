"""Processes that a stage spawns: they end with it, and a Ctrl-C on the terminal does not reach them.

This imports the standard library alone, since a new process must be watched before it imports what takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any


@contextmanager
def spawning() -> Iterator[None]:
    """Around the start of processes: Ctrl-C on a terminal then reaches the stage alone, which ends them."""
    resource_tracker.ensure_running()  # multiprocessing's helper: its start would undo the next line
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # they inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pack_call(function: Callable[..., None], *arguments: Any) -> bytes:
    """What `run_spawned` is to do, packed: what it needs is imported when the new process is already watched."""
    return pickle.dumps((function, arguments))


def run_spawned(call: bytes, *handles: Any) -> None:
    """In a spawned process: call a function with its arguments and handles, and end as soon as the parent has ended.

    A stage that is killed would leave it waiting for ever, or writing beside the processes of the next run.

    Args:
        call: of `pack_call`.
        handles: further arguments, queues and pipes, which can be handed over only when a process starts.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    function, arguments = pickle.loads(call)
    function(*arguments, *handles)


def kill_spawned() -> None:
    for process in multiprocessing.active_children():
        process.kill()
