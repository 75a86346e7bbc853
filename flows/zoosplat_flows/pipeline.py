"""The pipeline as a Prefect flow: chains the stages of `zoosplat.pipeline`, nothing else."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import httpx
from prefect import flow, runtime, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import task_run
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from zoosplat import stores
from zoosplat.config import load_config
from zoosplat.errors import Unreachable, UserError
from zoosplat.pipeline import PIPELINE, STAGES, StageSpec
from zoosplat.project import Project
from zoosplat_flows.runners.containers import Containers
from zoosplat_flows.runners.kubernetes import (
    Api,
    Exhausted,
    Jobs,
    choose_profile,
    end_jobs,
    with_profile,
)
from zoosplat_flows.runners.local import Interrupted, Processes, Progress
from zoosplat_flows.runners.settings import Settings

RETRIES = 2
RETRY_DELAY_S = 5.0
ARTIFACT_EVERY_S = 5.0
PLACEMENT = "placement"  # key of the table of pods, in Prefect's interface


@dataclass(frozen=True)
class Event:
    """What happens to a stage: `state` is started, running, done, skipped, reused, retrying or failed."""

    stage: str
    state: str
    done: int = 0
    total: int = 0
    message: str = ""


class Runner(Protocol):
    """Where stages run: see `zoosplat_flows.runners`. Leaving its `with` block ends what still runs."""

    def run(
        self, stage: str, project_url: str, *, workers: int | None = None, force: bool = False, progress: Progress
    ) -> str: ...


RunnerName = Literal["local", "containers", "kubernetes"]

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
    """A stage's progress bar in Prefect's interface, moved every few seconds.

    From threads: each call to a server that has stopped takes minutes, which no stage shall wait for.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.id: uuid.UUID | None = None
        self.last = 0.0
        self.thread: threading.Thread | None = None

    def __call__(self, percent: float) -> None:
        now = time.monotonic()
        if percent >= 100 and self.thread is not None:
            self.thread.join(timeout=ARTIFACT_EVERY_S)
        early = percent < 100 and now - self.last < ARTIFACT_EVERY_S
        if self.thread is not None and (early or self.thread.is_alive()):
            return
        self.last = now
        # With the context, which says whose artifact it is.
        self.thread = threading.Thread(target=copy_context().run, args=(self._send, percent), daemon=True)
        self.thread.start()
        if percent >= 100:
            self.thread.join(timeout=ARTIFACT_EVERY_S)

    def _send(self, percent: float) -> None:
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
    except Unreachable:
        return True
    except (UserError, Interrupted, Exhausted):
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
def run_stage(stage: str, project: str, workers: int | None, force: bool, runner: Runner) -> State[str]:
    """One stage. Its result is `done`, `skipped` or `reused`, the last two in the state Cached.

    Raises as the `run` of the runner.
    """
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
        state = runner.run(stage, project, workers=workers, force=force, progress=progress)
    except Interrupted:
        raise
    except Exception as error:
        wrong = isinstance(error, UserError | Exhausted) and not isinstance(error, Unreachable)
        final = wrong or attempt > RETRIES
        _tell(Event(stage, "failed" if final else "retrying", message=str(error)))
        raise
    artifact(100.0)
    _tell(Event(stage, state))
    # So that Prefect's interface shows what was computed and what was not.
    return Completed(name="Completed" if state == "done" else "Cached", data=state)


@task(
    name="report",
    task_run_name="report",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=_worth_retrying,
)
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


# -- where it runs ------------------------------------------------------------------------------------------------
def place(project: str | None, config: str | None) -> str:
    """URL of the project: the given one, or that which a config of the published tool names, or the config's without
    its suffix (s3://lab/mouse.yaml: s3://lab/mouse). Raises UserError where neither is given."""
    if project:
        return Project.at(project).url
    if not config:
        raise UserError("say where the project is: project, or config, or both")
    return Project.at(load_config(config).project or re.sub(r"\.(yaml|yml|json)$", "", config)).url


@contextmanager
def open_runner(
    name: RunnerName, profile: str | None, project: Project, config: str | None, stages: list[StageSpec]
) -> Iterator[Runner]:
    """Write the experiment, with its profile, into the project, and give a runner for it.

    Raises:
        UserError: bad configuration or settings, no cluster, or a profile that no node offers.
    """
    experiment = load_config(config).experiment if config else None
    if name != "kubernetes":
        if profile is not None:
            raise UserError(f"profile {profile}: profiles are kinds of nodes; use it with the runner kubernetes")
        if experiment is not None:
            project.write_experiment(experiment)
        with Containers() if name == "containers" else Processes() as processes:
            yield processes
        return
    if not stores.is_s3(project.url):
        raise UserError(f"{project.url}: the pods of a cluster share no folder; use a project at s3://bucket/prefix")
    settings = Settings.read()
    api = Api(settings.namespace)
    experiment = experiment or project.read_experiment()
    chosen: str | None = None
    if profile not in (None, "auto") or any(spec.gpu for spec in stages):
        chosen = choose_profile(settings, api.nodes(), profile, experiment)
    if chosen is not None and profile == chosen:
        experiment = with_profile(settings, chosen, experiment)
    project.write_experiment(experiment)
    with Jobs(settings, chosen, api, str(runtime.flow_run.get_id())) as jobs:
        try:
            yield jobs
        finally:
            if jobs.placements:
                with suppress(httpx.HTTPError):
                    create_table_artifact(jobs.placements, key=PLACEMENT, description="where each shard and stage ran")


def _end_children(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook of a run that was cancelled, crashed or failed: its process may have been killed before it could do this."""
    if flow_run.parameters.get("runner") == "kubernetes":
        end_jobs(str(flow_run.id))


@flow(
    name="pipeline",
    task_runner=ThreadPoolTaskRunner(max_workers=len(PIPELINE)),  # type: ignore[arg-type]
    persist_result=False,
    on_cancellation=[_end_children],
    on_crashed=[_end_children],
    on_failure=[_end_children],
)
def pipeline(
    project: str | None = None,
    from_stage: str | None = None,
    until_stage: str | None = None,
    force: list[str] | None = None,
    workers: int | None = None,
    config: str | None = None,
    runner: RunnerName = "local",
    profile: str | None = None,
) -> dict[str, str]:
    """Run the stages of a project and build its report; stages that are done are skipped.

    A stage starts as soon as those that it reads have ended: packing images runs beside tracking and cropping.

    Args:
        project: folder or s3:// URL; None: see `place`.
        from_stage: first stage to run; what comes before must be done.
        until_stage: last stage to run.
        force: stages to compute again, with all that is made from them.
        workers: processes a stage; None: a core each. On Kubernetes shards at a time; None: as the settings say.
        config: URL of a configuration, which becomes the project's experiment.yaml; None: that which is there.
        runner: local (processes of this machine), containers (of this machine) or kubernetes (Jobs): see
            `zoosplat_flows.runners`.
        profile: kind of GPU node, whose settings also change the experiment; None or auto: the smallest that fits the
            experiment as it is.

    Returns:
        What became of each stage (`done`, `skipped` or `reused`), and the URL of the report under `report`.

    Raises:
        UserError: bad input or configuration, found by this or by a stage.
        RuntimeError: a stage failed three times.
    """
    chosen = select(from_stage, until_stage)
    forced = with_followers(force or [])
    url = place(project, config)
    futures: dict[str, PrefectFuture[Any]] = {}
    with open_runner(runner, profile, Project.at(url), config, chosen) as where:
        for spec in chosen:
            futures[spec.name] = run_stage.with_options(name=spec.name, task_run_name=spec.name).submit(
                spec.name,
                url,
                workers,
                spec.name in forced,
                where,
                return_state=False,
                wait_for=[futures[name] for name in STAGES[spec.name].reads if name in futures],
            )
        for future in futures.values():
            future.wait()
        # In the order of the pipeline the first failure is a cause; those after it may be its consequences.
        results = {name: future.result() for name, future in futures.items()}
    results["report"] = report(url)
    return results
