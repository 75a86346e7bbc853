"""Stages as containers of this machine's engine, podman or docker, on projects that are on S3."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoosplat.errors import UserError
from zoosplat.stages.registry import STAGES
from zoosplat.stages.runs import Run
from zoosplat.storage import urls
from zoosplat_flows.execution.executor import Log, Progress
from zoosplat_flows.runners.local import Processes, out_of_memory

# Handed on by name: values on a command line can be read by everyone on the machine.
PASSED_ON = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "OMP_NUM_THREADS",
)
# Its standard input ends however the pipeline ends, also by SIGKILL. A container that is being started is waited for.
WATCHER = """
name=$1; shift; cat >/dev/null
for i in $(seq 20); do
  if "$@" container inspect "$name"; then "$@" rm -f "$name"; exit; fi
  sleep 0.5
done
"""
KILLED = 137


def engine() -> list[str]:
    """The engine's command: ZOOSPLAT_CONTAINER_ENGINE, a docker whose server answers, or podman.

    Raises:
        UserError: there is none.
    """
    named = os.environ.get("ZOOSPLAT_CONTAINER_ENGINE")
    if named:
        return shlex.split(named)
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return ["docker"]
    if shutil.which("podman"):
        # The same words as in deploy/images/build.sh, which puts the images there.
        state = Path.home() / ".cache" / "zoosplat" / "containers"
        command = ["podman", "--root", str(state / "root"), "--runroot", str(state / "run")]
        return [*command, "--storage-driver=overlay", "--runtime", "runc", "--cgroup-manager=cgroupfs"]
    raise UserError(
        "the runner containers needs docker or podman; install one, or name it in ZOOSPLAT_CONTAINER_ENGINE"
    )


def image_of(stage: str) -> str:
    """A stage's image: ZOOSPLAT_IMAGE_REGISTRY (localhost) and ZOOSPLAT_IMAGE_TAG (dev) say where it comes from."""
    registry = os.environ.get("ZOOSPLAT_IMAGE_REGISTRY", "localhost")
    return f"{registry}/zoosplat-{stage.replace('_', '-')}:{os.environ.get('ZOOSPLAT_IMAGE_TAG', 'dev')}"


def container_command(command: list[str], name: str, stage: str, arguments: list[str]) -> list[str]:
    """The engine's words for a stage: nothing of this machine but its network, the S3 variables, and GPUs if asked for.

    ZOOSPLAT_CONTAINER_GPUS, such as `all`, gives GPUs to the stages that use them. ZOOSPLAT_WORKER is a label, by which
    a worker in a container, with which its watchers die, finds what an earlier one has left.
    """
    gpus = os.environ.get("ZOOSPLAT_CONTAINER_GPUS") if STAGES[stage].gpu else None
    return [
        *command,
        "run",
        "--rm",
        f"--name={name}",
        "--label=zoosplat.stage=" + stage,
        "--label=zoosplat.worker=" + os.environ.get("ZOOSPLAT_WORKER", ""),
        "--read-only",
        "--tmpfs=/tmp",
        "--user=10001:10001",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--network=host",
        "--ulimit=nofile=20000:20000",
        "--ulimit=nproc=20000:20000",
        *([f"--gpus={gpus}", "--shm-size=1g"] if gpus else []),  # GPUs may talk by way of shared memory
        f"--env={urls.S3_ONLY}=1",
        *(f"--env={name}" for name in PASSED_ON if name in os.environ),
        image_of(stage),
        *arguments,
    ]


class Containers(Processes):
    """`Processes`, each in a container of its own; leaving the `with` block, or being killed, removes them all."""

    def __init__(self) -> None:
        super().__init__()
        self._engine = engine()
        self._watchers: set[subprocess.Popen[bytes]] = set()

    def run(self, stage: str, run: Run, *, workers: int | None = None, progress: Progress, log: Log) -> None:
        """As `Processes.run`.

        Raises:
            UserError: also when the image is missing, or the project or the recording is not on S3.
        """
        for url in (run.project.url, run.experiment.data.directory):
            if not urls.is_s3(url):
                raise UserError(f"{url}: containers see no folders of this machine; use s3://bucket/prefix")
        found = subprocess.run([*self._engine, "image", "inspect", image_of(stage)], capture_output=True)
        if found.returncode != 0:
            raise UserError(
                f"{stage}: there is no image {image_of(stage)}; make images, or set ZOOSPLAT_IMAGE_REGISTRY"
            )
        super().run(stage, run, workers=workers, progress=progress, log=log)

    def stop(self) -> None:
        super().stop()
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            assert watcher.stdin is not None
            watcher.stdin.close()

    def _wait(self, stage: str, command: list[str], progress: Progress, log: Log) -> None:
        name = f"zoosplat-{stage.replace('_', '-')}-{secrets.token_hex(6)}"
        # After `python -m zoosplat_<stage>`, which is the image's entry point.
        inside = container_command(self._engine, name, stage, command[3:])
        with self._watched(name):
            try:
                super()._wait(stage, inside, progress, log)
            except RuntimeError as error:
                if f"exit status {KILLED}" in str(error):
                    raise RuntimeError(f"{stage}: its container was killed; {out_of_memory(stage)}") from None
                raise

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        quiet = subprocess.DEVNULL
        command = ["bash", "-c", WATCHER, "watcher", name, *self._engine]
        watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
        assert watcher.stdin is not None
        with self._lock:
            self._watchers.add(watcher)
        ended = False
        try:
            yield
            ended = True
        except (UserError, RuntimeError):  # the client has ended, and its container with it
            ended = True
            raise
        finally:
            with self._lock:
                self._watchers.discard(watcher)
            if ended:
                watcher.kill()
            watcher.stdin.close()
            watcher.wait()
