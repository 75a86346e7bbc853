"""The Helm chart, rendered by helm: what it makes, what it may do, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat_flows.runners.kubernetes.manifests import job_manifest
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings, overlay

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "zoosplat"
BUILT = Path.home() / ".cache" / "zoosplat" / "bin" / "helm"
HELM = str(BUILT) if BUILT.is_file() else shutil.which("helm")
Object = dict[str, Any]

pytestmark = pytest.mark.skipif(HELM is None, reason="no helm here; `make cluster-tools` builds it")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, check=False)


def template(*arguments: str) -> subprocess.CompletedProcess[str]:
    return helm("template", "zoosplat", str(CHART), "-n", "lab", "--kube-version", "1.36.3", *arguments)


def render(*arguments: str) -> dict[tuple[str, str], Object]:
    """All objects by kind and name."""
    done = template("--set", "register.enabled=true", *arguments)
    assert done.returncode == 0, done.stderr
    objects = [o for o in yaml.safe_load_all(done.stdout) if o]
    by_name = {(o["kind"], o["metadata"]["name"]): o for o in objects}
    assert len(by_name) == len(objects)
    return by_name


def settings(objects: dict[tuple[str, str], Object], folder: Path) -> ClusterSettings:
    file = folder / "settings.yaml"
    file.write_text(objects["ConfigMap", "zoosplat-settings"]["data"]["settings.yaml"])
    return ClusterSettings.read(str(file))


def flow_manifest(objects: dict[tuple[str, str], Object]) -> Object:
    """The Job of a flow run, as the work pool's template has it, before Prefect fills it in."""
    base = json.loads(objects["ConfigMap", "zoosplat-job-template"]["data"]["baseJobTemplate.json"])
    manifest: Object = base["job_configuration"]["job_manifest"]
    return manifest


def pod_specs(objects: dict[tuple[str, str], Object]) -> Iterator[tuple[str, Object]]:
    for (kind, name), o in objects.items():
        if kind == "Pod":
            yield name, o["spec"]
        elif kind in ("Job", "Deployment"):
            yield name, o["spec"]["template"]["spec"]
    yield "flow", flow_manifest(objects)["spec"]["template"]["spec"]


def test_lint() -> None:
    done = helm("lint", "--strict", str(CHART), "--kube-version", "1.36.3")
    assert done.returncode == 0, done.stdout


def test_every_kind_that_is_made_is_known() -> None:
    assert sorted(render()) == [
        ("ClusterRole", "zoosplat-nodes-lab"),
        ("ClusterRoleBinding", "zoosplat-nodes-lab"),
        ("ConfigMap", "zoosplat-job-template"),
        ("ConfigMap", "zoosplat-settings"),
        ("Job", "zoosplat-register"),
        ("NetworkPolicy", "zoosplat-flow"),
        ("NetworkPolicy", "zoosplat-stage"),
        ("Pod", "zoosplat-test"),
        ("Role", "zoosplat-runner"),
        ("RoleBinding", "zoosplat-runner"),
        ("ServiceAccount", "zoosplat-runner"),
        ("ServiceAccount", "zoosplat-stage"),
    ]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("runner.cpu.paralelism=3", "paralelism"),
        ("runner.images.tagg=x", "tagg"),
        ("profiles.24gb.gpu=1", "gpu"),
        ("profiles.huge.gpus=1", "huge"),
        ("flow.resources.limit.cpu=1", "limit"),
        ("serviceAccounts.runer.annotations.a=b", "runer"),
        ("networkPolicy.enable=true", "enable"),
        ("register.enable=true", "enable"),
        ("register.job.name=x", "job"),
        ("replicas=2", "replicas"),
        ("runner.cpu.parallelism=0", "parallelism"),
        ("runner.cpu.parallelism=many", "parallelism"),
        ("runner.hostNetwork=maybe", "hostNetwork"),
        ("runner.images.pullPolicy=Sometimes", "pullPolicy"),
        ("runner.s3.endpoint=minio:9000", "endpoint"),
        ("profiles.24gb.gpus=none", "gpus"),
        ("profiles.24gb.memory=32 GB", "memory"),
        ("profiles.24gb.nodeSelector.zoosplat\\.io/gpu-memory=null", "nodeSelector"),
        ("profiles.24gb.config.model=3", "model"),
        ("networkPolicy.s3Ports={http}", "s3Ports"),
        ("flow.apiUrl=http://prefect:4200", "apiUrl"),
    ],
)
def test_schema_refuses_typos_and_wrong_types(value: str, complaint: str) -> None:
    done = template("--set", value)
    assert done.returncode != 0
    assert "schema" in done.stderr
    assert complaint in done.stderr


def test_every_object_of_the_schema_is_closed() -> None:
    def closed(node: Any) -> Iterator[Object]:
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for inner in node.values():
                yield from closed(inner)

    objects = list(closed(json.loads((CHART / "values.schema.json").read_text())))
    assert len(objects) > 10
    assert [o for o in objects if o.get("additionalProperties") not in (False, {"type": "string"})] == []


def test_runner_reads_the_settings(tmp_path: Path) -> None:
    read = settings(render(), tmp_path)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert (read.namespace, read.serviceAccount) == ("lab", "zoosplat-stage")
    assert read.ordered() == ["12gb", "24gb", "48gb", "80gb"] == list(values["profiles"])
    for name, profile in values["profiles"].items():
        assert read.profile(name).model_dump(exclude_none=True, mode="json") == profile
    assert read.cpu.parallelism == values["runner"]["cpu"]["parallelism"]
    assert read.s3.secretName == values["runner"]["s3"]["secretName"]


def test_overlays_are_keys_of_the_experiment(tmp_path: Path, experiment: Experiment) -> None:
    read = settings(render(), tmp_path)
    gaussians = [overlay(experiment, n, read.profile(n).config).model.max_gaussians for n in read.ordered()]
    assert gaussians == [64000, 64000, 96000, 128000]


def test_numbers_survive_rendering(tmp_path: Path, experiment: Experiment) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("profiles: {80gb: {config: {train.lr: 0.00001, model.max_gaussians: 2000000}}}")
    changes = settings(render("-f", str(file)), tmp_path).profile("80gb").config
    changed = overlay(experiment, "80gb", changes)
    assert (changed.train.lr, changed.model.max_gaussians) == (1e-5, 2_000_000)


@pytest.fixture
def experiment() -> Experiment:
    return read_config(str(ROOT / "configs" / "mouse_6cam.yaml"))


def test_profiles_are_written_down_once() -> None:
    found = [
        path
        for folder in ("helm", "flows", "shared", "services", "deploy")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".yaml", ".yml", ".py", ".json") and "gpu-memory: 24gb" in path.read_text()
    ]
    assert found == [CHART / "values.yaml"]


def test_containers_are_confined(tmp_path: Path) -> None:
    objects = render()
    stage = job_manifest(
        settings(objects, tmp_path), "s3://b/p", "crop", "shards", "d", ["--shard", "0/1"], run="r", shards=1
    )
    specs = [*pod_specs(objects), ("stage", stage["spec"]["template"]["spec"])]
    assert sorted(name for name, _ in specs) == ["flow", "stage", "zoosplat-register", "zoosplat-test"]
    for name, pod in specs:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] == 10001, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any("hostPath" in volume for volume in pod["volumes"]), name
        assert not pod["hostNetwork"], name
        # The API server's token is mounted in flows alone.
        assert pod["automountServiceAccountToken"] is (name == "flow"), name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
                assert amounts["cpu"], name
                assert amounts["memory"], name


def test_roles_are_exactly_what_the_runner_calls() -> None:
    objects = render()
    assert objects["Role", "zoosplat-runner"]["rules"] == [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    assert objects["ClusterRole", "zoosplat-nodes-lab"]["rules"] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}
    ]
    runner = [{"kind": "ServiceAccount", "name": "zoosplat-runner", "namespace": "lab"}]
    assert objects["RoleBinding", "zoosplat-runner"]["subjects"] == runner
    assert objects["ClusterRoleBinding", "zoosplat-nodes-lab"]["subjects"] == runner


def test_nothing_outside_the_namespace_without_the_cluster_role() -> None:
    assert not [kind for kind, _ in render("--set", "clusterRole=false") if kind.startswith("Cluster")]


def test_secrets_are_references() -> None:
    objects = render()
    assert not any(kind == "Secret" for kind, _ in objects)
    base = json.loads(objects["ConfigMap", "zoosplat-job-template"]["data"]["baseJobTemplate.json"])
    assert not [name for name in base["variables"]["properties"]["env"]["default"] if "KEY" in name]
    for name, pod in pod_specs(objects):
        container = pod["containers"][0]
        if name == "flow":
            assert container["envFrom"] == [{"secretRef": {"name": "zoosplat-s3"}}]
            continue
        keys = {e["name"]: e for e in container["env"] if e["name"] in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        assert len(keys) == 2
        for key, entry in keys.items():
            assert entry["valueFrom"] == {"secretKeyRef": {"name": "zoosplat-s3", "key": key}}


def test_without_a_secret_nothing_refers_to_one() -> None:
    done = template("--set", "register.enabled=true", "--set", "runner.s3.secretName=null")
    assert done.returncode == 0, done.stderr
    assert "secretKeyRef" not in done.stdout
    assert "secretRef" not in done.stdout


def test_network_policies_select_the_pods_and_let_nobody_in(tmp_path: Path) -> None:
    objects = render()
    policies = {name: o["spec"] for (kind, name), o in objects.items() if kind == "NetworkPolicy"}
    stage = job_manifest(settings(objects, tmp_path), "s3://b/p", "crop", "prepare", "d", ["--prepare"], run="r")
    labels = {
        "zoosplat-stage": [stage["spec"]["template"]["metadata"]["labels"]],
        "zoosplat-flow": [
            flow_manifest(objects)["spec"]["template"]["metadata"]["labels"],
            objects["Job", "zoosplat-register"]["spec"]["template"]["metadata"]["labels"],
            objects["Pod", "zoosplat-test"]["metadata"]["labels"],
        ],
    }
    for name, pods in labels.items():
        assert policies[name]["ingress"] == []
        assert policies[name]["policyTypes"] == ["Ingress", "Egress"]
        for pod in pods:
            chosen = policies[name]["podSelector"]["matchLabels"]
            assert chosen.items() <= pod.items()
            # Prefect's worker puts its own in place of these.
            assert not any(key.startswith("app.kubernetes.io/") for key in chosen)
    ports = {name: {p["port"] for rule in policies[name]["egress"] for p in rule["ports"]} for name in labels}
    assert ports == {"zoosplat-stage": {53, 443, 9000}, "zoosplat-flow": {53, 443, 9000, 4200, 6443}}


def test_prefect_takes_the_job_template() -> None:
    """Each placeholder is a variable and each variable is used, which Prefect checks when the pool is made."""
    text = render()["ConfigMap", "zoosplat-job-template"]["data"]["baseJobTemplate.json"]
    from prefect.utilities.templating import find_placeholders

    base = json.loads(text)
    used = {p.name for p in find_placeholders(base["job_configuration"])}
    assert used == set(base["variables"]["properties"])
    defaults = {name: v.get("default") for name, v in base["variables"]["properties"].items()}
    assert defaults["namespace"] == "lab"
    assert defaults["image"] == "localhost/zoosplat-flows:dev"
    assert defaults["service_account_name"] == "zoosplat-runner"
    assert defaults["env"]["ZOOSPLAT_SETTINGS"] == "/etc/zoosplat/settings.yaml"
