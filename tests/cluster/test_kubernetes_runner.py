"""The Kubernetes runner: settings, names and manifests; then on a real control plane whose one kubelet is a thread."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.projects import Project
from zoosplat.stages.results import RESULTS, Result
from zoosplat.stages.runs import Run
from zoosplat_flows.cli.app import app
from zoosplat_flows.runners.kubernetes import manifests
from zoosplat_flows.runners.kubernetes import runner as kubernetes
from zoosplat_flows.runners.kubernetes.api import KubernetesApi
from zoosplat_flows.runners.kubernetes.explanations import explain_unschedulable
from zoosplat_flows.runners.kubernetes.manifests import INDEX_LABEL, job_manifest, own_pod_reference, request_digest
from zoosplat_flows.runners.kubernetes.nodes import apply_profile, choose_profile, offers_profile
from zoosplat_flows.runners.kubernetes.objects import parse_indexes
from zoosplat_flows.runners.kubernetes.runner import KubernetesRunner, delete_jobs
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings, overlay
from zoosplat_flows.runners.protocol import Exhausted, Interrupted

TEXT = """
namespace: zoosplat
images: {registry: registry.example/lab, tag: "1.2", pullPolicy: IfNotPresent}
s3: {secretName: s3-credentials, endpoint: "http://127.0.0.1:9000", region: eu-central-1}
serviceAccount: stages
cpu:
  parallelism: 4
  resources: {requests: {cpu: 500m, memory: 256Mi}, limits: {cpu: "1", memory: 512Mi}}
  nodeSelector: {pool: cpu}
  tolerations: [{key: pool, operator: Equal, value: cpu, effect: NoSchedule}]
  backoffLimitPerIndex: 1
profiles:
  24gb:
    nodeSelector: {zoosplat.io/gpu-memory: 24gb}
    gpus: 1
    cpu: "2"
    memory: 8Gi
    config: {crop.grid_size: 128, model.max_gaussians: 32000}
  12gb:
    nodeSelector: {zoosplat.io/gpu-memory: 12gb}
    tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
    gpus: 1
    cpu: "1"
    memory: 4Gi
    config: {model.max_gaussians: 8000}
  80gb: {nodeSelector: {zoosplat.io/gpu-memory: 80gb}, gpus: 2, cpu: "8", memory: 64Gi}
"""


def _settings(tmp_path: Path, text: str = TEXT) -> ClusterSettings:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return ClusterSettings.read(str(path))


def _experiment(**changes: Any) -> Experiment:
    raw: dict[str, Any] = {
        "data": {"directory": "s3://b/rec", "videos": ["0", "1"], "masks": ["m0", "m1"], "calibration": "c.h5"},
        "center_rotation": {"ell": 0.25},
        "crop": {"ell": 0.22},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        raw.setdefault(section, {})[leaf] = value
    return Experiment.model_validate(raw)


# -- settings -----------------------------------------------------------------------------------------------------
def test_settings_are_read_from_the_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _settings(tmp_path)
    monkeypatch.setenv("ZOOSPLAT_SETTINGS", str(tmp_path / "settings.yaml"))
    assert ClusterSettings.read() == expected
    assert expected.cpu.resources.limits.memory == "512Mi"
    assert expected.ordered() == ["12gb", "24gb", "80gb"]
    with pytest.raises(UserError, match=r"profile 48gb: is not in the settings; there are 12gb, 24gb, 80gb, and auto"):
        expected.profile("48gb")
    with pytest.raises(UserError, match=r"missing.yaml: .* cannot be read .* set ZOOSPLAT_SETTINGS"):
        ClusterSettings.read(str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("parallelism: 4", "paralelism: 4", "cpu.paralelism: is no such key; correct or remove it"),
        ("serviceAccount: stages", "account: x", "account: is no such key; correct or remove it"),
        ("namespace: zoosplat\n", "", "namespace: field required"),
        ("memory: 8Gi", "memory: lots", "profiles.24gb.memory: must be an amount as Kubernetes writes it"),
        ("  80gb:", "  huge:", "profiles.huge: string should match pattern"),
        ("Equal, value", "Equals, value", "cpu.tolerations.0.operator: input should be 'Exists' or 'Equal'"),
        ("cpu:\n", "cpu: [\n", "not valid YAML"),
    ],
)
def test_bad_settings_are_named_by_file_and_key(tmp_path: Path, old: str, new: str, line: str) -> None:
    assert old in TEXT
    with pytest.raises(UserError) as caught:
        _settings(tmp_path, TEXT.replace(old, new, 1))
    assert str(caught.value).startswith(f"{tmp_path / 'settings.yaml'}: {line}")


def test_a_profile_changes_the_experiment_and_bad_keys_name_the_profile(tmp_path: Path) -> None:
    changed = apply_profile(_settings(tmp_path), "24gb", _experiment())
    assert (changed.crop.grid_size, changed.model.max_gaussians) == (128, 32000)
    assert changed.train == _experiment().train
    without = apply_profile(
        _settings(tmp_path, TEXT.replace("crop.grid_size: 128", "crop.grid_size: null")), "24gb", _experiment()
    )
    assert (without.crop.grid_size, without.model.max_gaussians) == (_experiment().crop.grid_size, 32000)
    with pytest.raises(UserError, match=r"^profiles.12gb.config: modle.poolings: there is no section modle$"):
        overlay(_experiment(), "12gb", {"modle.poolings": 3})
    with pytest.raises(UserError, match=r"^profiles.12gb.config: unknown key model.max_gausians"):
        overlay(_experiment(), "12gb", {"model.max_gausians": 3})


# -- manifests ----------------------------------------------------------------------------------------------------
POD: dict[str, Any] = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": 10,
    "serviceAccountName": "stages",
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,
    "hostNetwork": False,
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "pool", "operator": "Equal", "value": "cpu", "effect": "NoSchedule"}],
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    },
    "containers": [
        {
            "name": "stage",
            "image": "registry.example/lab/zoosplat-center-rotation:1.2",
            "imagePullPolicy": "IfNotPresent",
            "args": ["--project", "s3://b/p", "--run", "r1", "--shard", "$(JOB_COMPLETION_INDEX)/6"],
            "env": [
                {"name": "HOME", "value": "/tmp"},
                {"name": "OMP_WAIT_POLICY", "value": "passive"},
                {"name": "ZOOSPLAT_S3_ONLY", "value": "1"},
                {"name": "AWS_DEFAULT_REGION", "value": "eu-central-1"},
                {"name": "AWS_ENDPOINT_URL", "value": "http://127.0.0.1:9000"},
                {
                    "name": "AWS_ACCESS_KEY_ID",
                    "valueFrom": {"secretKeyRef": {"name": "s3-credentials", "key": "AWS_ACCESS_KEY_ID"}},
                },
                {
                    "name": "AWS_SECRET_ACCESS_KEY",
                    "valueFrom": {"secretKeyRef": {"name": "s3-credentials", "key": "AWS_SECRET_ACCESS_KEY"}},
                },
            ],
            "resources": {
                "requests": {"cpu": "500m", "memory": "256Mi"},
                "limits": {"cpu": "1", "memory": "512Mi"},
            },
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
    ],
    "volumes": [{"name": "tmp", "emptyDir": {}}],
}


def test_the_whole_manifest_of_an_indexed_job(tmp_path: Path) -> None:
    arguments = ["--run", "r1", "--shard", "$(JOB_COMPLETION_INDEX)/6"]
    job = job_manifest(
        _settings(tmp_path),
        "s3://b/p",
        "center_rotation",
        "shards",
        "d",
        arguments,
        run="r",
        shards=6,
        parallelism=4,
    )
    name = job["metadata"]["name"]
    assert re.fullmatch(r"zoosplat-center-rotation-shards-[0-9a-f]{12}", name)
    labels = {
        "app.kubernetes.io/managed-by": "zoosplat",
        "app.kubernetes.io/name": "zoosplat-stage",
        "zoosplat.io/component": "stage",
        "zoosplat.io/stage": "center_rotation",
        "zoosplat.io/step": "shards",
        "zoosplat.io/run": "r",
    }
    assert job == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels, "annotations": {"zoosplat.io/project": "s3://b/p"}},
        "spec": {
            "ttlSecondsAfterFinished": 3600,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailIndex",
                        "onExitCodes": {"containerName": "stage", "operator": "In", "values": [2]},
                    },
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": POD},
            "completionMode": "Indexed",
            "completions": 6,
            "parallelism": 4,
            "backoffLimitPerIndex": 1,
            "maxFailedIndexes": 6,
        },
    }


def test_a_gpu_job_differs_by_its_profile_alone(tmp_path: Path) -> None:
    loaded = _settings(tmp_path)
    job = job_manifest(
        loaded, "s3://b/p", "train", "run", "d", ["--run", "r1"], run="r", profile=loaded.profile("12gb")
    )
    amounts = {"cpu": "1", "memory": "4Gi", "nvidia.com/gpu": "1"}
    container = {
        **POD["containers"][0],
        "image": "registry.example/lab/zoosplat-train:1.2",
        "args": ["--project", "s3://b/p", "--run", "r1"],
        "resources": {"requests": amounts, "limits": amounts},
    }
    assert job["spec"]["template"]["spec"] == {
        **POD,
        "nodeSelector": {"zoosplat.io/gpu-memory": "12gb"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
    }
    assert {k: v for k, v in job["spec"].items() if k not in ("template", "podFailurePolicy")} == {
        "ttlSecondsAfterFinished": 3600,
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": 0,
    }
    assert job["spec"]["podFailurePolicy"]["rules"][1]["action"] == "FailJob"


def test_a_pod_of_several_gpus_has_shared_memory_for_them(tmp_path: Path) -> None:
    loaded = _settings(tmp_path)
    two = loaded.profile("12gb").model_copy(update={"gpus": 2})
    pod = job_manifest(loaded, "s3://b/p", "train", "run", "d", [], run="r", profile=two)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in pod["volumes"]


def test_names_follow_from_what_is_made_and_from_nothing_else(tmp_path: Path, recording: Any) -> None:
    """From where the result lies, its id, and the images: not from the run, so that runs share Jobs."""
    loaded, project = _settings(tmp_path), Project.at(str(tmp_path / "p"))
    newer = loaded.model_copy(update={"images": loaded.images.model_copy(update={"tag": "1.3"})})

    def digest(
        stage: str = "crop",
        force: str = "",
        where: Project = project,
        by: ClusterSettings = loaded,
        **changes: Any,
    ) -> str:
        draft = draft_run(where, Experiment.model_validate(recording.config(**changes)), force.split())
        return request_digest(draft.results[stage], by)

    first = draft_run(project, Experiment.model_validate(recording.config()))
    first.results["crop"].claim(first.requests["crop"])
    same = [
        digest(),
        digest(),
        digest(train__lr=1.0),
        digest(scheduling__frames_per_shard=16),
        digest(force="train"),
    ]
    assert len(set(same)) == 1
    different = [
        digest("pack"),
        digest(force="crop"),
        digest(crop__grid_size=64),
        digest(center_rotation__ell=0.3),  # crop is made from it
        digest(where=Project.at(str(tmp_path / "q"))),
        digest(by=newer),
    ]
    assert len({*same, *different}) == 7

    names = {
        job_manifest(loaded, "s3://b/p", "crop", step, "d", [], run=run, shards=shards)["metadata"]["name"]
        for step, run, shards in (("shards", "a", 2), ("shards", "b", 2), ("shards", "a", 3), ("prepare", "a", None))
    }
    assert len(names) == 3


def test_jobs_belong_to_the_pod_of_their_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "POD_INFO_FOLDER", tmp_path / "podinfo")
    assert own_pod_reference() is None
    (tmp_path / "podinfo").mkdir()
    (tmp_path / "podinfo" / "name").write_text("flow-1")
    (tmp_path / "podinfo" / "uid").write_text("0a-1b")
    owner = own_pod_reference()
    assert owner == {"apiVersion": "v1", "kind": "Pod", "name": "flow-1", "uid": "0a-1b"}
    loaded = _settings(tmp_path)
    jobs = [job_manifest(loaded, "s3://b/p", "crop", "finish", "d", [], run="r", owner=o) for o in (None, owner)]
    assert jobs[1]["metadata"].pop("ownerReferences") == [owner]
    assert jobs[0] == jobs[1]


# -- nodes and words ----------------------------------------------------------------------------------------------
def _node(name: str, labels: dict[str, str], gpus: int = 0, taints: list[dict[str, str]] | None = None) -> Any:
    amounts = {"cpu": "4", "memory": "16Gi", "pods": "110", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}},
        "spec": {"taints": taints or []},
        "status": {
            "allocatable": amounts,
            "capacity": amounts,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Test", "message": ""}],
        },
    }


GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
NODES = [
    _node("cpu-1", {"pool": "cpu"}),
    _node("cpu-2", {"pool": "cpu"}),
    _node("gpu-12", {"zoosplat.io/gpu-memory": "12gb"}, 1, [GPU_TAINT]),
    _node("gpu-24", {"zoosplat.io/gpu-memory": "24gb"}, 1),
]


def test_a_profile_is_chosen_among_what_nodes_offer(tmp_path: Path) -> None:
    loaded, experiment = _settings(tmp_path), _experiment(crop__grid_size=32)
    assert choose_profile(loaded, NODES, "24gb", experiment) == "24gb"
    assert choose_profile(loaded, NODES, "auto", experiment) == "12gb"
    assert choose_profile(loaded, NODES[3:], None, experiment) == "24gb"
    with pytest.raises(UserError) as caught:
        choose_profile(loaded, NODES, "80gb", experiment)
    assert str(caught.value) == (
        "profile 80gb: no node offers it (zoosplat.io/gpu-memory=80gb, 2 GPU, cpu 8, memory 64Gi); "
        "the nodes of this cluster offer 12gb (1 node), 24gb (1 node)"
    )
    with pytest.raises(UserError, match=r"profile auto: .* GiB of GPU memory; the nodes of this cluster offer 12gb"):
        choose_profile(loaded, NODES, "auto", _experiment(crop__grid_size=256, model__bottleneck=512))
    with pytest.raises(UserError, match="this cluster offer no profile"):
        choose_profile(loaded, NODES[:2], "12gb", experiment)
    # Without its GPU, or with a taint that the profile does not tolerate, a node offers nothing.
    profile = loaded.profile("24gb")
    assert not offers_profile(_node("n", {"zoosplat.io/gpu-memory": "24gb"}), profile)
    assert not offers_profile(_node("n", {"zoosplat.io/gpu-memory": "24gb"}, 1, [GPU_TAINT]), profile)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "0/4 nodes are available: 1 Insufficient nvidia.com/gpu, 3 node(s) didn't match Pod's node "
            "affinity/selector. preemption: 0/4 nodes are available: 4 Preemption is not helpful for scheduling.",
            "1 node has no free GPU, 3 nodes have other labels than wanted (a=b)",
        ),
        (
            "0/3 nodes are available: 1 node(s) were unschedulable, 2 Insufficient memory, 1 Insufficient cpu.",
            "1 node is drained, 2 nodes have too little free memory, 1 node has too little free cpu",
        ),
        (
            "0/2 nodes are available: 1 node(s) had untolerated taint {nvidia.com/gpu: present}, "
            "1 node(s) had untolerated taint {node.kubernetes.io/unreachable: }. no new claims to deallocate",
            "1 node is kept for others by the taint nvidia.com/gpu, 1 node is not ready",
        ),
        ("no nodes available to schedule pods", "no nodes available to schedule pods"),
    ],
)
def test_the_scheduler_in_words(message: str, words: str) -> None:
    assert explain_unschedulable(message, {"a": "b"}) == words


def test_indexes_of_a_job_status() -> None:
    assert parse_indexes("1,3-5,9") == [1, 3, 4, 5, 9]
    assert parse_indexes("") == []


# -- a real control plane -----------------------------------------------------------------------------------------
BIN = Path.home() / ".cache" / "zoosplat" / "bin"
SERVERS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
ETCD, PEER, PORT = 12379, 12380, 16443


def _wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def control_plane() -> Iterator[str]:
    """etcd, API server, controllers and scheduler on the loopback interface; the path of a kubeconfig."""
    if os.environ.get("ZOOSPLAT_CI_CLUSTER") != "1":
        pytest.skip("cluster tests run with ZOOSPLAT_CI_CLUSTER=1")
    if missing := [name for name in SERVERS if not (BIN / name).is_file()]:
        pytest.skip(f"not built on this machine: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        processes: list[subprocess.Popen[bytes]] = []

        def start(name: str, *arguments: str) -> None:
            log = open(f"{folder}/{name}.log", "wb")  # noqa: SIM115
            processes.append(subprocess.Popen([str(BIN / name), *arguments], cwd=folder, stdout=log, stderr=log))

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

        openssl("genrsa", "-out", "sa.key", "2048")
        openssl("rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca")
        )
        token = os.urandom(16).hex()
        Path(folder, "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
        server = {"server": f"https://127.0.0.1:{PORT}", "insecure-skip-tls-verify": True}
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "local",
            "clusters": [{"name": "local", "cluster": server}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": "admin"}}],
        }
        path = Path(folder, "kubeconfig")
        path.write_text(json.dumps(kubeconfig))
        etcd = f"http://127.0.0.1:{ETCD}"
        try:
            start(
                "etcd",
                *("--data-dir", "etcd", "--unsafe-no-fsync", "--listen-peer-urls", f"http://127.0.0.1:{PEER}"),
                *("--listen-client-urls", etcd, "--advertise-client-urls", etcd),
            )
            start(
                "kube-apiserver",
                *(f"--etcd-servers={etcd}", f"--secure-port={PORT}", "--bind-address=127.0.0.1", "--cert-dir=."),
                *("--service-account-key-file=sa.pub", "--service-account-signing-key-file=sa.key"),
                *("--service-account-issuer=https://kubernetes.default.svc", "--token-auth-file=tokens.csv"),
                *("--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16", "--client-ca-file=ca.crt"),
                *("--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none"),
            )
            ready = [str(BIN / "kubectl"), "--kubeconfig", str(path), "get", "--raw", "/readyz"]
            _wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, "the API server")
            # Nobody renews these nodes' leases, so their controller would soon call them lost.
            start(
                "kube-controller-manager",
                *("--kubeconfig=kubeconfig", "--service-account-private-key-file=sa.key", "--secure-port=0"),
                *("--root-ca-file=ca.crt", "--use-service-account-credentials", "--leader-elect=false"),
                "--controllers=*,-node-lifecycle-controller",
            )
            start("kube-scheduler", "--kubeconfig=kubeconfig", "--leader-elect=false", "--secure-port=0")
            yield str(path)
        finally:
            # Nothing of it is kept, and an API server takes a minute to end by itself.
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


@dataclass(frozen=True)
class End:
    """How a pod ends: as Kubernetes reports it, the message being the last lines of its log."""

    code: int = 0
    message: str = ""
    reason: str = ""


@dataclass
class Kubelet:
    """Stands for the kubelets of all nodes: `decide` says how a scheduled pod ends, None that it goes on; `blocked` why
    none can start. Removes what is deleted."""

    core: Any
    namespace: str
    decide: Callable[[Any], End | None] = lambda pod: End()
    blocked: str = ""
    seen: list[Any] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _running: set[str] = field(default_factory=set)

    def loop(self) -> None:
        while not self._stop.wait(0.2):
            # What another thread has just changed is seen to in the next round.
            with suppress(Exception):
                for pod in json.loads(self.core.list_namespaced_pod(self.namespace, _preload_content=False).data)[
                    "items"
                ]:
                    self._see_to(pod)

    def _see_to(self, pod: Any) -> None:
        name, phase = pod["metadata"]["name"], pod["status"].get("phase")
        if "deletionTimestamp" in pod["metadata"]:
            self.core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=0, _preload_content=False)
        elif pod["spec"].get("nodeName") and phase == "Pending" and name not in self._running:
            self._running.add(name)
            self.seen.append(pod)
            if self.blocked:
                self._patch(name, "Pending", {"waiting": {"reason": self.blocked, "message": "no such image"}})
                return
            self._patch(name, "Running", {"running": {"startedAt": "2026-01-01T00:00:00Z"}})
            threading.Thread(target=self._end, args=(name, pod), daemon=True).start()

    def _end(self, name: str, pod: Any) -> None:
        end = self.decide(pod)
        if end is not None:
            reason = end.reason or ("Error" if end.code else "Completed")
            ended = {"exitCode": end.code, "reason": reason, "message": end.message}
            self._patch(name, "Failed" if end.code else "Succeeded", {"terminated": ended})

    def _patch(self, name: str, phase: str, state: Any) -> None:
        container = {
            "name": "stage",
            "image": "image:1",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": state,
        }
        body = {"status": {"phase": phase, "containerStatuses": [container]}}
        with suppress(Exception):
            self.core.patch_namespaced_pod_status(name, self.namespace, body, _preload_content=False)


@dataclass
class Place:
    """A namespace of its own on the control plane, with a kubelet."""

    api: KubernetesApi
    kubelet: Kubelet
    settings: ClusterSettings
    settings_path: Path

    def names(self) -> list[str]:
        return sorted(job["metadata"]["name"] for job in self.api.list_jobs())


@pytest.fixture
def place(control_plane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    from kubernetes import client

    monkeypatch.setenv("KUBECONFIG", control_plane)
    monkeypatch.setattr(kubernetes, "POLL_S", 0.3)
    namespace = f"test-{os.urandom(4).hex()}"
    text = TEXT.replace("namespace: zoosplat", f"namespace: {namespace}").replace("stages", "default")
    loaded = _settings(tmp_path, text)
    monkeypatch.setenv("ZOOSPLAT_SETTINGS", str(tmp_path / "settings.yaml"))
    api = KubernetesApi(namespace)
    api.core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=namespace)))
    for node in NODES:
        with suppress(client.ApiException):
            api.core.create_node(node, _preload_content=False)
            name, taints = node["metadata"]["name"], node["spec"]["taints"]
            # A new node is tainted as not ready, until the controller that does not run here sees to it.
            for value in (None, taints):
                api.core.patch_node(name, {"spec": {"taints": value}}, _preload_content=False)
            api.core.patch_node_status(name, {"status": node["status"]}, _preload_content=False)
    _wait_until(lambda: api.core.list_namespaced_service_account(namespace).items, "the namespace's service account")
    kubelet = Kubelet(api.core, namespace)
    thread = threading.Thread(target=kubelet.loop, daemon=True)
    thread.start()
    yield Place(api, kubelet, loaded, tmp_path / "settings.yaml")
    kubelet._stop.set()
    thread.join()


def _quiet(done: int, total: int, message: str) -> None:
    return None


def _no_log(line: str, source: str = "", at: str = "") -> None:
    return None


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Files of s3://b/p, by URL: stand for a project on a server."""
    files: dict[str, Any] = {}
    monkeypatch.setattr("zoosplat.storage.objects.read_json", files.get)
    return files


URL, ID = "s3://b/p", "0123456789abcdef"


def _run(experiment: Experiment | None = None) -> Run:
    """A run in that project, none of whose results have been looked at."""
    folders = {stage: f"{URL}/{RESULTS}/{stage}/{ID}" for stage in ("segment", "crop", "train")}
    results = {stage: Result(stage, ID, folder, folder) for stage, folder in folders.items()}
    return Run(Project(URL), "r1", experiment or _experiment(), results)


def _plan(files: dict[str, Any], stage: str, shards: int) -> None:
    files[f"{URL}/{RESULTS}/{stage}/{ID}/plan.json"] = {"bounds": list(range(shards + 1)), "id": ID}


def _done(files: dict[str, Any], stage: str) -> None:
    files[f"{URL}/{RESULTS}/{stage}/{ID}/done.json"] = {"id": ID, "finished": time.time()}


def _number(pod: Any) -> int:
    return int(pod["metadata"]["labels"].get(INDEX_LABEL, -1))


def _step(pod: Any) -> str:
    return str(pod["metadata"]["labels"]["zoosplat.io/step"])


def _finishing(
    files: dict[str, Any], stage: str, shards: int, then: Callable[[Any], End | None]
) -> Callable[[Any], End | None]:
    """What a stage does: plan, shards as `then` says, mark."""

    def decide(pod: Any) -> End | None:
        if _step(pod) == "prepare":
            _plan(files, stage, shards)
        elif _step(pod) == "shards":
            return then(pod)
        else:
            _done(files, stage)
        return End()

    return decide


@contextmanager
def _in_thread(
    jobs: KubernetesRunner, stage: str, hear: Callable[[int, int, str], None] = _quiet
) -> Iterator[list[Any]]:
    """Run a stage beside the test; the list gets `ended` or what it raises."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            jobs.run(stage, _run(), progress=lambda done, total, message: hear(done, total, message), log=_no_log)
            outcome.append("ended")
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield outcome
    finally:
        jobs.stop()
        thread.join(60)


@pytest.mark.cluster
def test_a_cpu_stage_is_prepared_sharded_and_finished(place: Place, marks: dict[str, Any]) -> None:
    lock, now, most, reports = threading.Lock(), [0], [0], []

    def work(pod: Any) -> End:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.5)
        with lock:
            now[0] -= 1
        return End()

    place.kubelet.decide = _finishing(marks, "crop", 6, work)
    with KubernetesRunner(place.settings, None, place.api, "run-1") as jobs:
        run = _run()
        jobs.run("crop", run, progress=lambda *event: reports.append(event), log=_no_log)
        assert run.result("crop").is_done()
        created = {job["metadata"]["labels"]["zoosplat.io/step"]: job for job in place.api.list_jobs()}
        assert sorted(created) == ["finish", "prepare", "shards"]
        spec = created["shards"]["spec"]
        assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (6, 4, "Indexed")
        assert created["shards"]["status"]["succeeded"] == 6
    assert 2 <= most[0] <= 4
    pods = [pod for pod in place.kubelet.seen if _step(pod) == "shards"]
    assert sorted(map(_number, pods)) == list(range(6))
    assert {pod["spec"]["nodeName"] for pod in pods} <= {"cpu-1", "cpu-2"}
    # The API server has accepted and kept all of it.
    for pod in pods:
        container = pod["spec"]["containers"][0]
        assert container["args"] == ["--project", URL, "--run", "r1", "--shard", "$(JOB_COMPLETION_INDEX)/6"]
        assert {
            "name": "JOB_COMPLETION_INDEX",
            "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX_LABEL}']"}},
        } in container["env"]
        assert container["securityContext"] == POD["containers"][0]["securityContext"]
        assert pod["spec"]["securityContext"] == POD["securityContext"]
        assert pod["spec"]["automountServiceAccountToken"] is False
        # No token is mounted: its only volume is /tmp.
        assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["tmp"]
        secret = [e for e in container["env"] if e["name"].startswith("AWS_") and "KEY" in e["name"]]
        assert [sorted(e) for e in secret] == [["name", "valueFrom"]] * 2
    assert all(total in (0, 1, 6) for _, total, _ in reports)
    _wait_until(lambda: not place.names() and not place.api.list_pods(), "Jobs and pods to be gone")

    # Done before: only the preparation runs, and finds it so.
    with KubernetesRunner(place.settings, None, place.api, "run-2") as jobs:
        place.kubelet.decide = lambda pod: End()
        before = len(place.kubelet.seen)
        jobs.run("crop", _run(), progress=_quiet, log=_no_log)
        assert [_step(pod) for pod in place.kubelet.seen[before:]] == ["prepare"]


@pytest.mark.cluster
def test_a_failed_index_is_tried_again_and_reported_by_number_with_its_log(place: Place, marks: dict[str, Any]) -> None:
    def work(pod: Any) -> End:
        return End(1, "Traceback ...\nOSError: disk on fire") if _number(pod) == 3 else End()

    place.kubelet.decide = _finishing(marks, "crop", 5, work)
    with KubernetesRunner(place.settings, None, place.api, "r") as jobs, pytest.raises(Exhausted) as caught:
        jobs.run("crop", _run(), progress=_quiet, log=_no_log)
    lines = str(caught.value).splitlines()
    assert lines[0] == "crop: shards failed for good: 3 of 5; the others are kept"
    assert re.fullmatch(r"crop: shard 3 of 5: exit status 1 on cpu-[12], 2 times", lines[1])
    assert lines[2:] == ["Traceback ...", "OSError: disk on fire"]
    numbers = sorted(_number(pod) for pod in place.kubelet.seen if _step(pod) == "shards")
    assert numbers == [0, 1, 2, 3, 3, 4]


@pytest.mark.cluster
def test_bad_input_is_not_tried_again(place: Place, marks: dict[str, Any]) -> None:
    bad = End(2, "a warning\nzoosplat crop: crop.ell = 0.1: too small")
    place.kubelet.decide = _finishing(marks, "crop", 2, lambda pod: bad if _number(pod) == 1 else End())
    with KubernetesRunner(place.settings, None, place.api, "r") as jobs, pytest.raises(UserError) as caught:
        jobs.run("crop", _run(), progress=_quiet, log=_no_log)
    assert str(caught.value) == "crop: crop.ell = 0.1: too small"
    assert sorted(_number(pod) for pod in place.kubelet.seen if _step(pod) == "shards") == [0, 1]


@pytest.mark.cluster
def test_too_little_memory_is_named_with_the_key_to_change(place: Place, marks: dict[str, Any]) -> None:
    killed = End(137, "", "OOMKilled")
    place.kubelet.decide = _finishing(marks, "crop", 2, lambda pod: killed if _number(pod) == 1 else End())
    expected = (
        r"^crop: shard 1 of 2 was OOMKilled on cpu-[12]: it needs more than its 512Mi of memory; "
        r"raise runner\.cpu\.resources\.limits\.memory$"
    )
    with KubernetesRunner(place.settings, None, place.api, "r") as jobs, pytest.raises(UserError, match=expected):
        jobs.run("crop", _run(), progress=_quiet, log=_no_log)

    place.kubelet.decide = lambda pod: killed
    expected = (
        r"^train: run was OOMKilled on gpu-12: it needs more than its 4Gi of memory; "
        r"raise profiles\.12gb\.memory, or choose the profile 24gb$"
    )
    with KubernetesRunner(place.settings, "12gb", place.api, "r") as jobs, pytest.raises(UserError, match=expected):
        jobs.run("train", _run(), progress=_quiet, log=_no_log)


@pytest.mark.cluster
def test_gpu_stages_run_on_the_nodes_of_their_profile(place: Place, marks: dict[str, Any]) -> None:
    def train(pod: Any) -> End:
        _done(marks, "train")
        return End()

    place.kubelet.decide = train
    for profile, node in (("12gb", "gpu-12"), ("24gb", "gpu-24")):
        with KubernetesRunner(place.settings, profile, place.api, "r") as jobs:
            jobs.run("train", _run(), progress=_quiet, log=_no_log)
        assert place.kubelet.seen[-1]["spec"]["nodeName"] == node
        _wait_until(lambda: not place.names(), "the Job to be gone")


@pytest.mark.cluster
def test_masks_are_made_on_either_kind_of_node(place: Place, marks: dict[str, Any]) -> None:
    """By one process beside a GPU, or by shards where `segment.device` is cpu."""
    for device, steps in (("auto", ["run"]), ("cpu", ["prepare", "shards", "shards", "finish"])):
        made = _experiment(data__masks="auto", segment__device=device)
        place.kubelet.decide = _finishing(marks, "segment", 2, lambda pod: End())
        before = len(place.kubelet.seen)
        with KubernetesRunner(place.settings, "12gb", place.api, "r") as jobs:
            jobs.run("segment", _run(made), progress=_quiet, log=_no_log)
        pods = place.kubelet.seen[before:]
        assert [_step(pod) for pod in pods] == steps
        nodes = {pod["spec"]["nodeName"] for pod in pods}
        assert nodes <= ({"gpu-12"} if device == "auto" else {"cpu-1", "cpu-2"})
        marks.clear()
        _wait_until(lambda: not place.names(), "the Jobs to be gone")


@pytest.mark.cluster
def test_cancelling_leaves_no_job_and_no_pod(place: Place, marks: dict[str, Any]) -> None:
    place.kubelet.decide = _finishing(marks, "crop", 6, lambda pod: None)
    with _in_thread(KubernetesRunner(place.settings, None, place.api, "r"), "crop") as outcome:
        _wait_until(lambda: sum(_step(pod) == "shards" for pod in place.kubelet.seen) == 4, "four running shards")
    assert isinstance(outcome[0], Interrupted)
    began = time.monotonic()
    _wait_until(lambda: not place.names() and not place.api.list_pods(), "Jobs and pods to be gone", 30)
    assert time.monotonic() - began < 30


@pytest.mark.cluster
def test_two_pipelines_share_jobs_and_the_second_survives_the_first(place: Place, marks: dict[str, Any]) -> None:
    free = threading.Event()

    def work(pod: Any) -> End | None:
        return End() if free.is_set() else None

    place.kubelet.decide = _finishing(marks, "crop", 2, work)
    first, second = (KubernetesRunner(place.settings, None, place.api, name) for name in ("first", "second"))
    with _in_thread(second, "crop") as outcome:
        with _in_thread(first, "crop"):
            _wait_until(lambda: sum("shards" in n for n in first._names & second._names) == 1, "both to use one Job")
            assert sum("shards" in name for name in place.names()) == 1
        # The first has ended and deleted the Job: the second goes on with one of its own.
        free.set()
        _wait_until(lambda: outcome, "the second pipeline")
    assert outcome == ["ended"]


@pytest.mark.cluster
def test_what_has_ended_earlier_is_not_adopted(place: Place, marks: dict[str, Any]) -> None:
    place.kubelet.decide = lambda pod: End(1, "lost connection")
    killed = KubernetesRunner(place.settings, None, place.api, "killed")  # it never deletes its Jobs
    with pytest.raises(RuntimeError, match=r"^crop: prepare: exit status 1 on cpu-[12]\nlost connection$"):
        killed.run("crop", _run(), progress=_quiet, log=_no_log)
    assert len(place.names()) == 1
    place.kubelet.decide = _finishing(marks, "crop", 1, lambda pod: End())
    with KubernetesRunner(place.settings, None, place.api, "next") as jobs:
        run = _run()
        jobs.run("crop", run, progress=_quiet, log=_no_log)
        assert run.result("crop").is_done()


@pytest.mark.cluster
def test_hooks_end_the_jobs_of_their_run_alone(place: Place, marks: dict[str, Any]) -> None:
    from zoosplat_flows.pipeline import pipeline

    for run in ("a", "b"):
        place.api.create_job(job_manifest(place.settings, URL, "crop", "prepare", run, [], run=run))
    delete_jobs("a")
    assert [job["metadata"]["labels"]["zoosplat.io/run"] for job in place.api.list_jobs()] == ["b"]

    @dataclass
    class FlowRun:
        id: str
        parameters: dict[str, Any]

    for hooks in (pipeline.on_cancellation_hooks, pipeline.on_crashed_hooks, pipeline.on_failure_hooks):
        for runner, left in (("local", 1), ("kubernetes", 0)):
            hooks[0](pipeline, FlowRun("b", {"runner": runner}), None)  # type: ignore[arg-type]
            assert len(place.names()) == left
        place.api.create_job(job_manifest(place.settings, URL, "crop", "prepare", "b", [], run="b"))


@pytest.mark.cluster
def test_waiting_pods_are_explained_while_they_wait(place: Place, marks: dict[str, Any], tmp_path: Path) -> None:
    profiles = place.settings.profiles
    greedy = place.settings.model_copy(
        update={"profiles": {**profiles, "24gb": profiles["24gb"].model_copy(update={"memory": "100Gi"})}}
    )
    absent = place.settings.model_copy(
        update={"cpu": place.settings.cpu.model_copy(update={"nodeSelector": {"a": "b"}})}
    )
    reports: list[str] = []

    def hear(done: int, total: int, text: str) -> None:
        reports.append(text)

    def heard(words: str) -> bool:
        return any(words in text for text in reports)

    for loaded, profile, stage, words in (
        (greedy, "24gb", "train", "1 node has too little free memory"),
        (place.settings, "80gb", "train", "3 nodes have other labels than wanted (zoosplat.io/gpu-memory=80gb)"),
        (absent, None, "crop", "have other labels than wanted (a=b)"),
    ):
        with _in_thread(KubernetesRunner(loaded, profile, place.api, "r"), stage, hear):
            _wait_until(partial(heard, words), words)
        _wait_until(lambda: not place.names(), "the Job to be gone")
    # The only GPU of the profile is taken.
    place.kubelet.decide = lambda pod: None
    place.api.create_job(job_manifest(place.settings, URL, "render", "run", "d", [], run="r", profile=profiles["12gb"]))
    _wait_until(lambda: place.kubelet.seen, "a pod on the GPU")
    with _in_thread(KubernetesRunner(place.settings, "12gb", place.api, "r"), "train", hear):
        _wait_until(partial(heard, "1 node has no free GPU"), "no free GPU")
        result = CliRunner().invoke(app, ["cluster", "status"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "4 nodes, 4 ready" in result.output
    rows = [re.split(r"\W+", line.strip("│ ")) for line in result.output.splitlines()]
    assert ["12gb", "1", "1", "1", "1"] in [row[:5] for row in rows]
    assert ["24gb", "1", "1", "1", "0"] in [row[:5] for row in rows]
    assert ["80gb", "0", "0", "0", "0"] in [row[:5] for row in rows]
    assert re.search(r"^train run: 1 pod: .*1 node has no free GPU", result.output, re.MULTILINE)
    place.api.delete_job(place.names()[0])


@pytest.mark.cluster
def test_an_image_that_cannot_be_pulled_ends_the_stage(
    place: Place, marks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "BLOCKED_S", 1.0)
    place.kubelet.blocked = "ImagePullBackOff"
    expected = r"^crop: image:1: its image cannot be pulled; check images.registry and images.tag \(no such image\)$"
    with KubernetesRunner(place.settings, None, place.api, "r") as jobs, pytest.raises(UserError, match=expected):
        jobs.run("crop", _run(), progress=_quiet, log=_no_log)
    _wait_until(lambda: not place.names() and not place.api.list_pods(), "Jobs and pods to be gone")


@pytest.mark.cluster
def test_what_the_cluster_refuses_names_the_settings(place: Place, marks: dict[str, Any], tmp_path: Path) -> None:
    elsewhere = place.settings.model_copy(update={"namespace": "nowhere"})
    with (
        KubernetesRunner(elsewhere, None, KubernetesApi("nowhere"), "r") as jobs,
        pytest.raises(UserError, match=r"refuses the Job.*nowhere"),
    ):
        jobs.run("crop", _run(), progress=_quiet, log=_no_log)
    with (
        KubernetesRunner(place.settings, None, place.api, "r") as jobs,
        pytest.raises(UserError, match="use a project at s3://"),
    ):
        jobs.run("crop", replace(_run(), project=Project(str(tmp_path))), progress=_quiet, log=_no_log)
