"""Trainings of two processes, on the CPU: the same result as of one, and what becomes of them when one is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from trainings import configure, latest

from zoosplat.errors import UserError
from zoosplat.stages import command
from zoosplat.stages.command import main
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.storage import groups, schema
from zoosplat_model.checkpoints import Checkpoint
from zoosplat_train.ranks import Ranks
from zoosplat_train.stage import STAGE

EPOCHS = 4


@pytest.fixture
def three(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Three training frames, two a step: every other step leaves a process without a frame."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    group = groups.open_group(open_run(tiny).output_url("center_rotation"), write=True)
    valid = schema.read(group, "valid")
    valid[:] = True
    schema.array(group, "valid")[...] = valid
    configure(tiny, epochs=EPOCHS, batch_frames=2, plot_every=100)
    return tiny


@pytest.fixture
def alone(three: Project) -> Checkpoint:
    """What one process makes of them."""
    run_stage(STAGE, open_run(three))
    return latest(three)


def check_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert (found.step, found.progress.epoch) == (expected.step, expected.progress.epoch) == (2 * EPOCHS, EPOCHS)
    for name, tensor in expected.model.items():
        # Adam divides by the size of a gradient: where that is rounding, in a number or two of 1,000, so is a step.
        off = (found.model[name] - tensor).abs() > 1e-4 + 1e-3 * tensor.abs()
        assert off.float().mean() < 0.005, name
    for a, b in zip(found.progress.history, expected.progress.history, strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "utilisation")} == pytest.approx(
            {k: v for k, v in b.items() if k not in ("seconds", "utilisation")}, rel=1e-4
        )
    assert found.progress.best_step == expected.progress.best_step


def test_frames_are_dealt_out_and_none_is_lost() -> None:
    dealt = [Ranks(rank, 3).share([5, 8, 2, 9]) for rank in range(3)]
    assert dealt == [[5, 9], [8], [2]]
    assert Ranks().share([5, 8]) == [5, 8]


def test_two_processes_end_as_one(three: Project, alone: Checkpoint) -> None:
    configure(three, gpus=2)
    assert not run_stage(STAGE, open_run(three))  # how many there are makes no other result
    assert run_stage(STAGE, configure(three, force=True))
    check_same(latest(three), alone)
    assert (open_run(three).read_mark("train") or {})["figures"]["processes"] == 2


class Killer:
    """Progress that kills a process of the training at a step, as a machine that is short of memory does."""

    def __init__(self, rank: int, at: int) -> None:
        self.rank, self.at = rank, at

    def __call__(self, done: int, total: int, message: str) -> None:
        if done >= self.at:
            for process in multiprocessing.active_children():
                if process.name == f"rank {self.rank}" and process.pid:
                    os.kill(process.pid, signal.SIGKILL)


def test_a_killed_process_ends_the_others_and_torchrun_goes_on_from_there(
    three: Project,
    alone: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure(three, gpus=2)

    @contextmanager
    def progress(stage: str) -> Iterator[Killer]:
        yield Killer(1, 4)

    with monkeypatch.context() as patch:
        patch.setattr(command, "terminal_progress", progress)
        # Status 1: a pipeline tries again.
        assert main(STAGE, ["--project", three.url, "--workers", "1", "--force"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "zoosplat train: rank 1 of 2 was ended by SIGKILL (too little memory?); the last checkpoint is kept, and "
        "the same command goes on from there"
    )
    assert not multiprocessing.active_children()
    kept = latest(three)
    assert 2 <= kept.step < 2 * EPOCHS
    assert open_run(three).read_mark("train") is None
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "zoosplat_train", "--project", three.url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_same(latest(three), alone)


def test_an_error_in_a_process_ends_the_training_with_its_line(three: Project) -> None:
    configure(three, gpus=2, lr=1e30)
    with pytest.raises(UserError, match=r"diverged by step .*train\.lr"):
        run_stage(STAGE, open_run(three))
    assert not multiprocessing.active_children()
