"""deploy/compose.yaml: what it opens and hands out, and that its worker's command does what the file says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from zoosplat_flows.runners.containers import container_command

FOLDER = Path(__file__).resolve().parents[2] / "deploy"
TEXT = (FOLDER / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
OWN = ("minio", "prefect", "worker")


def test_nothing_is_open_to_others() -> None:
    assert set(SERVICES) == {*OWN, "postgres"}
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["healthcheck"]["test"][0] == "CMD"
        assert "privileged" not in service
        assert ("network_mode" in service) == (name == "worker")
    # On the host's network all that it listens on is open: its health, which answers this machine alone.
    assert SERVICES["worker"]["environment"]["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"


def test_own_images_can_do_little(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN:
        service = SERVICES[name]
        assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    # What a killed worker leaves is found by its label.
    monkeypatch.setenv("ZOOSPLAT_WORKER", SERVICES["worker"]["environment"]["ZOOSPLAT_WORKER"])
    assert "--label=zoosplat.worker=compose" in container_command(["docker"], "n", "crop", [])
    sockets = {name for name, s in SERVICES.items() if any(".sock" in volume for volume in s.get("volumes", []))}
    assert sockets == {"worker"}


def test_secrets_are_given_by_the_user() -> None:
    """Each has no default; the example names all that must be set, and sets nothing."""
    required = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert required == {
        "MINIO_ROOT_USER",
        "MINIO_ROOT_PASSWORD",
        "POSTGRES_PASSWORD",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "ENGINE_GROUP",
    }
    optional = set(re.findall(r"\$\{(\w+):-", TEXT))
    assert optional == {"REGISTRY", "TAG", "ENGINE_SOCKET", "ENGINE_USER", "GPUS"}
    lines = (FOLDER / "compose.env.example").read_text().splitlines()
    assert {line.removesuffix("=") for line in lines if not line.startswith("#")} == required
    for service in SERVICES.values():
        for key, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY|CONNECTION", key):
                assert re.search(r"\$\{\w+:\?", value), key


@pytest.mark.cluster
@pytest.mark.skipif(os.environ.get("ZOOSPLAT_CI_CLUSTER") != "1", reason="runs with ZOOSPLAT_CI_CLUSTER=1")
def test_the_command_of_the_worker(tmp_path: Path) -> None:
    """Against a Prefect server on PostgreSQL, twice, as after a restart: deployed once, healthy, nothing left over."""
    from servers import Servers, free_port, prefect

    shell, option, script = SERVICES["worker"]["command"]
    assert (shell, option) == ("sh", "-c")
    # What is not the image: where the programs and the deployments are.
    script = script.replace("/app/prefect.yaml", str(FOLDER.parent / "prefect.yaml"))
    docker, calls = tmp_path / "docker", tmp_path / "calls"
    docker.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n[ "$1" != ps ] || echo left-over\n')
    docker.chmod(0o755)
    label = f"zoosplat.worker={SERVICES['worker']['environment']['ZOOSPLAT_WORKER']}"
    with Servers() as servers:
        servers.prefect()
        port = free_port()
        env = {
            "PATH": f"{tmp_path}:{Path(prefect()).parent}:{os.environ['PATH']}",
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_WORKER_WEBSERVER_PORT": str(port),
        }
        for _ in range(2):
            servers.start("worker", [shell, option, script], env)
            servers.wait("worker", servers.answers(f"http://127.0.0.1:{port}/health"))
            servers.stop("worker")
        assert calls.read_text().splitlines() == [f"ps -q --filter label={label}", "rm -f left-over"] * 2
        listed = servers.run(prefect(), "deployment", "ls")
        assert re.findall(r"pipeline/\w+", listed) == ["pipeline/containers"]
