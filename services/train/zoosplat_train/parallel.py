"""Processes that train together: ranks, a GPU each, which share the frames of a step and add up their gradients.

The stage starts its ranks itself, watches them, and ends them all when one fails. Under torchrun, that does so.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.errors import TransientError, UserError
from zoosplat.machine import loopback_interface
from zoosplat.stages.command import main, report_failure, service_parser
from zoosplat.stages.contract import Context, Outcome, Stage
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.spawning import pack_call, run_spawned, spawning
from zoosplat.storage import s3_client
from zoosplat.storage.errors import as_user_error
from zoosplat_model.predictor import pick_device

T = TypeVar("T")
GRACE_S = 3.0  # after a failure, for the others to say what they saw: the first to speak is not always the cause
BEGIN = "zoosplat/begin"  # key of torchrun's store, whose value is the id of the run to train for, or OVER
OVER = "over"
KEPT = "the last checkpoint is kept, and the same command goes on from there"


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size` that train together; alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def share(self, values: Sequence[T]) -> Sequence[T]:
        """Those that fall to this rank."""
        return values[self.rank :: self.size]

    def add_up(self, values: Tensor) -> None:
        """Put the sum over all ranks in place of the values: the same bits everywhere."""
        if self.size > 1:
            with _in_touch():
                dist.all_reduce(values)

    def agreed(self, value: float) -> float:
        """The value of the first rank: clocks differ."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        with _in_touch():
            dist.broadcast(told, 0)
        return float(told)

    def copy(self, values: Iterable[Tensor]) -> None:
        """Put those of the first rank in place of the values."""
        if self.size > 1:
            with _in_touch():
                for value in values:
                    whole = value.contiguous()
                    dist.broadcast(whole, 0)
                    value.copy_(whole)


@contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TransientError(f"lost touch with the other processes of this training; {KEPT}") from error


def number(experiment: Experiment) -> int:
    """How many ranks a training has. Raises UserError where there are not so many GPUs."""
    gpus, frames = experiment.train.gpus, experiment.train.batch_frames
    if pick_device(experiment.train.device).type == "cpu":
        return 1 if gpus == "auto" else gpus
    there = torch.cuda.device_count()
    if gpus == "auto":
        return min(there, frames)
    if gpus > there:
        raise UserError(f"train.gpus = {gpus}: there are {there} here; set it to auto, or to {there} at most")
    return gpus


def device_of(experiment: Experiment, rank: int) -> torch.device:
    """The device of a rank, which becomes the process's own."""
    device = pick_device(experiment.train.device)
    if device.type == "cpu":
        return device
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


@contextmanager
def _joined(device: torch.device, **how: Any) -> Iterator[Ranks]:
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", **how)
    else:
        dist.init_process_group("gloo", **how)
    # After a failure the group is left as it is: leaving it, one would wait for the others.
    yield Ranks(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


Train = Callable[[Context, torch.device, Ranks], Outcome]


# -- started by the stage -----------------------------------------------------------------------------------------
def start(train: Train, ctx: Context, size: int) -> Outcome:
    """Train in `size` processes of this machine and wait for them.

    Returns:
        What the first rank gives.

    Raises:
        UserError: what a rank raised, or a line about the one that was killed. No rank is left running.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[SpawnProcess] = []
    with TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                ours, theirs = spawn.Pipe(duplex=False)
                work = pack_call(_run_rank, train, ctx.run.project.url, ctx.run.id, rank, size, f"{folder}/meeting")
                process = spawn.Process(target=run_spawned, args=(work, theirs), name=f"rank {rank}", daemon=True)
                with spawning():
                    process.start()
                theirs.close()  # so that it ends with the process
                pipes.append(ours)
                processes.append(process)
            return _watch(ctx, pipes, processes)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _watch(ctx: Context, pipes: list[Connection], processes: list[SpawnProcess]) -> Outcome:
    size = len(processes)
    running = dict(zip(pipes, range(size), strict=True))
    results: list[Outcome] = []
    said: list[BaseException] = []
    killed: list[BaseException] = []
    deadline: float | None = None
    while running:
        if (said or killed) and deadline is None:
            deadline = time.monotonic() + GRACE_S
        ready = wait(list(running), None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            break  # those that still run wait for the one that failed
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = running[pipe]
            try:
                news = pipe.recv()
            except (EOFError, ConnectionResetError):
                del running[pipe]
                processes[rank].join()
                status = processes[rank].exitcode
                if status:
                    end = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                    hint = " (too little memory?)" if status == -signal.SIGKILL else ""
                    killed.append(TransientError(f"rank {rank} of {size} was ended by {end}{hint}; {KEPT}"))
                continue
            if isinstance(news, tuple):
                ctx.progress(*news)
            elif isinstance(news, Outcome):
                results.append(news)
            else:
                said.append(news)
    for error in (*killed, *said):
        raise error
    return results[0]


def _run_rank(train: Train, url: str, run_id: str, rank: int, size: int, meeting: str, report: Connection) -> None:
    s3_client.expect_answers()
    # One machine: no other network is needed, nor a name for this one.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback_interface())
    try:
        run = open_run(Project.at(url), run_id)
        device = device_of(run.experiment, rank)
        store = dist.FileStore(meeting, size)  # type: ignore[attr-defined]

        def progress(done: int, total: int, message: str) -> None:
            if rank == 0:
                report.send((done, total, message))

        with _joined(device, store=store, rank=rank, world_size=size) as ranks:
            result = train(Context(run, progress), device, ranks)
        if rank == 0:
            report.send(result)
    except Exception as error:
        # Exceptions of other libraries do not always survive the way between processes.
        known = error if isinstance(error, UserError) else as_user_error(error, url)
        news = known or RuntimeError("".join(traceback.format_exception(error)))
        if rank > 0:
            news.add_note(f"in rank {rank} of {size}")
        report.send(news)
        report.close()
        os._exit(0)  # a group that has failed cannot be left


# -- started by torchrun ------------------------------------------------------------------------------------------
def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _store() -> Any:
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    return store


def join(train: Train, ctx: Context) -> Outcome:
    """Train as the first rank of those that torchrun has started."""
    _store().set(BEGIN, ctx.run.id)
    return _train_under_torchrun(train, ctx)


@contextmanager
def joined(experiment: Experiment) -> Iterator[tuple[torch.device, Ranks]]:
    """This process's device and number among those that torchrun has started; alone, without torchrun."""
    if not by_torchrun():
        yield pick_device(experiment.train.device), Ranks()
        return
    device = device_of(experiment, int(os.environ["LOCAL_RANK"]))
    with _joined(device) as ranks:
        yield device, ranks


def _train_under_torchrun(train: Train, ctx: Context) -> Outcome:
    with joined(ctx.experiment) as (device, ranks):
        return train(ctx, device, ranks)


def run_under_torchrun(stage: Stage, train: Train) -> int:
    """What a process of torchrun does: the first is the stage, the others wait until that one trains or has ended."""
    store = _store()
    if os.environ["RANK"] == "0":
        status = main(stage)
        store.set(BEGIN, OVER)
        if status:
            os._exit(status)  # a group that has failed cannot be left
        return 0
    args = service_parser(stage.name).parse_args()
    store.wait([BEGIN], timedelta(days=365))
    begun = store.get(BEGIN).decode()
    if begun == OVER:
        return 0
    try:
        run = open_run(Project.at(args.project), begun)
        _train_under_torchrun(train, Context(run, lambda done, total, message: None))
    except Exception as error:
        return report_failure(stage.name, error, args.project)
    return 0
