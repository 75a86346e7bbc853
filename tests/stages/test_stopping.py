"""Processes of stages that are told to stop say one line, and nothing is left after 5 s. The stages are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from process_groups import wait_for_group

from zoosplat.stages.stopping import GRACE_S

LINE = "zoosplat idle: stopped; finished work is kept, the same command goes on from here\n"
SHARED = Path(__file__).resolve().parents[2] / "shared"
MAIN = 'from zoosplat.stages.service import run_service\n\nrun_service("idle")\n'
# What the stage does, by what it is busy with.
BUSY_WITH = {
    # PyTorch and the like: C code that does not look for signals.
    "in a long computation": """
        import hashlib
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
    """,
    "waiting for the shards of its processes": """
        import multiprocessing, os, time
        from concurrent.futures import ProcessPoolExecutor
        spawn = multiprocessing.get_context("spawn")
        queue = spawn.SimpleQueue()
        begin = (pack_call(os.write, 1, b"busy\\n"),)  # in one piece: two processes write it
        with ProcessPoolExecutor(2, spawn, initializer=run_spawned, initargs=begin) as pool:
            with spawning():
                waiting = [pool.submit(time.sleep, 60) for _ in range(4)]
            [each.result() for each in waiting]
    """,
    "while its processes import": """
        import multiprocessing
        spawn = multiprocessing.get_context("spawn")
        call = pack_call(importlib.import_module, "slow")
        children = [spawn.Process(target=run_spawned, args=(call,)) for _ in range(2)]
        try:
            for child in children:
                with spawning():
                    child.start()
            for child in children:
                child.join()
        finally:
            for child in children:
                child.kill()
    """,
    "while it imports": """
        import slow
    """,
}


@pytest.fixture(params=BUSY_WITH)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with `zoosplat_idle`, a stage that works for a minute, and says when it has begun."""
    package = tmp_path / "zoosplat_idle"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(MAIN)
    body = textwrap.indent(textwrap.dedent(BUSY_WITH[request.param]), "    ")
    begin = "import importlib\nfrom zoosplat.stages.spawning import *\nSTAGE = None\ndef work():"
    (package / "stage.py").write_text(f"{begin}\n{body}\n")
    if request.param == "while it imports":
        (package / "stage.py").write_text(textwrap.dedent(body))
    (tmp_path / "slow.py").write_text("import os, time\nos.write(1, b'busy\\n')\ntime.sleep(60)\n")
    # In place of the real command line, which would need a project.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "def main(stage):\n"
        "    import zoosplat_idle.stage\n"
        "    try:\n"
        "        zoosplat_idle.stage.work()\n"
        "    finally:\n"
        "        open('unwound', 'w').close()\n"
        "sys.modules['zoosplat.stages.command'] = command = types.ModuleType('command')\n"
        "command.main = main\n"
    )
    return tmp_path


def started(stage: Path) -> subprocess.Popen[str]:
    """The stage, at work, as the leader of a process group."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "zoosplat_idle"],
        cwd=stage,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(stage), str(SHARED)]), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    return process


@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)],
    ids=["SIGTERM", "SIGINT", "terminal"],
)
def test_a_stage_that_is_told_to_stop(stage: Path, number: signal.Signals, everyone: bool) -> None:
    process = started(stage)
    began = time.monotonic()
    (os.killpg if everyone else os.kill)(process.pid, number)
    assert wait_for_group(process) == LINE
    assert process.returncode == 128 + number
    # What takes longer, as it may on a busy machine, is not waited for; the others may come to it too late anyway.
    if time.monotonic() - began < GRACE_S and "multiprocessing" in (stage / "zoosplat_idle" / "stage.py").read_text():
        assert (stage / "unwound").exists()


def test_spawned_processes_do_not_outlive_a_stage_that_is_killed(stage: Path) -> None:
    process = started(stage)
    process.kill()
    wait_for_group(process, 15)  # one of them may just have begun, and the machine be busy
