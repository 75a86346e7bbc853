"""Reads what Jobs and pods say about themselves."""

from __future__ import annotations

from zoosplat_flows.runners.kubernetes.api import JsonObject
from zoosplat_flows.runners.kubernetes.manifests import INDEX_LABEL, LABEL_PREFIX


def final_condition(job: JsonObject) -> str | None:
    """`Complete` or `Failed` for a Job that has ended, None for one that has not."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return None


def is_indexed(job: JsonObject) -> bool:
    """Whether a Job has a pod for each shard, rather than a single pod."""
    return bool(job["spec"].get("completionMode") == "Indexed")


def parse_indexes(text: str) -> list[int]:
    """The numbers that a Job's status lists: `"1,3-5"` -> [1, 3, 4, 5]."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def shard_index(pod: JsonObject) -> int:
    """Number of the shard that a pod works on; 0 for a pod of a Job that is not indexed."""
    return int(pod["metadata"].get("labels", {}).get(INDEX_LABEL, 0))


def container_end(pod: JsonObject) -> JsonObject:
    """How the container of a pod ended: exitCode, reason, message and times; empty where it has not ended."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        return dict(container.get("state", {}).get("terminated") or {})
    return {}


def placement_of(pod: JsonObject) -> JsonObject:
    """Where and when a pod has run: stage, step, shard, node, started, finished and exit_code.

    A value that is not known is an empty string.
    """
    labels, end = pod["metadata"]["labels"], container_end(pod)
    return {
        "stage": labels[f"{LABEL_PREFIX}/stage"],
        "step": labels[f"{LABEL_PREFIX}/step"],
        "shard": labels.get(INDEX_LABEL, ""),
        "node": pod["spec"].get("nodeName", ""),
        "started": end.get("startedAt", ""),
        "finished": end.get("finishedAt", ""),
        "exit_code": end.get("exitCode", ""),
    }


def log_source(pod: JsonObject) -> str:
    """Where the lines of a pod's log come from: its node and name, and the number of its shard."""
    labels = pod["metadata"]["labels"]
    shard = f" shard {labels[INDEX_LABEL]}" if INDEX_LABEL in labels else ""
    return f"{pod['spec'].get('nodeName', '')}/{pod['metadata']['name']}{shard}"
