"""The stage contract and its runner: skipping, resuming, marking, parallel shards and progress, once for all stages.

A stage runs as `prepare` (checks its input, creates its empty group, writes its plan), any number of `shard`s in any
order, place and number of tries, and `finish` (writes what needs all shards, then the success mark: the last write).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for
from typing import Any

from zoosplat import locks, stores
from zoosplat.config import Experiment
from zoosplat.errors import Passing, UserError
from zoosplat.pipeline import STAGES, StageSpec
from zoosplat.project import Mark, Project, digest_of, settings_of

PACKAGES = ("zoosplat", "numpy", "zarr", "av", "opencv-python-headless", "scipy", "torch", "gsplat")


@dataclass(frozen=True)
class Shard:
    """A shard of work: kept frames `start` to `stop`, the `index`-th of `count`."""

    index: int
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What `prepare` decided: the bounds of the shards (ascending, from 0) and values that shards and finish need."""

    bounds: tuple[int, ...]
    values: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def shard(self, index: int) -> Shard:
        return Shard(index, len(self.bounds) - 1, self.bounds[index], self.bounds[index + 1])

    @property
    def n_shards(self) -> int:
        return len(self.bounds) - 1


def split(n_frames: int, per_shard: int, multiple: int) -> tuple[int, ...]:
    """Bounds of shards of about `per_shard` frames whose inner bounds are multiples of `multiple`."""
    step = max(1, per_shard // multiple) * multiple
    return (*range(0, n_frames, step), n_frames)


@dataclass(frozen=True)
class Result:
    """What a shard or finish reports into its mark: frames done, warnings, and figures worth keeping."""

    frames: int = 0
    warnings: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a stage is given: the project, its configuration, and where to report progress."""

    project: Project
    experiment: Experiment
    progress: Callable[[int, int, str], None]

    def open_input(self, stage: str) -> Any:
        """Group of a finished earlier stage. Raises UserError if it is missing or was made with another config."""
        return self.project.open_input(stage, self.experiment)


class Stage(ABC):
    """A stage: a spec from `zoosplat.pipeline` and three functions.

    `run_shard` must give the same bytes whenever it is run with the same digest, and write nothing outside its shard.
    """

    def __init__(self, name: str) -> None:
        self.spec: StageSpec = STAGES[name]

    @property
    def name(self) -> str:
        return self.spec.name

    def sources(self, experiment: Experiment) -> list[str]:
        """URLs of files outside the project whose content determines the result."""
        return []

    @abstractmethod
    def prepare(self, ctx: Context) -> Plan:
        """Check the input, create the empty output, return the plan."""

    @abstractmethod
    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Result:
        """Compute and write one shard."""

    def finish(self, ctx: Context, plan: Plan) -> Result:
        """Write what needs all shards."""
        return Result()


# -- digests and marks --------------------------------------------------------------------------------------------
def stage_digest(stage: Stage, ctx: Context) -> str:
    """Digest of what determines the stage's result: its name, version, configuration, inputs and source files."""
    inputs = {}
    for name in stage.spec.reads:
        ctx.project.input_url(name, ctx.experiment)
        mark = ctx.project.read_mark(name)
        assert mark is not None
        inputs[name] = mark["digest"]
    sources = []
    for url in stage.sources(ctx.experiment):
        try:
            sources.append(stores.fingerprint(url))
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"{url}: no such file; check data.directory and the file names in the config") from None
    return digest_of(
        [stage.name, stage.spec.version, settings_of(stage.spec, ctx.experiment), inputs, sources],
    )


def _provenance(stage: Stage, ctx: Context, digest: str) -> Mark:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "stage": stage.name,
        "version": stage.spec.version,
        "digest": digest,
        "settings": settings_of(stage.spec, ctx.experiment),
        "versions": versions,
    }


@dataclass
class _Measured:
    started: float
    seconds: float = 0.0
    peak_bytes: int = 0

    def as_mark(self) -> Mark:
        return {"started": self.started, "seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_bytes}


@contextmanager
def _measured() -> Iterator[_Measured]:
    measured = _Measured(time.time())
    clock = time.monotonic()
    yield measured
    measured.seconds = time.monotonic() - clock
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN  # of these the largest
    measured.peak_bytes = max(resource.getrusage(each).ru_maxrss for each in who) * 1024


# -- the three steps ----------------------------------------------------------------------------------------------
def is_done(stage: Stage, ctx: Context, digest: str) -> bool:
    mark = ctx.project.read_mark(stage.name)
    return mark is not None and mark["digest"] == digest


def _reused(stage: Stage, ctx: Context, digest: str) -> bool:
    """Point to the same result in the project named by `reuse`, if it holds one."""
    if not ctx.experiment.reuse or stage.name not in ("ingest", "pack"):
        return False
    other = Project.at(ctx.experiment.reuse)
    mark = other.read_mark(stage.name)
    if mark is None or mark["digest"] != digest:
        return False
    location = mark.get("location") or other.output_url(stage.name)
    stores.write_json(ctx.project.mark_url(stage.name), {**mark, "location": location})
    return True


def _remove_partials(stage: Stage, project: Project) -> None:
    for url in (project.output_url(stage.name), project.path("_marks", stage.name), project.mark_url(stage.name)):
        stores.remove_partials(url)


def prepare(stage: Stage, ctx: Context, digest: str, *, force: bool = False) -> Plan:
    """Make the stage ready for its shards. What an earlier try with the same digest finished is kept."""
    project = ctx.project
    old = stores.read_json(project.plan_url(stage.name))
    if old is not None and old["digest"] == digest and not force:
        _remove_partials(stage, project)
        return read_plan(stage, ctx, digest)
    # In this order, so that no kill leaves a mark beside data that it does not describe.
    stores.delete(project.mark_url(stage.name))
    stores.delete(project.path("_marks", stage.name))
    stores.delete(project.output_url(stage.name))
    with _measured() as measured:
        plan = stage.prepare(ctx)
    stores.write_json(
        project.plan_url(stage.name),
        {
            **_provenance(stage, ctx, digest),
            **measured.as_mark(),
            "bounds": list(plan.bounds),
            "values": plan.values,
            "warnings": list(plan.warnings),
        },
    )
    return plan


def read_plan(stage: Stage, ctx: Context, digest: str) -> Plan:
    """The plan that `prepare` wrote. Raises UserError where there is none for this digest."""
    mark = stores.read_json(ctx.project.plan_url(stage.name))
    if mark is None or mark["digest"] != digest:
        raise UserError(f"{ctx.project.url}: stage {stage.name} is not prepared; run it with --prepare first")
    return Plan(tuple(mark["bounds"]), mark["values"], tuple(mark["warnings"]))


def shard_is_done(stage: Stage, ctx: Context, digest: str, shard: Shard) -> bool:
    mark = stores.read_json(ctx.project.shard_mark_url(stage.name, shard.index, shard.count))
    return mark is not None and mark["digest"] == digest


def run_shard(stage: Stage, ctx: Context, digest: str, index: int, plan: Plan) -> None:
    """Run one shard unless its mark is there; its mark is written after its data."""
    shard = plan.shard(index)
    if shard_is_done(stage, ctx, digest, shard):
        return
    try:
        with _measured() as measured:
            result = stage.run_shard(ctx, shard, plan)
    except Exception as error:
        if shard.count > 1:
            # As the argument of --shard.
            error.add_note(f"in shard {index}/{shard.count}, kept frames {shard.start} to {shard.stop - 1}")
        raise
    stores.write_json(
        ctx.project.shard_mark_url(stage.name, shard.index, shard.count),
        {
            "digest": digest,
            **measured.as_mark(),
            "start": shard.start,
            "stop": shard.stop,
            "frames": result.frames,
            "warnings": list(result.warnings),
            "figures": result.figures,
            "pid": os.getpid(),
        },
    )


def finish(stage: Stage, ctx: Context, digest: str, plan: Plan) -> None:
    """Check that every shard is done, write what needs them all, then the stage's mark: the last write."""
    marks = [stores.read_json(ctx.project.shard_mark_url(stage.name, i, plan.n_shards)) for i in range(plan.n_shards)]
    missing = [i for i, mark in enumerate(marks) if mark is None or mark["digest"] != digest]
    if missing:
        raise UserError(f"{ctx.project.url}: shards {missing} of stage {stage.name} are not done; run them first")
    _remove_partials(stage, ctx.project)
    with _measured() as measured:
        result = stage.finish(ctx, plan)
    preparation = stores.read_json(ctx.project.plan_url(stage.name)) or {}
    steps = [preparation, *(m for m in marks if m is not None), measured.as_mark()]
    warnings = list(dict.fromkeys([w for m in steps for w in m.get("warnings", [])] + list(result.warnings)))
    figures: dict[str, Any] = {}
    for mark in marks:
        figures.update(mark["figures"] if mark else {})
    stores.write_json(
        ctx.project.mark_url(stage.name),
        {
            **_provenance(stage, ctx, digest),
            "inputs": {name: (ctx.project.read_mark(name) or {})["digest"] for name in stage.spec.reads},
            "shards": plan.n_shards,
            "frames": sum(m["frames"] for m in marks if m) or result.frames,
            "started": min(m["started"] for m in steps),
            "finished": time.time(),
            "cpu_seconds": round(sum(m["seconds"] for m in steps), 3),
            "peak_memory_bytes": max(m["peak_memory_bytes"] for m in steps),
            "warnings": warnings,
            "figures": {**figures, **result.figures},
        },
    )


# -- running ------------------------------------------------------------------------------------------------------
def _no_progress(done: int, total: int, message: str) -> None:
    return None


_queue: Any = None  # of a worker process: where its progress goes


def start_process() -> None:
    """What a process that a stage has started does first: it ends with the stage, and expects the storage to answer.

    A parent that is killed leaves its children waiting for ever, or writing beside those of the next run.
    """
    stores.expect_answers()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()


def _start_worker(queue: Any) -> None:
    global _queue
    _queue = queue
    start_process()


def _shard_in_worker(stage: Stage, url: str, digest: str, index: int, plan: Plan) -> None:
    project = Project.at(url)
    ctx = Context(project, project.read_experiment(), lambda done, total, text: _queue.put((index, done)))
    try:
        run_shard(stage, ctx, digest, index, plan)
    except Exception as error:
        # Here and not in the parent: exceptions of other libraries do not always survive the way between processes.
        raise stores.as_user_error(error, url) or error from error


def run_stage(
    stage: Stage,
    project: Project,
    *,
    workers: int = 1,
    force: bool = False,
    progress: Callable[[int, int, str], None] = _no_progress,
) -> bool:
    """Run a whole stage here: skip it if done, else prepare, run the missing shards in processes, finish.

    Where another process is at it, this waits, and skips what that has done.

    Returns:
        Whether anything was computed.

    Raises:
        UserError: bad input or configuration. Shards that are done stay done.
    """
    ctx = Context(project, project.read_experiment(), progress)
    digest = stage_digest(stage, ctx)
    if not force and (is_done(stage, ctx, digest) or _reused(stage, ctx, digest)):
        return False
    with _alone(stage, ctx):
        if not force and is_done(stage, ctx, digest):
            return False
        plan = prepare(stage, ctx, digest, force=force)
        todo = [i for i in range(plan.n_shards) if not shard_is_done(stage, ctx, digest, plan.shard(i))]
        if workers == 1 or len(todo) <= 1 or stage.spec.gpu:  # one process has a GPU, or all the cores, for itself
            for i in todo:
                run_shard(stage, ctx, digest, i, plan)
        else:
            _run_in_processes(stage, ctx, digest, plan, todo, min(workers, len(todo)))
        finish(stage, ctx, digest, plan)
    return True


def _alone(stage: Stage, ctx: Context) -> AbstractContextManager[None]:
    """Keeps other processes from deleting what this one has begun."""
    return locks.locked(
        ctx.project.lock_url(stage.name), lambda: ctx.progress(0, 1, "another run is at work on it; waiting")
    )


def _run_in_processes(stage: Stage, ctx: Context, digest: str, plan: Plan, todo: list[int], workers: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    queue: Any = spawn.SimpleQueue()
    total = plan.bounds[-1]
    done = {i: 0 for i in todo}
    before = total - sum(plan.shard(i).stop - plan.shard(i).start for i in todo)
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(queue,)) as pool:
        pending = {pool.submit(_shard_in_worker, stage, ctx.project.url, digest, i, plan): i for i in todo}
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
                    # The others' finished work is kept; what has not begun is not begun.
                    for other in futures:
                        other.cancel()
            ctx.progress(before + sum(done.values()), total, "")
        if errors:  # of those that ran at the same time the first: not whichever was quicker
            raise errors[min(errors)]


# -- command line -------------------------------------------------------------------------------------------------
def parse_shard(text: str) -> tuple[int, int]:
    """`"3/18"` -> (3, 18): shard 3 (from 0) of 18."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise UserError(f"--shard {text}: expected INDEX/COUNT, such as 3/18") from None
    if not 0 <= index < count:
        raise UserError(f"--shard {text}: the index goes from 0 to {count - 1}")
    return index, count


class _JsonProgress:
    """Progress as JSON lines, a few a second at most."""

    def __init__(self, stage: str) -> None:
        self.stage, self.last = stage, 0.0

    def __call__(self, done: int, total: int, message: str = "") -> None:
        now = time.monotonic()
        if done >= total or now - self.last > 0.3:
            self.last = now
            event = {"event": "progress", "stage": self.stage, "done": done, "total": total, "message": message}
            print(json.dumps(event), flush=True)


@contextmanager
def terminal_progress(stage: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on a terminal, JSON lines otherwise."""
    if not sys.stdout.isatty():
        yield _JsonProgress(stage)
        return
    from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[message]}")) as bar:
        task = bar.add_task(stage, total=None, message="")

        def show(done: int, total: int, message: str = "") -> None:
            bar.update(task, completed=done, total=total, message=message)

        yield show


def main(stage: Stage, argv: list[str] | None = None) -> int:
    """Entry point of a service: `python -m zoosplat_<stage> --project URL`.

    Returns:
        Exit status: 0 done or skipped, 2 bad input or configuration (one line on stderr), 1 anything else, which may
        pass: where the storage does not answer or a process was killed, with one line too.
    """
    parser = argparse.ArgumentParser(prog=f"python -m zoosplat_{stage.name}", description=stage.__doc__)
    parser.add_argument("--project", required=True, metavar="URL", help="folder or s3://bucket/prefix")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("--force", action="store_true", help="ignore marks and compute again")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--prepare", action="store_true", help="only check the input and write the plan")
    only.add_argument("--shard", metavar="I/N", help="only shard I (from 0) of the plan's N")
    only.add_argument("--finish", action="store_true", help="only the last step, after all shards")
    args = parser.parse_args(argv)
    try:
        project = Project.at(args.project)
        with terminal_progress(stage.name) as progress:
            if not (args.prepare or args.shard or args.finish):
                run_stage(stage, project, workers=max(1, args.workers), force=args.force, progress=progress)
                return 0
            ctx = Context(project, project.read_experiment(), progress)
            digest = stage_digest(stage, ctx)
            if not args.force and (is_done(stage, ctx, digest) or _reused(stage, ctx, digest)):
                return 0
            if args.prepare:
                with _alone(stage, ctx):
                    plan = prepare(stage, ctx, digest, force=args.force)
                print(json.dumps({"event": "plan", "stage": stage.name, "shards": plan.n_shards}), flush=True)
                return 0
            plan = read_plan(stage, ctx, digest)
            if args.finish:
                finish(stage, ctx, digest, plan)
                return 0
            index, count = parse_shard(args.shard)
            if count != plan.n_shards:
                raise UserError(f"--shard {args.shard}: the plan has {plan.n_shards} shards")
            run_shard(stage, ctx, digest, index, plan)
            return 0
    except Exception as error:
        return failed(stage, error, args.project)


def failed(stage: Stage, error: Exception, url: str) -> int:
    """Say in one line what went wrong; the exit status. Other errors than the user's are raised again."""
    known = error if isinstance(error, UserError) else stores.as_user_error(error, url)
    if known is None:
        raise error
    lines = [*str(known).splitlines(), *getattr(known, "__notes__", ())]
    print(f"zoosplat {stage.name}: {'; '.join(lines)}", file=sys.stderr, flush=True)
    return 1 if isinstance(known, Passing) else 2


def run(stage: Stage) -> None:
    """`__main__` of a service."""
    sys.exit(main(stage))
