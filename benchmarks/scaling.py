"""Measures what one recording takes, and prints the tables of docs/scaling.md for 100 recordings of 18,000 frames.

    python benchmarks/scaling.py [CONFIG] [--measurements FILE]

The CPU stages of a recording run with one process for each step, as pods do, against a MinIO that counts requests.
Without a configuration the recording is a synthetic one of 6 cameras. Pipelines of empty stages run against a Prefect
server on PostgreSQL. This program starts both servers. FILE keeps the measurements; where FILE exists, nothing is
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "deploy" / "demo"))

from servers import Servers  # noqa: E402

from zoosplat.machine import peak_bytes_of  # noqa: E402
from zoosplat.stages.registry import PREPROCESSING  # noqa: E402
from zoosplat.synthetic.stand_in import begin_with_results, loop_video  # noqa: E402

if TYPE_CHECKING:
    from zoosplat.stages.contract import StageProgress
    from zoosplat.stages.runs import Run
    from zoosplat_flows.runners.protocol import Log

STAGES = tuple(spec.name for spec in PREPROCESSING)
RENDERED, REPEATED = 128, 8  # frames of the synthetic recording, and how often they are played
FRAMES_READ = 1000  # frames of the long video that a shard reads
METRICS_S = 11.0  # seconds after which MinIO's counts are up to date; it updates them every 10 s
BATCHES = ((1, 0), (10, 0), (30, 0), (30, 10))  # pipelines at once, seconds a stage
PROBE_S = 0.2  # seconds between the requests that measure the latency of Prefect's API

# -- assumed ------------------------------------------------------------------------------------------------------
RECORDINGS, FRAMES = 100, 18_000  # recordings of the plan, and frames of each
SIZES = (1000, 4000)  # frames a shard
CORES = 50  # CPU cores of the cluster; each shard uses one
GPUS = 4  # GPUs of the cluster
CORE_HOUR, GPU_HOUR = 0.04, 4.00  # USD: a general-purpose core, an H200
PUT_1000, GET_1000, GB_MONTH = 0.005, 0.0004, 0.023  # USD: S3, standard class
# -- measured elsewhere: docs/experiments.md, a step of one frame, four or five cameras, three runs on an H200 -------
STEP_GPU_S = 110 / 1530 / 3
SCHEDULED = 200 / 69  # pods/s: 40 simulated nodes, all of Kubernetes on two cores


@dataclass(frozen=True)
class Step:
    """What one pod takes: CPU and wall seconds, peak memory, bytes, and S3 requests.

    Requests that write or list are counted apart from the others, because they cost more.
    """

    frames: int
    cpu_s: float
    wall_s: float
    peak_mib: float
    puts: int
    gets: int
    read_mb: float
    written_mb: float


# -- stages -------------------------------------------------------------------------------------------------------
def counts(endpoint: str) -> tuple[int, int, float, float]:
    """Requests that write or list, other requests, MB sent and MB received by MinIO, all at most METRICS_S old."""
    with urllib.request.urlopen(f"{endpoint}/minio/v2/metrics/node") as answer:
        text = answer.read().decode()
    found = {m[1]: float(m[2]) for m in re.finditer(r'^minio_s3_requests_total\{api="(\w+)".*\} (\S+)$', text, re.M)}
    dear = sum(n for api, n in found.items() if re.match("put|list|delete|post", api))
    sent, received = (
        sum(float(n) for n in re.findall(rf"^minio_s3_traffic_{way}_bytes\S* (\S+)$", text, re.M)) / 1e6
        for way in ("sent", "received")
    )
    return int(dear), int(sum(found.values()) - dear), sent, received


def measure(endpoint: str, stage: str, url: str, words: list[str], frames: int) -> Step:
    """What one step of a stage takes in a process of its own, while nothing else uses the server."""
    before, began = counts(endpoint), time.monotonic()
    command = [sys.executable, "-m", f"zoosplat_{stage}", "--project", url, *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    if status:
        sys.exit(f"scaling: {stage} {' '.join(words)} failed")
    time.sleep(METRICS_S)
    puts, gets, sent, received = (b - a for a, b in zip(before, counts(endpoint), strict=True))
    cpu = usage.ru_utime + usage.ru_stime
    step = Step(frames, cpu, wall, peak_bytes_of(usage) / 2**20, int(puts), int(gets), sent, received)
    print(f"{stage} {' '.join(words)}: {json.dumps(vars(step))}", flush=True)
    return step


def synthetic(folder: Path) -> str:
    """A configuration of a synthetic recording of 6 cameras, 1152 x 1024 pixels, read at a quarter of that size."""
    from preprocessing import SYNTHETIC

    from zoosplat.synthetic.recording import make_recording

    # Another process makes it, because the peak memory of this one would count as that of the stages.
    size = {"n_frames": RENDERED, "width": 1152, "height": 1024}
    renderer = multiprocessing.get_context("spawn").Process(target=make_recording, args=(folder,), kwargs=size)
    renderer.start()
    renderer.join()
    for video in [*folder.glob("*/*.mp4")]:
        once = video.rename(video.with_suffix(".once.mp4"))
        loop_video(once, video, REPEATED)
        once.unlink()
    names = {kind: ", ".join(f"{kind}/{c}.mp4" for c in range(6)) for kind in ("videos", "masks")}
    config = folder / "config.yaml"
    config.write_text(SYNTHETIC.format(folder=folder, **names))
    return str(config)


def measure_stages(config: str | None) -> dict[str, Any]:
    """What the steps of each CPU stage take; of its shards, one of many frames and one of few are measured."""
    import boto3

    from zoosplat.config.load import read_config
    from zoosplat.stages.begin import begin_run
    from zoosplat.stages.projects import Project
    from zoosplat.storage import urls

    os.environ["MINIO_PROMETHEUS_AUTH_TYPE"] = "public"
    with Servers() as servers, tempfile.TemporaryDirectory() as scratch:
        experiment = read_config(config or synthetic(Path(scratch)))
        servers.minio()
        endpoint = servers.env["AWS_ENDPOINT_URL"]
        recording = f"s3://{servers.bucket}/recording"
        data = experiment.data
        names = {*data.videos, *data.masks, data.calibration, data.up}
        for name in sorted(name for name in names if isinstance(name, str) and name != "auto"):
            source = data.url(name)
            assert not urls.is_s3(source)
            boto3.Session().client("s3").upload_file(source, servers.bucket, f"recording/{name}")
        time.sleep(METRICS_S)
        project = Project.at(f"s3://{servers.bucket}/project")
        chosen = experiment.model_copy(update={"data": data.model_copy(update={"directory": recording})})
        with begin_run(project, chosen, list(STAGES), []) as run:
            pass
        measured: dict[str, Any] = {"cameras": len(data.videos), "stages": {}}
        for stage in STAGES:
            steps: dict[str, Step] = {"prepare": measure(endpoint, stage, project.url, ["--prepare"], 0)}
            bounds = (run.result(stage).plan() or {})["bounds"]
            for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
                words = ["--shard", f"{i}/{len(bounds) - 1}"]
                steps[f"shard {i}"] = measure(endpoint, stage, project.url, words, stop - start)
            steps["finish"] = measure(endpoint, stage, project.url, ["--finish"], 0)
            measured["stages"][stage] = {name: vars(step) for name, step in steps.items()}
        measured["video"] = measure_video(servers, data.url(data.videos[0]))
        return measured


def measure_video(servers: Servers, source: str) -> dict[str, float]:
    """Size in MB of one video of FRAMES, and the MB (index and frames) that a shard of FRAMES_READ reads of it.

    Read-ahead fetches 4 MiB at each place where a file is read. A short recording is too small to show this.
    """
    import boto3

    from zoosplat.recording import video
    from zoosplat.storage import objects

    whole, url = servers.folder / "whole.mp4", f"s3://{servers.bucket}/whole.mp4"
    loop_video(Path(source), whole, -(-FRAMES // video.probe(source, source).n_frames))
    boto3.Session().client("s3").upload_file(str(whole), servers.bucket, whole.name)
    info = video.probe(url, url)
    time.sleep(METRICS_S)
    before = counts(servers.env["AWS_ENDPOINT_URL"])
    assert sum(1 for _ in video.read_frames(info, FRAMES // 2, FRAMES // 2 + FRAMES_READ)) == FRAMES_READ
    time.sleep(METRICS_S)
    read = counts(servers.env["AWS_ENDPOINT_URL"])[2] - before[2]
    return {"mb": objects.size(url) / 1e6, "read_mb": read}


# -- Prefect ------------------------------------------------------------------------------------------------------
class Empty:
    """A runner whose stages wait for a given time, report every second, and make results without data."""

    seconds = 0

    def __enter__(self) -> Empty:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return

    def run(self, stage: str, run: Run, *, workers: int | None, progress: StageProgress, log: Log) -> None:
        from zoosplat.storage import objects

        for second in range(self.seconds):
            progress(second, self.seconds, "")
            time.sleep(1)
        result = run.result(stage)
        objects.write_json(result.file("done.json"), {"id": result.id, "run": run.id})

    def stop(self) -> None:
        return


def cpu_seconds(names: tuple[str, ...]) -> float:
    """CPU seconds of those children of this process whose command holds one of the names, and of their children."""
    rows = subprocess.run(["ps", "-eo", "pid,ppid,cputimes,args"], capture_output=True, text=True, check=True).stdout
    table = [row.split(None, 3) for row in rows.splitlines()[1:]]
    own = {pid for pid, parent, _, args in table if parent == str(os.getpid()) and any(n in args for n in names)}
    while more := {pid for pid, parent, *_ in table if parent in own} - own:
        own |= more
    return sum(float(seconds) for pid, _, seconds, _ in table if pid in own)


def measure_prefect() -> list[dict[str, float]]:
    """What pipelines that run at once take: seconds until all have ended, CPU of the server, latency of its API."""
    with Servers() as servers:
        servers.prefect()
        os.environ |= servers.env | {
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        }
        import httpx

        import zoosplat_flows.report.page
        from zoosplat.config.experiment import Experiment
        from zoosplat.stages.projects import Project
        from zoosplat_flows import pipeline as flows

        vars(flows)["LocalRunner"] = Empty
        vars(zoosplat_flows.report.page)["build_report"] = lambda run, state="": run.path("report")
        names, cube = ["0.mp4", "1.mp4"], {"ell": 0.2}
        recording = {"directory": str(servers.folder / "recording"), "videos": names, "masks": names}
        experiment = Experiment.model_validate(
            {"data": {**recording, "calibration": "c.h5"}, "center_rotation": cube, "crop": cube}
        )
        measured: list[dict[str, Any]] = []
        for n, seconds in BATCHES:
            Empty.seconds = seconds
            latencies: list[float] = []
            ended = threading.Event()

            def probe(latencies: list[float] = latencies, ended: threading.Event = ended) -> None:
                with httpx.Client(base_url=servers.env["PREFECT_API_URL"], timeout=60) as client:
                    while not ended.wait(PROBE_S):
                        began = time.monotonic()
                        client.post("/flow_runs/filter", json={"limit": 20}).raise_for_status()
                        latencies.append(time.monotonic() - began)

            prober = threading.Thread(target=probe)
            begun_runs = [
                begin_with_results(Project.at(str(servers.folder / f"batch{len(measured)}" / f"p{i}")), experiment, {})
                for i in range(n)
            ]
            pipelines = [
                threading.Thread(target=flows.pipeline, kwargs={"project": run.project.url, "run": run.id})
                for run in begun_runs
            ]
            before, began = cpu_seconds(("prefect", "postgres")), time.monotonic()
            for thread in (prober, *pipelines):
                thread.start()
            for thread in pipelines:
                thread.join()
            wall = time.monotonic() - began
            ended.set()
            prober.join()
            time.sleep(2)
            ranked = sorted(latencies)
            row = {
                "pipelines": n,
                "stage_s": seconds,
                "wall_s": wall,
                "server_cpu_s": cpu_seconds(("prefect", "postgres")) - before,
                "median_s": ranked[len(ranked) // 2],
                "p95_s": ranked[int(0.95 * len(ranked))],
                "max_s": ranked[-1],
            }
            print(json.dumps(row), flush=True)
            measured.append(row)
        return measured


# -- multiplied out -----------------------------------------------------------------------------------------------
class Line:
    """What shards of one stage take, on the straight line through a shard of many frames and a shard of few."""

    def __init__(self, steps: dict[str, Step]) -> None:
        shards = [step for name, step in steps.items() if name.startswith("shard")]
        self.many, self._few = max(shards, key=lambda s: s.frames), min(shards, key=lambda s: s.frames)
        self._others = [steps["prepare"], steps["finish"]]

    def recording(self, key: str, shards: int) -> float:
        """What a recording of FRAMES takes in so many shards, with the steps before and after the shards."""
        many, few = float(getattr(self.many, key)), float(getattr(self._few, key))
        frame = (many - few) / (self.many.frames - self._few.frames)
        others = sum(float(getattr(step, key)) for step in self._others)
        return others + shards * (many - self.many.frames * frame) + FRAMES * frame


def read_mb(measured: dict[str, Any], stage: str, line: Line, shards: int) -> float:
    """MB that all shards of a stage read of a recording, corrected for videos longer than the measured ones."""
    if stage not in ("ingest", "pack"):
        return line.recording("read_mb", shards)
    video = measured["video"]
    a_shard = video["read_mb"] - video["mb"] * FRAMES_READ / FRAMES  # MB that a shard reads besides its frames
    return float(measured["cameras"] * (shards * a_shard + video["mb"]))


def show_shards(measured: dict[str, Any], lines: dict[str, Line]) -> None:
    """Print what a shard of each stage takes, as it was measured."""
    print("\n| stage | frames of a shard | CPU s | peak MiB | requests put, list / get | MB read / written |")
    print("|---|---|---|---|---|---|")
    for stage, line in lines.items():
        s = line.many
        read = read_mb(measured, stage, line, -(-FRAMES // FRAMES_READ)) / -(-FRAMES // FRAMES_READ)
        print(
            f"| {stage} | {s.frames} | {s.cpu_s:.0f} | {s.peak_mib:.0f} | {s.puts} / {s.gets} | "
            f"{read:.0f} / {s.written_mb:.1f} |"
        )


def show_sizes(measured: dict[str, Any], lines: dict[str, Line]) -> None:
    """Print what all recordings take, by the number of frames in a shard."""
    print("\n| frames a shard | pods | CPU s a pod | pods/s to keep the cores busy | core-hours | hours | USD | "
          "S3 requests/s | MB/s read |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for size in SIZES:
        shards = -(-FRAMES // size)
        pods = len(lines) * (shards + 2)
        cpu_s = sum(line.recording("cpu_s", shards) for line in lines.values())
        requests = sum(line.recording(key, shards) for line in lines.values() for key in ("puts", "gets"))
        read = sum(read_mb(measured, stage, line, shards) for stage, line in lines.items())
        busy = min(CORES, SCHEDULED * cpu_s / pods)
        hours = RECORDINGS * cpu_s / 3600
        print(
            f"| {size} | {RECORDINGS * pods:,} | {cpu_s / pods:.0f} | {CORES * pods / cpu_s:.1f} | {hours:.0f} | "
            f"{hours / busy:.1f} | {hours * CORE_HOUR:.2f} | {busy * requests / cpu_s:.0f} | "
            f"{busy * read / cpu_s:.0f} |"
        )
    shards = -(-FRAMES // SIZES[0])
    puts, gets, kept = (
        RECORDINGS * sum(line.recording(key, shards) for line in lines.values())
        for key in ("puts", "gets", "written_mb")
    )
    print(
        f"\nS3 at {SIZES[0]} frames a shard: {(puts + gets) / 1e6:.1f} million requests, "
        f"{(puts * PUT_1000 + gets * GET_1000) / 1000:.2f} USD; kept: {kept / 1000:.0f} GB, "
        f"{kept / 1000 * GB_MONTH:.2f} USD a month"
    )


def show(measured: dict[str, Any]) -> None:
    """Print the tables of docs/scaling.md."""
    lines = {
        stage: Line({name: Step(**step) for name, step in steps.items()}) for stage, steps in measured["stages"].items()
    }
    show_shards(measured, lines)
    show_sizes(measured, lines)
    steps = FRAMES // 3
    print(
        f"\n| training a recording, {steps} frames | steps | GPU-hours | {RECORDINGS} recordings on {GPUS} GPUs | USD |"
    )
    print("|---|---|---|---|---|")
    for name, epochs, jump in (("50 epochs", 50, 1), ("10 epochs", 10, 1), ("every 5th frame, 50 epochs", 50, 5)):
        n_steps = steps // jump * epochs
        gpu_h = n_steps * STEP_GPU_S / 3600
        print(
            f"| {name} | {n_steps:,} | {gpu_h:.1f} | {RECORDINGS * gpu_h / GPUS:.0f} h | "
            f"{RECORDINGS * gpu_h * GPU_HOUR:.0f} |"
        )
    print(
        "\n| pipelines at once | seconds a stage | until all ended, s | server CPU s, each pipeline | "
        "API median / p95 / max, s |"
    )
    print("|---|---|---|---|---|")
    for row in measured["prefect"]:
        each = row["server_cpu_s"] / row["pipelines"]
        print(
            f"| {row['pipelines']} | {row['stage_s']} | {row['wall_s']:.0f} | {each:.1f} | "
            f"{row['median_s']:.2f} / {row['p95_s']:.2f} / {row['max_s']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--measurements", type=Path, metavar="FILE")
    args = parser.parse_args()
    measured: dict[str, Any] = {}
    if args.measurements is not None and args.measurements.exists():
        measured = json.loads(args.measurements.read_text())
    if "stages" not in measured:
        measured |= measure_stages(args.config)
        if args.measurements is not None:
            args.measurements.write_text(json.dumps(measured, indent=1))
    if "prefect" not in measured:
        measured["prefect"] = measure_prefect()
        if args.measurements is not None:
            args.measurements.write_text(json.dumps(measured, indent=1))
    show(measured)


if __name__ == "__main__":
    main()
