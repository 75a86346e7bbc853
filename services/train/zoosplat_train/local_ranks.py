"""Ranks that the stage starts itself: it watches the processes, and ends them all when one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from tempfile import TemporaryDirectory

import torch.distributed as dist

from zoosplat.errors import TransientError, UserError
from zoosplat.machine import loopback_interface
from zoosplat.stages.contract import Context, Outcome
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.spawning import pack_call, run_spawned, spawning
from zoosplat.storage import s3_client
from zoosplat.storage.errors import as_user_error
from zoosplat_train.ranks import RESUMABLE, TrainFunction, claim_device, process_group

# Seconds after a failure in which the other ranks may report theirs: the first to report is not always the cause.
GRACE_S = 3.0


def train_in_processes(train: TrainFunction, ctx: Context, size: int) -> Outcome:
    """Train in `size` processes of this machine and wait for them.

    Returns:
        What the first rank returns.

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
                theirs.close()  # the pipe then ends when the process does
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
    raised: list[BaseException] = []
    killed: list[BaseException] = []
    deadline: float | None = None
    while running:
        if (raised or killed) and deadline is None:
            deadline = time.monotonic() + GRACE_S
        ready = wait(list(running), None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            break  # those that still run wait for the one that failed
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = running[pipe]
            try:
                message = pipe.recv()
            except (EOFError, ConnectionResetError):
                del running[pipe]
                processes[rank].join()
                status = processes[rank].exitcode
                if status:
                    end = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                    hint = " (too little memory?)" if status == -signal.SIGKILL else ""
                    killed.append(TransientError(f"rank {rank} of {size} was ended by {end}{hint}; {RESUMABLE}"))
                continue
            if isinstance(message, tuple):
                ctx.progress(*message)
            elif isinstance(message, Outcome):
                results.append(message)
            else:
                raised.append(message)
    for error in (*killed, *raised):
        raise error
    return results[0]


def _run_rank(
    train: TrainFunction, url: str, run_id: str, rank: int, size: int, meeting: str, report: Connection
) -> None:
    s3_client.expect_answers()
    # All ranks are on one machine, so they need no other network and no name for this one.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback_interface())
    try:
        run = open_run(Project.at(url), run_id)
        device = claim_device(run.experiment, rank)
        store = dist.FileStore(meeting, size)  # type: ignore[attr-defined]

        def progress(done: int, total: int, message: str) -> None:
            if rank == 0:
                report.send((done, total, message))

        with process_group(device, store=store, rank=rank, world_size=size) as ranks:
            result = train(Context(run, progress), device, ranks)
        if rank == 0:
            report.send(result)
    except Exception as error:
        # Exceptions of other libraries do not always survive pickling between processes.
        known = error if isinstance(error, UserError) else as_user_error(error, url)
        message = known or RuntimeError("".join(traceback.format_exception(error)))
        if rank > 0:
            message.add_note(f"in rank {rank} of {size}")
        report.send(message)
        report.close()
        os._exit(0)  # a group that has failed cannot be left
