"""The pipeline as a Prefect flow with a task for each stage, for deployments and where a Prefect server is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal

import httpx
from prefect import flow, runtime, task
from prefect.artifacts import create_table_artifact
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
from zoosplat.stages.registry import PIPELINE, STAGES, wants_gpu
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
from zoosplat_flows.execution.progress_artifact import ProgressArtifact
from zoosplat_flows.execution.recorder import EventListener, RunRecorder, StageEvent, keep_record
from zoosplat_flows.report.refresh import ensure_report
from zoosplat_flows.runners.containers import ContainerRunner
from zoosplat_flows.runners.kubernetes.api import KubernetesApi
from zoosplat_flows.runners.kubernetes.nodes import apply_profile, choose_profile
from zoosplat_flows.runners.kubernetes.runner import KubernetesRunner, delete_jobs
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings
from zoosplat_flows.runners.local import LocalRunner
from zoosplat_flows.runners.protocol import Interrupted, Runner

PLACEMENT = "placement"  # key of the artifact that says where pods have run, in Prefect's interface
RunnerName = Literal["local", "containers", "kubernetes"]

_listener: ContextVar[EventListener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: EventListener) -> Iterator[None]:
    """Call `listener`, from any thread, with the events of flow runs of this process while the block runs."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class _FlowContext:
    """What the tasks of a flow run share.

    It is not a dataclass: Prefect looks into dataclasses among the parameters of a task for futures.
    """

    def __init__(self, run: Run, runner: Runner, workers: int | None, recorder: RunRecorder) -> None:
        self.run, self.runner, self.workers, self.recorder = run, runner, workers, recorder
        self._listener = _listener.get()

    def tell(self, event: StageEvent) -> None:
        """Record an event, and hand it to the listener."""
        self.recorder(event)
        if self._listener is not None:
            self._listener(event)


def _is_worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """Whether another try of a task may help, from the state of the last try."""
    try:
        state.result()
    except Exception as error:
        return is_worth_retrying(error)
    return False


@task(
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=_is_worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_stage(stage: str, context: _FlowContext) -> State[str]:
    """Task of one stage.

    Returns:
        A state whose result is that of `attempt_stage`. It is named Cached for all results but `done`: so Prefect's
        interface shows what was computed and what was not.

    Raises:
        Exception: as `attempt_stage`.
    """
    tries = int(task_run.run_count or 1)
    artifact = ProgressArtifact(stage)
    artifact.update(0.0)

    def tell(event: StageEvent) -> None:
        context.tell(event)
        if event.state == "running" and event.total:
            artifact.update(100.0 * event.done / event.total)

    def log(line: str, source: str = "", at: str = "") -> None:
        context.recorder.log(stage, line, source, at)

    try:
        state = attempt_stage(stage, context.run, context.runner, context.workers, tell, log)
    except Interrupted:
        context.tell(StageEvent(stage, "stopped"))
        raise
    except Exception as error:
        again = is_worth_retrying(error) and tries <= RETRIES
        context.tell(StageEvent(stage, "retrying" if again else "failed", message=str(error)))
        raise
    artifact.update(100.0)
    context.tell(StageEvent(stage, state))
    return Completed(name="Completed" if state == "done" else "Cached", data=state)


@task(
    name="report",
    task_run_name="report",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=_is_worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def report(context: _FlowContext) -> str:
    """Task of the report page. Returns its URL."""
    return ensure_report(context.run, context.recorder, context.tell)


# -- where it runs ------------------------------------------------------------------------------------------------
def project_url_for(project: str | None, config: str | None) -> str:
    """URL of the project of a flow run.

    Args:
        project: the project, where one is given.
        config: URL of the configuration. Where no project is given, its own `project_directory` is the project, or else
            its URL without the suffix: s3://lab/mouse for s3://lab/mouse.yaml.

    Raises:
        UserError: neither is given, or the configuration is not valid.
    """
    if project:
        return Project.at(project).url
    if not config:
        raise UserError("say where the project is: project, or config, or both")
    return Project.at(load_config(config).project or re.sub(r"\.(yaml|yml|json)$", "", config)).url


def _profile_for(
    profile: str | None, project: Project, stages: list[str], experiment: Experiment
) -> tuple[ClusterSettings, KubernetesApi, str | None, Experiment]:
    """Settings and API of the cluster, the profile of the GPU stages, and the experiment as the profile changes it."""
    if not urls.is_s3(project.url):
        raise UserError(f"{project.url}: the pods of a cluster share no folder; use a project at s3://bucket/prefix")
    settings = ClusterSettings.read()
    api = KubernetesApi(settings.namespace)
    chosen: str | None = None
    if profile not in (None, "auto") or any(wants_gpu(stage, experiment) for stage in stages):
        chosen = choose_profile(settings, api.list_nodes(), profile, experiment)
    if chosen is not None and profile == chosen:
        experiment = apply_profile(settings, chosen, experiment)
    return settings, api, chosen, experiment


@contextmanager
def _cluster_runner(settings: ClusterSettings, api: KubernetesApi, profile: str | None) -> Iterator[KubernetesRunner]:
    """A runner whose placements become an artifact of the flow run, also where stages fail."""
    with KubernetesRunner(settings, profile, api, str(runtime.flow_run.get_id())) as runner:
        try:
            yield runner
        finally:
            if runner.placements:
                with suppress(httpx.HTTPError):
                    create_table_artifact(
                        runner.placements, key=PLACEMENT, description="where each shard and stage ran"
                    )


def _delete_jobs_of(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook of a flow run that was cancelled, crashed or failed: a process that is killed leaves its Jobs behind."""
    if flow_run.parameters.get("runner") == "kubernetes":
        delete_jobs(str(flow_run.id))


@flow(
    name="pipeline",
    task_runner=ThreadPoolTaskRunner(max_workers=len(PIPELINE)),  # type: ignore[arg-type]
    persist_result=False,
    on_cancellation=[_delete_jobs_of],
    on_crashed=[_delete_jobs_of],
    on_failure=[_delete_jobs_of],
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
        project: folder or s3:// URL; None: see `project_url_for`.
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
        StagesFailed: stages failed at each of their tries.
    """
    where = Project.at(project_url_for(project, config))
    if run is not None:
        begun = open_run(where, run)
        with LocalRunner() as processes:
            return _run_stages(begun, select_stages(begun.experiment, from_stage, until_stage), processes, workers)
    experiment = load_config(config).experiment if config else open_run(where).experiment
    stages = select_stages(experiment, from_stage, until_stage)
    if runner == "kubernetes":
        settings, api, chosen_profile, experiment = _profile_for(profile, where, stages, experiment)
        placed: Any = _cluster_runner(settings, api, chosen_profile)
    elif profile is not None:
        raise UserError(f"profile {profile}: profiles are kinds of nodes; use it with the runner kubernetes")
    else:
        placed = ContainerRunner() if runner == "containers" else LocalRunner()
    with placed as chosen, begin_run(where, experiment, stages, force or []) as begun_run:
        return _run_stages(begun_run, stages, chosen, workers)


def _run_stages(run: Run, stages: list[str], runner: Runner, workers: int | None) -> dict[str, str]:
    futures: dict[str, PrefectFuture[Any]] = {}
    with keep_record(run, stages) as recorder:
        context = _FlowContext(run, runner, workers, recorder)
        for stage in stages:
            futures[stage] = run_stage.with_options(name=stage, task_run_name=stage).submit(
                stage,
                context,
                return_state=False,
                wait_for=[futures[name] for name in STAGES[stage].reads if name in futures],
            )
        for future in futures.values():
            future.wait()
        _raise_failures(futures, context)
        results = {stage: future.result() for stage, future in futures.items()}
        results["report"] = report(context)
    return results


def _raise_failures(futures: dict[str, PrefectFuture[Any]], context: _FlowContext) -> None:
    """Raise the errors of all stages that failed. Stages that were not begun because of them raise none."""
    errors = []
    for stage, future in futures.items():
        if future.state.is_pending():
            context.tell(StageEvent(stage, "blocked"))
        elif not future.state.is_completed():
            try:
                future.result()
            except Exception as error:
                errors.append(error)
    if len(errors) == 1 and not isinstance(errors[0], (UserError, RuntimeError)):
        raise errors[0]
    if errors:
        kind = UserError if all(isinstance(error, UserError) for error in errors) else StagesFailed
        raise kind("\n".join(str(error) for error in errors)) from errors[0]
