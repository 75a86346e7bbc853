"""Runs stages as containers of this machine's engine, podman or docker, for projects on S3."""

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
from zoosplat.stages.contract import StageProgress
from zoosplat.stages.registry import STAGES
from zoosplat.stages.runs import Run
from zoosplat.storage import urls
from zoosplat_flows.runners.images import IMAGE_USER_ID, image_name
from zoosplat_flows.runners.local import LocalRunner, out_of_memory_advice
from zoosplat_flows.runners.protocol import Log

# Environment variables that a container gets with the values that they have here. They are handed on by name, since
# everyone on the machine can read the values on a command line.
INHERITED_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "OMP_NUM_THREADS",
)
# A shell program that removes a container when this process ends: its standard input is a pipe of this process, which
# the system closes even after SIGKILL. A container that is still being started is waited for.
WATCHER = """
name=$1; shift; cat >/dev/null
for i in $(seq 20); do
  if "$@" container inspect "$name"; then "$@" rm -f "$name"; exit; fi
  sleep 0.5
done
"""
KILLED_STATUS = 137  # exit status of an engine whose container was ended by SIGKILL: 128 + 9


def find_engine() -> list[str]:
    """The command of the container engine: ZOOSPLAT_CONTAINER_ENGINE, a docker whose server answers, or podman.

    Raises:
        UserError: there is no engine.
    """
    named = os.environ.get("ZOOSPLAT_CONTAINER_ENGINE")
    if named:
        return shlex.split(named)
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return ["docker"]
    if shutil.which("podman"):
        # The same folders and options as in deploy/images/build.sh, which builds the images with them.
        state = Path.home() / ".cache" / "zoosplat" / "containers"
        command = ["podman", "--root", str(state / "root"), "--runroot", str(state / "run")]
        return [*command, "--storage-driver=overlay", "--runtime", "runc", "--cgroup-manager=cgroupfs"]
    raise UserError(
        "the runner containers needs docker or podman; install one, or name it in ZOOSPLAT_CONTAINER_ENGINE"
    )


def image_of(stage: str) -> str:
    """A stage's image. Its registry is ZOOSPLAT_IMAGE_REGISTRY (localhost), its tag ZOOSPLAT_IMAGE_TAG (dev)."""
    registry = os.environ.get("ZOOSPLAT_IMAGE_REGISTRY", "localhost")
    return image_name(registry, stage, os.environ.get("ZOOSPLAT_IMAGE_TAG", "dev"))


def container_command(engine: list[str], name: str, stage: str, arguments: list[str]) -> list[str]:
    """The command that runs a stage in a container.

    The container gets nothing of this machine but its network, the variables of S3, and GPUs where they are asked for:
    ZOOSPLAT_CONTAINER_GPUS, such as `all`, gives GPUs to the stages that use them. The value of ZOOSPLAT_WORKER becomes
    a label. A worker that itself runs in a container finds by the label what an earlier worker has left behind, whose
    watchers ended with it.

    Args:
        engine: the engine's command, see `find_engine`.
        name: name of the container.
        stage: the stage.
        arguments: arguments of the stage's command.
    """
    gpus = os.environ.get("ZOOSPLAT_CONTAINER_GPUS") if STAGES[stage].gpu else None
    return [
        *engine,
        "run",
        "--rm",
        f"--name={name}",
        "--label=zoosplat.stage=" + stage,
        "--label=zoosplat.worker=" + os.environ.get("ZOOSPLAT_WORKER", ""),
        "--read-only",
        "--tmpfs=/tmp",
        f"--user={IMAGE_USER_ID}:{IMAGE_USER_ID}",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--network=host",
        "--ulimit=nofile=20000:20000",
        "--ulimit=nproc=20000:20000",
        *([f"--gpus={gpus}", "--shm-size=1g"] if gpus else []),  # GPUs may exchange data through shared memory
        f"--env={urls.S3_ONLY}=1",
        *(f"--env={variable}" for variable in INHERITED_VARIABLES if variable in os.environ),
        image_of(stage),
        *arguments,
    ]


class ContainerRunner(LocalRunner):
    """Runs each stage in a container of its own.

    All containers are removed when the `with` block is left, and also when this process is killed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._engine = find_engine()
        self._watchers: set[subprocess.Popen[bytes]] = set()

    def run(self, stage: str, run: Run, *, workers: int | None = None, progress: StageProgress, log: Log) -> None:
        """Run a whole stage in a container and wait for it, as `LocalRunner.run` does in a process.

        Raises:
            UserError: also where the image is missing, or the project or the recording is not on S3.
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
        """Remove every container and refuse new ones."""
        super().stop()
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            assert watcher.stdin is not None
            watcher.stdin.close()

    def _run_command(self, stage: str, command: list[str], progress: StageProgress, log: Log) -> None:
        name = f"zoosplat-{stage.replace('_', '-')}-{secrets.token_hex(6)}"
        # The image's entry point is `python -m zoosplat_<stage>`, the first three words of the command.
        in_container = container_command(self._engine, name, stage, command[3:])
        with self._watched(name):
            try:
                super()._run_command(stage, in_container, progress, log)
            except RuntimeError as error:
                if f"exit status {KILLED_STATUS}" in str(error):
                    raise RuntimeError(f"{stage}: its container was killed; {out_of_memory_advice(stage)}") from None
                raise

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """Keep a watcher process while the block runs, which removes the container if this process ends meanwhile."""
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
        except (UserError, RuntimeError):  # the engine's command has ended, and with it the container
            ended = True
            raise
        finally:
            with self._lock:
                self._watchers.discard(watcher)
            if ended:
                watcher.kill()
            watcher.stdin.close()
            watcher.wait()
