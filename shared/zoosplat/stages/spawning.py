"""Processes that a stage spawns: they end when the stage ends, and Ctrl-C on the terminal does not reach them.

This module imports the standard library alone, because a new process must watch its parent before it imports packages
that take seconds.
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
    """Protect processes that are started in the block from Ctrl-C: it reaches the stage alone, which ends them."""
    # multiprocessing starts this helper when it needs it, and the start would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # The new processes inherit the mask.
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pack_call(function: Callable[..., None], *arguments: Any) -> bytes:
    """A call for `run_spawned`, pickled, so that its modules are imported only after the process watches its parent."""
    return pickle.dumps((function, arguments))


def run_spawned(call: bytes, *handles: Any) -> None:
    """Make a call in a spawned process, which ends as soon as its parent has ended.

    Otherwise a process whose stage was killed would wait for ever, or write beside the processes of the next run.

    Args:
        call: What `pack_call` returned.
        handles: Further arguments of the call: queues and pipes, which can be passed only when a process starts.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    function, arguments = pickle.loads(call)
    function(*arguments, *handles)


def kill_spawned() -> None:
    """Kill every process that this process has spawned."""
    for process in multiprocessing.active_children():
        process.kill()
