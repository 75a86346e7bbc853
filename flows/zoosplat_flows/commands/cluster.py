"""`zoosplat cluster status`: nodes of each profile, Jobs, and why pods wait, in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoosplat.errors import UserError
from zoosplat_flows.runners.kubernetes.api import JsonObject, KubernetesApi, http_status
from zoosplat_flows.runners.kubernetes.explanations import explain_pending
from zoosplat_flows.runners.kubernetes.manifests import JOB_LABEL, LABEL_PREFIX
from zoosplat_flows.runners.kubernetes.nodes import offers_profile
from zoosplat_flows.runners.kubernetes.objects import final_condition
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings

GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class ProfileState:
    """Nodes of a profile: how many offer it, how many of them take pods now, their GPUs and those in use by us."""

    name: str
    nodes: int
    ready: int
    gpus: int
    used: int


@dataclass(frozen=True)
class JobState:
    """A Job that has not ended: pods by state, and why some wait (most frequent reason first)."""

    name: str
    stage: str
    step: str
    project: str
    done: int
    total: int
    running: int
    waiting: int
    reasons: tuple[tuple[str, int], ...]


def _ready(node: JsonObject) -> bool:
    conditions = {c["type"]: c["status"] for c in node["status"].get("conditions", [])}
    return conditions.get("Ready") == "True" and not node["spec"].get("unschedulable", False)


def _gpus(amounts: JsonObject) -> int:
    return int(amounts.get(GPU, 0))


def profiles(settings: ClusterSettings, nodes: list[JsonObject], pods: list[JsonObject]) -> list[ProfileState]:
    """The state of every profile of the settings, the smallest GPU first."""
    used: Counter[str] = Counter()
    for pod in pods:
        if pod.get("status", {}).get("phase") in ("Pending", "Running"):
            limits = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
            used[pod["spec"].get("nodeName", "")] += _gpus(limits)
    states = []
    for name in settings.ordered():
        offering = [node for node in nodes if offers_profile(node, settings.profiles[name])]
        gpus = sum(_gpus(node["status"].get("allocatable", {})) for node in offering)
        busy = sum(used[node["metadata"]["name"]] for node in offering)
        states.append(ProfileState(name, len(offering), sum(map(_ready, offering)), gpus, busy))
    return states


def jobs(found: list[JsonObject], pods: list[JsonObject]) -> list[JobState]:
    """The state of every Job that has not ended, the oldest first."""
    states = []
    for job in sorted(found, key=lambda job: str(job["metadata"].get("creationTimestamp", ""))):
        if final_condition(job) is not None:
            continue
        metadata, status = job["metadata"], job.get("status", {})
        own = [pod for pod in pods if pod["metadata"]["labels"].get(JOB_LABEL) == metadata["name"]]
        reasons = Counter(why for pod in own if (why := explain_pending(pod)) is not None)
        states.append(
            JobState(
                metadata["name"],
                metadata["labels"][f"{LABEL_PREFIX}/stage"],
                metadata["labels"][f"{LABEL_PREFIX}/step"],
                metadata.get("annotations", {}).get(f"{LABEL_PREFIX}/project", ""),
                status.get("succeeded", 0),
                job["spec"].get("completions", 1),
                sum(pod.get("status", {}).get("phase") == "Running" for pod in own),
                sum(reasons.values()),
                tuple(reasons.most_common()),
            )
        )
    return states


def show(settings: ClusterSettings, api: KubernetesApi) -> None:
    """Print the tables of `zoosplat cluster status`. Raises UserError where the cluster cannot be asked."""
    try:
        nodes, pods, found = api.list_nodes(), api.list_pods(), api.list_jobs()
    except Exception as error:
        if http_status(error) is None:
            raise
        raise UserError(f"the Kubernetes API server cannot be asked: {error}; check KUBECONFIG") from None
    if nodes is None:
        raise UserError("this account may not list nodes; use one that may (a ClusterRole)")
    console = Console()
    table = Table(title=f"{len(nodes)} nodes, {sum(map(_ready, nodes))} ready", title_justify="left")
    for column in ("profile", "nodes", "ready", "GPUs", "in use"):
        table.add_column(column, justify="left" if column == "profile" else "right")
    for state in profiles(settings, nodes, pods):
        table.add_row(state.name, *map(str, (state.nodes, state.ready, state.gpus, state.used)))
    console.print(table)
    states = jobs(found, pods)
    if not states:
        console.print(f"no Jobs in namespace {settings.namespace}")
        return
    table = Table(title=f"Jobs in namespace {settings.namespace}", title_justify="left")
    for column in ("stage", "step", "done", "running", "waiting", "queued", "project"):
        table.add_column(column, justify="right" if column in ("done", "running", "waiting", "queued") else "left")
    for job in states:
        queued = max(0, job.total - job.done - job.running - job.waiting)
        numbers = (f"{job.done}/{job.total}", job.running, job.waiting, queued)
        table.add_row(job.stage, job.step, *map(str, numbers), escape(job.project))
    console.print(table)
    for job in states:
        for why, count in job.reasons:
            console.print(
                f"{job.stage} {job.step}: {count} pod{'s' * (count != 1)}: {why}", markup=False, soft_wrap=True
            )
