"""Runs a whole stage on this machine: it is skipped if done, resumed if begun, and its shards run in processes."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from zoosplat.errors import TransientError
from zoosplat.stages.contract import Context, Plan, Stage, StageProgress
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run
from zoosplat.stages.spawning import pack_call, run_spawned, spawning
from zoosplat.stages.steps import finish_held, hold_alone, prepare_held, run_shard, shard_is_done
from zoosplat.storage import s3_client
from zoosplat.storage.errors import as_user_error


def _no_progress(done: int, total: int, message: str) -> None:
    return None


_queue: Any = None  # In a worker process: the queue to which it reports its progress.


def _start_worker(queue: Any) -> None:
    global _queue
    _queue = queue
    s3_client.expect_answers()


def _shard_in_worker(stage: Stage, url: str, run_id: str, index: int, plan: Plan) -> None:
    try:
        ctx = Context(open_run(Project.at(url), run_id), lambda done, total, text: _queue.put((index, done)))
        run_shard(stage, ctx, index, plan)
    except Exception as error:
        # It is converted here, because exceptions of other libraries cannot always be pickled for the parent.
        raise as_user_error(error, url) or error from error


def run_stage(stage: Stage, run: Run, *, workers: int = 1, progress: StageProgress = _no_progress) -> bool:
    """Run a whole stage on this machine: skip it if it is done, else prepare it, run the missing shards, and finish it.

    While another process works on the stage, this one waits, and then skips what the other one has done.

    Returns:
        Whether anything was computed.

    Raises:
        UserError: bad input or configuration. Shards that are done stay done.
    """
    ctx = Context(run, progress)
    result = run.result(stage.name)
    if result.is_done():
        return False
    with hold_alone(result.lease_url(), ctx):
        if result.is_done():
            return False
        plan = prepare_held(stage, ctx, result)
        todo = [i for i in range(plan.n_shards) if not shard_is_done(result, plan.shard(i))]
        if workers == 1 or len(todo) <= 1 or stage.spec.gpu:  # A stage on a GPU has the whole GPU for itself.
            for i in todo:
                run_shard(stage, ctx, i, plan)
        else:
            _run_in_processes(stage, ctx, plan, todo, min(workers, len(todo)))
        finish_held(stage, ctx, plan, result)
    return True


def _run_in_processes(stage: Stage, ctx: Context, plan: Plan, todo: list[int], workers: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    queue: Any = spawn.SimpleQueue()
    total = plan.bounds[-1]
    done = {i: 0 for i in todo}
    before = total - sum(plan.shard(i).stop - plan.shard(i).start for i in todo)
    begin = (pack_call(_start_worker), queue)
    with ProcessPoolExecutor(workers, spawn, initializer=run_spawned, initargs=begin) as pool:
        with spawning():
            pending = {pool.submit(_shard_in_worker, stage, ctx.run.project.url, ctx.run.id, i, plan): i for i in todo}
        futures = dict(pending)
        errors: dict[int, BaseException] = {}
        while pending:
            ready, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                index, count = queue.get()
                done[index] = count
            for future in ready:
                index = pending.pop(future)
                done[index] = plan.shard(index).stop - plan.shard(index).start
                error = None if future.cancelled() else future.exception()
                if error is not None:
                    errors[index] = error
                    # Shards that run are left to finish, so that their work is kept; the others are not begun.
                    for other in futures:
                        other.cancel()
            ctx.progress(before + sum(done.values()), total, "")
        if not errors:
            return
        killed = [error for error in errors.values() if isinstance(error, BrokenProcessPool)]
        if len(killed) == len(errors):
            raise TransientError(
                f"a worker process of stage {stage.name} was killed, as the system does when memory runs out; lower "
                f"--workers (now {workers}) and run again, finished shards are kept"
            )
        # The first shard is named, so that the message does not depend on which shard was quicker.
        raise errors[min(i for i, error in errors.items() if not isinstance(error, BrokenProcessPool))]
