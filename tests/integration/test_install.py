"""Installing one stage brings what that stage needs, nothing of the others; what make targets need is named at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zoosplat.stages.registry import STAGES

if TYPE_CHECKING:
    from tests.conftest import Recording, Stages

ROOT = Path(__file__).resolve().parents[2]
UV = [sys.executable, "-m", "uv"]


def test_crop_alone_brings_no_torch_and_runs(recording: Recording, stages: Stages, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([*UV, "venv", "-q", "--python", sys.executable, str(environment)], check=True)
    python = str(environment / "bin" / "python")
    install = [*UV, "pip", "install", "-q", "--python", python, "-c", str(ROOT / "constraints.txt"), f"{ROOT}[crop]"]
    subprocess.run(install, check=True)
    listing = [*UV, "pip", "list", "--python", python, "--format", "json"]
    listed = subprocess.run(listing, capture_output=True, check=True)
    installed = {entry["name"] for entry in json.loads(listed.stdout)}
    assert "zoosplat" in installed
    assert not installed & {"torch", "gsplat", "prefect", "scipy", "av", "h5py", "matplotlib", "tensorboard"}

    project = recording.write_project(tmp_path / "project")
    for name in ("ingest", "center_rotation"):
        assert stages(name, project).status == 0
    # -P: not the checkout's own packages, though the tests run in it.
    command = [python, "-P", "-m", "zoosplat_crop", "--project", project]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "project" / "latest" / "crop.zarr").is_dir()


# -- what make targets need of a machine ----------------------------------------------------------------------------
TARGETS = ("images", "cluster-tools", "demo-containers", "demo-kubernetes", "test-cluster")
COMMANDS = {  # and Debian's packages
    "podman": "podman",
    "runc": "runc",
    "containerd": "containerd",
    "ctr": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "loopback": "containernetworking-plugins",
    "openssl": "openssl",
    "initdb": "postgresql",
    "debootstrap": "debootstrap",
}
IMAGES = [*(name.replace("_", "-") for name in STAGES), "flows"]
OFF_PATH = [Path("/usr/sbin"), Path("/usr/lib/cni"), *Path("/usr/lib/postgresql").glob("*/bin")]


class Machine:
    """A folder of stand-ins for commands, the only ones on the PATH of what is run."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home = folder / "bin", folder / "home"
        self.bin.mkdir()
        self.home.mkdir()
        for name in ("bash", "dirname", "env"):
            found = shutil.which(name)
            assert found
            (self.bin / name).symlink_to(found)
        for name in COMMANDS:
            self.command(name)
        self.command("podman", *(f"echo localhost/zoosplat-{image}:dev" for image in IMAGES))
        self.command("minio")
        self.command("go", "echo go1.26.1")
        self.free(100)

    def command(self, name: str, *lines: str) -> None:
        (self.bin / name).write_text("\n".join(["#!/bin/bash", *lines, ""]))
        (self.bin / name).chmod(0o755)

    def free(self, gigabytes: int) -> None:
        self.command("df", "echo Filesystem 1024-blocks Used", f"echo disk 1 1 {gigabytes * 10**6} 1% /")

    def run(self, *command: str) -> tuple[int, list[str]]:
        """Exit status and lines on standard error. Nothing but the check runs, so it must end within seconds."""
        env = {"PATH": str(self.bin), "HOME": str(self.home)}
        done = subprocess.run(
            ["/bin/bash", *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
        return done.returncode, done.stderr.splitlines()

    def check(self, target: str) -> list[str]:
        """The lines of the check, of which those about root are the same for every user."""
        status, lines = self.run("deploy/requirements.sh", target)
        assert all(line.startswith(f"{target}: ") for line in lines), lines
        lines = [line.removeprefix(f"{target}: ") for line in lines]
        assert status == (2 if lines else 0)
        if os.geteuid() != 0:
            lines = [line for line in lines if not line.startswith("only root") and "newuidmap" not in line]
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def elsewhere(command: str) -> bool:
    """Whether this machine has a command in a folder that is searched beside the PATH."""
    return any((folder / command).exists() for folder in OFF_PATH)


@pytest.mark.parametrize("target", TARGETS)
def test_a_machine_with_everything_is_fine(machine: Machine, target: str) -> None:
    assert machine.check(target) == []


@pytest.mark.parametrize("target", ["demo-kubernetes", "test-cluster"])
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "debootstrap"])
def test_a_command_that_is_missing_is_named_with_its_package(machine: Machine, target: str, command: str) -> None:
    if elsewhere(command):
        pytest.skip(f"{command} is on this machine, in a folder that is searched too")
    (machine.bin / command).unlink()
    package = COMMANDS[command]
    assert machine.check(target) == [
        f"there is no {command}; it is in Debian's package {package}",
        f"apt-get install {package}",
    ]


def test_all_that_is_missing_is_named_at_once(machine: Machine) -> None:
    for path in machine.bin.iterdir():
        path.unlink()
    lines = machine.check("demo-kubernetes")
    for command in ("podman", "containerd", "ctr", "containerd-shim-runc-v2", "openssl"):
        assert f"there is no {command}; it is in Debian's package {COMMANDS[command]}" in lines
    assert any(line.startswith("there is no go; install Go 1.21 or newer") for line in lines)
    install = lines[-1].removeprefix("apt-get install ").split()
    assert [name for name in install if not elsewhere(name)] == [
        name for name in ("podman", "runc", "containerd", "openssl") if not elsewhere(name)
    ] + [p for c, p in (("loopback", "containernetworking-plugins"), ("initdb", "postgresql")) if not elsewhere(c)]


def test_old_go_little_disk_and_missing_images_are_named(machine: Machine) -> None:
    machine.command("go", "echo go1.19.8")
    machine.free(3)
    assert machine.check("cluster-tools") == [
        "go is version 1.19.8; install Go 1.21 or newer, from its own site or as Debian 13's package golang-go",
        f"building the tools takes 7 GB of disk, and {machine.home} has 3 GB free",
    ]
    machine.command("podman", f"echo localhost/zoosplat-{IMAGES[0]}:dev")
    assert machine.check("demo-containers") == [f"there are no images of {', '.join(IMAGES[1:])}; run make images"]
    (machine.bin / "minio").unlink()
    (machine.bin / "go").unlink()
    assert [line.split(";")[0] for line in machine.check("demo-containers")[1:]] == ["there is no go"]


@pytest.mark.parametrize(
    ("script", "missing"), [("images/build.sh", "podman"), ("cluster/build.sh", "go")], ids=["images", "cluster-tools"]
)
def test_builds_check_before_they_work(machine: Machine, script: str, missing: str) -> None:
    (machine.bin / missing).unlink()
    status, lines = machine.run(f"deploy/{script}")
    assert status == 2
    assert f"there is no {missing}" in lines[0]
    assert not list(machine.home.iterdir())


@pytest.mark.parametrize("target", ["demo-containers", "demo-kubernetes", "test-cluster"])
def test_make_checks_before_it_builds(target: str) -> None:
    # Within `make test` this make is an inner one, which would print its folder first.
    command = ["make", "--no-print-directory", "-n", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == f"deploy/requirements.sh {target}"


def test_the_documentation_lists_the_packages() -> None:
    script = (ROOT / "deploy" / "requirements.sh").read_text()
    pairs = script.partition('PACKAGES="')[2].partition('"')[0].split()
    assert dict(zip(pairs[::2], pairs[1::2], strict=True)) == {**COMMANDS, "newuidmap": "uidmap"}
    for page in ("README.md", "docs/kubernetes.md"):
        text = (ROOT / page).read_text()
        assert [name for name in {*COMMANDS.values(), "uidmap"} if f"{name}" not in text] == [], page
