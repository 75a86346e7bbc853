"""Fixtures shared by all tests. Run as a script it is the process that `stages` forks stages from."""

from __future__ import annotations

import atexit
import contextlib
import csv
import fcntl
import gc
import hashlib
import io
import json
import os
import re
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each worker

CONFIG = "tested.yaml"  # the configuration in a project's folder that `Stages` begins its runs with
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the recordings that are developed with: not part of the project, tests skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the development recordings are not on this machine")
    return folder


# -- a tiny recording ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def loop() -> Callable[[Path, Path, int], None]:
    """Write a video that plays another one several times over."""
    from zoosplat.synthetic import stand_in

    return stand_in.loop_video


@dataclass(frozen=True)
class Recording:
    """A synthetic recording on disk, and the configurations that tests run on it.

    144 frames of 96 x 80 pixels from 4 cameras: storage blocks hold 64 frames, so ingest, center_rotation and pack have
    shards of 64, 64 and 16 frames, and crop, which needs no blocks, three of at most 48.
    """

    folder: Path

    def config(self, directory: str | Path | None = None, **changes: Any) -> dict[str, Any]:
        """The native configuration; `changes` are dotted keys with `__` for the dot."""
        raw: dict[str, Any] = {
            "name": "tiny",
            "data": {
                "directory": str(directory or self.folder),
                "videos": [f"videos/{c}.mp4" for c in range(4)],
                "masks": [f"masks/{c}.mp4" for c in range(4)],
                "calibration": "camera_params.h5",
                "up": "vertical_lines.npz",
            },
            "scheduling": {"frames_per_shard": 48},
            "ingest": {"image_downsample": 1},
            "center_rotation": {"ell": 0.25, "grid_size": 48},
            "crop": {"ell": 0.22, "grid_size": 48},
        }
        for key, value in changes.items():
            *sections, leaf = key.split("__")
            inner = raw
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[leaf] = value
        return raw

    def write_project(self, project: Path, directory: str | Path | None = None, **changes: Any) -> str:
        """A folder with that configuration, unchecked, from which `Stages` begins runs in it; its URL."""
        project.mkdir(parents=True, exist_ok=True)
        # YAML holds JSON.
        (project / CONFIG).write_text(json.dumps(self.config(directory, **changes)))
        return str(project)

    def copy(self, folder: Path) -> Path:
        """A copy to be damaged."""
        shutil.copytree(self.folder, folder)
        return folder


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of pytest's processes makes and all of them read; none may write to it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has a folder of its own in that of the session
    made, finished = folder / name, folder / f"{name}.finished"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            finished.touch()
    return made


def make_tiny_recording(folder: Path) -> None:
    """Its 48 frames are rendered once and shown three times."""
    from zoosplat.synthetic.recording import make_recording
    from zoosplat.synthetic.stand_in import loop_video

    with tempfile.TemporaryDirectory() as name:
        rendered = Path(name)
        make_recording(rendered, n_frames=48, n_cameras=4, width=96, height=80)
        for file in ("camera_params.h5", "vertical_lines.npz", "truth.npz"):
            shutil.copy(rendered / file, folder)
        for kind in ("videos", "masks"):
            (folder / kind).mkdir()
            for video in (rendered / kind).glob("*.mp4"):
                loop_video(video, folder / kind / video.name, 3)


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording(make_once(tmp_path_factory, "tiny_recording", make_tiny_recording))


@pytest.fixture(scope="session")
def whole_settings() -> dict[str, Any]:
    """Changes for `Recording.config` with which all stages together take seconds."""
    return {
        "holdout_views": [2],
        "ingest__max_frames": 36,
        "center_rotation__grid_size": 32,
        "crop__grid_size": 32,
        "model": {"num_unets": 1, "base_filters": 2, "bottleneck": 16, "min_gaussians": 64, "max_gaussians": 1500},
        "train": {"epochs": 3, "lr": 1e-3, "device": "cpu", "keep_last": 2},
        "evaluate": {"gallery_frames": 1, "device": "cpu"},
        "render": {"orbit_frames": 4, "sequence_frames": 4, "width": 96, "height": 80, "device": "cpu"},
        "features": {"device": "cpu"},
    }


@pytest.fixture(scope="session")
def whole_project(
    recording: Recording, whole_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A project that `zoosplat run` has taken from its videos to its report, undisturbed. Not to be written to."""
    from zoosplat.stages.lookup import open_run
    from zoosplat.stages.projects import Project

    def make(folder: Path) -> None:
        config = folder.with_suffix(".yaml")
        config.write_text(json.dumps(recording.config(**whole_settings)))
        start = [sys.executable, "-c", "from zoosplat_flows.cli.entry import main; main()"]
        command = [*start, "run", str(config), "--project", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert open_run(Project.at(str(folder))).path("report", "index.html") in done.stdout.replace("\n", "")

    return make_once(tmp_path_factory, "whole_project", make)


# -- stages as processes ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """How a stage's process ended: exit status (negative: the signal), standard output and standard error."""

    status: int
    out: str
    err: str


class Stages:
    """Runs `python -m zoosplat_<stage>` in processes of their own, forked from one that has imported everything.

    A fresh interpreter takes seconds to import; a fork takes milliseconds and is as fresh, caches included.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        assert json.loads(self._server.stdout.readline()) == "ready"

    def start(
        self, stage: str, project: str, *args: str, env: dict[str, str] | None = None, as_nobody: bool = False
    ) -> int:
        """Start a stage as the leader of a process group of its own; its process id. `finished` waits for it."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {
            "module": f"zoosplat_{stage}",
            "argv": ["--project", project, *self._which_run(project, args, env), *args],
            "env": {**os.environ, "ZOOSPLAT_TEST": "1", **(env or {})},
            "folder": str(self._folder),
            "as_nobody": as_nobody,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(json.loads(self._server.stdout.readline()))

    @staticmethod
    def _which_run(project: str, args: tuple[str, ...], env: dict[str, str] | None) -> list[str]:
        """The configuration in the project's folder, unless the arguments say otherwise."""
        there = "AWS_ENDPOINT_URL" in (env or {}) or Path(project, CONFIG).exists()
        named = {"--run", "--config"} & set(args)
        return ["--config", f"{project}/{CONFIG}"] if there and not named else []

    def finished(self) -> Outcome:
        """Wait for the stage that was started last."""
        assert self._server.stdout is not None
        status = int(json.loads(self._server.stdout.readline()))
        return Outcome(status, (self._folder / "out").read_text(), (self._folder / "err").read_text())

    def __call__(self, stage: str, project: str, *args: str, **options: Any) -> Outcome:
        """Run a stage and wait for it; one process for its shards unless told otherwise."""
        if "--workers" not in args:
            args = (*args, "--workers", "1")
        self.start(stage, project, *args, **options)
        return self.finished()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def _serve() -> None:
    """Fork a child for every line on standard input; answer with its process id, then with its exit status."""
    import encodings.cp437
    import encodings.utf_8_sig  # noqa: F401

    import boto3  # noqa: F401
    import h5py  # noqa: F401
    import s3fs  # noqa: F401
    import scipy.io  # noqa: F401

    import zoosplat.recording.sources
    import zoosplat.stages.command  # noqa: F401
    from zoosplat.stages.registry import PREPROCESSING

    for spec in PREPROCESSING:
        __import__(f"zoosplat_{spec.name}.stage")
    gc.freeze()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        # In both processes: whichever comes first, it is done before anyone knows the number.
        with contextlib.suppress(PermissionError):
            os.setpgid(pid, pid)
        if pid == 0:
            folder = Path(request["folder"])
            for descriptor, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if request["as_nobody"]:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.environ.clear()
            os.environ.update(request["env"])
            sys.argv = [request["module"], *request["argv"]]
            os._exit(_run_as_main(request["module"]))
        print(pid, flush=True)
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run_as_main(module: str) -> int:
    """`python -m module`, its exit status. Without the interpreter's finalisation, which touches all memory."""
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    server = Stages(tmp_path_factory.mktemp("stages"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def finished(recording: Recording, stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the stages before the model have run undisturbed. Not to be written to."""
    from zoosplat.stages.registry import PREPROCESSING

    project = tmp_path_factory.mktemp("finished")
    recording.write_project(project)
    for spec in PREPROCESSING:
        outcome = stages(spec.name, str(project))
        assert (outcome.status, outcome.err) == (0, "")
    return project


# -- runs made by hand --------------------------------------------------------------------------------------------
class ByHand:
    """Runs whose results a test writes itself, in place of the stages."""

    @staticmethod
    def begin(folder: Path, experiment: Any, *force: str, until: str = "embedding", state: str = "begun") -> Any:
        """A recorded run; files outside that its configuration names are made up where there are none."""
        from zoosplat.stages import dependencies
        from zoosplat.stages.drafts import draft_run
        from zoosplat.stages.projects import Project
        from zoosplat.stages.registry import PIPELINE
        from zoosplat.stages.run_records import record_run
        from zoosplat_flows.execution.executor import select_stages

        for spec in PIPELINE:
            for url in dependencies.outside_files(spec.name, experiment).values():
                path = Path(url)
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    path.write_text(f"contents of {path.name}")
        draft = draft_run(Project.at(str(folder)), experiment, force)
        return record_run(draft, select_stages(experiment, until_stage=until), state)

    @staticmethod
    def mark(run: Any, stage: str, **changes: Any) -> None:
        """The mark by which a result is done: 90 s from begin to end, 300 s of work, 1.5 GiB."""
        from zoosplat.stages import results
        from zoosplat.storage import objects

        result, request = run.result(stage), run.request(stage)
        result.claim(request)
        mark = {
            **request.to_json(),
            "run": run.id,
            "versions": {"python": "3.11.9", "numpy": "2.1.0"},
            "shards": 4,
            "frames": 100,
            "started": 1_000_000.0,
            "finished": 1_000_090.0,
            "cpu_seconds": 300.0,
            "peak_memory_bytes": 3 << 29,
            "warnings": [],
            "figures": {},
        }
        objects.write_json(result.file(results.DONE), mark | changes)


@pytest.fixture(scope="session")
def by_hand() -> ByHand:
    """`ByHand`, for tests, which cannot import this module."""
    return ByHand()


# -- results that are written by hand ------------------------------------------------------------------------------
def given_group(url: str, sizes: dict[str, int], attributes: dict[str, Any], values: dict[str, Any]) -> None:
    """A whole group: what is not given of it is the arrays' fill value."""
    import numpy as np

    from zoosplat.storage import schema

    name = url.rpartition("/")[2]
    group = schema.create(url, name, sizes, schema.SMALL_BLOCK, attributes)
    for key in schema.GROUPS[name]:
        array = schema.array(group, key)
        array[...] = np.broadcast_to(values.get(key, array.fill_value), array.shape)


@pytest.fixture(scope="session")
def write_group() -> Callable[..., None]:
    """`given_group`, for tests, which cannot import this module."""
    return given_group


@pytest.fixture(scope="session")
def finish() -> Callable[..., Any]:
    """Begin a run of which some stages are finished: `zoosplat.synthetic.stand_in.begin_with_results`."""
    from zoosplat.synthetic import stand_in

    return stand_in.begin_with_results


# -- results of runs that went differently ------------------------------------------------------------------------
def losses(history: bytes) -> list[list[float]]:
    """Training and validation loss of every epoch."""
    rows = csv.DictReader(io.StringIO(history.decode()))
    return [[float(row["train_loss"]), float(row["valid_loss"])] for row in rows]


def same_losses(ours: bytes, theirs: bytes) -> None:
    """Two histories of a training: the same within float noise."""
    mine, other = losses(ours), losses(theirs)
    assert [value for row in mine for value in row] == pytest.approx([v for row in other for v in row], rel=1e-4)
    assert len(mine) == len(other)


@pytest.fixture(scope="session")
def check_same_losses() -> Callable[[bytes, bytes], None]:
    """`same_losses`, for tests, which cannot import this module."""
    return same_losses


def pictures(path: Path) -> Any:
    """The pictures of a PNG or MP4 file, [n, h, w, 3]."""
    import av
    import cv2
    import numpy as np

    if path.suffix == ".png":
        return np.asarray(cv2.imread(str(path)))[None]
    with av.open(str(path)) as film:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])


NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")


def check_same_file(ours: Path, theirs: Path) -> None:
    """The same content within float noise."""
    import numpy as np

    if ours.suffix in (".png", ".mp4"):
        mine, other = pictures(ours), pictures(theirs)
        assert mine.shape == other.shape
        assert np.abs(mine.astype(int) - other).mean() < 0.05, ours
    elif ours.suffix == ".npy":
        np.testing.assert_allclose(np.load(ours), np.load(theirs), 1e-3, 1e-4, err_msg=str(ours))
    elif ours.suffix == ".ply":
        end = b"end_header\n"
        (head, _, body), (head_there, _, body_there) = (path.read_bytes().partition(end) for path in (ours, theirs))
        assert head == head_there
        np.testing.assert_allclose(np.frombuffer(body, "<f4"), np.frombuffer(body_there, "<f4"), 1e-3, 1e-5)
    else:
        text, expected = ours.read_text(), theirs.read_text()
        assert NUMBER.sub("x", text) == NUMBER.sub("x", expected), ours
        found, there = (np.array(NUMBER.findall(each), float) for each in (text, expected))
        np.testing.assert_allclose(found, there, 1e-3, 1e-4, err_msg=str(ours))


def check_same_rows(ours: Path, theirs: Path) -> None:
    """The same descriptors within float noise; of embeddings what that cannot turn round, as it can axes and map."""
    import numpy as np

    from zoosplat.storage import groups, schema

    mine, other = (groups.open_group(str(folder)) for folder in (ours, theirs))
    for key in schema.GROUPS[theirs.name]:
        found, expected = schema.read(mine, key), schema.read(other, key)
        assert found.shape == expected.shape, key
        if key == "features":
            np.testing.assert_allclose(found, expected, atol=1e-3 * np.nanmax(np.abs(expected)))
        elif key in ("embedding", "map", "neighbours", "state"):
            np.testing.assert_array_equal(np.isnan(found) | (found == -1), np.isnan(expected) | (expected == -1))
        else:
            np.testing.assert_array_equal(found, expected)


def check_same_stage(stage: str, project: Path, reference: Path) -> None:
    """A stage's result in the latest runs of two projects: the same bytes, or, where it was learned, within noise."""
    from zoosplat.stages.lookup import open_run
    from zoosplat.stages.projects import Project
    from zoosplat.stages.registry import PREPROCESSING, STAGES

    spec = STAGES[stage]
    ours, theirs = (Path(open_run(Project.at(str(folder))).input_url(stage)) for folder in (project, reference))
    if stage == "train":
        same_losses(*((folder / "history.csv").read_bytes() for folder in (ours, theirs)))
        return
    if stage in ("features", "embedding"):
        check_same_rows(ours, theirs)
        return
    names = sorted(p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file())
    assert sorted(p.relative_to(ours) for p in ours.rglob("*") if p.is_file()) == names
    for name in names:
        if spec not in PREPROCESSING:
            check_same_file(ours / name, theirs / name)
        else:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def finished_files(project: Path) -> dict[str, str]:
    """Digest of every file of the finished results of a project, and of the name of its latest run."""
    from zoosplat.stages.results import DONE

    found = {"latest.json": hashlib.sha256((project / "latest.json").read_bytes()).hexdigest()}
    for mark in project.glob(f"results/*/*/{DONE}"):
        for path in mark.parent.rglob("*"):
            if path.is_file():
                found[path.relative_to(project).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, str]]:
    """`finished_files`, for tests, which cannot import this module."""
    return finished_files


@pytest.fixture(scope="session")
def check_same() -> Callable[[str, Path, Path], None]:
    """`check_same_stage`, for tests, which cannot import this module."""
    return check_same_stage


# -- an S3 server -------------------------------------------------------------------------------------------------
def _minio() -> str | None:
    built = Path.home() / ".cache" / "zoosplat" / "bin" / "minio"
    return str(built) if built.is_file() else shutil.which("minio")


S3_KIND = "minio" if _minio() else "moto"


@dataclass
class S3:
    """A running S3 server: MinIO, or moto's server where there is no MinIO (which checks no credentials)."""

    kind: str
    endpoint: str
    env: dict[str, str]
    client: Any
    folder: Path
    server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Again, too: same data, same address. Returns when it answers."""
        port = self.endpoint.rpartition(":")[2]
        if self.kind == "minio":
            command = [str(_minio()), "server", str(self.folder), "--address", f"127.0.0.1:{port}", "--quiet"]
            health = f"{self.endpoint}/minio/health/live"
        else:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
            health = self.endpoint
        env = {
            "MINIO_ROOT_USER": self.env["AWS_ACCESS_KEY_ID"],
            "MINIO_ROOT_PASSWORD": self.env["AWS_SECRET_ACCESS_KEY"],
            "MINIO_BROWSER": "off",
        }
        quiet = subprocess.DEVNULL
        self.server = subprocess.Popen(command, env={**os.environ, **env}, cwd=self.folder, stdout=quiet, stderr=quiet)
        _wait_for(lambda: _answers(health), self.server)

    def stop(self, number: int = signal.SIGKILL) -> None:
        if self.server is not None:
            self.server.send_signal(number)
            self.server.wait()

    def bucket(self) -> str:
        """A new, empty bucket."""
        name = f"b{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return name

    def put_folder(self, folder: Path, bucket: str, prefix: str) -> None:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            self.client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def objects(self, bucket: str) -> dict[str, tuple[str, Any]]:
        """ETag (of the content) and time of every object of a bucket, by key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {o["Key"]: (o["ETag"], o["LastModified"]) for page in pages for o in page.get("Contents", [])}

    def read(self, bucket: str, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve_s3(kind: str) -> Iterator[S3]:
    import boto3

    port, user, password = free_port(), f"user{secrets.token_hex(4)}", secrets.token_hex(16)
    credentials = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": user,
        "AWS_SECRET_ACCESS_KEY": password,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    client = boto3.client(
        "s3",
        endpoint_url=credentials["AWS_ENDPOINT_URL"],
        aws_access_key_id=user,
        aws_secret_access_key=password,
        region_name="us-east-1",
    )
    with tempfile.TemporaryDirectory() as folder:
        server = S3(kind, credentials["AWS_ENDPOINT_URL"], credentials, client, Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session", params=[S3_KIND])
def s3(request: pytest.FixtureRequest) -> Iterator[S3]:
    """A real S3 server on the loopback interface; its kind stands in the tests' names."""
    with serve_s3(request.param) as server:
        yield server


@pytest.fixture(scope="module")
def own_s3() -> Iterator[S3]:
    """A MinIO that a module may stop and start."""
    if S3_KIND != "minio":
        pytest.skip("no MinIO on this machine; make minio")
    with serve_s3("minio") as server:
        yield server


@pytest.fixture
def s3_here(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, for functions called in this process."""
    from zoosplat.storage import s3_client

    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    for connected in (s3_client.file_system, s3_client.boto3_session):
        connected.cache_clear()
    return s3


@pytest.fixture(scope="module")
def another_s3() -> Iterator[None]:
    """For modules that start an S3 server of their own: this process forgets the one that it is connected to."""
    from zoosplat.storage import s3_client

    def forget() -> None:
        for connected in (s3_client.file_system, s3_client.boto3_session):
            connected.cache_clear()

    forget()
    yield
    forget()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _wait_for(ready: Callable[[], bool], server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert server.poll() is None, "the S3 server ended"
        assert time.monotonic() < deadline, "the S3 server does not answer"
        time.sleep(0.1)


if __name__ == "__main__":
    _serve()
