"""Durations and amounts of memory in words, as tables and pages show them."""

from __future__ import annotations

from zoosplat.stages.results import Mark


def format_duration(s: float) -> str:
    """A duration in seconds: `42.0 s`, `3 min 05 s`, `2 h 07 min`."""
    if s < 60:
        return f"{s:.1f} s"
    if s < 3600:
        return f"{int(s) // 60} min {int(s) % 60:02d} s"
    return f"{int(s) // 3600} h {int(s) % 3600 // 60:02d} min"


def format_memory(n_bytes: float) -> str:
    """An amount of memory in binary units: `512 MiB`, `1.50 GiB`."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def format_peak_memory(mark: Mark) -> str:
    """Peak memory of the largest process of a stage, and of its GPU where it used one."""
    gpu = mark["figures"].get("peak_gpu_bytes")
    return format_memory(mark["peak_memory_bytes"]) + (f", GPU {format_memory(gpu)}" if gpu else "")


def format_size(n_bytes: int) -> str:
    """The size of files in decimal units: `312 bytes`, `4.1 kB`, `1.23 GB`."""
    if n_bytes < 1000:
        return f"{n_bytes} bytes"
    power = next((power for power in (1, 2, 3) if n_bytes < 999.5 * 1000**power), 4)
    return f"{n_bytes / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
