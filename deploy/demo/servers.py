"""Starts MinIO, PostgreSQL, Prefect's server and a worker for one demonstration or test, and stops them at its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

BIN = Path.home() / ".cache" / "zoosplat" / "bin"
READY_S = 180.0  # seconds that a server may take until it is ready
# Folders of the programs of a distribution's PostgreSQL packages, the newest version first.
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: -float(p.parent.name))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def without_blas_choice(env: Mapping[str, str]) -> dict[str, str]:
    """A copy of an environment without the choice of BLAS kernels.

    Containers do not have this choice, and results are compared with theirs: other kernels round otherwise.
    """
    return {key: value for key, value in env.items() if key != "OPENBLAS_CORETYPE"}


def program(name: str, *folders: Path, hint: str) -> str:
    """The path of a program. Raises SystemExit with what to do where it is missing."""
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        sys.exit(f"demo: there is no {name}; {hint}")
    return found


class Servers:
    """Starts servers on loopback; leaving the `with` block stops them, the last one first, and removes their data.

    Attributes:
        folder: their data and logs.
        env: what their clients need: credentials of S3, and Prefect's API.
        bucket: an empty bucket of the S3 server.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zoosplat-demo-"))
        self.folder.chmod(0o755)  # PostgreSQL runs as another user
        self.bucket = "demo"
        self.env: dict[str, str] = {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
        }
        self._running: list[tuple[str, subprocess.Popen[bytes], int]] = []

    def __enter__(self) -> Servers:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that __exit__ runs
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._running:
            self.stop(self._running[-1][0])
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- processes
    def start(
        self, name: str, command: list[str], env: dict[str, str] | None = None, end: int = signal.SIGTERM
    ) -> None:
        """Start a process in a group of its own. Output goes to `folder`/NAME.log; `end` is the signal that ends it."""
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append((name, process, end))

    def stop(self, name: str) -> None:
        """End a process and all that it has started."""
        for entry in [entry for entry in self._running if entry[0] == name]:
            self._running.remove(entry)
            _, process, end = entry
            process.send_signal(end)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                print(f"demo: {name} does not end by itself", file=sys.stderr)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until something is ready. Raises SystemExit with the end of its log where that does not happen."""
        deadline = time.monotonic() + READY_S
        while not ready():
            process = next((p for n, p, _ in self._running if n == name), None)
            if time.monotonic() > deadline or (process is not None and process.poll() is not None):
                log = (self.folder / f"{name}.log").read_text(errors="replace") if process else ""
                sys.exit(f"demo: {name} did not start\n{log[-2000:]}")
            time.sleep(0.2)

    def answers(self, url: str) -> Callable[[], bool]:
        def ready() -> bool:
            try:
                with urllib.request.urlopen(url, timeout=2):
                    return True
            except (OSError, urllib.error.HTTPError):
                return False

        return ready

    def run(self, *command: str, quiet: bool = True) -> str:
        """Run a command of the environment. Raises SystemExit with what it has printed where it fails."""
        env = without_blas_choice({**os.environ, **self.env})
        done = subprocess.run(
            command,
            env=env,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
        )
        if done.returncode != 0:
            sys.exit(f"demo: {' '.join(command)}\n{done.stdout or ''}")
        return done.stdout or ""

    # -- servers
    def minio(self) -> None:
        """Start an S3 server with an empty bucket."""
        import boto3

        port, user, password = free_port(), "demo", secrets.token_hex(16)
        path = program("minio", BIN, hint="make minio")
        secret = {"MINIO_ROOT_USER": user, "MINIO_ROOT_PASSWORD": password, "MINIO_BROWSER": "off"}
        command = [path, "server", str(self.folder / "objects"), "--address", f"127.0.0.1:{port}", "--quiet"]
        self.start("minio", command, secret)
        endpoint = f"http://127.0.0.1:{port}"
        self.wait("minio", self.answers(f"{endpoint}/minio/health/live"))
        self.env |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": user,
            "AWS_SECRET_ACCESS_KEY": password,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        os.environ |= {key: value for key, value in self.env.items() if key.startswith("AWS_")}
        # The client has a session of its own, because boto3 keeps the credentials of its default session.
        boto3.Session().client("s3").create_bucket(Bucket=self.bucket)

    def prefect(self) -> None:
        """Start Prefect's server on a PostgreSQL of its own."""
        hint = "install PostgreSQL (Debian: apt-get install postgresql)"
        initdb = program("initdb", *POSTGRES, hint=hint)
        postgres = str(Path(initdb).resolve().parent / "postgres")
        data, port, password = self.folder / "database", free_port(), secrets.token_hex(16)
        secret = self.folder / "database-password"
        secret.write_text(password)
        secret.chmod(0o600)
        data.mkdir()
        # PostgreSQL refuses to run as root.
        become = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
        if become:
            shutil.chown(data, "nobody", "nogroup")
            shutil.chown(secret, "nobody", "nogroup")
        options = ["--username=prefect", f"--pwfile={secret}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"]
        self.run(*become, initdb, "-D", str(data), *options)
        # The data need not survive a crash of the machine, so PostgreSQL does not wait for the disk.
        fast = ["-c", "fsync=off", "-c", "full_page_writes=off"]
        where = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-p", str(port)]
        self.start("postgres", [*become, postgres, "-D", str(data), *where, *fast], end=signal.SIGINT)
        self.wait("postgres", lambda: _listens(port))
        url = f"postgresql+asyncpg://prefect:{password}@127.0.0.1:{port}/postgres"
        api = free_port()
        command = [prefect(), "server", "start", "--host", "127.0.0.1", "--port", str(api)]
        self.start("prefect", command, {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url})
        self.env["PREFECT_API_URL"] = f"http://127.0.0.1:{api}/api"
        self.wait("prefect", self.answers(f"http://127.0.0.1:{api}/api/health"))

    def worker(self, pool: str, kind: str, env: dict[str, str] | None = None) -> None:
        """Start a worker of a work pool that exists."""
        command = [prefect(), "worker", "start", "--pool", pool, "--type", kind, "--install-policy", "never"]
        self.start("worker", command, {"PREFECT_WORKER_QUERY_SECONDS": "2", **(env or {})}, end=signal.SIGINT)

    # -- flows
    def deploy(self, name: str) -> None:
        """Register one deployment of prefect.yaml that a process worker runs, with its pool."""
        self.run(prefect(), "work-pool", "create", "zoosplat", "--type", "process")
        file = str(Path(__file__).resolve().parents[2] / "prefect.yaml")
        self.run(prefect(), "--no-prompt", "deploy", "--prefect-file", file, "--name", name)

    def pipeline(self, name: str, *parameters: str, watch: bool = True, quiet: bool = False) -> str:
        """Start a deployment with KEY=VALUE parameters; with `watch` wait for its end and raise SystemExit if it fails.

        Returns:
            What the command has printed; empty unless `quiet`.
        """
        given = [word for value in parameters for word in ("-p", value)]
        watching = ["--watch"] if watch else []
        return self.run(prefect(), "deployment", "run", f"pipeline/{name}", *given, *watching, quiet=quiet)

    # -- the recording
    def demo_recording(self, frames: int = 120) -> str:
        """Put the demo's recording and its configuration on S3. Returns the URL of the configuration."""
        import importlib.resources

        from zoosplat.storage import objects
        from zoosplat.synthetic.recording import make_recording

        folder = self.folder / "recording"
        make_recording(folder, n_frames=frames)
        for path in (p for p in folder.rglob("*") if p.is_file()):
            objects.write_bytes(f"s3://{self.bucket}/recording/{path.relative_to(folder)}", path.read_bytes())
        text = (importlib.resources.files("zoosplat_flows.commands") / "demo.yaml").read_text()
        url = f"s3://{self.bucket}/demo.yaml"
        objects.write_bytes(url, text.replace("directory: demo", f"directory: s3://{self.bucket}/recording").encode())
        return url


def prefect() -> str:
    return program("prefect", Path(sys.executable).parent, hint="make install")


def show_results(project: str, folder: Path) -> None:
    """Print the metrics of a project's latest run and put its report page into a folder."""
    from zoosplat.stages.lookup import open_run
    from zoosplat.stages.projects import Project
    from zoosplat.storage import objects
    from zoosplat_flows.commands.run import summarize_metrics

    run = open_run(Project.at(project))
    for line in summarize_metrics(run):
        print(line)
    objects.write_bytes(str(folder / "index.html"), objects.read_bytes(run.path("report", "index.html")))
    print(f"report: {folder / 'index.html'}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
