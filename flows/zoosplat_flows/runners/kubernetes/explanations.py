"""Says in words why a pod waits, and why a Job has failed."""

from __future__ import annotations

import re

from zoosplat.errors import UserError
from zoosplat_flows.runners.kubernetes.api import JsonObject, label_selector
from zoosplat_flows.runners.kubernetes.manifests import GPU_RESOURCE, LABEL_PREFIX
from zoosplat_flows.runners.kubernetes.objects import container_end, is_indexed, parse_indexes, shard_index
from zoosplat_flows.runners.protocol import Exhausted
from zoosplat_flows.runners.stage_output import BAD_INPUT_STATUS, bad_input_error

# Reasons of a container that waits and that waiting does not help, and what the user has to mend.
BLOCKING_REASONS = {
    "ErrImagePull": "its image cannot be pulled; check images.registry and images.tag",
    "ImagePullBackOff": "its image cannot be pulled; check images.registry and images.tag",
    "ErrImageNeverPull": "its image is not on the node and images.pullPolicy is Never",
    "InvalidImageName": "the name of its image is not valid; check images.registry and images.tag",
    "CreateContainerConfigError": "something that it refers to is missing; check s3.secretName",
    "CreateContainerError": "its container cannot be made",
    "RunContainerError": "its container cannot be started",
}
RESOURCE_LACKS = {"cpu": "too little free cpu", "memory": "too little free memory", GPU_RESOURCE: "no free GPU"}
MAX_QUOTED_SHARDS = 3  # failed shards whose logs an error message quotes


# -- why a pod waits ----------------------------------------------------------------------------------------------
def _count_nodes(n: int, singular: str, plural: str) -> str:
    return f"1 node {singular}" if n == 1 else f"{n} nodes {plural}"


def explain_unschedulable(message: str, selector: dict[str, str]) -> str:
    """The scheduler's message in words.

    Args:
        message: of the condition PodScheduled, such as `0/3 nodes are available: 1 Insufficient cpu, ...`.
        selector: the labels that the pod's node must have.

    >>> explain_unschedulable("0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.", {})
    '1 node has too little free cpu, 2 nodes are drained'
    """
    wants = f" ({label_selector(selector)})" if selector else ""
    reasons = []
    _, _, rest = message.partition("nodes are available:")
    # A taint stands in braces, and has spaces and dots within them.
    for number, reason in re.findall(
        r"(\d+) ((?:\{[^}]*\}|[^,{])+?)(?=, \d+ |\. |\.?$)", rest.partition("preemption:")[0].strip()
    ):
        n = int(number)
        if lack := re.match(r"Insufficient (\S+)", reason):
            what = RESOURCE_LACKS.get(lack[1], f"too little free {lack[1]}")
            reasons.append(_count_nodes(n, f"has {what}", f"have {what}"))
        elif "node affinity/selector" in reason:
            what = f"other labels than wanted{wants}"
            reasons.append(_count_nodes(n, f"has {what}", f"have {what}"))
        elif "unschedulable" in reason:
            reasons.append(_count_nodes(n, "is drained", "are drained"))
        elif taint := re.search(r"taint\(?s?\)? \{([^:}]*)", reason):
            away = {"node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"}
            what = "not ready" if taint[1] in away else f"kept for others by the taint {taint[1]}"
            what = "drained" if taint[1] == "node.kubernetes.io/unschedulable" else what
            reasons.append(_count_nodes(n, f"is {what}", f"are {what}"))
        else:
            reasons.append(_count_nodes(n, f"refuses: {reason}", f"refuse: {reason}"))
    return ", ".join(reasons) or message or "no node is free"


def explain_pending(pod: JsonObject) -> str | None:
    """Why a pod has not begun to run, in words; None for a pod that runs or has ended."""
    status = pod.get("status", {})
    if status.get("phase", "Pending") != "Pending":
        return None
    if (blocked := explain_blocked(pod)) is not None:
        return blocked
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            if condition.get("reason") == "SchedulingGated":
                return "is held back by a scheduling gate"
            return explain_unschedulable(condition.get("message", ""), pod["spec"].get("nodeSelector", {}))
    node = pod["spec"].get("nodeName")
    return f"is starting on {node}" if node else "waits for the scheduler"


def explain_blocked(pod: JsonObject) -> str | None:
    """Why a pod cannot start until somebody mends something; None for a pod that is not blocked so."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") in BLOCKING_REASONS:
            detail = f" ({waiting['message']})" if waiting.get("message") else ""
            return f"{container.get('image', '')}: {BLOCKING_REASONS[waiting['reason']]}{detail}"
    return None


# -- why a Job has failed -----------------------------------------------------------------------------------------
def explain_failure(job: JsonObject, pods: list[JsonObject], memory_key: str) -> Exception:
    """The exception for a failed Job.

    Args:
        job: the Job, with its status.
        pods: the pods of the Job.
        memory_key: the setting that limits the memory of its pods, for the advice.

    Returns:
        UserError for bad input, a lack of memory and a pod that cannot start; Exhausted for shards whose last try
        failed; RuntimeError otherwise. The messages name shards by number and quote the last lines of their logs.
    """
    labels, spec, status = job["metadata"]["labels"], job["spec"], job.get("status", {})
    stage, step = labels[f"{LABEL_PREFIX}/stage"], labels[f"{LABEL_PREFIX}/step"]
    indexed = is_indexed(job)
    failed = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
    failed.sort(key=lambda pod: (shard_index(pod), pod["metadata"].get("creationTimestamp", "")))
    last_tries = {shard_index(pod): pod for pod in failed}
    numbers = parse_indexes(status.get("failedIndexes", "")) or sorted(last_tries)
    condition: JsonObject = next((c for c in status.get("conditions", []) if c["type"] == "Failed"), {})

    def name(number: int) -> str:
        return f"{stage}: shard {number} of {spec['completions']}" if indexed else f"{stage}: {step}"

    details: list[str] = []
    for number in [n for n in numbers if n in last_tries]:
        pod = last_tries[number]
        end, where = container_end(pod), pod["spec"].get("nodeName", "no node")
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
        if end.get("exitCode") == BAD_INPUT_STATUS and lines:
            return bad_input_error(stage, lines)
        if "exitCode" in end:
            how = f"exit status {end['exitCode']}"
        else:
            reason = pod.get("status", {})
            how = f"{reason.get('reason', 'ended')} {reason.get('message', '')}".strip()
        if len(details) < MAX_QUOTED_SHARDS:
            tries = sum(shard_index(pod) == number for pod in failed)
            times = f", {tries} times" if tries > 1 else ""
            details.append("\n".join([f"{name(number)}: {how} on {where}{times}", *lines]))
    text = "\n".join(details) or f"{stage}: {step}: {condition.get('reason')}: {condition.get('message')}"
    if not indexed:
        return RuntimeError(text)
    listed = ", ".join(map(str, numbers))
    return Exhausted(f"{stage}: shards failed for good: {listed} of {spec['completions']}; the others are kept\n{text}")
