"""Writes the manifests of the Jobs that stages run as."""

from __future__ import annotations

from pathlib import Path

from zoosplat.stages.results import Result, json_digest
from zoosplat.storage import urls
from zoosplat_flows.runners.images import IMAGE_USER_ID, image_name
from zoosplat_flows.runners.kubernetes.api import MANAGED_BY, JsonObject
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings, Profile
from zoosplat_flows.runners.stage_output import BAD_INPUT_STATUS

LABEL_PREFIX = "zoosplat.io"  # of our own labels and annotations
WHOLE_STAGE = "run"  # the step of a stage that is one process beside a GPU
JOB_LABEL = "batch.kubernetes.io/job-name"  # set by Kubernetes on the pods of a Job: the name of the Job
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"  # set on the pods of an Indexed Job: the number of the shard
GPU_RESOURCE = "nvidia.com/gpu"  # the name under which nodes offer GPUs and pods ask for them
FINISHED_JOB_KEPT_S = 3600  # seconds that the cluster keeps a finished Job whose runner was killed
MAX_FAILED_SHARDS = 10  # failed shards of a Job after which it begins no others
STOP_GRACE_S = 10  # seconds between SIGTERM and SIGKILL of a pod that is deleted
SHARED_MEMORY = "1Gi"  # size of /dev/shm of a pod with several GPUs, which exchange gradients through it
POD_INFO_FOLDER = Path("/etc/podinfo")  # the chart's job template puts the name and uid of the flow's pod there


def own_pod_reference() -> JsonObject | None:
    """An owner reference to the pod that this process runs in; None outside a pod of the chart's template.

    The cluster deletes a Job whose last owner is gone. So Jobs end even when the flow that watched them was killed.
    """
    try:
        name, uid = ((POD_INFO_FOLDER / key).read_text().strip() for key in ("name", "uid"))
    except OSError:
        return None
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}


def request_digest(result: Result, settings: ClusterSettings) -> str:
    """Digest of what determines the Jobs of a result: its folder, which contains its id, and the images."""
    return json_digest([result.folder, settings.images.registry, settings.images.tag])


def job_manifest(
    settings: ClusterSettings,
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
    owner: JsonObject | None = None,
) -> JsonObject:
    """The manifest of the Job that does one step of a stage.

    Args:
        settings: the settings of the runner.
        project_url: URL of the project, on S3.
        stage: name in `zoosplat.stages.registry.STAGES`.
        step: prepare, shards, finish, or WHOLE_STAGE.
        digest: the result of `request_digest`. The Job's name follows from it, the step and the number of shards.
        arguments: arguments of the stage's command, after --project URL.
        run: id of Prefect's flow run. It becomes a label, by which the Jobs of the flow run are found and deleted.
        shards: number of shards; the Job is then an Indexed Job. None: a Job of one pod.
        parallelism: the most pods at a time.
        profile: kind of GPU node that the pod needs; None: the pod gets the resources of CPU stages.
        owner: the result of `own_pod_reference`; None: the Job lasts until it is deleted.
    """
    name = f"zoosplat-{stage.replace('_', '-')}-{step}-{json_digest([digest, step, shards])[:12]}"
    labels = {
        "app.kubernetes.io/managed-by": MANAGED_BY,
        "app.kubernetes.io/name": "zoosplat-stage",
        f"{LABEL_PREFIX}/component": "stage",
        f"{LABEL_PREFIX}/stage": stage,
        f"{LABEL_PREFIX}/step": step,
        f"{LABEL_PREFIX}/run": run,
    }
    fail = "FailJob" if shards is None else "FailIndex"
    rules: list[JsonObject] = [
        # A pod that ends because its node is drained does not count as a failed try.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        # Bad input stays bad: another try would only repeat the failure.
        {"action": fail, "onExitCodes": {"containerName": "stage", "operator": "In", "values": [BAD_INPUT_STATUS]}},
    ]
    spec: JsonObject = {
        "ttlSecondsAfterFinished": FINISHED_JOB_KEPT_S,
        "podFailurePolicy": {"rules": rules},
        "template": {
            "metadata": {"labels": labels},
            "spec": _pod_spec(settings, project_url, stage, arguments, profile),
        },
    }
    if shards is None:
        # One try: the flow itself tries such a stage again.
        spec |= {"completions": 1, "parallelism": 1, "backoffLimit": 0}
    else:
        spec |= {
            "completionMode": "Indexed",
            "completions": shards,
            "parallelism": min(parallelism, shards),
            "backoffLimitPerIndex": settings.cpu.backoffLimitPerIndex,
            "maxFailedIndexes": min(MAX_FAILED_SHARDS, shards),
        }
    metadata: JsonObject = {"name": name, "labels": labels, "annotations": {f"{LABEL_PREFIX}/project": project_url}}
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _pod_spec(
    settings: ClusterSettings, project_url: str, stage: str, arguments: list[str], profile: Profile | None
) -> JsonObject:
    if profile is None:
        resources, selector = settings.cpu.resources.model_dump(), settings.cpu.nodeSelector
        tolerations = settings.cpu.tolerations
    else:
        amounts = {"cpu": profile.cpu, "memory": profile.memory, GPU_RESOURCE: str(profile.gpus)}
        resources, selector = {"requests": amounts, "limits": amounts}, profile.nodeSelector
        tolerations = profile.tolerations
    volumes: list[JsonObject] = [{"name": "tmp", "emptyDir": {}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    if profile is not None and profile.gpus > 1:
        # GPUs may exchange data through shared memory, of which a pod has 64 MiB without this volume.
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    container = {
        "name": "stage",
        "image": image_name(settings.images.registry, stage, settings.images.tag),
        "imagePullPolicy": settings.images.pullPolicy,
        # Kubernetes replaces $(NAME) in arguments by the variable's value, and some variables are credentials.
        "args": ["--project", project_url.replace("$", "$$"), *arguments],
        "env": _environment(settings),
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # The last lines of the log stay in the pod's status, where they outlive the node.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": STOP_GRACE_S,
        "serviceAccountName": settings.serviceAccount,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostNetwork": settings.hostNetwork,
        "nodeSelector": dict(selector),
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in tolerations],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": IMAGE_USER_ID,
            "runAsGroup": IMAGE_USER_ID,
            "fsGroup": IMAGE_USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }


def _environment(settings: ClusterSettings) -> list[JsonObject]:
    variables: list[JsonObject] = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "OMP_WAIT_POLICY", "value": "passive"},
        {"name": urls.S3_ONLY, "value": "1"},
        {"name": "AWS_DEFAULT_REGION", "value": settings.s3.region},
    ]
    if settings.s3.endpoint:
        variables.append({"name": "AWS_ENDPOINT_URL", "value": settings.s3.endpoint})
    if settings.s3.secretName:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            reference = {"name": settings.s3.secretName, "key": key}
            variables.append({"name": key, "valueFrom": {"secretKeyRef": reference}})
    return variables
