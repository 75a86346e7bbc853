"""What a machine has, on Linux and on macOS, which no test here runs on: there the platform's name is a stand-in."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from zoosplat import machine
from zoosplat.machine import loopback_interface, peak_bytes_of, physical_memory_bytes

ROOT = Path(__file__).resolve().parents[1]


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    program += "from zoosplat.machine import usable_cores; print(usable_cores())"
    if hasattr(os, "sched_setaffinity"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "1\n"
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert machine.usable_cores() == os.cpu_count()


def test_peak_memory_is_in_bytes_also_of_children(monkeypatch: pytest.MonkeyPatch) -> None:
    held = bytearray(500 << 20)  # by the one that starts the process, of whose memory it is no part
    child = "import subprocess, sys; from zoosplat.machine import peak_memory_bytes as peak; before = peak(); "
    child += "subprocess.run([sys.executable, '-c', 'b = bytearray(300 << 20)']); print(before, peak())"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    del held
    before, after = (int(word) for word in done.stdout.split())
    assert 5 << 20 < before < 200 << 20 < 300 << 20 < after < 400 << 20
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_bytes_of(usage) == usage.ru_maxrss * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_bytes_of(usage) == usage.ru_maxrss


def test_memory_and_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 30 < physical_memory_bytes() < 1 << 50
    assert loopback_interface() in {name for _, name in socket.if_nameindex()}
    monkeypatch.setattr(sys, "platform", "darwin")
    assert loopback_interface() == "lo0"


def test_nothing_else_asks_the_system_in_a_way_that_only_linux_understands() -> None:
    """Also forks, which macOS has but whose libraries do not survive them."""
    only_linux = re.compile(r"sched_getaffinity|ru_maxrss|[\"']fork[\"']|SOCKET_IFNAME\", \"")
    sources = [path for top in ("shared", "services", "flows", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    assert len(sources) > 100
    found = [str(path.relative_to(ROOT)) for path in sources if only_linux.search(path.read_text())]
    assert found == ["shared/zoosplat/machine.py"]
