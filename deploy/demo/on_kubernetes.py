"""`make demo-kubernetes`: the demo on a Kubernetes of this machine with two CPU nodes and two GPU nodes.

The nodes are real: each has a containerd and a kubelet. Their GPUs are not real, so the stages rasterise on the CPU.
The demo needs root, the images, and what `make cluster-tools` builds.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from servers import BIN, Servers, prefect, show_results

from zoosplat.stages.registry import PIPELINE, PREPROCESSING, SEGMENT
from zoosplat_flows.runners.containers import find_engine

ROOT = Path(__file__).resolve().parents[2]
CPU_IMAGES = [*(spec.name.replace("_", "-") for spec in PIPELINE if not spec.gpu), "flows"]
GPU_IMAGES = [spec.name.replace("_", "-") for spec in PIPELINE if spec.gpu]
NAMESPACE = "zoosplat"
FOLDER = Path.home() / ".cache" / "zoosplat" / "cluster"


class Cluster:
    """A Kubernetes with the chart installed and a worker for its flows; leaving the `with` block removes it.

    Args:
        servers: with MinIO and Prefect started; their environment gets KUBECONFIG.
        folder: folder of the cluster's files; its path must be short, because paths of sockets are limited.
        port: port of the API server; etcd uses the next two.
        prefix: beginning of the names of the nodes.
        kubelet_port: port of the first node's kubelet.
    """

    def __init__(
        self,
        servers: Servers,
        folder: Path = FOLDER,
        port: int = 6443,
        prefix: str = "",
        kubelet_port: int = 10351,
    ) -> None:
        self.servers, self.port, self.prefix, self.kubelet_port = servers, port, prefix, kubelet_port
        servers.env |= {
            "ZOOSPLAT_CLUSTER": str(folder),
            "ZOOSPLAT_CLUSTER_PORT": str(port),
            "KUBECONFIG": str(folder / "kubeconfig"),
        }

    def __enter__(self) -> Cluster:
        self.script("down.sh")  # removes what a killed run has left
        try:
            self.script("up.sh")
            self._nodes()
            self._install()
        except BaseException:
            self.script("down.sh")
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.servers.stop("worker")
        self.script("down.sh")

    def script(self, name: str, *arguments: str) -> None:
        self.servers.run(str(ROOT / "deploy" / "cluster" / name), *arguments)

    def kubectl(self, *arguments: str) -> str:
        return self.servers.run(str(BIN / "kubectl"), "-n", NAMESPACE, *arguments)

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", "-o", "json", *arguments))

    def helm(self, *arguments: str) -> None:
        self.servers.run(str(BIN / "helm"), "-n", NAMESPACE, *arguments)

    def _nodes(self) -> None:
        words = find_engine()
        # podman puts only one image into an archive unless it is told otherwise; docker puts all into it.
        save = [*words, "save", *(["-q", "--multi-image-archive"] if Path(words[0]).name == "podman" else [])]
        gpu = ["--gpus", "1", "--taint", "nvidia.com/gpu=present:NoSchedule"]
        kinds: list[tuple[list[str], list[str], dict[str, str]]] = [
            (CPU_IMAGES, [], {"cpu-1": "pool=cpu", "cpu-2": "pool=cpu"}),
            (GPU_IMAGES, gpu, {f"gpu-{size}": f"zoosplat.io/gpu-memory={size}" for size in ("12gb", "24gb")}),
        ]
        port = self.kubelet_port
        for images, options, nodes in kinds:
            with tempfile.TemporaryDirectory(dir=BIN.parent) as folder:  # not /tmp, which may be in memory
                archive = f"{folder}/images.tar"
                names = [f"localhost/zoosplat-{image}:dev" for image in images]
                self.servers.run(*save, "-o", archive, *names)
                for name, labels in nodes.items():
                    self.script("node.sh", self.prefix + name, str(port), "--labels", labels, *options, archive)
                    port += 1
                    print(f"demo: node {self.prefix + name} is ready", flush=True)

    def _install(self) -> None:
        servers = self.servers
        self.kubectl("create", "namespace", NAMESPACE)
        secret = servers.folder / "secret"  # on a command line, every user could read it
        secret.touch(mode=0o600)
        secret.write_text(
            "".join(f"{key}={servers.env[key]}\n" for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
        )
        self.kubectl("create", "secret", "generic", "zoosplat-s3", f"--from-env-file={secret}")
        # The chart's Job registers the deployments in pools that must exist before. The chart has the template of one.
        servers.run(prefect(), "work-pool", "create", "zoosplat", "--type", "process")
        servers.run(prefect(), "work-pool", "create", "kubernetes", "--type", "kubernetes")
        values = [
            f"runner.s3.endpoint={servers.env['AWS_ENDPOINT_URL']}",
            f"flow.apiUrl={servers.env['PREFECT_API_URL']}",
            f"flow.env.KUBERNETES_SERVICE_PORT={self.port}",
        ]
        file = ROOT / "deploy" / "demo" / "values.yaml"
        chart = ROOT / "helm" / "zoosplat"
        self.helm("install", "zoosplat", str(chart), "-f", str(file), "--set-string", ",".join(values), "--timeout=5m")
        template = servers.folder / "base-job-template.json"
        template.write_text(self.get("configmap", "zoosplat-job-template")["data"]["baseJobTemplate.json"])
        servers.run(prefect(), "work-pool", "update", "kubernetes", "--base-job-template", str(template))
        servers.worker("kubernetes", "kubernetes")


def placements(api: str) -> list[dict[str, Any]]:
    """Where shards and stages of all flow runs have run, from the tables that the flow leaves in Prefect."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    from zoosplat_flows.pipeline import PLACEMENT

    with SyncPrefectClient(api) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[PLACEMENT])))
    return [row for artifact in found for row in json.loads(str(artifact.data))]


def copy_masks(bucket: str, one: str, other: str) -> None:
    """Make a project that has the runs of another one and, of their results, the masks alone: to be reused."""
    import boto3

    client = boto3.Session().client("s3")
    for folder in ("runs", f"results/{SEGMENT}"):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{one}/{folder}/"):
            for found in page.get("Contents", []):
                key = str(found["Key"])
                client.copy_object(Bucket=bucket, Key=other + key.removeprefix(one), CopySource=f"{bucket}/{key}")


def same_objects(bucket: str, one: str, other: str) -> int:
    """How many objects of the stages before the model are byte for byte the same in two projects.

    Raises SystemExit where one differs.
    """
    import boto3

    pages = boto3.Session().client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket)
    tags = {o["Key"]: o["ETag"] for page in pages for o in page.get("Contents", [])}
    written = [f"{spec.writes}/" for spec in PREPROCESSING]
    tags = {key: tag for key, tag in tags.items() if any(name in key for name in written)}
    groups = [
        {key.removeprefix(project): tag for key, tag in tags.items() if key.startswith(project)}
        for project in (f"{one}/", f"{other}/")
    ]
    different = [key for key in groups[0].keys() | groups[1].keys() if groups[0].get(key) != groups[1].get(key)]
    if different or not groups[0]:
        raise SystemExit(f"demo: the results differ from those of a local run: {', '.join(sorted(different)[:5])}")
    return len(groups[0])


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("demo: nodes of this machine need root")
    with Servers() as servers:
        print("demo: starting MinIO, PostgreSQL, Prefect and Kubernetes", flush=True)
        servers.minio()
        servers.prefect()
        config = servers.demo_recording()
        with Cluster(servers):
            project = f"s3://{servers.bucket}/cluster"
            servers.pipeline("kubernetes", f"config={config}", f"project={project}", "profile=24gb")
            # One stage runs by its own deployment on the other kind of node.
            servers.pipeline("render", f"project={project}", "profile=12gb", 'force=["render"]', quiet=True)
            rows = placements(servers.env["PREFECT_API_URL"])
        # The masks of two machines may differ in a pixel, because their arithmetic does. What is made of the same masks
        # has the same bytes.
        copy_masks(servers.bucket, "cluster", "masks")
        local = [config, "--project", f"s3://{servers.bucket}/local", "--until", "pack"]
        local += ["--set", f"reuse=s3://{servers.bucket}/masks"]
        servers.run(str(Path(prefect()).parent / "zoosplat"), "run", *local)
        n = same_objects(servers.bucket, "cluster", "local")
        print(f"demo: {n} objects between masks and model are, byte for byte, those of a local run with these masks")
        show_results(project, ROOT / "demo-kubernetes")
        print(f"{'stage':<16}{'step':<9}{'shard':<6}{'node':<10}started")
        for row in sorted(rows, key=lambda row: row["started"]):
            print(f"{row['stage']:<16}{row['step']:<9}{row['shard']:<6}{row['node']:<10}{row['started']}")
        nodes = Counter(row["node"] for row in rows)
        print(", ".join(f"{node}: {count} pods" for node, count in sorted(nodes.items())))


if __name__ == "__main__":
    main()
