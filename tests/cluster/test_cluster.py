"""The chart on a Kubernetes of this machine whose nodes kwok simulates.

Everything is started by deploy/cluster and stopped again, in a place of its own beside a cluster that may run already.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines import FILES_STAGES
from servers import Servers, prefect

from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.storage import objects
from zoosplat_flows.runners.kubernetes.api import KubernetesApi
from zoosplat_flows.runners.kubernetes.manifests import JOB_LABEL, job_manifest
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings

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


def read_settings(folder: Path) -> ClusterSettings:
    """The settings that helm has installed, read as the runner reads them."""
    file = folder / "settings.yaml"
    file.write_text(get("configmap", "zoosplat-settings")["data"]["settings.yaml"])
    return ClusterSettings.read(str(file))


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


# -- many pipelines -----------------------------------------------------------------------------------------------
class StandIn(threading.Thread):
    """Does for the simulated pods what their containers would: leaves the plans and marks of a pipeline that was run.

    The marks say that the data lies in that pipeline's project. A pod that ended before its mark was there only makes
    the flow try that stage again.
    """

    def __init__(self, done: str) -> None:
        super().__init__(daemon=True)
        self.api = KubernetesApi(NAMESPACE)
        self.done = open_run(Project.at(done))
        self.others = {pod["metadata"]["name"] for pod in self.api.list_pods()}  # of earlier tests
        self.seen: dict[str, Object] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            for pod in self.api.list_pods():
                name = pod["metadata"]["name"]
                if name in self.others:
                    continue
                if name not in self.seen:
                    self._do(pod["spec"]["containers"][0]["args"], pod["metadata"]["labels"])
                if pod["spec"].get("nodeName") or name not in self.seen:
                    self.seen[name] = pod

    def _do(self, arguments: list[str], labels: dict[str, str]) -> None:
        stage, step = labels["zoosplat.io/stage"], labels["zoosplat.io/step"]
        assert (arguments[0], arguments[2]) == ("--project", "--run")
        run = open_run(Project.at(arguments[1]), arguments[3])
        there, here = self.done.result(stage), run.result(stage)
        assert there.id == here.id
        if step == "prepare":
            objects.write_bytes(here.file("plan.json"), objects.read_bytes(there.file("plan.json")))
        elif step in ("finish", "run"):
            objects.write_json(here.file("done.json"), {**there.require(), "run": run.id, "data": there.folder})


@pytest.mark.timeout(900)
def test_ten_pipelines_at_once(
    forty_nodes: None, another_s3: None, tmp_path: Path, recording: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_settings(tmp_path)
    # No profile changes the configuration: all pipelines have the results of the one that was run.
    raw = yaml.safe_load((tmp_path / "settings.yaml").read_text())
    for profile in raw["profiles"].values():
        profile["config"] = {}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(raw))
    for key, value in {**CLUSTER, "ZOOSPLAT_SETTINGS": str(tmp_path / "settings.yaml")}.items():
        monkeypatch.setenv(key, value)
    with Servers() as servers:
        servers.minio()
        servers.prefect()
        for key, value in servers.env.items():
            monkeypatch.setenv(key, value)
        small = {
            "holdout_views": [3],
            "model": {"num_unets": 1, "base_filters": 2, "max_gaussians": 2000},
            "train": {"epochs": 1, "batch_frames": 8},
        }
        config = tmp_path / "tiny.yaml"
        config.write_text(yaml.safe_dump({**recording.config(), **small}))
        done = f"s3://{servers.bucket}/done"
        servers.run(str(Path(prefect()).parent / "zoosplat"), "run", str(config), "--project", done)
        servers.deploy("local")
        servers.worker("zoosplat", "process")
        stand_in = StandIn(done)
        stand_in.start()
        url = servers.env["PREFECT_API_URL"]
        answers: list[float] = []

        def states() -> Counter[str]:
            began = time.monotonic()
            body = json.dumps({}).encode()
            request = urllib.request.Request(f"{url}/flow_runs/filter", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=15) as answer:
                found = json.load(answer)
            answers.append(time.monotonic() - began)
            return Counter(run["state_type"] for run in found)

        for i in range(10):
            given = [f"project=s3://{servers.bucket}/p{i}", f"config={config}", "runner=kubernetes"]
            servers.pipeline("local", *given, f"profile={PROFILES[i % 4]}", watch=False, quiet=True)
        # Not answering in time is an error of `states`. One more is the run that was made in earnest.
        until(lambda: sum(states()[kind] for kind in ("COMPLETED", "FAILED", "CRASHED")) == 11, 600)
        stand_in.ended.set()
        assert states() == {"COMPLETED": 11}, (servers.folder / "worker.log").read_text()[-3000:]
        print(
            f"Prefect's API: {len(answers)} calls, median {sorted(answers)[len(answers) // 2]:.2f} s, "
            f"slowest {max(answers):.2f} s"
        )
    seen: Counter[tuple[str, str]] = Counter()
    for pod in stand_in.seen.values():
        labels, node = pod["metadata"]["labels"], pod["spec"]["nodeName"]
        stage = labels["zoosplat.io/stage"]
        project = pod["spec"]["containers"][0]["args"][1]
        kind = f"n-{PROFILES[int(project[-1]) % 4]}" if FILES_STAGES[stage].gpu else "n-cpu"
        assert node.rsplit("-", 1)[0] == kind
        seen[project, stage] += 1
    assert len(seen) == 10 * len(FILES_STAGES)
    assert settings.ordered() == list(PROFILES)
