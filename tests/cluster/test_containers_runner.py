"""The runner of containers: its engine's command line, its refusals, and that nothing outlives a pipeline."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runs import Run
from zoosplat.storage import s3_client
from zoosplat_flows.runners import containers
from zoosplat_flows.runners.protocol import Interrupted

if TYPE_CHECKING:
    from tests.conftest import S3, Recording

SECRET = "a-word-that-nobody-may-read"

# An engine that keeps its containers as files: `run` lives while its container's file is there.
ENGINE = """#!/bin/sh
cd "$(dirname "$0")"
case $1 in
  image) [ "$2 $3" = "inspect localhost/zoosplat-crop:dev" ] ;;
  container) [ -e "box-$3" ] ;;
  rm) rm -f "box-$3" ;;
  run)
    for word in "$@"; do
      case $word in --name=*) name=${word#--name=} ;; esac
      echo "$word" >> words
    done
    if [ -e fails ]; then cat fails >&2; exit "$(cat status)"; fi
    sleep 0.3
    touch "box-$name"
    trap '' TERM
    echo '{"event": "progress", "stage": "crop", "done": 3, "total": 9, "message": ""}'
    while [ -e "box-$name" ]; do sleep 0.1; done
    exit 137 ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path, s3: S3, recording: Recording, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The engine's folder; ZOOSPLAT_CONTAINER_ENGINE names it."""
    program = tmp_path / "engine"
    program.write_text(ENGINE)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("ZOOSPLAT_CONTAINER_ENGINE", str(program))
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    s3_client.file_system.cache_clear()
    s3_client.boto3_session.cache_clear()
    return tmp_path


@pytest.fixture
def run(folder: Path, s3: S3, recording: Recording) -> Run:
    """A run that is begun, in a project on S3 whose recording is there too."""
    name = s3.bucket()
    s3.put_folder(recording.folder, name, "recording")
    experiment = Experiment.model_validate(recording.config(f"s3://{name}/recording"))
    return record_run(draft_run(Project.at(f"s3://{name}/p"), experiment), ["crop", "pack"])


def no_progress(done: int, total: int, message: str) -> None:
    return None


def no_log(line: str, source: str = "", at: str = "") -> None:
    return None


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_values_of_credentials_stay_off_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    words = containers.container_command(["podman"], "n", "center_rotation", ["--project", "s3://b/p"])
    assert "--env=AWS_SECRET_ACCESS_KEY" in words
    assert not [word for word in words if SECRET in word or "AWS_SESSION_TOKEN" in word]
    assert words[-3:] == ["localhost/zoosplat-center-rotation:dev", "--project", "s3://b/p"]
    assert {"--read-only", "--user=10001:10001", "--cap-drop=ALL", "--rm"} <= set(words)


def test_registry_and_gpus_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOOSPLAT_IMAGE_REGISTRY", "registry.example/lab")
    monkeypatch.setenv("ZOOSPLAT_IMAGE_TAG", "1.2")
    monkeypatch.setenv("ZOOSPLAT_CONTAINER_GPUS", "all")
    assert containers.image_of("train") == "registry.example/lab/zoosplat-train:1.2"
    assert "--gpus=all" in containers.container_command(["docker"], "n", "train", [])
    assert "--gpus=all" not in containers.container_command(["docker"], "n", "crop", [])


def test_refuses_folders(run: Run, recording: Recording, tmp_path: Path) -> None:
    experiment = Experiment.model_validate(recording.config())
    project = Project.at(str(tmp_path / "project"))
    here = [record_run(draft_run(project, each), ["crop"]) for each in (experiment, run.experiment)]
    elsewhere = record_run(draft_run(run.project, experiment), ["crop"])
    for local, named in ((here[0], project.url), (here[1], project.url), (elsewhere, str(recording.folder))):
        with containers.ContainerRunner() as runner, pytest.raises(UserError) as caught:
            runner.run("crop", local, progress=no_progress, log=no_log)
        assert str(caught.value) == f"{named}: containers see no folders of this machine; use s3://bucket/prefix"


def test_a_missing_image_is_named(run: Run) -> None:
    with containers.ContainerRunner() as runner, pytest.raises(UserError, match="no image localhost/zoosplat-pack:dev"):
        runner.run("pack", run, progress=no_progress, log=no_log)


def test_a_container_is_told_the_project_and_the_run(folder: Path, run: Run) -> None:
    (folder / "fails").write_text("zoosplat crop: some reason\n")
    (folder / "status").write_text("2")
    with containers.ContainerRunner() as runner, pytest.raises(UserError):
        runner.run("crop", run, workers=3, progress=no_progress, log=no_log)
    words = (folder / "words").read_text().splitlines()
    at = words.index("localhost/zoosplat-crop:dev")
    assert words[at + 1 :] == ["--project", run.project.url, "--run", run.id, "--workers", "3"]


def test_bad_input_and_a_killed_container(folder: Path, run: Run) -> None:
    """What they have printed goes to the run's log, of each try."""
    (folder / "fails").write_text("zoosplat crop: grid_size: too small\n")
    (folder / "status").write_text("2")
    logged: list[str] = []

    def log(line: str, source: str = "", at: str = "") -> None:
        logged.append(line)

    with containers.ContainerRunner() as runner:
        with pytest.raises(UserError, match=r"^crop: grid_size: too small$"):
            runner.run("crop", run, progress=no_progress, log=log)
        (folder / "status").write_text("137")
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.run("crop", run, progress=no_progress, log=log)
    said = "zoosplat crop: grid_size: too small"
    assert logged == [said, "exit status 2", said, "exit status 137"]


def test_leaving_removes_the_container(folder: Path, run: Run) -> None:
    """The stage ignores SIGTERM, as process 1 of a container does; the runner is left in the middle."""
    failures: list[BaseException] = []
    heard: list[tuple[int, int]] = []
    with containers.ContainerRunner() as runner:

        def work() -> None:
            try:
                runner.run("crop", run, progress=lambda done, total, _: heard.append((done, total)), log=no_log)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        until(lambda: bool(heard))
    thread.join(timeout=30)
    assert heard == [(3, 9)]
    assert [type(failure) for failure in failures] == [Interrupted]
    assert not list(folder.glob("box-*"))
    with pytest.raises(Interrupted):
        runner.run("crop", run, progress=no_progress, log=no_log)


def test_a_killed_pipeline_leaves_no_container(folder: Path, run: Run) -> None:
    program = (
        "import sys; from zoosplat.stages.lookup import open_run\n"
        "from zoosplat.stages.projects import Project\n"
        "from zoosplat_flows.runners.containers import ContainerRunner\n"
        "run = open_run(Project.at(sys.argv[1]))\n"
        "with ContainerRunner() as runner: runner.run('crop', run, progress=lambda *_: None, log=lambda *_: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, run.project.url], env=os.environ.copy())
    until(lambda: bool(list(folder.glob("box-*"))))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not list(folder.glob("box-*")))
