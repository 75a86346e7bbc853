"""The pipeline as a Prefect flow: a task a stage, for deployments and wherever a Prefect server is named."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any, Literal, cast

import httpx
from prefect import flow, runtime, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import task_run
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import load_config
from zoosplat.errors import UserError
from zoosplat.stages.begin import begin_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PIPELINE, STAGES
from zoosplat.stages.runs import Run
from zoosplat.storage import urls
from zoosplat_flows.execution.executor import (
    RETRIES,
    RETRY_DELAY_S,
    StagesFailed,
    attempt_stage,
    is_worth_retrying,
    select_stages,
)
from zoosplat_flows.execution.recorder import EventListener, RunRecorder, StageEvent, keep_record
from zoosplat_flows.report.refresh import ensure_report
from zoosplat_flows.runners.containers import ContainerRunner
from zoosplat_flows.runners.kubernetes.api import KubernetesApi
from zoosplat_flows.runners.kubernetes.nodes import apply_profile, choose_profile
from zoosplat_flows.runners.kubernetes.runner import KubernetesRunner, delete_jobs
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings
from zoosplat_flows.runners.local import LocalRunner
from zoosplat_flows.runners.protocol import Interrupted, Runner

ARTIFACT_EVERY_S = 5.0
PLACEMENT = "placement"  # key of the table of pods, in Prefect's interface
RunnerName = Literal["local", "containers", "kubernetes"]

_listener: ContextVar[EventListener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: EventListener) -> Iterator[None]:
    """Hand the events of pipelines that run in this block, in this process, to `listener` (from their threads)."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


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


class _Work:
    """What the tasks of a flow have in common. Not a dataclass: Prefect walks through those of a task's parameters."""

    def __init__(self, run: Run, runner: Runner, workers: int | None, recorder: RunRecorder) -> None:
        self.run, self.runner, self.workers, self.recorder = run, runner, workers, recorder
        self._listener = _listener.get()

    def tell(self, event: StageEvent) -> None:
        """Record an event, and hand it to who listens."""
        self.recorder(event)
        if self._listener is not None:
            self._listener(event)


def _may_pass(_task: Any, _run: Any, state: Any) -> bool:
    """Whether another try may help."""
    try:
        state.result()
    except Exception as error:
        return is_worth_retrying(error)
    return False


@task(
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=_may_pass,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_stage(stage: str, work: _Work) -> State[str]:
    """One stage. Its result is what `execution.attempt` returns; all but `done` in the state Cached.

    Raises as `execution.attempt`.
    """
    tries = int(task_run.run_count or 1)
    artifact = _Artifact(stage)
    artifact(0.0)

    def heard(event: StageEvent) -> None:
        work.tell(event)
        if event.state == "running" and event.total:
            artifact(100.0 * event.done / event.total)

    def log(line: str, source: str = "", at: str = "") -> None:
        work.recorder.log(stage, line, source, at)

    try:
        state = attempt_stage(stage, work.run, work.runner, work.workers, heard, log)
    except Interrupted:
        work.tell(StageEvent(stage, "stopped"))
        raise
    except Exception as error:
        again = is_worth_retrying(error) and tries <= RETRIES
        work.tell(StageEvent(stage, "retrying" if again else "failed", message=str(error)))
        raise
    artifact(100.0)
    work.tell(StageEvent(stage, state))
    # So that Prefect's interface shows what was computed and what was not.
    return Completed(name="Completed" if state == "done" else "Cached", data=state)


@task(
    name="report",
    task_run_name="report",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=_may_pass,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def report(work: _Work) -> str:
    """The report page of what is done. Returns its URL."""
    return ensure_report(work.run, work.recorder, work.tell)


# -- where it runs ------------------------------------------------------------------------------------------------
def place(project: str | None, config: str | None) -> str:
    """URL of the project: the given one, or that which a config of the published tool names, or the config's without
    its suffix (s3://lab/mouse.yaml: s3://lab/mouse). Raises UserError where neither is given."""
    if project:
        return Project.at(project).url
    if not config:
        raise UserError("say where the project is: project, or config, or both")
    return Project.at(load_config(config).project or re.sub(r"\.(yaml|yml|json)$", "", config)).url


def _profile_for(
    profile: str | None, project: Project, stages: list[str], experiment: Experiment
) -> tuple[ClusterSettings, KubernetesApi, str | None, Experiment]:
    """Settings and cluster, the profile of the GPU stages, and the experiment as that changes it."""
    if not urls.is_s3(project.url):
        raise UserError(f"{project.url}: the pods of a cluster share no folder; use a project at s3://bucket/prefix")
    settings = ClusterSettings.read()
    api = KubernetesApi(settings.namespace)
    chosen: str | None = None
    if profile not in (None, "auto") or any(STAGES[stage].gpu for stage in stages):
        chosen = choose_profile(settings, api.list_nodes(), profile, experiment)
    if chosen is not None and profile == chosen:
        experiment = apply_profile(settings, chosen, experiment)
    return settings, api, chosen, experiment


@contextmanager
def _in_cluster(settings: ClusterSettings, api: KubernetesApi, profile: str | None) -> Iterator[KubernetesRunner]:
    with KubernetesRunner(settings, profile, api, str(runtime.flow_run.get_id())) as jobs:
        try:
            yield jobs
        finally:
            if jobs.placements:
                with suppress(httpx.HTTPError):
                    create_table_artifact(jobs.placements, key=PLACEMENT, description="where each shard and stage ran")


def _end_children(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook of a run that was cancelled, crashed or failed: its process may have been killed before it could do this."""
    if flow_run.parameters.get("runner") == "kubernetes":
        delete_jobs(str(flow_run.id))


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
    run: str | None = None,
) -> dict[str, str]:
    """Run the stages of a project and build its report; stages that are done are skipped.

    A stage starts as soon as those that it reads have ended: packing images runs beside tracking and cropping.

    Args:
        project: folder or s3:// URL; None: see `place`.
        from_stage: first stage to run; what comes before must be done.
        until_stage: last stage to run.
        force: stages to make again; what is made from them follows.
        workers: processes a stage; None: a core each. On Kubernetes shards at a time; None: as the settings say.
        config: URL of a configuration; None: that of the project's latest run.
        runner: local (processes of this machine), containers (of this machine) or kubernetes (Jobs): see
            `zoosplat_flows.runners`.
        profile: kind of GPU node, whose settings also change the configuration; None or auto: the smallest that fits
            the configuration as it is.
        run: id of a run that the caller has begun; None begins one.

    Returns:
        What became of each stage (`done`, `skipped`, `reused` or `shared`), and the URL of the report under `report`.

    Raises:
        UserError: bad input or configuration, found by this or by a stage.
        Failed: stages failed three times.
    """
    stages = select_stages(from_stage, until_stage)
    where = Project.at(place(project, config))
    if run is not None:
        with LocalRunner() as processes:
            return _run_stages(open_run(where, run), stages, processes, workers)
    experiment = load_config(config).experiment if config else open_run(where).experiment
    if runner == "kubernetes":
        settings, api, chosen_profile, experiment = _profile_for(profile, where, stages, experiment)
        placed: Any = _in_cluster(settings, api, chosen_profile)
    elif profile is not None:
        raise UserError(f"profile {profile}: profiles are kinds of nodes; use it with the runner kubernetes")
    else:
        placed = ContainerRunner() if runner == "containers" else LocalRunner()
    with placed as chosen, begin_run(where, experiment, stages, force or []) as begun_run:
        return _run_stages(begun_run, stages, chosen, workers)


def _run_stages(run: Run, stages: list[str], runner: Runner, workers: int | None) -> dict[str, str]:
    futures: dict[str, PrefectFuture[Any]] = {}
    with keep_record(run, stages) as recorder:
        work = _Work(run, runner, workers, recorder)
        for stage in stages:
            futures[stage] = run_stage.with_options(name=stage, task_run_name=stage).submit(
                stage,
                work,
                return_state=False,
                wait_for=[futures[name] for name in STAGES[stage].reads if name in futures],
            )
        for future in futures.values():
            future.wait()
        _raise_failures(futures, work)
        results = {stage: future.result() for stage, future in futures.items()}
        results["report"] = report(work)
    return results


def _raise_failures(futures: dict[str, PrefectFuture[Any]], work: _Work) -> None:
    """Raise what the stages that failed said, all of them; those that were not begun for it say nothing."""
    errors = []
    for stage, future in futures.items():
        if future.state.is_pending():
            work.tell(StageEvent(stage, "blocked"))
        elif not future.state.is_completed():
            try:
                future.result()
            except Exception as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = UserError if all(isinstance(error, UserError) for error in errors) else StagesFailed
        raise kind("\n".join(str(error) for error in errors))
