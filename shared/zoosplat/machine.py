"""What this machine has and what a process takes of it, on Linux and on macOS, which say some of it in other ways."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """How many CPU cores this process may use. A batch system or `taskset` can give it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS cannot bind a process to cores


def memory_bytes() -> int:
    """The machine's physical memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The most physical memory that any one of the processes of a `getrusage` or `wait4` has held, in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB


def peak_memory_bytes() -> int:
    """The most physical memory that this process, or any one of its children that have ended, has held, in bytes."""
    own = peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    with suppress(OSError, IndexError):
        # Linux hands the figure above on to the program that a process becomes: it can be that of who started this one.
        own = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    return max(own, peak_bytes(resource.getrusage(resource.RUSAGE_CHILDREN)))


def loopback() -> str:
    """The name of the network interface that reaches this machine alone."""
    return "lo0" if sys.platform == "darwin" else "lo"
