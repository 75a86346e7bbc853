"""Runs stages as Kubernetes Jobs: an Indexed Job for the shards of a CPU stage, a Job of one pod for a GPU stage.

A Job's name follows from the project, the id of the result that it makes, and the images. So two pipelines that need
one result share Jobs, and a pipeline whose predecessor was killed finds its Jobs again. Every step of a stage may be
run again at any time. So it is right to create a Job again wherever somebody has deleted it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from zoosplat.errors import UserError
from zoosplat.stages.contract import StageProgress
from zoosplat.stages.memory import profile_gib
from zoosplat.stages.registry import wants_gpu
from zoosplat.stages.runs import Run
from zoosplat.storage import urls
from zoosplat_flows.runners.kubernetes.api import JsonObject, KubernetesApi, explain_refusal, http_status
from zoosplat_flows.runners.kubernetes.explanations import explain_blocked, explain_failure, explain_pending
from zoosplat_flows.runners.kubernetes.manifests import (
    JOB_LABEL,
    LABEL_PREFIX,
    WHOLE_STAGE,
    job_manifest,
    own_pod_reference,
    request_digest,
)
from zoosplat_flows.runners.kubernetes.objects import final_condition, is_indexed, placement_of
from zoosplat_flows.runners.kubernetes.pod_logs import PodLogReader
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings
from zoosplat_flows.runners.protocol import Exhausted, Interrupted, Log

POLL_S = 2.0  # seconds between looks at a Job
SILENT_S = 120.0  # seconds for which the API server may give no answer
BLOCKED_S = 60.0  # seconds for which a pod may be blocked, see `explain_blocked`
MAX_DELETIONS = 5  # times that others may delete a Job before its stage fails


class KubernetesRunner:
    """Runs the stages of one pipeline run as Jobs; leaving the `with` block deletes them and their pods.

    Args:
        settings: the settings of the runner.
        profile: the profile of GPU stages; None where no GPU stage will run.
        api: the cluster.
        run: id of Prefect's flow run, which becomes a label of the Jobs.

    Attributes:
        placements: `placement_of` each pod of all Jobs that have ended.
    """

    def __init__(self, settings: ClusterSettings, profile: str | None, api: KubernetesApi, run: str) -> None:
        self.settings, self.profile, self.api, self._run = settings, profile, api, run
        self._owner = own_pod_reference()
        self.placements: list[JsonObject] = []
        self._names: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> KubernetesRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Delete every Job and refuse new ones. Another pipeline that waits for one of them creates it again."""
        self._closed.set()
        with self._lock:
            names = sorted(self._names)
        for name in names:
            self.api.delete_job(name)

    def run(self, stage: str, run: Run, *, workers: int | None = None, progress: StageProgress, log: Log) -> None:
        """Run a whole stage in the cluster and wait for it.

        Args:
            stage: name in `zoosplat.stages.registry.STAGES`.
            run: the recorded run whose result the stage makes, in a project on S3.
            workers: shards at a time; None: `cpu.parallelism` of the settings.
            progress: called with shards done, their number and what the pods wait for; for a GPU stage with what the
                stage itself reports.
            log: called with every line that a pod has printed, its node and name, and the time of the line. The single
                pod of a Job is followed while it runs; the lines of other pods come when the pods have ended.

        Raises:
            UserError: bad input, too little memory, or a pod that cannot start.
            Exhausted: shards failed although they were tried again.
            RuntimeError: any other failure, with the last lines of the log.
            Interrupted: the pipeline ended meanwhile.
        """
        if not urls.is_s3(run.project.url):
            raise UserError(
                f"{run.project.url}: the pods of a cluster share no folder; use a project at s3://bucket/prefix"
            )
        result = run.result(stage)
        digest = request_digest(result, self.settings)

        def run_step(step: str, arguments: list[str], **options: Any) -> None:
            manifest = job_manifest(
                self.settings,
                run.project.url,
                stage,
                step,
                digest,
                ["--run", run.id, *arguments],
                run=self._run,
                owner=self._owner,
                **options,
            )
            self._finish_job(manifest, progress, log, result.is_done)

        if wants_gpu(stage, run.experiment):
            if self.profile is None:
                raise UserError(f"{stage}: needs a GPU; choose a profile")
            run_step(WHOLE_STAGE, [], profile=self.settings.profile(self.profile))
            return
        run_step("prepare", ["--prepare"])
        if result.is_done():
            return
        plan = result.plan()
        if plan is None:
            raise RuntimeError(f"{stage}: prepared, but without its plan in {result.folder}")
        shards = len(plan["bounds"]) - 1
        arguments = ["--shard", f"$(JOB_COMPLETION_INDEX)/{shards}"]
        run_step("shards", arguments, shards=shards, parallelism=workers or self.settings.cpu.parallelism)
        run_step("finish", ["--finish"])

    def _finish_job(self, manifest: JsonObject, progress: StageProgress, log: Log, is_done: Callable[[], bool]) -> None:
        """Create or adopt a Job and wait until it is complete."""
        name = manifest["metadata"]["name"]
        for attempt in range(MAX_DELETIONS):
            if attempt and is_done():
                return
            self._create_job(manifest)
            if self._wait_for_job(name, progress, log):
                return
        raise RuntimeError(f"{name}: was deleted {MAX_DELETIONS} times by someone else")

    def _create_job(self, manifest: JsonObject) -> None:
        """Create a Job, or adopt the one of its name that has not ended."""
        name = manifest["metadata"]["name"]
        while True:
            with self._lock:
                if self._closed.is_set():
                    raise Interrupted(name)
                self._names.add(name)
                try:
                    self.api.create_job(manifest)
                    return
                except Exception as error:
                    if http_status(error) != 409:  # 409: a Job of this name exists
                        raise explain_refusal(error) from error
            existing = self.api.read_job(name)
            if (
                existing is not None
                and final_condition(existing) is None
                and "deletionTimestamp" not in existing["metadata"]
            ):
                return  # another pipeline has created it, or a predecessor that was killed
            # A Job that has ended belongs to an earlier try. A pipeline that still waits for it creates it again.
            if existing is not None:
                self.api.delete_job(name)
            self._sleep(name)

    def _sleep(self, name: str) -> None:
        """Wait until the next look at a Job. Raises Interrupted as soon as the runner is stopped."""
        if self._closed.wait(POLL_S):
            raise Interrupted(name)

    def _wait_for_job(self, name: str, progress: StageProgress, log: Log) -> bool:
        """Wait for a Job. Returns whether it is complete; False where somebody has deleted it."""
        last_answer = time.monotonic()
        logs = PodLogReader(self.api, log)
        blocked_since: float | None = None
        while True:
            try:
                job = self.api.read_job(name)
                if job is None:
                    if self._closed.is_set():
                        raise Interrupted(name)
                    return False
                end = final_condition(job)
                pods = self.api.list_pods(**{JOB_LABEL: name})
                stage_progress = logs.read(job, pods)
                if end is not None:
                    self.placements += map(placement_of, pods)
                if end == "Complete":
                    return True
                if end == "Failed":
                    raise explain_failure(job, pods, self._memory_key(job))
                _report_progress(job, pods, stage_progress, progress)
                blocked = next(filter(None, map(explain_blocked, pods)), None)
                if blocked is None:
                    blocked_since = None
                elif blocked_since is None:
                    blocked_since = time.monotonic()
                elif time.monotonic() - blocked_since > BLOCKED_S:
                    raise UserError(f"{job['metadata']['labels'][f'{LABEL_PREFIX}/stage']}: {blocked}")
                last_answer = time.monotonic()
            except (UserError, Exhausted, Interrupted):
                raise
            except Exception as error:
                status = http_status(error)
                is_server_away = status is not None and (status in (0, 429) or status >= 500)
                if not is_server_away:
                    raise
                if time.monotonic() - last_answer > SILENT_S:
                    raise RuntimeError(f"{name}: the Kubernetes API server does not answer: {error}") from error
            self._sleep(name)

    def _memory_key(self, job: JsonObject) -> str:
        """The setting to raise where a pod of a Job had too little memory."""
        if job["metadata"]["labels"][f"{LABEL_PREFIX}/step"] == WHOLE_STAGE:
            larger = [n for n in self.settings.ordered() if self.profile and profile_gib(n) > profile_gib(self.profile)]
            return f"profiles.{self.profile}.memory" + (f", or choose the profile {larger[0]}" if larger else "")
        return "runner.cpu.resources.limits.memory"


def _report_progress(
    job: JsonObject, pods: list[JsonObject], stage_progress: tuple[int, int, str] | None, progress: StageProgress
) -> None:
    waiting = [why for pod in pods if (why := explain_pending(pod)) and not why.startswith("is starting")]
    why = f"{len(waiting)} waiting: {waiting[0]}" if waiting else ""
    if is_indexed(job):
        progress(job.get("status", {}).get("succeeded", 0), job["spec"]["completions"], why)
    elif stage_progress is not None:
        progress(*stage_progress)
    elif why:
        progress(0, 0, why)


def delete_jobs(run: str) -> None:
    """Delete the Jobs that a flow run has created, from a hook that runs when the flow itself cannot do so."""
    api = KubernetesApi(ClusterSettings.read().namespace)
    for job in api.list_jobs(**{f"{LABEL_PREFIX}/run": run}):
        api.delete_job(job["metadata"]["name"])
