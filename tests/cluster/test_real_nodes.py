"""The images on a Kubernetes of this machine with four real nodes, through Prefect on PostgreSQL, against MinIO.

All is started by deploy/demo and stopped again. The GPUs are claimed, not there: the stages compute on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from on_kubernetes import CPU_IMAGES, GPU_IMAGES, NAMESPACE, ROOT, Cluster, placements, same_objects
from pipelines import FILES_PIPELINE
from servers import BIN, Servers, prefect

from zoosplat.config.load import load_config
from zoosplat.errors import UserError
from zoosplat.stages.begin import begin_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.storage import listing, objects, urls
from zoosplat_flows.runners.kubernetes.api import KubernetesApi
from zoosplat_flows.runners.kubernetes.manifests import job_manifest
from zoosplat_flows.runners.kubernetes.runner import KubernetesRunner
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings
from zoosplat_flows.runners.protocol import Exhausted, Log

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.environ.get("ZOOSPLAT_CI_CLUSTER") != "1", reason="set ZOOSPLAT_CI_CLUSTER=1"),
    pytest.mark.timeout(2400),  # of the first test, which starts everything and gives 7 GB of images to four nodes
]

Object = dict[str, Any]
RUN = Path.home() / ".cache" / "zoosplat" / "real-test"  # kubelets' sockets need a short path
WITHIN_S = 30.0
SMALL: dict[str, Any] = {
    "train": {"epochs": 1, "batch_frames": 4},
    "model": {"num_unets": 1, "base_filters": 2, "max_gaussians": 2000},
    "holdout_views": [3],
}


def until(what: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)
    return found


@dataclass(frozen=True)
class Place:
    """The cluster, and a small recording on its S3 server."""

    cluster: Cluster
    servers: Servers
    recording: Any

    def config(self, name: str, **changes: Any) -> str:
        """Write a configuration to S3; its URL."""
        raw = self.recording.config(f"s3://{self.servers.bucket}/tiny", **changes)
        url = f"s3://{self.servers.bucket}/{name}.yaml"
        objects.write_bytes(
            url, yaml.safe_dump({**raw, **SMALL, "train": {**SMALL["train"], **raw.get("train", {})}}).encode()
        )
        return url

    def start(self, *parameters: str) -> str:
        """Start a pipeline and do not wait; the id of its flow run."""
        text = self.servers.pipeline("kubernetes", *parameters, watch=False, quiet=True)
        return next(line.split()[-1] for line in text.splitlines() if "UUID" in line)

    def state(self, run: str) -> str:
        return str(
            json.loads(self.servers.run(prefect(), "flow-run", "inspect", run, "--output", "json"))["state"]["name"]
        )

    def stage_jobs(self) -> list[Object]:
        selector = "app.kubernetes.io/name=zoosplat-stage"
        return [*self.cluster.get("jobs", "-l", selector)["items"], *self.cluster.get("pods", "-l", selector)["items"]]

    def flow_pod(self) -> Object | None:
        items = self.cluster.get("pods", "-l", "zoosplat.io/component=flow")["items"]
        return next((pod for pod in items if pod["status"]["phase"] == "Running"), None)

    def running(self, stage: str) -> list[Object]:
        pods = self.cluster.get("pods", "-l", f"zoosplat.io/stage={stage}")["items"]
        return [pod for pod in pods if pod["status"]["phase"] == "Running"]

    def settings(self, **changes: Any) -> ClusterSettings:
        """What the chart has installed, with changes of `cpu`."""
        text = self.cluster.get("configmap", "zoosplat-settings")["data"]["settings.yaml"]
        raw = yaml.safe_load(text)
        raw["cpu"] |= changes
        return ClusterSettings.model_validate(raw)


@pytest.fixture(scope="module")
def place(recording: Any, another_s3: None) -> Iterator[Place]:
    needed = ("podman", "containerd", "runc", "go", "initdb")
    if os.geteuid() != 0 or not all(shutil.which(name) for name in needed):
        pytest.skip(f"real nodes need root, {', '.join(needed)}")
    if not all((BIN / name).is_file() for name in ("kubelet", "helm", "minio")):
        pytest.skip("no Kubernetes here; `make cluster-tools minio` builds one")
    store = Path.home() / ".cache" / "zoosplat" / "containers"
    podman = ["podman", "--storage-driver=overlay", "--root", str(store / "root"), "--runroot", str(store / "run")]
    for name in (*CPU_IMAGES, *GPU_IMAGES):
        if subprocess.run([*podman, "image", "exists", f"localhost/zoosplat-{name}:dev"]).returncode != 0:
            pytest.skip(f"no image of {name}; `make images` builds it")
    before = dict(os.environ)
    try:
        with Servers() as servers:
            servers.minio()
            servers.prefect()
            for path in (p for p in recording.folder.rglob("*") if p.is_file()):
                url = f"s3://{servers.bucket}/tiny/{path.relative_to(recording.folder)}"
                objects.write_bytes(url, path.read_bytes())
            with Cluster(servers, RUN, port=28443, prefix="zt-", kubelet_port=10371) as cluster:
                os.environ |= servers.env
                yield Place(cluster, servers, recording)
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_pipeline_runs_on_the_nodes_of_its_stages_and_an_upgrade_does_not_disturb_it(place: Place) -> None:
    config, bucket = place.config("whole"), place.servers.bucket
    run = place.start(f"config={config}", f"project=s3://{bucket}/whole", "profile=24gb")
    until(lambda: place.running("ingest"))
    place.cluster.helm(
        "upgrade",
        "zoosplat",
        str(ROOT / "helm" / "zoosplat"),
        "--reuse-values",
        "--no-hooks",
        "--set",
        "runner.cpu.backoffLimitPerIndex=1",
    )
    until(lambda: place.state(run) in ("Completed", "Failed", "Crashed"), 600)
    assert place.state(run) == "Completed", place.servers.run(prefect(), "flow-run", "logs", run)
    rows = placements(place.servers.env["PREFECT_API_URL"])
    shards: dict[str, list[Object]] = {}
    for row in rows:
        assert row["exit_code"] == 0
        shards.setdefault(row["stage"], []).append(row)
    assert set(shards) == {spec.name for spec in FILES_PIPELINE}
    for spec in FILES_PIPELINE:
        nodes = {row["node"] for row in shards[spec.name]}
        if spec.gpu:
            assert nodes == {"zt-gpu-24gb"}
        else:
            assert nodes <= {"zt-cpu-1", "zt-cpu-2"}
    # Two shards at the same time on two nodes.
    ingest = [row for row in shards["ingest"] if row["step"] == "shards"]
    assert sorted(row["shard"] for row in ingest) == ["0", "1", "2"]
    spans = [(row["started"], row["finished"], row["node"]) for row in ingest]
    assert any(a[0] <= b[1] and b[0] <= a[1] and a[2] != b[2] for a in spans for b in spans)
    place.servers.run(
        str(Path(prefect()).parent / "zoosplat"), "run", config, "--project", f"s3://{bucket}/local", "--until", "pack"
    )
    assert same_objects(bucket, "whole", "local") > 20
    assert not place.stage_jobs()
    # The pods are gone, what they have printed is kept with the run.
    recorded = open_run(Project.at(f"s3://{bucket}/whole"))
    assert recorded.record()["state"] == "done"
    for spec in FILES_PIPELINE:
        lines = objects.read_bytes(recorded.path("logs", f"{spec.name}.log")).decode().splitlines()
        ended = [line.split()[1:] for line in lines if " exit status 0" in line]
        assert len(ended) == len(shards[spec.name])
        assert {where.partition("/")[0] for where, *_ in ended} == {row["node"] for row in shards[spec.name]}


def test_a_second_run_shows_its_stages_as_cached(place: Place) -> None:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    run = place.start(f"project=s3://{place.servers.bucket}/whole")
    until(lambda: place.state(run) in ("Completed", "Failed", "Crashed"), 600)
    with SyncPrefectClient(place.servers.env["PREFECT_API_URL"]) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))  # type: ignore[list-item]
    states = {r.name: r.state_name for r in runs}
    assert states == {**{spec.name: "Cached" for spec in FILES_PIPELINE}, "report": "Completed"}


def _training(place: Place, name: str) -> str:
    """A pipeline whose training takes long, in the midst of it; the id of its flow run."""
    config = place.config(name, train__epochs=100_000)
    run = place.start(f"config={config}", f"project=s3://{place.servers.bucket}/whole", "profile=12gb")
    until(lambda: place.running("train"))
    return run


def test_cancelling_leaves_no_job_and_no_pod(place: Place) -> None:
    run = _training(place, "cancelled")
    place.servers.run(prefect(), "flow-run", "cancel", run)
    until(lambda: not place.stage_jobs(), WITHIN_S)
    until(lambda: place.state(run) == "Cancelled")
    until(lambda: place.flow_pod() is None)


def test_killing_the_parent_leaves_no_job_and_no_pod(place: Place) -> None:
    run = _training(place, "killed")
    pod = until(place.flow_pod)
    # As the kernel does where memory runs out: the process alone, with no word to anyone.
    id = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    socket = RUN / "nodes" / pod["spec"]["nodeName"] / "containerd.sock"
    place.servers.run("ctr", "--address", str(socket), "-n", "k8s.io", "tasks", "kill", "-a", "-s", "SIGKILL", id)
    until(lambda: not place.stage_jobs(), WITHIN_S)
    until(lambda: place.state(run) in ("Crashed", "Failed"))


# -- several pipelines on one project ------------------------------------------------------------------------------
def test_pipelines_with_other_and_with_the_same_settings_run_at_once(place: Place) -> None:
    """Each ends with its own results; what two of them need is made once."""
    url = f"s3://{place.servers.bucket}/several"
    configs = [place.config("several-48"), place.config("several-32", crop__grid_size=32)]
    runs = [place.start(f"config={c}", f"project={url}", "until_stage=crop") for c in (*configs, configs[0])]
    until(lambda: all(place.state(run) in ("Completed", "Failed", "Crashed") for run in runs), 600)
    for flow_run in runs:
        assert place.state(flow_run) == "Completed", place.servers.run(prefect(), "flow-run", "logs", flow_run)
    recorded = [open_run(Project.at(url), name) for name in Project.at(url).run_ids()]
    assert [run.record()["state"] for run in recorded] == ["done"] * 3
    assert sorted(run.experiment.crop.grid_size for run in recorded) == [32, 48, 48]
    for run in recorded:
        assert run.open_input("crop").attrs["grid_size"] == run.experiment.crop.grid_size
    for stage, count in (("ingest", 1), ("center_rotation", 1), ("crop", 2)):
        ids = {run.result(stage).id for run in recorded}
        assert set(listing.list_folders(urls.join(url, "results", stage))) == ids
        assert len(ids) == count
        makers = {(run.read_mark(stage) or {})["run"] for run in recorded}
        assert len(makers) == count
        states = [run.record()["stages"][stage]["state"] for run in recorded]
        assert set(states) <= {"done", "shared", "skipped"}
        assert sum(state == "done" for state in states) == count
    assert not place.stage_jobs()


# -- the runner on these nodes, without Prefect ---------------------------------------------------------------------
def _no_progress(done: int, total: int, message: str) -> None:
    return None


def _ingest(place: Place, project: str, settings: ClusterSettings, workers: int | None = None) -> list[str]:
    """Run stage ingest in a new project; what its pods have printed, each line after where it comes from."""
    lines: list[str] = []
    experiment = load_config(place.config(project)).experiment
    with (
        KubernetesRunner(settings, None, KubernetesApi(NAMESPACE), "direct") as jobs,
        begin_run(Project.at(f"s3://{place.servers.bucket}/{project}"), experiment, ["ingest"], []) as run,
    ):
        keep: Log = lambda line, source="", at="": lines.append(f"{source}: {line}")  # noqa: E731
        jobs.run("ingest", run, workers=workers, progress=_no_progress, log=keep)
        assert run.result("ingest").is_done()
    return lines


def test_shards_of_a_drained_node_finish_elsewhere(place: Place) -> None:
    outcome: list[list[str]] = []
    thread = threading.Thread(target=lambda: outcome.append(_ingest(place, "drained", place.settings(), 3)))
    thread.start()
    try:

        def on_first() -> bool:
            shards = place.cluster.get("pods", "-l", "zoosplat.io/step=shards")["items"]
            return any(p["spec"].get("nodeName") == "zt-cpu-1" and p["status"]["phase"] == "Running" for p in shards)

        until(on_first)
        place.cluster.kubectl("drain", "zt-cpu-1", "--force", "--delete-emptydir-data", "--grace-period=1")
        thread.join(240)
    finally:
        place.cluster.kubectl("uncordon", "zt-cpu-1")
        thread.join(60)
    (lines,) = outcome
    assert {line.partition(" ")[2].partition(":")[0] for line in lines if "exit status 0" in line} >= {
        f"shard {i}" for i in range(3)
    }
    assert same_objects(place.servers.bucket, "drained/results/ingest", "whole/results/ingest") > 3


def test_a_lack_of_memory_is_named_with_the_key_to_change(place: Place) -> None:
    amounts = {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "64Mi"}}
    expected = (
        r"^ingest: prepare was OOMKilled on zt-cpu-[12]: it needs more than its 64Mi of memory; raise runner\.cpu"
    )
    with pytest.raises(UserError, match=expected):
        _ingest(place, "oom", place.settings(resources=amounts))


def test_a_failed_index_is_tried_again_then_reported_and_the_others_are_kept(place: Place) -> None:
    settings = place.settings()
    job = job_manifest(settings, "s3://b/p", "ingest", "shards", "f", [], run="f", shards=3, parallelism=3)
    container = job["spec"]["template"]["spec"]["containers"][0]
    container["command"] = ["python", "-c"]
    container["args"] = ["import os; i = os.environ['JOB_COMPLETION_INDEX']; print('shard', i); assert i != '1'"]
    logged: list[str] = []
    keep: Log = lambda line, source="", at="": logged.append(f"{source.partition(' ')[2]}: {line}")  # noqa: E731
    with KubernetesRunner(settings, None, KubernetesApi(NAMESPACE), "f") as jobs, pytest.raises(Exhausted) as caught:
        jobs._finish_job(job, _no_progress, keep, lambda: False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "ingest: shards failed for good: 1 of 3; the others are kept"
    times = 1 + settings.cpu.backoffLimitPerIndex
    assert lines[1].startswith("ingest: shard 1 of 3: exit status 1 on zt-cpu-")
    assert lines[1].endswith(f", {times} times")
    assert "shard 1" in lines
    # In which order a container's two streams are read is not said; the traceback's own last line is the last of it.
    assert [line for line in lines if line != "shard 1"][-1] == "AssertionError"
    tried = [row for row in jobs.placements if row["shard"] == "1"]
    assert len(tried) == times
    # What every pod has printed is kept, that of each failed try too.
    assert Counter(line for line in logged if ": shard " in line) == {
        "shard 0: shard 0": 1,
        "shard 1: shard 1": times,
        "shard 2: shard 2": 1,
    }
    assert logged.count("shard 1: AssertionError") == times
