"""The chart on a Kubernetes of this machine: on nodes simulated by kwok, and on two real ones that run images.

Everything is started by deploy/cluster and stopped again, in a place of its own beside a cluster that may run already.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from zoosplat_flows.runners.kubernetes import INDEX_LABEL, JOB_LABEL, job_manifest
from zoosplat_flows.runners.settings import Settings

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.environ.get("ZOOSPLAT_CI_CLUSTER") != "1", reason="set ZOOSPLAT_CI_CLUSTER=1"),
]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "zoosplat"
SCRIPTS = ROOT / "deploy" / "cluster"
CACHE = Path.home() / ".cache" / "zoosplat"
BIN = CACHE / "bin"
RUN = CACHE / "cluster-test"  # kubelets' sockets need a short path
NAMESPACE = "lab"
PROFILES = ("12gb", "24gb", "48gb", "80gb")
Object = dict[str, Any]

CLUSTER = {
    "ZOOSPLAT_CLUSTER": str(RUN),
    "ZOOSPLAT_CLUSTER_PORT": "27443",
    "KUBECONFIG": str(RUN / "kubeconfig"),
}


def call(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        command, input=stdin, env={**os.environ, **CLUSTER}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    return call(str(BIN / "kubectl"), *arguments, stdin=stdin)


def get(*arguments: str) -> Any:
    return json.loads(kubectl("-n", NAMESPACE, "get", "-o", "json", *arguments))


def apply(*objects: Object) -> None:
    kubectl(
        "-n", NAMESPACE, "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    )


def until(what: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)
    return found


def ended(name: str) -> Object | None:
    """A Job's status once it is complete or failed."""
    status: Object = get("job", name)["status"]
    kinds = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
    return status if kinds & {"Complete", "Failed"} else None


def pods(job: str) -> list[Object]:
    found: list[Object] = get("pods", "-l", f"{JOB_LABEL}={job}")["items"]
    return found


def admit(standard: str) -> None:
    """Let the API server refuse pods that break a Pod Security Standard."""
    kubectl("label", "namespace", NAMESPACE, f"pod-security.kubernetes.io/enforce={standard}", "--overwrite")


def helm(*arguments: str) -> str:
    return call(str(BIN / "helm"), "-n", NAMESPACE, *arguments)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A control plane with the chart installed."""
    if not (BIN / "kube-apiserver").is_file() or not (BIN / "helm").is_file():
        pytest.skip("no Kubernetes here; `make cluster-tools` builds one")
    call(str(SCRIPTS / "down.sh"))
    try:
        call(str(SCRIPTS / "up.sh"))
        call(str(SCRIPTS / "up.sh"))  # again: it disturbs nothing
        kubectl("create", "namespace", NAMESPACE)
        admit("restricted")
        helm("install", "zoosplat", str(CHART), "--set", "runner.cpu.nodeSelector.pool=cpu")
        yield
    finally:
        call(str(SCRIPTS / "down.sh"))


def read_settings(folder: Path) -> Settings:
    """The settings that helm has installed, read as the runner reads them."""
    file = folder / "settings.yaml"
    file.write_text(get("configmap", "zoosplat-settings")["data"]["settings.yaml"])
    return Settings.read(str(file))


def fake_node(name: str, labels: dict[str, str], amounts: dict[str, str], taints: list[Object]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "spec": {"taints": taints},
        "status": {"allocatable": amounts, "capacity": amounts},
    }


@pytest.fixture(scope="module")
def forty_nodes(cluster: None) -> Iterator[None]:
    """Eight nodes of each profile, one GPU each and tainted, and eight for shards."""
    taint = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
    gpu = {"cpu": "16", "memory": "128Gi", "pods": "110", "nvidia.com/gpu": "1"}
    cpu = {"cpu": "8", "memory": "64Gi", "pods": "110"}
    nodes = [fake_node(f"n-{p}-{i}", {"zoosplat.io/gpu-memory": p}, gpu, taint) for p in PROFILES for i in range(8)]
    nodes += [fake_node(f"n-cpu-{i}", {"pool": "cpu"}, cpu, []) for i in range(8)]
    assert len(nodes) == 40
    apply(*nodes)
    kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=120s")
    yield
    kubectl("delete", "nodes", *(n["metadata"]["name"] for n in nodes))


def test_accounts_can_do_exactly_what_they_do(cluster: None) -> None:
    def rights(account: str, namespace: str) -> set[tuple[str, str]]:
        who = f"--as=system:serviceaccount:{NAMESPACE}:{account}"
        lines = kubectl("auth", "can-i", "--list", "--no-headers", "-n", namespace, who).splitlines()
        # What everyone may: ask about themselves, and read versions and health.
        own = [line for line in lines if not line.startswith((" ", "self"))]
        verbs = {line.split()[0]: line[line.rindex("[") + 1 : -1].split() for line in (x.rstrip() for x in own)}
        return {(verb, resource) for resource, allowed in verbs.items() for verb in allowed}

    jobs = {(verb, "jobs.batch") for verb in ("create", "get", "list", "delete")}
    assert rights("zoosplat-runner", NAMESPACE) == jobs | {("list", "pods"), ("get", "pods/log"), ("list", "nodes")}
    assert rights("zoosplat-runner", "default") == {("list", "nodes")}
    assert rights("zoosplat-stage", NAMESPACE) == set()


def test_api_server_takes_every_object_of_the_chart(cluster: None) -> None:
    text = helm("template", "z", str(CHART), "--kube-version", "1.36.3", "--set", "register.enabled=true")
    kubectl("-n", NAMESPACE, "apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)


def test_shards_and_profiles_land_on_their_nodes(forty_nodes: None, tmp_path: Path) -> None:
    settings = read_settings(tmp_path)
    shards = job_manifest(settings, "s3://b/p", "crop", "shards", "d", [], run="r", shards=200, parallelism=50)
    gpu = [
        job_manifest(settings, f"s3://b/{p}-{i}", "train", "run", f"{p}-{i}", [], run=p, profile=settings.profile(p))
        for p in PROFILES
        for i in range(10)
    ]
    apply(shards, *gpu)
    name, most = shards["metadata"]["name"], 0

    def watched() -> Object | None:
        nonlocal most
        most = max(most, sum(p["status"]["phase"] in ("Pending", "Running") for p in pods(name)))
        return ended(name)

    status = until(watched)
    assert (status["succeeded"], status["completedIndexes"]) == (200, "0-199")
    assert most == 50
    nodes = Counter(p["spec"]["nodeName"] for p in pods(name))
    assert set(nodes) == {f"n-cpu-{i}" for i in range(8)}
    # Ten trainings on eight GPUs of a kind: two wait for a GPU, and none is put on another kind of node.
    for job in gpu:
        until(partial(ended, job["metadata"]["name"]))
    for profile in PROFILES:
        found = get("pods", "-l", f"zoosplat.io/run={profile}")["items"]
        assert len(found) == 10
        assert {p["spec"]["nodeName"].rsplit("-", 1)[0] for p in found} == {f"n-{profile}"}
        assert all(p["status"]["phase"] == "Succeeded" for p in found)


def test_upgrade_leaves_a_running_job_alone(forty_nodes: None, tmp_path: Path) -> None:
    job = job_manifest(read_settings(tmp_path), "s3://b/p", "pack", "shards", "u", [], run="u", shards=6, parallelism=6)
    # Between 30 s and 31 s: the second is the upper bound, and lowers the first where it is less.
    slow = {
        f"pod-complete.stage.kwok.x-k8s.io/{key}": value for key, value in (("delay", "30s"), ("jitter-delay", "31s"))
    }
    job["spec"]["template"]["metadata"]["annotations"] = slow
    apply(job)
    name = job["metadata"]["name"]
    until(lambda: get("job", name)["status"].get("ready") == 6)
    before, uid = {p["metadata"]["uid"] for p in pods(name)}, get("job", name)["metadata"]["uid"]
    helm(
        "upgrade", "zoosplat", str(CHART), "--reuse-values", "--set", "runner.images.tag=next,runner.cpu.parallelism=7"
    )
    assert ended(name) is None
    settings = read_settings(tmp_path)
    assert (settings.images.tag, settings.cpu.parallelism) == ("next", 7)
    assert settings.cpu.nodeSelector == {"pool": "cpu"}
    status = until(lambda: ended(name))
    assert status["succeeded"] == 6
    assert ({p["metadata"]["uid"] for p in pods(name)}, get("job", name)["metadata"]["uid"]) == (before, uid)
    helm("rollback", "zoosplat", "1")
    assert read_settings(tmp_path).images.tag == "dev"


# -- real nodes ---------------------------------------------------------------------------------------------------
IMAGE = "localhost/zoosplat-ingest:dev"
NODES = ("zt-cpu-1", "zt-cpu-2")


@pytest.fixture(scope="module")
def two_nodes(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two real nodes that hold the image of one stage."""
    needed = ("podman", "containerd", "runc", "go")
    if os.geteuid() != 0 or not all(shutil.which(name) for name in needed):
        pytest.skip(f"real nodes need root, {', '.join(needed)}")
    store = CACHE / "containers"
    podman = ["podman", "--storage-driver=overlay", "--root", str(store / "root"), "--runroot", str(store / "run")]
    if subprocess.run([*podman, "image", "exists", IMAGE], check=False).returncode != 0:
        pytest.skip(f"no image {IMAGE}; `make images` builds it")
    tar = tmp_path_factory.mktemp("image") / "ingest.tar"
    call(*podman, "save", "-q", "-o", str(tar), IMAGE)
    for i, name in enumerate(NODES):
        call(str(SCRIPTS / "node.sh"), name, str(10371 + i), "--labels", "pool=real", str(tar))
    tar.unlink()
    yield
    kubectl("delete", "nodes", *NODES)


@pytest.fixture
def real_settings(two_nodes: None, tmp_path: Path, s3: Any) -> Settings:
    """The chart's settings for these nodes, with the credentials of a real MinIO in the secret that they name."""
    amounts = {"cpu": "400m", "memory": "512Mi"}
    runner = {
        "images": {"pullPolicy": "Never"},
        "s3": {"endpoint": s3.endpoint},
        "cpu": {
            "nodeSelector": {"pool": "real"},
            "resources": {"requests": amounts, "limits": {"cpu": "1", "memory": "2Gi"}},
        },
        "hostNetwork": True,
    }
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"runner": runner}))
    helm("upgrade", "zoosplat", str(CHART), "-f", str(values))
    admit("privileged")  # for the host's network, which these nodes need; all else is as before
    credentials = {key: s3.env[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "zoosplat-s3"}, "stringData": credentials}
    apply(secret)
    return read_settings(tmp_path)


def complete(job: Object) -> list[Object]:
    """Run a Job that must succeed; its pods."""
    name = job["metadata"]["name"]
    apply(job)
    status = until(lambda: ended(name))
    found = pods(name)
    assert not status.get("failed"), [kubectl("-n", NAMESPACE, "logs", p["metadata"]["name"]) for p in found]
    return found


def test_real_shards_of_ingest_run_on_both_nodes(real_settings: Settings, s3: Any, recording: Any, stages: Any) -> None:
    bucket = s3.bucket()
    s3.put_folder(recording.folder, bucket, "recording")
    config = json.dumps(recording.config(f"s3://{bucket}/recording")).encode()
    for project in ("cluster", "local"):
        s3.client.put_object(Bucket=bucket, Key=f"{project}/experiment.yaml", Body=config)
    url = f"s3://{bucket}/cluster"

    def job(step: str, arguments: list[str], shards: int | None = None) -> Object:
        return job_manifest(
            real_settings, url, "ingest", step, url, arguments, run="real", shards=shards, parallelism=shards or 1
        )

    [prepared] = complete(job("prepare", ["--prepare"]))
    plan = kubectl("-n", NAMESPACE, "logs", prepared["metadata"]["name"]).splitlines()[-1]
    assert json.loads(plan) == {"event": "plan", "stage": "ingest", "shards": 3}
    ran = complete(job("shards", ["--shard", "$(JOB_COMPLETION_INDEX)/3"], shards=3))
    assert {p["spec"]["nodeName"] for p in ran} == set(NODES)
    assert sorted(int(p["metadata"]["labels"][INDEX_LABEL]) for p in ran) == [0, 1, 2]
    complete(job("finish", ["--finish"]))
    # The same bytes as from processes of this machine.
    assert stages("ingest", f"s3://{bucket}/local", env=s3.env).status == 0
    objects = s3.objects(bucket)
    groups = [
        {key.partition("/")[2]: tag for key, (tag, _) in objects.items() if key.startswith(f"{project}/masks.zarr/")}
        for project in ("cluster", "local")
    ]
    assert len(groups[0]) > 3
    assert groups[0] == groups[1]


def test_real_failed_index_is_tried_again_then_reported(real_settings: Settings) -> None:
    job = job_manifest(real_settings, "s3://b/p", "ingest", "shards", "f", [], run="f", shards=3, parallelism=3)
    container = job["spec"]["template"]["spec"]["containers"][0]
    container["command"] = ["python", "-c"]
    container["args"] = ["import os; i = os.environ['JOB_COMPLETION_INDEX']; print('shard', i); assert i != '1'"]
    apply(job)
    name = job["metadata"]["name"]
    status = until(lambda: ended(name))
    assert (status["failedIndexes"], status["completedIndexes"]) == ("1", "0,2")
    tried = [p for p in pods(name) if p["metadata"]["labels"][INDEX_LABEL] == "1"]
    assert len(tried) == 1 + real_settings.cpu.backoffLimitPerIndex
    for pod in tried:
        assert pod["status"]["phase"] == "Failed"
        log = kubectl("-n", NAMESPACE, "logs", pod["metadata"]["name"])
        assert "shard 1\n" in log
        assert "AssertionError" in log
