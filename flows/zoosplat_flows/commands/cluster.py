"""`zoosplat cluster status`: shows the nodes of each profile, the Jobs, and why pods wait."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoosplat.errors import UserError
from zoosplat_flows.runners.kubernetes.api import JsonObject, KubernetesApi, http_status
from zoosplat_flows.runners.kubernetes.explanations import explain_pending
from zoosplat_flows.runners.kubernetes.manifests import GPU_RESOURCE, JOB_LABEL, LABEL_PREFIX
from zoosplat_flows.runners.kubernetes.nodes import offers_profile
from zoosplat_flows.runners.kubernetes.objects import final_condition
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings


@dataclass(frozen=True)
class ProfileState:
    """The nodes of a profile.

    Attributes:
        name: name of the profile.
        nodes: number of nodes that offer it.
        ready: number of those that take pods now.
        gpus: GPUs of all nodes that offer it.
        used: GPUs that pods of zoosplat use.
    """

    name: str
    nodes: int
    ready: int
    gpus: int
    used: int


@dataclass(frozen=True)
class JobState:
    """A Job that has not ended.

    Attributes:
        name, stage, step, project: as in the Job's name, labels and annotation.
        done, total: pods that have succeeded, and pods of the whole Job.
        running, waiting: pods that run, and pods that have not begun.
        reasons: why pods wait, and how many wait for it; the most frequent reason first.
    """

    name: str
    stage: str
    step: str
    project: str
    done: int
    total: int
    running: int
    waiting: int
    reasons: tuple[tuple[str, int], ...]


def _is_ready(node: JsonObject) -> bool:
    """Whether a node takes pods now: it is ready and not drained."""
    conditions = {c["type"]: c["status"] for c in node["status"].get("conditions", [])}
    return conditions.get("Ready") == "True" and not node["spec"].get("unschedulable", False)


def _count_gpus(amounts: JsonObject) -> int:
    return int(amounts.get(GPU_RESOURCE, 0))


def profile_states(settings: ClusterSettings, nodes: list[JsonObject], pods: list[JsonObject]) -> list[ProfileState]:
    """The state of every profile of the settings, the smallest GPU first, from all nodes and the pods of zoosplat."""
    used: Counter[str] = Counter()
    for pod in pods:
        if pod.get("status", {}).get("phase") in ("Pending", "Running"):
            limits = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
            used[pod["spec"].get("nodeName", "")] += _count_gpus(limits)
    states = []
    for name in settings.ordered():
        offering = [node for node in nodes if offers_profile(node, settings.profiles[name])]
        gpus = sum(_count_gpus(node["status"].get("allocatable", {})) for node in offering)
        busy = sum(used[node["metadata"]["name"]] for node in offering)
        states.append(ProfileState(name, len(offering), sum(map(_is_ready, offering)), gpus, busy))
    return states


def job_states(found: list[JsonObject], pods: list[JsonObject]) -> list[JobState]:
    """The state of every Job that has not ended, the oldest first, from the Jobs and pods of zoosplat."""
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


def show_cluster(settings: ClusterSettings, api: KubernetesApi) -> None:
    """Print a table of profiles, a table of Jobs, and why pods wait.

    Raises:
        UserError: the cluster does not answer, or the account may not list nodes.
    """
    try:
        nodes, pods, found = api.list_nodes(), api.list_pods(), api.list_jobs()
    except Exception as error:
        if http_status(error) is None:
            raise
        raise UserError(f"the Kubernetes API server cannot be asked: {error}; check KUBECONFIG") from None
    if nodes is None:
        raise UserError("this account may not list nodes; use one that may (a ClusterRole)")
    console = Console()
    table = Table(title=f"{len(nodes)} nodes, {sum(map(_is_ready, nodes))} ready", title_justify="left")
    for column in ("profile", "nodes", "ready", "GPUs", "in use"):
        table.add_column(column, justify="left" if column == "profile" else "right")
    for state in profile_states(settings, nodes, pods):
        table.add_row(state.name, *map(str, (state.nodes, state.ready, state.gpus, state.used)))
    console.print(table)
    states = job_states(found, pods)
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
