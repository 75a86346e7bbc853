"""The pipeline as a Prefect flow: chains the stages of `zoosplat.pipeline`, nothing else."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import httpx
from prefect import flow, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.runtime import task_run
from prefect.task_runners import ThreadPoolTaskRunner

from zoosplat.errors import UserError
from zoosplat.pipeline import PIPELINE, STAGES, StageSpec
from zoosplat.project import Project
from zoosplat_flows.runners.local import Interrupted, Processes

RETRIES = 2
RETRY_DELAY_S = 5.0
ARTIFACT_EVERY_S = 5.0


@dataclass(frozen=True)
class Event:
    """What happens to a stage: `state` is started, running, done, skipped, reused, retrying or failed."""

    stage: str
    state: str
    done: int = 0
    total: int = 0
    message: str = ""


_listener: ContextVar[Callable[[Event], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[Event], None]) -> Iterator[None]:
    """Hand the events of pipelines that run in this block, in this process, to `listener` (from their threads)."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def _tell(event: Event) -> None:
    listener = _listener.get()
    if listener is not None:
        listener(event)


def select(from_stage: str | None = None, until_stage: str | None = None) -> list[StageSpec]:
    """The stages from one to another, both included, in the order of the pipeline.

    Raises:
        UserError: no such stage, or the wrong way round.
    """
    names = [spec.name for spec in PIPELINE]
    for name in (from_stage, until_stage):
        if name is not None and name not in names:
            raise UserError(f"there is no stage {name}; the stages are {', '.join(names)}")
    first = names.index(from_stage) if from_stage else 0
    last = names.index(until_stage) if until_stage else len(names) - 1
    if last < first:
        raise UserError(f"stage {until_stage} comes before {from_stage}; the stages are {', '.join(names)}")
    return list(PIPELINE[first : last + 1])


def with_followers(names: list[str]) -> set[str]:
    """Stages and all that are made from them: a result computed again has the digest of the old one, so that those
    which read it would otherwise count as done. Raises UserError for an unknown name."""
    for name in names:
        select(name)
    chosen = set(names)
    for spec in PIPELINE:
        if chosen & set(spec.reads):
            chosen.add(spec.name)
    return chosen


class _Artifact:
    """A stage's progress bar in Prefect's interface, moved every few seconds."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.id: uuid.UUID | None = None
        self.last = 0.0

    def __call__(self, percent: float) -> None:
        now = time.monotonic()
        if self.id is not None and percent < 100 and now - self.last < ARTIFACT_EVERY_S:
            return
        self.last = now
        # A picture of the progress is not worth a stage.
        with suppress(httpx.HTTPError):
            if self.id is None:
                key = self.stage.replace("_", "-")
                self.id = cast(uuid.UUID, create_progress_artifact(percent, key=key, description=self.stage))
            else:
                update_progress_artifact(self.id, percent)


def _worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """Whether another try may help: not when the input is wrong or the pipeline ends."""
    try:
        state.result()
    except (UserError, Interrupted):
        return False
    except Exception:
        return True
    return False


@task(
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=_worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_stage(stage: str, project: str, workers: int | None, force: bool, processes: Processes) -> str:
    """One stage. Returns `done`, `skipped` or `reused`; raises as `Processes.run`."""
    attempt = int(task_run.run_count or 1)
    # What a failed try of a forced stage has finished is kept: that try has removed the old mark before anything else.
    force = force and (attempt == 1 or Project.at(project).read_mark(stage) is not None)
    artifact = _Artifact(stage)
    _tell(Event(stage, "started"))
    artifact(0.0)

    def progress(done: int, total: int, message: str) -> None:
        _tell(Event(stage, "running", done, total, message))
        artifact(100.0 * done / total if total else 0.0)

    try:
        state = processes.run(stage, project, workers=workers, force=force, progress=progress)
    except Interrupted:
        raise
    except Exception as error:
        final = isinstance(error, UserError) or attempt > RETRIES
        _tell(Event(stage, "failed" if final else "retrying", message=str(error)))
        raise
    artifact(100.0)
    _tell(Event(stage, state))
    return state


@task(name="report", retries=RETRIES, retry_delay_seconds=RETRY_DELAY_S, retry_condition_fn=_worth_retrying)
def report(project: str) -> str:
    """The report page of what is done. Returns its URL."""
    from zoosplat_flows.report import build_report

    _tell(Event("report", "started"))
    try:
        url = build_report(Project.at(project))
    except Exception as error:
        _tell(Event("report", "failed", message=str(error)))
        raise
    _tell(Event("report", "done"))
    return url


@flow(name="pipeline", task_runner=ThreadPoolTaskRunner(max_workers=len(PIPELINE)), persist_result=False)  # type: ignore[arg-type]
def pipeline(
    project: str,
    from_stage: str | None = None,
    until_stage: str | None = None,
    force: list[str] | None = None,
    workers: int | None = None,
) -> dict[str, str]:
    """Run the stages of a project and build its report; stages that are done are skipped.

    A stage starts as soon as those that it reads have ended: packing images runs beside tracking and cropping.

    Args:
        project: folder or s3:// URL that holds experiment.yaml.
        from_stage: first stage to run; what comes before must be done.
        until_stage: last stage to run.
        force: stages to compute again, with all that is made from them.
        workers: processes a stage; None: a core each.

    Returns:
        What became of each stage (`done`, `skipped` or `reused`), and the URL of the report under `report`.

    Raises:
        UserError: bad input or configuration, found by this or by a stage.
        RuntimeError: a stage failed three times.
    """
    chosen = select(from_stage, until_stage)
    forced = with_followers(force or [])
    futures: dict[str, PrefectFuture[str]] = {}
    with Processes() as processes:
        for spec in chosen:
            futures[spec.name] = run_stage.with_options(name=spec.name, task_run_name=spec.name).submit(
                spec.name,
                project,
                workers,
                spec.name in forced,
                processes,
                return_state=False,
                wait_for=[futures[name] for name in STAGES[spec.name].reads if name in futures],
            )
        for future in futures.values():
            future.wait()
        # In the order of the pipeline the first failure is a cause; those after it may be its consequences.
        results = {name: future.result() for name, future in futures.items()}
    results["report"] = report(project)
    return results
