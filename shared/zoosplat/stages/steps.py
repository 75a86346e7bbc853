"""The three steps of a stage, each of them once for all stages.

`prepare` checks the stage's input, creates its empty group and writes its plan. `run_shard` makes one shard; shards may
run in any order and place, and any number of times. `finish` writes what needs all shards, and last the success mark.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zoosplat.errors import LockLost, UserError
from zoosplat.machine import peak_memory_bytes
from zoosplat.stages.contract import Context, Plan, Shard, Stage
from zoosplat.stages.latest_links import link_latest
from zoosplat.stages.results import DONE, MANIFEST, PLAN, SHARDS, Mark, Result
from zoosplat.stages.sources import refresh
from zoosplat.storage import conditional, groups, leases, listing, objects, schema, urls, writing

# Packages whose versions a mark records.
PACKAGES = ("zoosplat", "numpy", "zarr", "av", "opencv-python-headless", "scipy", "torch", "gsplat")


def _versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on, for its mark."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass
class _Measured:
    """When a step began, how long it took, and the largest memory of a process until its end."""

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
    measured.peak_bytes = peak_memory_bytes()


@contextmanager
def hold_alone(url: str, ctx: Context) -> Iterator[leases.Held]:
    """Hold the lease of a result, or of a shard of it, while the block runs. Waits while another process has it.

    A process that sleeps for longer than its lease lasts loses the lease, and then writes nothing more.
    """
    with (
        leases.locked(url, lambda: ctx.progress(0, 1, "another run is at work on it; waiting")) as lease,
        writing.only_while(lease.check),
    ):
        yield lease


def _write_once(url: str, value: Mark) -> None:
    """Write the mark of a step that is done. Raises LockLost if another process has written one meanwhile."""
    if not conditional.create_json(url, value):
        raise LockLost(f"{url}: another run has taken this work over; run again, finished work is kept")


def prepare(stage: Stage, ctx: Context) -> Plan | None:
    """Make the stage ready for its shards, unless an earlier try did. The plan, or None if the result is done."""
    result = ctx.run.result(stage.name)
    if result.is_done():
        return None
    with hold_alone(result.lease_url(), ctx):
        return None if result.is_done() else prepare_held(stage, ctx, result)


def prepare_held(stage: Stage, ctx: Context, result: Result) -> Plan:
    """Do the work of `prepare`, for who holds the lease of the result."""
    _check_version(stage, ctx)
    if result.plan() is not None:
        return read_plan(stage, ctx)
    result.claim(ctx.run.request(stage.name))
    with _measured() as measured:
        plan = stage.prepare(ctx)
    _write_once(
        result.file(PLAN),
        {
            "id": result.id,
            **measured.as_mark(),
            "bounds": list(plan.bounds),
            "values": plan.values,
            "warnings": list(plan.warnings),
        },
    )
    return plan


def _check_version(stage: Stage, ctx: Context) -> None:
    """Raise UserError if this process would make another result than the one that the run's record names."""
    request = ctx.run.request(stage.name)
    if request.version != stage.spec.version:
        raise UserError(
            f"run {ctx.run.id} was begun with version {request.version} of stage {stage.name}, this is version "
            f"{stage.spec.version}; begin a new run with `zoosplat run`"
        )
    if request.id != ctx.run.result(stage.name).id:
        raise UserError(
            f"run {ctx.run.id} was begun by another version of zoosplat; begin a new run with `zoosplat run`"
        )


def read_plan(stage: Stage, ctx: Context) -> Plan:
    """The plan that `prepare` wrote. Raises UserError if there is none."""
    plan = ctx.run.result(stage.name).plan()
    if plan is None:
        raise UserError(f"{ctx.run.project.url}: stage {stage.name} is not prepared; run it with --prepare first")
    return Plan(tuple(plan["bounds"]), plan["values"], tuple(plan["warnings"]))


def shard_is_done(result: Result, shard: Shard) -> bool:
    """Whether a shard has its mark."""
    return objects.exists(result.shard_mark_url(shard.index, shard.count))


def run_shard(stage: Stage, ctx: Context, index: int, plan: Plan) -> None:
    """Run one shard unless it is done. Its mark is written after its data.

    One process at a time works on a shard. Another one waits, and then finds the shard done.
    """
    result, shard = ctx.run.result(stage.name), plan.shard(index)
    if result.is_done() or shard_is_done(result, shard):
        return
    with hold_alone(result.shard_lease_url(shard.index, shard.count), ctx) as lease:
        if result.is_done() or shard_is_done(result, shard):
            return

        def progress(done: int, total: int, message: str) -> None:
            lease.check()  # A process that slept for long must not write beside the one that took its place.
            ctx.progress(done, total, message)

        try:
            with _measured() as measured:
                outcome = stage.run_shard(Context(ctx.run, progress), shard, plan)
        except Exception as error:
            if shard.count > 1:
                # The numbers are written as the argument of --shard.
                error.add_note(f"in shard {index}/{shard.count}, kept frames {shard.start} to {shard.stop - 1}")
            raise
        _write_once(
            result.shard_mark_url(shard.index, shard.count),
            {
                "id": result.id,
                **measured.as_mark(),
                "start": shard.start,
                "stop": shard.stop,
                "frames": outcome.frames,
                "warnings": list(outcome.warnings),
                "figures": outcome.figures,
                "pid": os.getpid(),
            },
        )


def finish(stage: Stage, ctx: Context, plan: Plan) -> None:
    """Check that every shard is done, write what needs them all, and last the success mark."""
    result = ctx.run.result(stage.name)
    if result.is_done():
        return
    with hold_alone(result.lease_url(), ctx):
        if not result.is_done():
            finish_held(stage, ctx, plan, result)


def finish_held(stage: Stage, ctx: Context, plan: Plan, result: Result) -> None:
    """Do the work of `finish`, for who holds the lease of the result."""
    _check_version(stage, ctx)
    marks = [objects.read_json(result.shard_mark_url(i, plan.n_shards)) for i in range(plan.n_shards)]
    missing = [i for i, mark in enumerate(marks) if mark is None]
    if missing:
        raise UserError(f"{ctx.run.project.url}: shards {missing} of stage {stage.name} are not done; run them first")
    objects.remove_partials(result.folder)
    # Left by processes that were killed between a shard's mark and the end of its lease. Nobody needs them any more.
    for name in listing.list_names(result.file(SHARDS)):
        if name.endswith(".lease"):
            objects.delete(result.file(SHARDS, name))
    with _measured() as measured:
        outcome = stage.finish(ctx, plan)
    _check_sources(stage, ctx)
    files = _complete_files(stage, result)
    objects.write_json(result.file(MANIFEST), files)
    steps = [result.plan() or {}, *(m for m in marks if m is not None), measured.as_mark()]
    warnings = list(dict.fromkeys([w for m in steps for w in m.get("warnings", [])] + list(outcome.warnings)))
    figures: dict[str, Any] = {}
    for mark in marks:
        figures.update(mark["figures"] if mark else {})
    _write_once(
        result.file(DONE),
        {
            **ctx.run.request(stage.name).to_json(),
            "run": ctx.run.id,
            "versions": _versions(),
            "shards": plan.n_shards,
            "frames": sum(m["frames"] for m in marks if m) or outcome.frames,
            "started": min(m["started"] for m in steps),
            "finished": time.time(),
            "cpu_seconds": round(sum(m["seconds"] for m in steps), 3),
            "peak_memory_bytes": max(m["peak_memory_bytes"] for m in steps),
            "warnings": warnings,
            "figures": {**figures, **outcome.figures},
            "files": len(files),
            "bytes": sum(files.values()),
        },
    )
    link_latest(ctx.run)


def _check_sources(stage: Stage, ctx: Context) -> None:
    """Raise UserError if a file that determines the result was changed after the run was begun."""
    for source in ctx.run.sources.get(stage.name, {}).values():
        if not source.state:
            continue
        try:
            now = refresh(source)
        except FileNotFoundError:
            continue  # The stage has read it before it was removed.
        if now.fingerprint != source.fingerprint:
            raise UserError(f"{source.url}: was changed while stage {stage.name} read it; run again")


def _complete_files(stage: Stage, result: Result) -> dict[str, int]:
    """The files that the stage has written: path below the result's data folder -> bytes.

    Raises:
        UserError: a block of a group is missing although its shard is marked as done.
    """
    files: dict[str, int] = {}
    for name in (stage.spec.writes, *stage.spec.also):
        url = urls.join(result.data_folder, name)
        below = listing.manifest(url)
        if "" in below:  # It is a file and no folder.
            files[name] = below[""]
            continue
        lost = [""] if not below else []
        if below and name.endswith(".zarr"):
            lost = sorted(schema.expected_files(groups.open_group(url)) - below.keys())
        if lost:
            raise UserError(
                f"{urls.join(url, lost[0]).rstrip('/')}: is missing, one of {len(lost)} of such, though its shard "
                f"was done; run stage {stage.name} with --force"
            )
        files |= {urls.join(name, path): size for path, size in below.items()}
    return files
