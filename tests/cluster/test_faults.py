"""Pipelines that are disturbed end as one that was not: killed containers, a storage server and a Prefect server that
stop, two pipelines on one project, a shard that always fails."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pipelines import FILES_PIPELINE
from servers import free_port, without_blas_choice

from zoosplat.errors import UserError
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.results import Result
from zoosplat_flows.runners.containers import find_engine, image_of

if TYPE_CHECKING:
    from tests.conftest import S3, Recording

    CheckSame = Callable[[str, Path, Path], None]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.environ.get("ZOOSPLAT_CI_CLUSTER") != "1", reason="set ZOOSPLAT_CI_CLUSTER=1"),
    pytest.mark.timeout(1800),
]

NAMES = [spec.name for spec in FILES_PIPELINE]
SMALL: dict[str, Any] = {
    "holdout_views": [2],
    "center_rotation__grid_size": 32,
    "crop__grid_size": 32,
    "model": {"num_unets": 1, "base_filters": 2, "bottleneck": 16, "min_gaussians": 64, "max_gaussians": 800},
    "train": {"epochs": 2, "lr": 1e-3, "device": "cpu", "keep_last": 2},
    "evaluate": {"gallery_frames": 1, "device": "cpu"},
    "render": {"orbit_frames": 4, "sequence_frames": 4, "width": 96, "height": 80, "device": "cpu"},
    "features": {"device": "cpu"},
}
# More than these a container is not killed; three in one run of the pipeline end it.
KILLS = {
    "ingest": 3,
    "center_rotation": 2,
    "crop": 2,
    "pack": 4,
    "train": 3,
    "evaluate": 2,
    "render": 1,
    "features": 2,
    "embedding": 1,
}
# Runs the pipeline where the command line does not: in containers. Retries wait for nothing.
IN_CONTAINERS = """
import sys
from zoosplat_flows.pipeline import listening, pipeline, run_stage
run_stage.retry_delay_seconds = 0
def show(event):
    if event.state != "running":
        print(event.stage, event.state, event.message.replace("\\n", " | "), flush=True)
config, project, until_stage, *force = sys.argv[1:]
with listening(show):
    pipeline(project, until_stage=until_stage, force=force, config=config, runner="containers", workers=2)
"""


def until(true: Callable[[], Any], seconds: float = 120, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


# -- what is disturbed --------------------------------------------------------------------------------------------
class Prefect:
    """A Prefect server of its own; it can be killed and started again with the same data, at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("prefect")), "server", "start", "--port", str(self.port)]
        env = {**os.environ, "PREFECT_HOME": str(self.folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        quiet = subprocess.DEVNULL
        self.server = subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet, start_new_session=True)
        until(self.answers, 300, pause=0.3)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
            return True
        return False

    def kill(self) -> None:
        if self.server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()


class Run:
    """A pipeline in a process of its own, whose descendants bear its mark."""

    def __init__(self, folder: Path, command: list[str], env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self._files = [folder / f"{time.monotonic_ns()}.{kind}" for kind in ("out", "err")]
        self.mark = f"ZOOSPLAT_TEST_RUN={self._files[0].stem}"
        key, _, value = self.mark.partition("=")
        env = without_blas_choice({**os.environ, **env, "OMP_NUM_THREADS": "1", key: value})
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err)

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    def running(self) -> bool:
        return self.process.poll() is None

    def ended(self, seconds: float = 900) -> int:
        try:
            return self.process.wait(timeout=seconds)
        finally:
            self.process.kill()

    def descendants(self) -> list[str]:
        """Command lines of what it has started and still runs."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found


class Pipelines:
    """Starts pipelines with the recording and configuration of this module, on folders and on S3."""

    def __init__(self, folder: Path, recording: Recording, prefect: Prefect) -> None:
        self.folder, self.recording, self.prefect = folder, recording, prefect
        self.env = {"PREFECT_API_URL": prefect.url}

    def config(self, name: str, directory: str | Path | None = None, **changes: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(self.recording.config(directory, **{**SMALL, **changes})))
        return path

    def start(self, config: Path, project: str, *arguments: str, env: dict[str, str] | None = None) -> Run:
        program = str(Path(sys.executable).with_name("zoosplat"))
        command = [program, "run", str(config), "--project", project, "--workers", "2", *arguments]
        return Run(self.folder / "logs", command, {**self.env, **(env or {})})

    def start_in_containers(
        self, config: Path, project: str, until_stage: str, env: dict[str, str], force: Sequence[str] = ()
    ) -> Run:
        command = [sys.executable, "-c", IN_CONTAINERS, str(config), project, until_stage, *force]
        return Run(self.folder / "logs", command, {**self.env, **env, "PREFECT_LOGGING_LEVEL": "CRITICAL"})


@pytest.fixture(scope="module")
def pipelines(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipelines]:
    folder = tmp_path_factory.mktemp("faults")
    prefect = Prefect(folder / "prefect")
    try:
        prefect.start()
        yield Pipelines(folder, recording, prefect)
    finally:
        prefect.kill()


@pytest.fixture(scope="module")
def reference(pipelines: Pipelines) -> Path:
    """A project that was not disturbed."""
    project = pipelines.folder / "reference"
    run = pipelines.start(pipelines.config("reference"), str(project))
    assert run.ended() == 0, run.err
    return project


@pytest.fixture(scope="module")
def bucket(own_s3: S3, recording: Recording) -> str:
    """A bucket of the server that is stopped, with the recording in it."""
    name = own_s3.bucket()
    own_s3.put_folder(recording.folder, name, "recording")
    return name


def download(s3: S3, bucket: str, prefix: str, folder: Path) -> Path:
    for key in s3.objects(bucket):
        if key.startswith(f"{prefix}/"):
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(s3.read(bucket, key))
    return folder


def check_result(project: Path, reference: Path, check_same: CheckSame, stages: list[str] = NAMES) -> None:
    """The latest run of a project has the results of the reference, under their ids, and what manifests say of them."""
    assert not list(project.rglob("*.partial"))
    ours, theirs = (open_run(Project.at(str(folder))) for folder in (project, reference))
    for stage in stages:
        result = ours.result(stage)
        if not ours.record()["forced"]:
            assert result.id == theirs.result(stage).id
        assert result.require()["settings"] == theirs.result(stage).require()["settings"]
        check_same(stage, project, reference)
        for name, size in (result.manifest() or {}).items():
            assert Path(result.data_folder, name).stat().st_size == size


def marks(project: Path) -> dict[str, bytes]:
    """Plans, marks of shards and success marks, by their paths in the project."""
    found = [p for name in ("plan.json", "shards/*.json", "done.json") for p in project.glob(f"results/*/*/{name}")]
    return {p.relative_to(project).as_posix(): p.read_bytes() for p in found}


def result_of(project: str | Path, stage: str) -> Result:
    """A stage's result of the latest run."""
    return open_run(Project.at(str(project))).result(stage)


# -- a stage's container is killed --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def podman() -> list[str]:
    """The engine, where the images are built."""
    try:
        command = find_engine()
    except UserError as error:
        pytest.skip(str(error))
    missing = [
        image_of(stage)
        for stage in NAMES
        if subprocess.run([*command, "image", "inspect", image_of(stage)], capture_output=True).returncode
    ]
    if missing:
        pytest.skip(f"no images {', '.join(missing)}; make images")
    return command


def working(s3: S3, bucket: str, project: str) -> set[str]:
    """Stages that are between their plan and their success mark."""
    keys = set(s3.objects(bucket))
    planned = re.compile(rf"({project}/results/(\w+)/[\w-]+)/plan\.json")
    found = [match for match in map(planned.fullmatch, keys) if match]
    return {match[2] for match in found if f"{match[1]}/done.json" not in keys}


def containers(podman: list[str], project: str) -> dict[str, str]:
    """Stages by the names of their containers that run, of this project alone: the engine may have others."""
    what = '{{.Names}} {{index .Labels "zoosplat.stage"}} {{.Command}}'
    words = ["ps", "--no-trunc", "--filter", "label=zoosplat.stage", "--format", what]
    done = subprocess.run([*podman, *words], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if project in line]
    return {line[0]: line[1] for line in lines}


@pytest.mark.timeout(3600)
def test_containers_are_killed_twenty_times(
    podman: list[str],
    pipelines: Pipelines,
    reference: Path,
    own_s3: S3,
    bucket: str,
    check_same: CheckSame,
    tmp_path: Path,
) -> None:
    """At random moments, half of them while the stage is at its work; a pipeline that gives up is started again."""
    config = pipelines.config("killed", f"s3://{bucket}/recording")
    rng = random.Random(20)
    left, killed = Counter(KILLS), Counter[str]()
    statuses: list[int] = []
    due: dict[str, float | None] = {}
    project = f"s3://{bucket}/killed"
    while True:
        # A stage that was too quick to be killed often enough is made again.
        again = [stage for stage in NAMES if left[stage]][:1] if statuses and statuses[-1] == 0 else []
        run = pipelines.start_in_containers(config, project, NAMES[-1], own_s3.env, again)
        while run.running():
            planned = {stage for stage in working(own_s3, bucket, "killed") if left[stage]}
            for name, stage in containers(podman, project).items():
                if name not in due:
                    due[name] = None if rng.random() < 0.5 else time.monotonic() + rng.uniform(0, 4)
                moment = due[name]
                if moment is None and stage in planned:
                    due[name] = moment = time.monotonic() + rng.uniform(0, 0.3)
                if not left[stage] or moment is None or time.monotonic() < moment:
                    continue
                if subprocess.run([*podman, "kill", "-s", "KILL", name], capture_output=True).returncode == 0:
                    left[stage] -= 1
                    killed[stage] += 1
            time.sleep(0.1)
        statuses.append(run.ended())
        assert "was killed" in run.out or statuses[-1] == 0, run.out + run.err
        if statuses[-1] == 0 and not left.total():
            break
        assert len(statuses) < 15, run.out + run.err
    assert killed == KILLS
    assert killed.total() == 20
    assert statuses[0] != 0, "a stage that is killed three times ends its pipeline"
    check_result(download(own_s3, bucket, "killed", tmp_path), reference, check_same)
    assert not containers(podman, project)


# -- the storage server stops -------------------------------------------------------------------------------------
def test_storage_stops_in_the_middle_of_each_stage(
    pipelines: Pipelines, reference: Path, own_s3: S3, bucket: str, check_same: CheckSame, tmp_path: Path
) -> None:
    """Killed and ended in turn, away for some seconds: a stage at work waits, one that just starts is tried again."""
    rng = random.Random(2)
    config = pipelines.config("storage", f"s3://{bucket}/recording")
    run = pipelines.start(config, f"s3://{bucket}/storage", env=own_s3.env)
    hit: list[str] = []
    numbers = [signal.SIGKILL, signal.SIGTERM]
    while run.running():
        now = working(own_s3, bucket, "storage") - set(hit)
        if not now:
            time.sleep(0.02)
            continue
        time.sleep(rng.uniform(0, 0.3))
        numbers.reverse()
        own_s3.stop(numbers[0])
        try:
            time.sleep(rng.uniform(1, 6))
        finally:
            own_s3.start()
        hit += sorted(now)
    assert run.ended() == 0, run.out + run.err
    assert sorted(hit) == sorted(NAMES)
    tried_again = [line for line in run.out.splitlines() if "trying again" in line]
    assert all(f"{own_s3.endpoint} cannot be reached" in line for line in tried_again)
    # Alone at work; of two at a time one may just start.
    assert not [line for line in tried_again if line.startswith(("ingest", "crop", "train"))]
    check_result(download(own_s3, bucket, "storage", tmp_path), reference, check_same)


def test_storage_stays_away(
    pipelines: Pipelines, reference: Path, own_s3: S3, bucket: str, check_same: CheckSame, tmp_path: Path
) -> None:
    """A stage alone ends with one line and the status that has it tried again; what it had done is kept."""
    config = pipelines.config("away", f"s3://{bucket}/recording")
    command = [sys.executable, "-m", "zoosplat_ingest", "--project", f"s3://{bucket}/away", "--config", str(config)]
    stage = Run(tmp_path / "logs", [*command, "--workers", "1"], own_s3.env)

    def first() -> dict[str, Any]:
        """The mark of the first shard, once it is there."""
        mark = re.compile(r"away/results/ingest/\w+/shards/00000-of-00003\.json")
        return {key: what for key, what in own_s3.objects(bucket).items() if mark.fullmatch(key)}

    def reached() -> bool:
        """Looks while the stage stands still, which otherwise may have ended by the time of the answer."""
        stage.process.send_signal(signal.SIGSTOP)
        if first():
            return True
        stage.process.send_signal(signal.SIGCONT)
        return False

    until(reached, pause=0.02)
    own_s3.stop()
    stage.process.send_signal(signal.SIGCONT)
    try:
        status = stage.ended()
    finally:
        own_s3.start()
    assert status == 1
    assert stage.err.startswith("zoosplat ingest: s3://")
    assert f"{own_s3.endpoint} cannot be reached; start the server" in stage.err
    assert stage.err.count("\n") == 1
    kept = first()
    run = pipelines.start(config, f"s3://{bucket}/away", "--until", "ingest", env=own_s3.env)
    assert run.ended() == 0, run.out + run.err
    assert first() == kept
    check_result(download(own_s3, bucket, "away", tmp_path / "away"), reference, check_same, ["ingest"])


def test_storage_stops_under_a_container(
    podman: list[str],
    pipelines: Pipelines,
    reference: Path,
    own_s3: S3,
    bucket: str,
    check_same: CheckSame,
    tmp_path: Path,
) -> None:
    config = pipelines.config("boxed", f"s3://{bucket}/recording")
    run = pipelines.start_in_containers(config, f"s3://{bucket}/boxed", "ingest", own_s3.env)
    until(lambda: not run.running() or working(own_s3, bucket, "boxed"), pause=0.01)
    own_s3.stop()
    try:
        time.sleep(5)
    finally:
        own_s3.start()
    assert run.ended() == 0, run.out + run.err
    assert run.out.split()[:4] == ["ingest", "started", "ingest", "done"]
    check_result(download(own_s3, bucket, "boxed", tmp_path), reference, check_same, ["ingest"])


# -- the Prefect server stops -------------------------------------------------------------------------------------
@pytest.mark.parametrize("comes_back", [False, True])
def test_prefect_stops(
    comes_back: bool, pipelines: Pipelines, reference: Path, check_same: CheckSame, tmp_path: Path
) -> None:
    """The run ends by itself, with a word about the cause and no processes left; the next one goes on from there."""
    project, config = tmp_path / "project", pipelines.config("prefect")
    prefect = Prefect(tmp_path / "prefect")
    try:
        prefect.start()
        run = pipelines.start(config, str(project), "--until", "crop", env={"PREFECT_API_URL": prefect.url})
        until(lambda: list(project.glob("results/center_rotation/*/plan.json")), pause=0.01)
        prefect.kill()
        if comes_back:
            prefect.start()
        status = run.ended()
        until(lambda: not run.descendants(), 30)
    finally:
        prefect.kill()
    assert status in ((0, 1) if comes_back else (1,))
    if status:
        assert "the Prefect server cannot be reached" in run.err
        assert "PREFECT_API_URL" in run.err
        assert run.err.splitlines()[1:] == ["zoosplat: finished work is kept; the same command tries again"]
    kept = marks(project)
    assert Path(result_of(project, "ingest").file("done.json")).relative_to(project).as_posix() in kept
    again = pipelines.start(config, str(project), "--until", "crop")
    assert again.ended() == 0, again.err
    assert "ingest: skipped" in again.out
    assert kept.items() <= marks(project).items()
    check_result(project, reference, check_same, ["ingest", "center_rotation", "crop"])


# -- two pipelines on one project ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_two_pipelines_on_one_project(
    kind: str, pipelines: Pipelines, reference: Path, own_s3: S3, bucket: str, check_same: CheckSame, tmp_path: Path
) -> None:
    on_s3 = kind == "s3"
    project = f"s3://{bucket}/twice" if on_s3 else str(tmp_path / "project")
    config = pipelines.config(f"twice-{kind}", f"s3://{bucket}/recording" if on_s3 else None)
    arguments = () if on_s3 else ("--until", "crop")
    runs = [pipelines.start(config, project, *arguments, env=own_s3.env) for _ in range(2)]
    for run in runs:
        assert run.ended() == 0, run.out + run.err
        assert "trying again" not in run.out
    result = download(own_s3, bucket, "twice", tmp_path / "project") if on_s3 else tmp_path / "project"
    check_result(result, reference, check_same, NAMES if on_s3 else NAMES[:3])
    # Nothing was computed twice: a stage's shards all have the time of the run that made its plan.
    for stage in NAMES[:3]:
        (made,) = (result / "results" / stage).iterdir()
        plan = json.loads((made / "plan.json").read_text())
        shards = [json.loads(p.read_text()) for p in (made / "shards").glob("*.json")]
        assert len(shards) == 3
        assert min(shard["started"] for shard in shards) >= plan["started"]
    # Of each stage one of them says that it has computed it, the other that it had not to.
    records = [open_run(Project.at(str(result)), name).record() for name in Project.at(str(result)).run_ids()]
    assert len(records) == 2
    for stage in NAMES if on_s3 else NAMES[:3]:
        first, second = sorted(record["stages"][stage]["state"] for record in records)
        assert (first, second) in (("done", "shared"), ("done", "skipped"))


# -- a shard that always fails ------------------------------------------------------------------------------------
def test_a_shard_that_always_crashes(
    pipelines: Pipelines, reference: Path, check_same: CheckSame, tmp_path: Path
) -> None:
    """Its block cannot be written: three tries, then its number and log; mended, it alone is computed."""
    project, config = tmp_path / "project", pipelines.config("crash")
    ingest = pipelines.start(config, str(project), "--until", "ingest")
    assert ingest.ended() == 0, ingest.err
    prepare = [sys.executable, "-m", "zoosplat_center_rotation", "--project", str(project), "--prepare"]
    subprocess.run(prepare, check=True)
    result = result_of(project, "center_rotation")
    block = Path(result.data_url) / "n_voxels" / "c" / "1"
    block.mkdir(parents=True)
    run = pipelines.start(config, str(project), "--until", "crop")
    assert run.ended() == 1, run.out + run.err
    assert "center_rotation: failed, trying again" in run.out
    assert "in shard 1/3, kept frames 64 to 127" in run.err
    assert "zoosplat: center_rotation: exit status 1\n" in run.err
    assert "IsADirectoryError" in run.err
    assert "finished work is kept" in run.err
    kept = marks(project)
    assert [Path(result.shard_mark_url(i, 3)).exists() for i in range(3)] == [True, False, True]
    log = Path(open_run(Project.at(str(project))).path("logs", "center_rotation.log")).read_text()
    assert log.count(" exit status 1\n") == 3
    assert log.count("IsADirectoryError: ") >= 3
    block.rmdir()
    again = pipelines.start(config, str(project), "--until", "crop")
    assert again.ended() == 0, again.err
    assert kept.items() <= marks(project).items()
    check_result(project, reference, check_same, ["ingest", "center_rotation", "crop"])


def test_a_shard_with_bad_input(
    pipelines: Pipelines, recording: Recording, reference: Path, check_same: CheckSame, tmp_path: Path
) -> None:
    """Masks that cannot be read from the second shard on: tried once, number and file in the line."""
    data = recording.copy(tmp_path / "recording")
    project, config = tmp_path / "project", pipelines.config("broken", data)
    video = data / "masks" / "1.mp4"
    whole = video.read_bytes()
    damage(video, first=70)
    run = pipelines.start(config, str(project), "--until", "crop")
    assert run.ended() == 2, run.out + run.err
    assert "trying again" not in run.out
    assert "masks/1.mp4" in run.err
    assert "in shard 1/3, kept frames 64 to 127" in run.err
    assert "Traceback" not in run.err
    broken = result_of(project, "ingest")
    assert Path(broken.shard_mark_url(0, 3)).exists()
    video.write_bytes(whole)
    again = pipelines.start(config, str(project), "--until", "crop")
    assert again.ended() == 0, again.err
    # The repaired recording has a result of its own; what was made of the broken one is not taken for it.
    assert result_of(project, "ingest") != broken
    assert not broken.is_done()
    check_result(project, reference, check_same, ["ingest", "center_rotation", "crop"])


def damage(video: Path, first: int) -> None:
    """Make what a camera has recorded from a frame on unreadable; the file's index stays whole."""
    import av

    with av.open(str(video)) as file:
        packets = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    with video.open("r+b") as opened:
        for position, size in packets[first:]:
            assert position is not None
            opened.seek(position)
            opened.write(b"\xff" * size)
