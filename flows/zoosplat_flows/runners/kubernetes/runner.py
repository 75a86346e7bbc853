"""Stages as Kubernetes Jobs: an Indexed Job for the shards of a CPU stage, one Job of its profile for a GPU stage.

A Job's name follows from the project, the id of the result that it makes, and the images. So two pipelines that need
one result share Jobs, and a pipeline whose parent was killed finds its Jobs again. Every step of a stage may be run
again at any time, which makes it right to create a Job anew wherever it has gone.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.memory import GIB, USABLE, advice, gpu_gib, peak_gpu_bytes, smallest_fitting
from zoosplat.stages.registry import STAGES
from zoosplat.stages.results import Result, digest_of
from zoosplat.stages.runs import Run
from zoosplat.storage import urls
from zoosplat_flows.execution.executor import Exhausted, Interrupted, Log, Progress
from zoosplat_flows.execution.recorder import PROGRESS_S
from zoosplat_flows.runners.settings import (
    Profile,
    Settings,
    Toleration,
    overlay,
    quantity,
)

Object = dict[str, Any]

MANAGER = "zoosplat"
LABELS = "zoosplat.io"
USER = 10001
POLL_S = 2.0
SILENT_S = 120.0  # how long the API server may be away
BLOCKED_S = 60.0  # how long a pod may be unable to start for a reason that time does not mend
KEPT_S = 3600  # of a finished Job whose runner was killed
TIMEOUT_S = 20
LOG_OVERLAP_S = (
    5  # a log that is read again begins so much before the last reading, whose lines are known by their times
)
MAX_FAILED = 10  # indexes, after which the others are not begun
SHOWN_FAILED = 3
TIMES_GONE = 5
BAD_INPUT = 2  # exit status of a stage
POD_FILES = Path("/etc/podinfo")  # where the chart's job template puts the name and uid of the flow's pod
JOB_LABEL = "batch.kubernetes.io/job-name"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
# What a kubelet reports before a container of ours has run, and what to mend.
BLOCKED = {
    "ErrImagePull": "its image cannot be pulled; check images.registry and images.tag",
    "ImagePullBackOff": "its image cannot be pulled; check images.registry and images.tag",
    "ErrImageNeverPull": "its image is not on the node and images.pullPolicy is Never",
    "InvalidImageName": "the name of its image is not valid; check images.registry and images.tag",
    "CreateContainerConfigError": "something that it refers to is missing; check s3.secretName",
    "CreateContainerError": "its container cannot be made",
    "RunContainerError": "its container cannot be started",
}
LACKS = {"cpu": "too little free cpu", "memory": "too little free memory", "nvidia.com/gpu": "no free GPU"}


# -- the API ------------------------------------------------------------------------------------------------------
class Api:
    """The calls that the runner and `zoosplat cluster status` make, with objects as plain JSON.

    Inside a pod with the pod's service account, elsewhere with $KUBECONFIG or ~/.kube/config.
    """

    def __init__(self, namespace: str) -> None:
        from kubernetes import client, config

        self.namespace = namespace
        configuration = client.Configuration()
        try:
            try:
                config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            except config.ConfigException:
                config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise UserError(f"no Kubernetes cluster: {error}; set KUBECONFIG, or run in a pod") from None
        connection = client.ApiClient(configuration)
        self.batch, self.core = client.BatchV1Api(connection), client.CoreV1Api(connection)

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> bytes:
        data: bytes = function(*args, **options, _preload_content=False, _request_timeout=TIMEOUT_S).data
        return data

    def create_job(self, job: Object) -> Object:
        return dict(json.loads(self._call(self.batch.create_namespaced_job, self.namespace, job)))

    def job(self, name: str) -> Object | None:
        """A Job, or None where it is gone."""
        try:
            return dict(json.loads(self._call(self.batch.read_namespaced_job, name, self.namespace)))
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise

    def delete_job(self, name: str) -> None:
        """Delete a Job and, by the garbage collector, its pods."""
        try:
            self._call(self.batch.delete_namespaced_job, name, self.namespace, propagation_policy="Background")
        except Exception as error:
            if status_of(error) != 404:
                raise

    def jobs(self, **labels: str) -> list[Object]:
        labels = {"app.kubernetes.io/managed-by": MANAGER, **labels}
        text = self._call(self.batch.list_namespaced_job, self.namespace, label_selector=_selector(labels))
        return list(json.loads(text)["items"])

    def pods(self, **labels: str) -> list[Object]:
        labels = {"app.kubernetes.io/managed-by": MANAGER, **labels}
        text = self._call(self.core.list_namespaced_pod, self.namespace, label_selector=_selector(labels))
        return list(json.loads(text)["items"])

    def nodes(self) -> list[Object] | None:
        """All nodes; None where the account may not list them, which takes a ClusterRole."""
        try:
            return list(json.loads(self._call(self.core.list_node))["items"])
        except Exception as error:
            if status_of(error) == 403:
                return None
            raise

    def log(self, pod: str, since_s: int | None = None) -> str:
        """What a pod has printed, each line after its time; with `since_s` that of the last seconds alone."""
        since = {} if since_s is None else {"since_seconds": since_s}
        function = self.core.read_namespaced_pod_log
        return self._call(function, pod, self.namespace, timestamps=True, **since).decode(errors="replace")


def _selector(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def status_of(error: BaseException) -> int | None:
    """HTTP status of an API error; 0 where the server did not answer, None for anything else."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, ApiException):
        return int(error.status or 0)
    return 0 if isinstance(error, HTTPError) else None


# -- manifests ----------------------------------------------------------------------------------------------------
def own_pod() -> Object | None:
    """An owner reference to the pod that this process runs in; None outside a pod of the chart's template.

    The cluster deletes a Job with its last owner: so Jobs end although the flow was killed, with whatever watched it.
    """
    try:
        name, uid = ((POD_FILES / key).read_text().strip() for key in ("name", "uid"))
    except OSError:
        return None
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}


def request_digest(result: Result, settings: Settings) -> str:
    """What the names of the Jobs that make a result follow from: where it lies, its id, the images."""
    return digest_of([result.folder, settings.images.registry, settings.images.tag])


def _tolerations(tolerations: tuple[Toleration, ...]) -> list[Object]:
    return [t.model_dump(exclude_none=True) for t in tolerations]


def job_manifest(
    settings: Settings,
    project_url: str,
    stage: str,
    step: str,
    digest: str,
    arguments: list[str],
    *,
    run: str,
    shards: int | None = None,
    parallelism: int = 1,
    profile: Profile | None = None,
    owner: Object | None = None,
) -> Object:
    """The whole Job of one step of a stage.

    Args:
        settings: of the runner.
        project_url: the project.
        stage: name in `zoosplat.stages.registry.STAGES`.
        step: prepare, shards, finish, or run for a whole GPU stage.
        digest: `request_digest`.
        arguments: of the stage, after --project URL.
        run: id of Prefect's flow run, a label by which its Jobs are found and ended.
        shards: makes it an Indexed Job of so many.
        parallelism: pods at a time.
        profile: places it on a GPU node and gives it its resources; None: those of CPU stages.
        owner: `own_pod`; None: the Job lasts until it is deleted.
    """
    name = f"zoosplat-{stage.replace('_', '-')}-{step}-{digest_of([digest, step, shards])[:12]}"
    labels = {
        "app.kubernetes.io/managed-by": MANAGER,
        "app.kubernetes.io/name": "zoosplat-stage",
        f"{LABELS}/component": "stage",
        f"{LABELS}/stage": stage,
        f"{LABELS}/step": step,
        f"{LABELS}/run": run,
    }
    env: list[Object] = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "OMP_WAIT_POLICY", "value": "passive"},
        {"name": urls.S3_ONLY, "value": "1"},
        {"name": "AWS_DEFAULT_REGION", "value": settings.s3.region},
    ]
    if settings.s3.endpoint:
        env.append({"name": "AWS_ENDPOINT_URL", "value": settings.s3.endpoint})
    if settings.s3.secretName:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            reference = {"name": settings.s3.secretName, "key": key}
            env.append({"name": key, "valueFrom": {"secretKeyRef": reference}})
    if profile is None:
        resources, selector = settings.cpu.resources.model_dump(), settings.cpu.nodeSelector
        tolerations = settings.cpu.tolerations
    else:
        amounts = {"cpu": profile.cpu, "memory": profile.memory, "nvidia.com/gpu": str(profile.gpus)}
        resources, selector = {"requests": amounts, "limits": amounts}, profile.nodeSelector
        tolerations = profile.tolerations
    volumes: list[Object] = [{"name": "tmp", "emptyDir": {}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    if profile is not None and profile.gpus > 1:  # which may talk by way of shared memory, of which a pod has 64 MiB
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    container = {
        "name": "stage",
        "image": f"{settings.images.registry}/zoosplat-{stage.replace('_', '-')}:{settings.images.tag}",
        "imagePullPolicy": settings.images.pullPolicy,
        # Kubernetes puts variables, credentials too, in place of $(NAME).
        "args": ["--project", project_url.replace("$", "$$"), *arguments],
        "env": env,
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # The last log lines stay in the pod's status, also when its node has gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 10,
        "serviceAccountName": settings.serviceAccount,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostNetwork": settings.hostNetwork,
        "nodeSelector": dict(selector),
        "tolerations": _tolerations(tolerations),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    # Drained nodes are nobody's fault, and bad input stays bad.
    fail = "FailJob" if shards is None else "FailIndex"
    rules: list[Object] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": fail, "onExitCodes": {"containerName": "stage", "operator": "In", "values": [BAD_INPUT]}},
    ]
    spec: Object = {
        "ttlSecondsAfterFinished": KEPT_S,
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    if shards is None:
        # One try: the flow tries such a stage again itself.
        spec |= {"completions": 1, "parallelism": 1, "backoffLimit": 0}
    else:
        spec |= {
            "completionMode": "Indexed",
            "completions": shards,
            "parallelism": min(parallelism, shards),
            "backoffLimitPerIndex": settings.cpu.backoffLimitPerIndex,
            "maxFailedIndexes": min(MAX_FAILED, shards),
        }
    metadata: Object = {"name": name, "labels": labels, "annotations": {f"{LABELS}/project": project_url}}
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


# -- nodes and profiles -------------------------------------------------------------------------------------------
def _amount(node: Object, resource: str) -> float:
    return quantity(node["status"].get("allocatable", {}).get(resource, "0"))


def _tolerated(taint: Object, tolerations: tuple[Toleration, ...]) -> bool:
    return any(
        (t.key is None or t.key == taint["key"])
        and (t.operator == "Exists" or (t.value or "") == taint.get("value", ""))
        and (t.effect is None or t.effect == taint["effect"])
        for t in tolerations
    )


def offers(node: Object, profile: Profile) -> bool:
    """Whether a node has a profile's labels and, when empty, its resources, and lets its pods in.

    Whether it is ready or drained does not count: it will be back.
    """
    labels = node["metadata"].get("labels", {})
    needs = {"nvidia.com/gpu": float(profile.gpus)}
    needs |= {"cpu": quantity(profile.cpu), "memory": quantity(profile.memory)}
    taints = [
        t
        for t in node["spec"].get("taints", [])
        if t["effect"] != "PreferNoSchedule" and not t["key"].startswith("node.kubernetes.io/")
    ]
    return (
        all(labels.get(key) == value for key, value in profile.nodeSelector.items())
        and all(_amount(node, resource) >= amount for resource, amount in needs.items())
        and all(_tolerated(taint, profile.tolerations) for taint in taints)
    )


def offered(settings: Settings, nodes: list[Object]) -> dict[str, int]:
    """How many nodes offer each profile, the smallest GPU first."""
    return {name: sum(offers(node, settings.profiles[name]) for node in nodes) for name in settings.ordered()}


def choose_profile(settings: Settings, nodes: list[Object] | None, wanted: str | None, experiment: Experiment) -> str:
    """The profile for an experiment.

    Args:
        settings: of the runner.
        nodes: of the cluster; None: not known, then every profile of the settings counts as offered.
        wanted: a name; None or `auto`: the smallest offered one whose GPU holds `memory.peak_gpu_bytes`.
        experiment: what is to be trained.

    Raises:
        UserError: no node offers it, or none is large enough; with the list of what exists.
    """
    counts = dict.fromkeys(settings.ordered(), 1) if nodes is None else offered(settings, nodes)
    present = [name for name, count in counts.items() if count]
    have = ", ".join(f"{name} ({counts[name]} node{'s' * (counts[name] != 1)})" for name in present) or "no profile"
    if wanted not in (None, "auto"):
        assert wanted is not None
        profile = settings.profile(wanted)
        if not counts[wanted]:
            needs = f"{_selector(profile.nodeSelector)}, {profile.gpus} GPU, cpu {profile.cpu}, memory {profile.memory}"
            raise UserError(f"profile {wanted}: no node offers it ({needs}); the nodes of this cluster offer {have}")
        return wanted
    fitting = smallest_fitting(experiment, present)
    if fitting is None:
        needs = f"{peak_gpu_bytes(experiment) / GIB:.0f} GiB"
        largest = USABLE * GIB * max(map(gpu_gib, present), default=0)
        raise UserError(
            f"profile auto: training needs about {needs} of GPU memory; the nodes of this cluster offer {have}; "
            f"{advice(experiment, largest)}, or name a profile"
        )
    return fitting


def with_profile(settings: Settings, name: str, experiment: Experiment) -> Experiment:
    return overlay(experiment, name, settings.profile(name).config)


# -- pods in words ------------------------------------------------------------------------------------------------
def _count(n: int, singular: str, plural: str) -> str:
    return f"1 node {singular}" if n == 1 else f"{n} nodes {plural}"


def why_unschedulable(message: str, selector: dict[str, str]) -> str:
    """The scheduler's message in words.

    >>> why_unschedulable("0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.", {})
    '1 node has too little free cpu, 2 nodes are drained'
    """
    wants = f" ({_selector(selector)})" if selector else ""
    reasons = []
    _, _, rest = message.partition("nodes are available:")
    # Taints are in braces, with spaces and dots inside.
    for number, reason in re.findall(
        r"(\d+) ((?:\{[^}]*\}|[^,{])+?)(?=, \d+ |\. |\.?$)", rest.partition("preemption:")[0].strip()
    ):
        n = int(number)
        if lack := re.match(r"Insufficient (\S+)", reason):
            what = LACKS.get(lack[1], f"too little free {lack[1]}")
            reasons.append(_count(n, f"has {what}", f"have {what}"))
        elif "node affinity/selector" in reason:
            reasons.append(_count(n, f"has other labels than wanted{wants}", f"have other labels than wanted{wants}"))
        elif "unschedulable" in reason:
            reasons.append(_count(n, "is drained", "are drained"))
        elif taint := re.search(r"taint\(?s?\)? \{([^:}]*)", reason):
            away = {"node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"}
            what = "not ready" if taint[1] in away else f"kept for others by the taint {taint[1]}"
            what = "drained" if taint[1] == "node.kubernetes.io/unschedulable" else what
            reasons.append(_count(n, f"is {what}", f"are {what}"))
        else:
            reasons.append(_count(n, f"refuses: {reason}", f"refuse: {reason}"))
    return ", ".join(reasons) or message or "no node is free"


def why_pending(pod: Object) -> str | None:
    """Why a pod is not running, in words; None for one that is, or was."""
    status = pod.get("status", {})
    if status.get("phase", "Pending") != "Pending":
        return None
    if (blocked := why_blocked(pod)) is not None:
        return blocked
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            if condition.get("reason") == "SchedulingGated":
                return "is held back by a scheduling gate"
            return why_unschedulable(condition.get("message", ""), pod["spec"].get("nodeSelector", {}))
    node = pod["spec"].get("nodeName")
    return f"is starting on {node}" if node else "waits for the scheduler"


def why_blocked(pod: Object) -> str | None:
    """Why a pod cannot start, where waiting does not help."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") in BLOCKED:
            detail = f" ({waiting['message']})" if waiting.get("message") else ""
            return f"{container.get('image', '')}: {BLOCKED[waiting['reason']]}{detail}"
    return None


# -- failures -----------------------------------------------------------------------------------------------------
def indexes(text: str) -> list[int]:
    """`"1,3-5"` -> [1, 3, 4, 5], as Job status writes them."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _index(pod: Object) -> int:
    return int(pod["metadata"].get("labels", {}).get(INDEX_LABEL, 0))


def _ended(pod: Object) -> Object:
    """How the container of a pod ended: exitCode, reason, message; empty where it has not."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        return dict(container.get("state", {}).get("terminated") or {})
    return {}


def failure(job: Object, pods: list[Object], memory_key: str) -> Exception:
    """What to raise for a failed Job.

    Args:
        job: with its status.
        pods: of the Job.
        memory_key: the setting that bounds the memory of its pods.

    Returns:
        UserError for bad input, a lack of memory and what cannot start; Exhausted for shards that failed again and
        again; RuntimeError otherwise. All name shards by number and quote the last lines of their logs.
    """
    labels, spec, status = job["metadata"]["labels"], job["spec"], job.get("status", {})
    stage, step = labels[f"{LABELS}/stage"], labels[f"{LABELS}/step"]
    indexed = spec.get("completionMode") == "Indexed"
    failed = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
    failed.sort(key=lambda pod: (_index(pod), pod["metadata"].get("creationTimestamp", "")))
    last = {_index(pod): pod for pod in failed}  # the last try of each
    numbers = indexes(status.get("failedIndexes", "")) or sorted(last)
    condition: Object = next((c for c in status.get("conditions", []) if c["type"] == "Failed"), {})

    def name(number: int) -> str:
        return f"{stage}: shard {number} of {spec['completions']}" if indexed else f"{stage}: {step}"

    details: list[str] = []
    for number in [n for n in numbers if n in last]:
        end, where = _ended(last[number]), last[number]["spec"].get("nodeName", "no node")
        lines = [line for line in str(end.get("message") or "").splitlines() if line.strip()]
        if end.get("reason") == "OOMKilled":
            limit = spec["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
            return UserError(
                f"{name(number)} was OOMKilled on {where}: it needs more than its {limit} of memory; raise {memory_key}"
            )
        if any("CUDA out of memory" in line for line in lines):
            return UserError(
                f"{name(number)} ran out of GPU memory on {where}; choose a larger profile, or lower crop.grid_size, "
                "model.max_gaussians or train.batch_frames"
            )
        if end.get("exitCode") == BAD_INPUT and lines:
            starts = [i for i, line in enumerate(lines) if line.startswith(f"zoosplat {stage}: ")]
            return UserError("\n".join(lines[starts[-1] if starts else -1 :]).removeprefix("zoosplat "))
        if "exitCode" in end:
            how = f"exit status {end['exitCode']}"
        else:
            reason = last[number].get("status", {})
            how = f"{reason.get('reason', 'ended')} {reason.get('message', '')}".strip()
        if len(details) < SHOWN_FAILED:
            tries = sum(_index(pod) == number for pod in failed)
            times = f", {tries} times" if tries > 1 else ""
            details.append("\n".join([f"{name(number)}: {how} on {where}{times}", *lines]))
    text = "\n".join(details) or f"{stage}: {step}: {condition.get('reason')}: {condition.get('message')}"
    if not indexed:
        return RuntimeError(text)
    listed = ", ".join(map(str, numbers))
    return Exhausted(f"{stage}: shards failed for good: {listed} of {spec['completions']}; the others are kept\n{text}")


def placement(pod: Object) -> Object:
    """Where and when a pod has run: stage, step, shard, node, started, finished, exit_code; empty what is not known."""
    labels, end = pod["metadata"]["labels"], _ended(pod)
    return {
        "stage": labels[f"{LABELS}/stage"],
        "step": labels[f"{LABELS}/step"],
        "shard": labels.get(INDEX_LABEL, ""),
        "node": pod["spec"].get("nodeName", ""),
        "started": end.get("startedAt", ""),
        "finished": end.get("finishedAt", ""),
        "exit_code": end.get("exitCode", ""),
    }


# -- the runner ---------------------------------------------------------------------------------------------------
def job_condition(job: Object) -> str | None:
    """`Complete` or `Failed` for a Job that has ended."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return None


class Jobs:
    """The Jobs of one pipeline run; leaving the `with` block deletes them and their pods.

    Args:
        settings: of the runner.
        profile: where GPU stages run; None where none will.
        api: the cluster.
        run: id of Prefect's flow run, a label of its Jobs.

    Attributes:
        placements: `placement` of the pods of all Jobs that have ended.
    """

    def __init__(self, settings: Settings, profile: str | None, api: Api, run: str) -> None:
        self.settings, self.profile, self.api, self._run = settings, profile, api, run
        self._owner = own_pod()
        self.placements: list[Object] = []
        self._names: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Delete every Job and refuse new ones. Another pipeline that uses one creates it again."""
        self._closed.set()
        with self._lock:
            names = sorted(self._names)
        for name in names:
            self.api.delete_job(name)

    def run(self, stage: str, run: Run, *, workers: int | None = None, progress: Progress, log: Log) -> None:
        """Run a whole stage in the cluster and wait for it.

        Args:
            stage: name in `zoosplat.stages.registry.STAGES`.
            run: the recorded run that it works for, in a project on S3.
            workers: shards at a time; None: `cpu.parallelism` of the settings.
            progress: called with shards done, their number and what the pods are waiting for; for GPU stages with
                what the stage itself reports.
            log: called with every line that a pod has printed, its node and name, and the time of the line: of the
                pod of a Job that has one alone while it runs, of others when they have ended, failed ones too.

        Raises:
            UserError: bad input, too little memory, or a pod that cannot start.
            Exhausted: shards that failed although they were tried again.
            RuntimeError: any other failure, with the last lines of the log.
            Interrupted: the pipeline ended meanwhile.
        """
        if not urls.is_s3(run.project.url):
            raise UserError(
                f"{run.project.url}: the pods of a cluster share no folder; use a project at s3://bucket/prefix"
            )
        result = run.result(stage)
        digest = request_digest(result, self.settings)

        def step(name: str, arguments: list[str], **options: Any) -> None:
            manifest = job_manifest(
                self.settings,
                run.project.url,
                stage,
                name,
                digest,
                ["--run", run.id, *arguments],
                run=self._run,
                owner=self._owner,
                **options,
            )
            self._finish_job(manifest, progress, log, result.is_done)

        if STAGES[stage].gpu:
            if self.profile is None:
                raise UserError(f"{stage}: needs a GPU; choose a profile")
            step("run", [], profile=self.settings.profile(self.profile))
            return
        step("prepare", ["--prepare"])
        if result.is_done():
            return
        plan = result.plan()
        if plan is None:
            raise RuntimeError(f"{stage}: prepared, but without its plan in {result.folder}")
        shards = len(plan["bounds"]) - 1
        arguments = ["--shard", f"$(JOB_COMPLETION_INDEX)/{shards}"]
        step("shards", arguments, shards=shards, parallelism=workers or self.settings.cpu.parallelism)
        step("finish", ["--finish"])

    def _finish_job(self, manifest: Object, progress: Progress, log: Log, is_done: Callable[[], bool]) -> None:
        """Create or adopt a Job and wait until it is complete."""
        name = manifest["metadata"]["name"]
        for attempt in range(TIMES_GONE):
            if attempt and is_done():
                return
            self._create(manifest)
            if self._wait(name, progress, log):
                return
        raise RuntimeError(f"{name}: was deleted {TIMES_GONE} times by someone else")

    def _create(self, manifest: Object) -> None:
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
                    if status_of(error) != 409:
                        raise _api_error(error) from error
            there = self.api.job(name)
            if there is not None and job_condition(there) is None and "deletionTimestamp" not in there["metadata"]:
                return  # another pipeline's, or that of a parent that was killed
            # What has ended belongs to an earlier try. Whoever still waits for it creates it again.
            if there is not None:
                self.api.delete_job(name)
            self._sleep(name)

    def _sleep(self, name: str) -> None:
        if self._closed.wait(POLL_S):
            raise Interrupted(name)

    def _wait(self, name: str, progress: Progress, log: Log) -> bool:
        """Wait for a Job. Returns whether it is complete; False where it has gone."""
        answered = time.monotonic()
        logs = _PodLogs(self.api, log)
        blocked_since: float | None = None
        while True:
            try:
                job = self.api.job(name)
                if job is None:
                    if self._closed.is_set():
                        raise Interrupted(name)
                    return False
                end = job_condition(job)
                pods = self.api.pods(**{JOB_LABEL: name})
                event = logs.read(job, pods)
                if end is not None:
                    self.placements += map(placement, pods)
                if end == "Complete":
                    return True
                if end == "Failed":
                    raise failure(job, pods, self._memory_key(job))
                self._report(job, pods, event, progress)
                blocked = next(filter(None, map(why_blocked, pods)), None)
                if blocked is None:
                    blocked_since = None
                elif blocked_since is None:
                    blocked_since = time.monotonic()
                elif time.monotonic() - blocked_since > BLOCKED_S:
                    raise UserError(f"{job['metadata']['labels'][f'{LABELS}/stage']}: {blocked}")
                answered = time.monotonic()
            except (UserError, Exhausted, Interrupted):
                raise
            except Exception as error:
                status = status_of(error)
                if status is None or (status not in (0, 429) and status < 500):
                    raise
                if time.monotonic() - answered > SILENT_S:
                    raise RuntimeError(f"{name}: the Kubernetes API server does not answer: {error}") from error
            self._sleep(name)

    def _memory_key(self, job: Object) -> str:
        if STAGES[job["metadata"]["labels"][f"{LABELS}/stage"]].gpu:
            larger = [n for n in self.settings.ordered() if self.profile and gpu_gib(n) > gpu_gib(self.profile)]
            return f"profiles.{self.profile}.memory" + (f", or choose the profile {larger[0]}" if larger else "")
        return "runner.cpu.resources.limits.memory"

    def _report(self, job: Object, pods: list[Object], event: tuple[int, int, str] | None, progress: Progress) -> None:
        waiting = [why for pod in pods if (why := why_pending(pod)) and not why.startswith("is starting")]
        why = f"{len(waiting)} waiting: {waiting[0]}" if waiting else ""
        if job["spec"].get("completionMode") == "Indexed":
            progress(job.get("status", {}).get("succeeded", 0), job["spec"]["completions"], why)
        elif event is not None:
            progress(*event)
        elif why:
            progress(0, 0, why)


class _PodLogs:
    """What the pods of a Job have printed, handed on line by line; a pod's log goes, with its Job, soon after its end.

    The pod of a Job that has one alone is followed while it runs, others are read when they have ended.
    """

    def __init__(self, api: Api, log: Log) -> None:
        self._api, self._log = api, log
        self._last: dict[str, str] = {}  # pod -> time of the last line that was handed on
        self._read: dict[str, float] = {}  # pod -> when its log was read last
        self._shown: dict[str, datetime] = {}  # pod -> time of the last line of progress that was handed on
        self._complete: set[str] = set()

    def read(self, job: Object, pods: list[Object]) -> tuple[int, int, str] | None:
        """Hand on what is new. What a pod that runs has last said of its progress, None where nothing is known."""
        event = None
        for pod in pods:
            name, phase = pod["metadata"]["name"], pod.get("status", {}).get("phase")
            has_ended = phase in ("Succeeded", "Failed")
            followed = phase == "Running" and job["spec"].get("completionMode") != "Indexed"
            if name in self._complete or not (has_ended or followed):
                continue
            try:
                event = self._follow(pod) or event
            except Exception:
                # Tried again as long as the Job lasts; then it costs the lines of the log, not the stage.
                if not has_ended or job_condition(job) is None:
                    continue
            if has_ended:
                self._complete.add(name)
                end = _ended(pod)
                # Without its time, of which Kubernetes keeps whole seconds: it would come before the last lines.
                self._log(f"exit status {end.get('exitCode', 'unknown')} {end.get('reason', '')}".rstrip(), _place(pod))
        return event

    def _follow(self, pod: Object) -> tuple[int, int, str] | None:
        name, where, now = pod["metadata"]["name"], _place(pod), time.monotonic()
        since = None if name not in self._read else int(now - self._read[name]) + LOG_OVERLAP_S
        event = None
        for text in self._api.log(name, since).splitlines():
            at, _, line = text.partition(" ")
            event = _event(line) or event
            if at <= self._last.get(name, "") or not line.strip():
                continue
            self._last[name] = at
            if _event(line) is None or self._is_due(name, at):
                self._log(line, where, at)
        self._read[name] = now
        return event

    def _is_due(self, name: str, at: str) -> bool:
        """Whether a line of progress, printed several times a second, goes into the log."""
        printed = datetime.fromisoformat(at)
        if name in self._shown and (printed - self._shown[name]).total_seconds() < PROGRESS_S:
            return False
        self._shown[name] = printed
        return True


def _place(pod: Object) -> str:
    """Where the lines of a pod come from: its node and name, and the number of its shard."""
    labels = pod["metadata"]["labels"]
    shard = f" shard {labels[INDEX_LABEL]}" if INDEX_LABEL in labels else ""
    return f"{pod['spec'].get('nodeName', '')}/{pod['metadata']['name']}{shard}"


def _api_error(error: Exception) -> Exception:
    """An API error that the settings can mend, as UserError."""
    status = status_of(error)
    if status in (400, 403, 404, 422):
        try:
            text = json.loads(getattr(error, "body", "") or "")["message"]
        except (ValueError, KeyError, TypeError):
            text = str(error)
        return UserError(f"Kubernetes refuses the Job: {text}; check the runner's settings and its Role")
    return error


def _event(line: str) -> tuple[int, int, str] | None:
    try:
        event = json.loads(line)
        if event["event"] == "progress":
            return int(event["done"]), int(event["total"]), str(event["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return None


def end_jobs(run: str) -> None:
    """Delete the Jobs that a flow run has created: for hooks, when the flow itself can no longer do it."""
    api = Api(Settings.read().namespace)
    for job in api.jobs(**{f"{LABELS}/run": run}):
        api.delete_job(job["metadata"]["name"])
