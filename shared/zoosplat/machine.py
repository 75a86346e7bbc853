"""The machine's cores and memory, and how much of them a process uses, on Linux and on macOS."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """How many CPU cores this process may use. A batch system or `taskset` can allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS cannot bind a process to cores.


def physical_memory_bytes() -> int:
    """The machine's physical memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes_of(usage: resource.struct_rusage) -> int:
    """The most physical memory, in bytes, that any single process has held of those that `usage` is about.

    Args:
        usage: What `resource.getrusage` or `os.wait4` returned.
    """
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB.


def peak_memory_bytes() -> int:
    """The most physical memory, in bytes, that this process or any one of its children that have ended has held."""
    own = peak_bytes_of(resource.getrusage(resource.RUSAGE_SELF))
    with suppress(OSError, IndexError):
        # On Linux a program inherits that figure from the program that started it; the kernel's VmHWM begins anew.
        own = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    return max(own, peak_bytes_of(resource.getrusage(resource.RUSAGE_CHILDREN)))


def loopback_interface() -> str:
    """The name of the network interface by which a machine reaches only itself."""
    return "lo0" if sys.platform == "darwin" else "lo"
