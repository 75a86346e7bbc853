"""The images as they are run: what is in them, as whom, and that each stage's does its work from S3 to S3.

`make images` builds them; the tests skip where they, or an engine that runs here, are missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pipelines import FILES_STAGES
from servers import without_blas_choice

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.begin import begin_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PREPROCESSING, STAGES
from zoosplat.stages.runs import Run
from zoosplat.storage import listing, objects, urls
from zoosplat_flows.runners import containers

if TYPE_CHECKING:
    from tests.conftest import S3, Recording

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.environ.get("ZOOSPLAT_CI_CLUSTER") != "1", reason="runs with ZOOSPLAT_CI_CLUSTER=1"),
]
CPU = [spec.name for spec in PREPROCESSING]
MEBIBYTE = 2**20

LOOK = r"""
import importlib.util as u, json, os, pathlib, pwd, shutil, sys
site, root = pathlib.Path("/opt/venv"), pwd.getpwuid(0).pw_dir
write = {}
for place in ("/app/x", "/opt/venv/x", "/x", "/tmp/x"):
    try:
        pathlib.Path(place).write_text("x"); write[place] = True
    except OSError:
        write[place] = False
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "write": write,
    "modules": [m for m in ("torch", "pytest", "hypothesis", "moto", "ruff", "mypy", "prefect") if u.find_spec(m)],
    "stages": [s for s in sys.argv[1:] if u.find_spec("zoosplat_" + s)],
    "tools": [t for t in ("gcc", "cc", "g++", "git", "make", "nvcc", "uv", "ninja", "curl") if shutil.which(t)],
    "tests": [str(p) for p in site.rglob("tests") if p.is_dir()][:5],
    "caches": [p for p in (root + "/.cache/pip", root + "/.cache/uv", "/tmp/tools", "/src") if os.path.exists(p)],
    "environment": sorted(os.environ), "home": os.environ["HOME"], "cwd": os.getcwd(),
}))
"""


@pytest.fixture(scope="module")
def engine() -> list[str]:
    try:
        return containers.find_engine()
    except UserError as error:
        pytest.skip(str(error))


def inspected(engine: list[str], stage: str) -> dict[str, Any]:
    image = containers.image_of(stage)
    found = subprocess.run([*engine, "image", "inspect", image], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"there is no image {image}: make images")
    answer: dict[str, Any] = json.loads(found.stdout)[0]
    return answer


def in_container(engine: list[str], stage: str, program: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a Python program prints in a stage's container, which runs as the runner runs it."""
    command = containers.container_command(engine, f"zoosplat-test-{os.getpid()}", stage, ["-c", program, *arguments])
    at = command.index(containers.image_of(stage))
    command.insert(at, "--entrypoint=python")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("stage", STAGES)
def test_contents(stage: str, engine: list[str]) -> None:
    image = inspected(engine, stage)
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["python", "-m", f"zoosplat_{stage}"]
    assert config["Labels"]["org.opencontainers.image.title"] == f"zoosplat-{stage.replace('_', '-')}"
    seen = in_container(engine, stage, LOOK, *STAGES)
    assert (seen["uid"], seen["gid"], seen["home"], seen["cwd"]) == (10001, 10001, "/tmp", "/app")
    assert seen["write"] == {"/app/x": False, "/opt/venv/x": False, "/x": False, "/tmp/x": True}
    assert seen["stages"] == [stage]
    assert seen["modules"] == (["torch"] if STAGES[stage].gpu else [])
    assert (seen["tools"], seen["tests"], seen["caches"]) == ([], [], [])
    if not STAGES[stage].gpu:
        assert image["Size"] < 600 * 10**6


@pytest.mark.parametrize("stage", STAGES)
def test_no_secrets(stage: str, engine: list[str]) -> None:
    """Neither the image's settings nor its history name a credential, whatever the builder's environment held."""
    text = json.dumps(inspected(engine, stage)).lower()
    for word in ("aws_", "password", "secret", "token", "credential"):
        assert word not in text


def no_progress(done: int, total: int, message: str) -> None:
    return None


def begin(url: str, raw: dict[str, Any]) -> Run:
    """A run of the whole pipeline that nobody works on yet."""
    with begin_run(Project.at(url), Experiment.model_validate(raw), list(STAGES), []) as run:
        return run


@pytest.fixture(scope="module")
def bucket(s3: S3, recording: Recording) -> str:
    """A bucket with a recording, and configurations of small experiments on it, with mask files and with made masks."""
    name = s3.bucket()
    s3.put_folder(recording.folder, name, "recording")
    small: dict[str, Any] = {
        "holdout_views": [2],
        "ingest__max_frames": 36,
        "center_rotation__grid_size": 32,
        "crop__grid_size": 32,
        "model": {"num_unets": 1, "base_filters": 2, "bottleneck": 16, "min_gaussians": 64, "max_gaussians": 1500},
        "train": {"epochs": 1, "lr": 1e-3, "device": "cpu", "keep_last": 2},
        "evaluate": {"gallery_frames": 1, "device": "cpu"},
        "render": {"orbit_frames": 2, "sequence_frames": 2, "width": 96, "height": 80, "device": "cpu"},
        "features": {"device": "cpu"},
    }
    made = {"data__masks": "auto", "segment": {"background_frames": 12, "adapt_minutes": 0, "device": "cpu"}}
    for project, changes in (("p", small), ("made", small | made)):
        config = recording.config(f"s3://{name}/recording", **changes)
        s3.client.put_object(Bucket=name, Key=f"{project}.yaml", Body=json.dumps(config).encode())
    return name


@pytest.mark.usefixtures("s3_here")
@pytest.mark.parametrize(
    ("stage", "project"), [*((stage, "p") for stage in FILES_STAGES), ("segment", "made"), ("ingest", "made")]
)
def test_runs_from_s3_to_s3(stage: str, project: str, engine: list[str], s3: S3, bucket: str) -> None:
    """In the order of the pipeline: each reads what the others' containers wrote."""
    inspected(engine, stage)
    run = begin(f"s3://{bucket}/{project}", json.loads(s3.read(bucket, f"{project}.yaml")))
    heard: list[tuple[int, int]] = []
    printed: list[str] = []

    def log(line: str, source: str = "", at: str = "") -> None:
        printed.append(line)

    with containers.ContainerRunner() as runner:
        runner.run(stage, run, workers=1, progress=lambda done, total, _: heard.append((done, total)), log=log)
        assert heard[-1][0] == heard[-1][1]
        assert run.result(stage).is_done()
        assert printed[-1] == "exit status 0"
        made = s3.objects(bucket)
        # Done before: another container finds it so, and changes nothing.
        heard.clear()
        runner.run(stage, run, workers=1, progress=lambda done, total, _: heard.append((done, total)), log=log)
    assert heard == []
    assert s3.objects(bucket) == made


@pytest.mark.usefixtures("s3_here")
@pytest.mark.parametrize("stage", CPU)
def test_begins_a_run_by_itself(stage: str, engine: list[str], s3: S3, bucket: str) -> None:
    """What a stage's image holds is enough to check a configuration, whatever else that needs elsewhere."""
    inspected(engine, stage)
    command = containers.container_command(
        engine,
        f"zoosplat-test-{os.getpid()}",
        stage,
        ["--project", f"s3://{bucket}/alone", "--config", f"s3://{bucket}/p.yaml", "--workers", "1"],
    )
    done = subprocess.run(command, env={**os.environ, **s3.env}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert open_run(Project.at(f"s3://{bucket}/alone")).result(stage).is_done()


@pytest.mark.usefixtures("s3_here")
@pytest.mark.parametrize("stage", CPU)
def test_the_same_objects_as_without_a_container(
    stage: str, engine: list[str], s3: S3, bucket: str, tmp_path: Path
) -> None:
    """A container's groups are those of a process of this machine, byte for byte."""
    inspected(engine, stage)
    config = tmp_path / "config.yaml"
    config.write_bytes(s3.read(bucket, "p.yaml"))
    env = without_blas_choice({**os.environ, **s3.env})
    for name in CPU[: CPU.index(stage) + 1]:
        command = [sys.executable, "-m", f"zoosplat_{name}", "--project", str(tmp_path / "p"), "--config", str(config)]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    theirs, ours = (open_run(Project.at(url)).result(stage) for url in (f"s3://{bucket}/p", str(tmp_path / "p")))
    assert theirs.id == ours.id
    there, here = (
        {path: objects.read_bytes(urls.join(result.data_url, path)) for path in listing.list_files(result.data_url)}
        for result in (theirs, ours)
    )
    assert there == here
    assert theirs.manifest() == ours.manifest()


@pytest.mark.usefixtures("s3_here")
def test_a_killed_pipeline_leaves_no_container(engine: list[str], s3: S3, recording: Recording) -> None:
    """SIGKILL, which nothing can catch, as soon as its stage's container is there; the next run goes on from there."""
    inspected(engine, "ingest")
    name = s3.bucket()
    s3.put_folder(recording.folder, name, "recording")
    run = begin(f"s3://{name}/p", recording.config(f"s3://{name}/recording"))
    program = (
        "import sys; from zoosplat.stages.lookup import open_run\n"
        "from zoosplat.stages.projects import Project\n"
        "from zoosplat_flows.runners.containers import ContainerRunner\n"
        "run = open_run(Project.at(sys.argv[1]))\n"
        "with ContainerRunner() as runner: runner.run('ingest', run, progress=lambda *_: None, log=lambda *_: None)"
    )

    def running() -> bool:
        command = [*engine, "ps", "-q", "--filter", "label=zoosplat.stage=ingest"]
        return bool(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())

    pipeline = subprocess.Popen([sys.executable, "-c", program, f"s3://{name}/p"])
    deadline = time.monotonic() + 60
    while not running():
        assert time.monotonic() < deadline
    pipeline.kill()
    pipeline.wait()
    while running():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not run.result("ingest").is_done()
    with containers.ContainerRunner() as runner:
        runner.run("ingest", run, workers=1, progress=no_progress, log=lambda line, source="", at="": None)
    assert run.result("ingest").is_done()
