"""The end of processes that were started with `start_new_session`, each of which leads a process group."""

from __future__ import annotations

import os
import signal
import subprocess
import time


def group_exists(group: int) -> bool:
    """Whether a process of the group is still there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_group(process: subprocess.Popen[str], within_s: float = 5) -> str:
    """Wait until the process and all that it has spawned are gone; returns what it printed on standard error.

    The test fails where that takes longer than `within_s`; then the group is killed.
    """
    deadline = time.monotonic() + within_s
    try:
        _, errors = process.communicate(timeout=within_s)
        while group_exists(process.pid):  # processes that have just been killed
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return errors
