"""Pipelines as Jobs of a stand-in for Kubernetes, whose pods are processes of this machine: the stages themselves, on a
real S3 server. What runs share, what their pods print, and where a project must not lie."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from kubernetes.client import ApiException

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.begin import begin_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run
from zoosplat.storage import listing, objects, urls
from zoosplat_flows.execution.executor import execute_stages
from zoosplat_flows.execution.recorder import StageEvent, keep_record
from zoosplat_flows.runners.kubernetes import runner as kubernetes
from zoosplat_flows.runners.kubernetes.manifests import INDEX_LABEL, JOB_LABEL
from zoosplat_flows.runners.kubernetes.runner import KubernetesRunner
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings, Images
from zoosplat_flows.runners.protocol import Exhausted
from zoosplat_flows.runners.stage_output import BAD_INPUT_STATUS

if TYPE_CHECKING:
    from tests.conftest import S3, Recording

    from zoosplat_flows.pipeline import RunnerName

JsonObject = dict[str, Any]
STAGES = ["ingest", "center_rotation", "crop"]

# Forks a stage for every line on standard input, from a process that has imported all of them. What a stage prints goes
# to NAME.log, its process id to NAME.pid, and its exit status to NAME.status, written by a process that waits for it.
FORKS = """
import gc, importlib, json, os, runpy, signal, sys
import boto3, h5py, s3fs, scipy.io
for name in sys.argv[1:]:
    importlib.import_module(f"zoosplat_{name}.stage")
gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    path, pid = request["path"], os.fork()
    if pid == 0:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        os.environ.update(request["env"])
        if request["program"] is not None:
            exec(request["program"], {"__name__": "__main__"})
        else:
            sys.argv = [request["module"], *request["argv"]]
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        sys.exit(0)
    open(f"{path}.pid", "w").write(str(pid))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    open(f"{path}.new", "w").write(str(status))
    os.rename(f"{path}.new", f"{path}.status")
    os._exit(0)
"""


def until(true: Callable[[], Any], seconds: float = 120, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


# -- the stand-in -------------------------------------------------------------------------------------------------
@dataclass
class Pod:
    """A process that stands for a pod: `path` with the suffixes of `FORKS` are its files."""

    name: str
    path: str
    labels: dict[str, str]
    lines: list[str] = field(default_factory=list)  # each with the time when it was seen first

    def status(self) -> int | None:
        with suppress(FileNotFoundError):
            return int(Path(f"{self.path}.status").read_text())
        return None

    def kill(self) -> None:
        with suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.killpg(int(Path(f"{self.path}.pid").read_text()), signal.SIGKILL)

    def as_object(self) -> JsonObject:
        status = self.status()
        phase = "Running" if status is None else "Failed" if status else "Succeeded"
        end = (
            {} if status is None else {"terminated": {"exitCode": status, "reason": "Error" if status else "Completed"}}
        )
        if status:
            end["terminated"] |= {"message": "\n".join(line.partition(" ")[2] for line in self.read()[-20:])}
        return {
            "metadata": {"name": self.name, "labels": self.labels},
            "spec": {"nodeName": "here"},
            "status": {"phase": phase, "containerStatuses": [{"state": end}]},
        }

    def read(self) -> list[str]:
        with suppress(FileNotFoundError):
            printed = Path(f"{self.path}.log").read_text().splitlines()
            for line in printed[len(self.lines) :]:
                self.lines.append(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}{len(self.lines) % 1000:03d}Z {line}")
        return self.lines


class StandIn:
    """Stands for a Kubernetes: has the calls of `KubernetesApi`, and does with processes what a Job says.

    Attributes:
        made: names of the Jobs that were created, in this order.
        pods_made: all pods that there were.
        instead: given the labels of a pod and the number of its try, a program that runs in its place; None: the stage.
    """

    def __init__(self, folder: Path, env: dict[str, str], forks: IO[str]) -> None:
        self._folder, self._env, self._forks = folder, env, forks
        self._lock = threading.RLock()
        self._jobs: dict[str, tuple[JsonObject, list[Pod]]] = {}
        self.made: list[str] = []
        self.pods_made: list[Pod] = []
        self.instead: Callable[[dict[str, str], int], str | None] = lambda labels, tries: None

    def close(self) -> None:
        for name in list(self._jobs):
            self.delete_job(name)

    # -- the calls of the API
    def create_job(self, manifest: JsonObject) -> JsonObject:
        job = json.loads(json.dumps(manifest))
        name = job["metadata"]["name"]
        with self._lock:
            if name in self._jobs:
                raise ApiException(status=409)
            self._jobs[name] = (job, [])
            self.made.append(name)
        threading.Thread(target=self._work, args=(job,), daemon=True).start()
        return dict(job)

    def read_job(self, name: str) -> JsonObject | None:
        with self._lock:
            found = self._jobs.get(name)
            return None if found is None else dict(json.loads(json.dumps(found[0])))

    def list_jobs(self, **labels: str) -> list[JsonObject]:
        with self._lock:
            return [job for job, _ in self._jobs.values() if labels.items() <= job["metadata"]["labels"].items()]

    def list_pods(self, **labels: str) -> list[JsonObject]:
        with self._lock:
            found = [pod for _, pods in self._jobs.values() for pod in pods]
        return [pod.as_object() for pod in found if labels.items() <= pod.labels.items()]

    def read_log(self, pod: str, since_s: int | None = None) -> str:
        found = next(each for each in self.pods_made if each.name == pod)
        return "\n".join(found.read())

    def delete_job(self, name: str) -> None:
        with self._lock:
            _, pods = self._jobs.pop(name, ({}, []))
        for pod in pods:
            pod.kill()

    # -- what a cluster does with a Job
    def _work(self, job: JsonObject) -> None:
        spec = job["spec"]
        waiting, tries = list(range(spec["completions"])), Counter[int]()
        running: dict[int, Pod] = {}
        failed: list[int] = []
        while waiting or running:
            if not self._is_there(job):
                return
            while waiting and len(running) < spec["parallelism"]:
                index = waiting.pop(0)
                tries[index] += 1
                running[index] = self._start(job, index, tries[index])
            for index, status in [(index, pod.status()) for index, pod in running.items()]:
                if status is None:
                    continue
                del running[index]
                if status == 0:
                    job["status"]["succeeded"] += 1
                elif status != BAD_INPUT_STATUS and tries[index] <= spec.get("backoffLimitPerIndex", 0):
                    waiting.append(index)
                else:
                    failed.append(index)
            time.sleep(0.05)
        kind = "Failed" if failed else "Complete"
        job["status"]["failedIndexes"] = ",".join(map(str, failed))
        job["status"]["conditions"] = [{"type": kind, "status": "True", "reason": "", "message": ""}]

    def _is_there(self, job: JsonObject) -> bool:
        with self._lock:
            job.setdefault("status", {"succeeded": 0})
            return job["metadata"]["name"] in self._jobs and self._jobs[job["metadata"]["name"]][0] is job

    def _start(self, job: JsonObject, index: int, tries: int) -> Pod:
        template = job["spec"]["template"]
        labels = {**template["metadata"]["labels"], JOB_LABEL: job["metadata"]["name"]}
        indexed = job["spec"].get("completionMode") == "Indexed"
        labels |= {INDEX_LABEL: str(index)} if indexed else {}
        (container,) = template["spec"]["containers"]
        arguments = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["args"]]
        with self._lock:
            name = f"{job['metadata']['name']}-{len(self.pods_made)}"
            pod = Pod(name, str(self._folder / name), labels)
            self.pods_made.append(pod)
            self._jobs[job["metadata"]["name"]][1].append(pod)
        request = {
            "path": pod.path,
            "module": f"zoosplat_{labels['zoosplat.io/stage']}",
            "argv": arguments,
            "program": self.instead(labels, tries),
            "env": {**self._env, **{e["name"]: e["value"] for e in container["env"] if e["name"] == urls.S3_ONLY}},
        }
        with self._lock:
            self._forks.write(json.dumps(request) + "\n")
            self._forks.flush()
        return pod


SETTINGS = ClusterSettings.model_validate(
    {"namespace": "n", "profiles": {"12gb": {"nodeSelector": {}, "cpu": "1", "memory": "1Gi"}}}
)


@pytest.fixture(scope="module")
def forks() -> Iterator[IO[str]]:
    """The process that stages are forked from: it takes requests, a line each."""
    command = [sys.executable, "-c", FORKS, *STAGES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield server.stdin


@pytest.fixture
def cluster(s3_here: S3, forks: IO[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(kubernetes, "POLL_S", 0.2)
    stand_in = StandIn(tmp_path, s3_here.env, forks)
    yield stand_in
    stand_in.close()


@pytest.fixture
def bucket(s3_here: S3, recording_here: Recording) -> str:
    name = s3_here.bucket()
    s3_here.put_folder(recording_here.folder, name, "recording")
    return name


@pytest.fixture
def recording_here(request: pytest.FixtureRequest) -> Recording:
    """The fixture `recording`, whose name is also that of the recorder's context manager."""
    found: Recording = request.getfixturevalue("recording")
    return found


class Pipelines:
    """Pipelines beside each other, as the flow runs them: each with Jobs of its own, the record of its run, and a
    thread."""

    def __init__(self, cluster: StandIn, url: str, config: Callable[..., JsonObject]) -> None:
        self.cluster, self.project, self._config = cluster, Project.at(url), config
        self.runs: list[Run] = []
        self.errors: list[Exception | None] = []
        self.states: list[dict[str, str]] = []
        self._threads: list[threading.Thread] = []

    def begin(self, stages: list[str] = STAGES, settings: ClusterSettings = SETTINGS, **changes: Any) -> None:
        """Begin a run that `work` goes on with."""
        number, held = len(self.runs), ExitStack()
        experiment = Experiment.model_validate(self._config(**changes))
        run = held.enter_context(begin_run(self.project, experiment, stages, []))
        self.runs.append(run)
        self.errors.append(None)
        self.states.append({})

        def tell(event: StageEvent) -> None:
            self.states[number][event.stage] = event.state

        def work() -> None:
            api: Any = self.cluster
            try:
                with (
                    held,
                    KubernetesRunner(settings, "12gb", api, f"flow-{number}") as jobs,
                    keep_record(run, stages) as recorder,
                ):

                    def record_and_tell(event: StageEvent) -> None:
                        recorder(event)
                        tell(event)

                    execute_stages(run, stages, jobs, None, recorder, record_and_tell)
            except Exception as error:
                self.errors[number] = error

        self._threads.append(threading.Thread(target=work))

    def work(self) -> None:
        """Do what was begun, all of it at the same time."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join(400)
        self._threads.clear()

    def log(self, number: int, stage: str) -> list[str]:
        return objects.read_bytes(self.runs[number].path("logs", f"{stage}.log")).decode().splitlines()


@pytest.fixture
def pipelines(cluster: StandIn, bucket: str, recording_here: Recording) -> Pipelines:
    def config(**changes: Any) -> JsonObject:
        return recording_here.config(f"s3://{bucket}/recording", **changes)

    return Pipelines(cluster, f"s3://{bucket}/p", config)


def done_of(pipelines: Pipelines, stage: str) -> dict[str, JsonObject]:
    """Success marks of all results of a stage, by id."""
    folder = pipelines.project.path("results", stage)
    return {
        name: objects.read_json(urls.join(folder, name, "done.json")) or {} for name in listing.list_folders(folder)
    }


# -- several pipelines on one project -----------------------------------------------------------------------------
def test_runs_with_the_same_settings_share_jobs(pipelines: Pipelines) -> None:
    stages = STAGES[:2]
    for _ in range(2):
        pipelines.begin(stages)
    pipelines.work()
    assert pipelines.errors == [None, None]
    first, second = pipelines.runs
    assert first.id != second.id
    for stage in stages:
        (made,) = done_of(pipelines, stage)
        assert made == first.result(stage).id == second.result(stage).id
        assert sorted(states[stage] for states in pipelines.states) in (["done", "shared"], ["done", "skipped"])
    # A Job a step, and a pod a shard: the second pipeline has waited for those of the first.
    steps = Counter(
        (pod.labels["zoosplat.io/stage"], pod.labels["zoosplat.io/step"]) for pod in pipelines.cluster.pods_made
    )
    assert all(steps[stage, "shards"] == 3 for stage in stages)
    assert len(pipelines.cluster.made) == len({*pipelines.cluster.made})


def test_runs_with_other_settings_have_their_own_results(pipelines: Pipelines) -> None:
    for size in (48, 32):
        pipelines.begin(crop__grid_size=size)
    pipelines.work()
    assert pipelines.errors == [None, None]
    first, second = (open_run(Project.at(pipelines.project.url), run.id) for run in pipelines.runs)
    assert [len(done_of(pipelines, stage)) for stage in STAGES] == [1, 1, 2]
    assert [run.open_input("crop").attrs["grid_size"] for run in (first, second)] == [48, 32]
    assert [run.record()["state"] for run in (first, second)] == ["done", "done"]
    assert [run.record()["stages"]["crop"]["state"] for run in (first, second)] == ["done", "done"]
    assert not pipelines.cluster.list_jobs()


def test_pods_of_different_jobs_share_shards_by_leases(pipelines: Pipelines) -> None:
    """Two versions of the images are at work, as in the midst of an upgrade: their Jobs have different names."""
    newer = SETTINGS.model_copy(update={"images": Images(tag="next")})
    for settings in (SETTINGS, newer):
        pipelines.begin(["ingest"], settings)
    pipelines.work()
    assert pipelines.errors == [None, None]
    names = {name for name in pipelines.cluster.made if "-shards-" in name}
    assert len(names) == 2
    (mark,) = done_of(pipelines, "ingest").values()
    result = pipelines.runs[0].result("ingest")
    shards = [objects.read_json(result.shard_mark_url(i, 3)) or {} for i in range(3)]
    pods = {int(Path(f"{pod.path}.pid").read_text()): pod for pod in pipelines.cluster.pods_made}
    assert [pods[shard["pid"]].labels[INDEX_LABEL] for shard in shards] == ["0", "1", "2"]
    # Every shard was computed once: of the two pods that had its number one has told of frames that it has read.
    for number in ("0", "1", "2"):
        both = [pod for pod in pods.values() if pod.labels.get(INDEX_LABEL) == number]
        assert len(both) == 2
        assert sum(any('"done": 0,' not in line for line in pod.read()) for pod in both) == 1
    assert mark["run"] in {run.id for run in pipelines.runs}
    assert sorted(states["ingest"] for states in pipelines.states) in (["done", "shared"], ["done", "skipped"])


# -- what pods print ----------------------------------------------------------------------------------------------
FAILING = "import sys, time; print('reading block 7'); time.sleep(0.5); sys.exit('OSError: disk on fire')"


def test_logs_of_pods_are_kept_of_failed_tries_too(pipelines: Pipelines) -> None:
    def fails_once(labels: dict[str, str], tries: int) -> str | None:
        return FAILING if labels.get(INDEX_LABEL) == "1" and tries == 1 else None

    pipelines.cluster.instead = fails_once
    pipelines.begin(["ingest"])
    pipelines.work()
    assert pipelines.errors == [None]
    assert not pipelines.cluster.list_jobs()
    lines = pipelines.log(0, "ingest")
    pattern = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00) here/(zoosplat-ingest-\S+)( shard \d)? (.+)")
    found = [pattern.fullmatch(line) for line in lines]
    assert all(found), lines
    ends = Counter((match[3], match[4]) for match in found if match and match[4].startswith("exit status"))
    assert ends == {
        (None, "exit status 0 Completed"): 2,  # prepare, finish
        (" shard 0", "exit status 0 Completed"): 1,
        (" shard 1", "exit status 1 Error"): 1,
        (" shard 1", "exit status 0 Completed"): 1,
        (" shard 2", "exit status 0 Completed"): 1,
    }
    said = [(match[1], match[2], match[4]) for match in found if match and match[3] == " shard 1"]
    first = [text for _, pod, text in said if pod == said[0][1]]
    assert first == ["reading block 7", "OSError: disk on fire", "exit status 1 Error"]
    assert [text for _, _, text in said if '"event": "progress"' in text]  # what the second try has said
    assert any('"event": "plan"' in line for line in lines)


def test_logs_of_a_shard_that_always_fails(pipelines: Pipelines) -> None:
    pipelines.cluster.instead = lambda labels, tries: FAILING if labels.get(INDEX_LABEL) == "2" else None
    pipelines.begin(["ingest"])
    pipelines.work()
    (error,) = pipelines.errors
    assert "ingest: shards failed for good: 2 of 3; the others are kept" in str(error)
    lines = pipelines.log(0, "ingest")
    tries = 1 + SETTINGS.cpu.backoffLimitPerIndex
    assert sum(" shard 2 OSError: disk on fire" in line for line in lines) == tries
    assert sum(" shard 2 exit status 1 Error" in line for line in lines) == tries
    # Mended, the run goes on with that shard alone.
    pipelines.cluster.instead = lambda labels, tries: None
    before = len(pipelines.cluster.pods_made)
    pipelines.begin(["ingest"])
    pipelines.work()
    assert pipelines.errors[1] is None
    assert pipelines.runs[1].id == pipelines.runs[0].id
    marks = [objects.read_json(pipelines.runs[1].result("ingest").shard_mark_url(i, 3)) or {} for i in range(3)]
    pids = {Path(f"{pod.path}.pid").read_text() for pod in pipelines.cluster.pods_made[before:]}
    assert [str(mark["pid"]) in pids for mark in marks] == [False, False, True]


TALKING = """
import json, time
print("began with 3 cameras", flush=True)
for step in range(1, 13):
    print(json.dumps({"event": "progress", "stage": "train", "done": step, "total": 12, "message": ""}), flush=True)
    time.sleep(0.15)
print("a warning: the loss is not finite", flush=True)
time.sleep(1.5)
raise SystemExit(1)
"""


def test_a_pod_that_is_alone_is_followed(cluster: StandIn, pipelines: Pipelines) -> None:
    """Its lines are there while it runs, each once, and of its progress one in some seconds."""
    cluster.instead = lambda labels, tries: TALKING
    with begin_run(pipelines.project, Experiment.model_validate(pipelines._config()), ["ingest"], []) as run:
        lines: list[str] = []
        reports: list[tuple[int, int]] = []
        seen_while_running: list[bool] = []

        def log(line: str, source: str = "", at: str = "") -> None:
            lines.append(line)
            if line.startswith("a warning"):
                seen_while_running.append(
                    bool(cluster.list_jobs()) and cluster.list_pods()[0]["status"]["phase"] == "Running"
                )

        api: Any = cluster
        with KubernetesRunner(SETTINGS, "12gb", api, "flow") as jobs, pytest.raises(RuntimeError) as caught:
            jobs.run("train", run, progress=lambda done, total, _: reports.append((done, total)), log=log)
    assert not isinstance(caught.value, Exhausted)
    assert seen_while_running == [True]
    progress = [line for line in lines if '"event"' in line]
    assert [line for line in lines if line not in progress] == [
        "began with 3 cameras",
        "a warning: the loss is not finite",
        "exit status 1 Error",
    ]
    assert len(progress) == 1
    assert (12, 12) in reports
    assert len(set(reports)) > 2


# -- where a project must not lie ---------------------------------------------------------------------------------
@pytest.mark.parametrize("runner", ["local", "containers", "kubernetes"])
def test_the_flow_refuses_the_folder_of_the_recording(
    runner: RunnerName, s3_here: S3, recording_here: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration gives its name to the project where none is named: here that is where the recording lies."""
    from zoosplat_flows import pipeline as flow

    lab = s3_here.bucket()
    s3_here.put_folder(recording_here.folder, lab, "mouse_6cam")
    config = json.dumps(recording_here.config("mouse_6cam"))
    s3_here.client.put_object(Bucket=lab, Key="mouse_6cam.yaml", Body=config.encode())
    settings = tmp_path / "settings.yaml"
    settings.write_text("namespace: n\n")
    engine = tmp_path / "engine"
    engine.write_text("#!/bin/sh\nexit 1\n")
    engine.chmod(0o755)
    monkeypatch.setenv("ZOOSPLAT_SETTINGS", str(settings))
    monkeypatch.setenv("ZOOSPLAT_CONTAINER_ENGINE", str(engine))
    monkeypatch.setattr(flow, "KubernetesApi", lambda namespace: None)
    before = s3_here.objects(lab)
    url = f"s3://{lab}/mouse_6cam"
    with pytest.raises(UserError) as caught:
        flow.pipeline.fn(config=f"{url}.yaml", runner=runner, until_stage="crop")
    assert str(caught.value) == (
        f"{url}: the project would be the folder of the recording (data.directory = {url}); give results a place of "
        "their own with --project, or the parameter project"
    )
    assert s3_here.objects(lab) == before
    # Named, the project may lie beside the recording.
    s3_here.client.delete_object(Bucket=lab, Key="mouse_6cam/masks/3.mp4")
    with pytest.raises(UserError, match=r"masks/3\.mp4"):
        flow.pipeline.fn(project=f"s3://{lab}/p", config=f"{url}.yaml", runner=runner, until_stage="crop")
