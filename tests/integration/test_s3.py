"""Stages on S3 do what they do on local files, and stay inside their prefix."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pipelines import FILES_STAGES

from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PREPROCESSING, STAGES
from zoosplat.stages.runs import Run
from zoosplat.storage import listing, objects, schema

if TYPE_CHECKING:
    from tests.conftest import S3, Recording, Stages

# Their groups are equal byte for byte.
EXACT = [spec.name for spec in PREPROCESSING]
PREFIX = "labs/one/tiny project"


@pytest.fixture(scope="module")
def bucket(s3: S3, recording: Recording, stages: Stages) -> str:
    """A bucket with the recording, and with a project in which the stages have run on it, videos straight from S3."""
    name = s3.bucket()
    s3.put_folder(recording.folder, name, "recording")
    s3.client.put_object(Bucket=name, Key="labs/one/tiny project neighbour/experiment.yaml", Body=b"not ours")
    config = recording.config(f"s3://{name}/recording")
    s3.client.put_object(Bucket=name, Key=f"{PREFIX}/tested.yaml", Body=json.dumps(config).encode())
    before = s3.objects(name)
    for stage in EXACT:
        outcome = stages(stage, f"s3://{name}/{PREFIX}", env=s3.env)
        assert (outcome.status, outcome.err) == (0, "")
    after = s3.objects(name)
    assert all(after[key] == value for key, value in before.items())
    return name


def run_of(project: Path | str) -> Run:
    """The latest run of a project."""
    return open_run(Project.at(str(project)))


def check_same_group(s3: S3, bucket: str, prefix: str, stage: str, finished: Path) -> None:
    """The same objects below the result of a stage as there are files in that of the finished project."""
    local = run_of(finished).result(stage)
    where = f"{prefix}/results/{stage}/{local.id}/{STAGES[stage].writes}/"
    there = {key.removeprefix(where): s3.read(bucket, key) for key in s3.objects(bucket) if key.startswith(where)}
    assert there == {name: Path(local.data_url, name).read_bytes() for name in listing.list_files(local.data_url)}


@pytest.mark.parametrize("stage", EXACT)
def test_the_same_objects_as_on_local_files(
    stage: str, s3: S3, s3_here: S3, bucket: str, recording: Recording, finished: Path
) -> None:
    """Under the same id, too, which knows content and settings and not places; S3 has fingerprints of its own."""
    check_same_group(s3, bucket, PREFIX, stage, finished)
    ours, local = run_of(f"s3://{bucket}/{PREFIX}").result(stage), run_of(finished).result(stage)
    assert (ours.id, ours.manifest()) == (local.id, local.manifest())


def test_arrays_read_back(s3: S3, s3_here: S3, bucket: str, finished: Path) -> None:
    """Through the reader that the next stages use, in this process."""
    url = f"s3://{bucket}/{PREFIX}"
    run = run_of(url)
    for stage in EXACT:
        remote, local = run.open_input(stage), run_of(finished).open_input(stage)
        assert dict(remote.attrs) == dict(local.attrs)
        assert sorted(remote.array_keys()) == sorted(local.array_keys())
        for key in remote.array_keys():
            np.testing.assert_array_equal(schema.read(remote, key), schema.read(local, key))
    names = list(listing.list_files(url))
    assert names == sorted(names)
    assert f"results/ingest/{run.result('ingest').id}/masks.zarr/zarr.json" in names
    assert not objects.exists(run.output_url("ingest").removesuffix("r"))
    assert objects.read_json(f"{url}/none.json") is None
    with objects.open_read(f"s3://{bucket}/recording/videos/0.mp4") as file:
        file.seek(-10, 2)
        assert len(file.read()) == 10


def test_nothing_outside_the_prefix(s3: S3, bucket: str, finished: Path) -> None:
    keys = set(s3.objects(bucket))
    outside = {key for key in keys if not key.startswith(f"{PREFIX}/")}
    videos = {f"recording/{kind}/{c}.mp4" for kind in ("masks", "videos") for c in range(4)}
    assert outside == videos | {
        "recording/camera_params.h5",
        "recording/vertical_lines.npz",
        "recording/truth.npz",
        "labs/one/tiny project neighbour/experiment.yaml",
    }
    inside = {key.removeprefix(f"{PREFIX}/") for key in keys - outside}
    results = {f"results/{name}" for name in listing.list_files(str(finished / "results"))}
    (run,) = {name.split("/")[1] for name in inside if name.startswith("runs/") and name.count("/") == 2}
    records = {f"runs/{run}/{name}" for name in ("config.yaml", "run.json")}
    assert inside == results | records | {"runs/sources.json", "latest.json", "tested.yaml"}


def test_a_second_run_computes_nothing(s3: S3, bucket: str, stages: Stages) -> None:
    before = s3.objects(bucket)
    for stage in EXACT:
        outcome = stages(stage, f"s3://{bucket}/{PREFIX}", env=s3.env)
        assert (outcome.status, outcome.out, outcome.err) == (0, "", "")
    assert s3.objects(bucket) == before


def test_preparing_again_leaves_the_neighbours_alone(s3: S3, s3_here: S3, recording: Recording, stages: Stages) -> None:
    """What a killed preparation has left goes; objects whose names only begin alike stay."""
    name = s3.bucket()
    config = recording.config(recording.folder, ingest__max_frames=8)
    s3.client.put_object(Bucket=name, Key="p/tested.yaml", Body=json.dumps(config).encode())
    assert stages("ingest", f"s3://{name}/p", "--prepare", env=s3.env).status == 0
    result = run_of(f"s3://{name}/p").result("ingest").folder.removeprefix(f"s3://{name}/")
    s3.client.delete_object(Bucket=name, Key=f"{result}/plan.json")
    beside = {f"{result}/masks.zarr.backup/zarr.json", f"{result}-2x/masks.zarr/zarr.json", "p2/masks.zarr/zarr.json"}
    for key in (*beside, f"{result}/masks.zarr/mask/c/9/0/0/0"):
        s3.client.put_object(Bucket=name, Key=key, Body=b"old")
    assert stages("ingest", f"s3://{name}/p", env=s3.env).status == 0
    keys = set(s3.objects(name))
    assert f"{result}/masks.zarr/mask/c/9/0/0/0" not in keys
    assert {*beside, f"{result}/masks.zarr/mask/c/0/0/0/0"} <= keys


def test_resumes_on_s3_with_workers(s3: S3, recording: Recording, stages: Stages, finished: Path) -> None:
    """One shard alone, then the rest in two processes: the shard is not computed again."""
    name = s3.bucket()
    config = recording.config(recording.folder)
    s3.client.put_object(Bucket=name, Key="p/tested.yaml", Body=json.dumps(config).encode())
    url = f"s3://{name}/p"
    assert stages("ingest", url, "--prepare", env=s3.env).status == 0
    assert stages("ingest", url, "--shard", "1/3", env=s3.env).status == 0
    result = f"p/results/ingest/{run_of(finished).result('ingest').id}"
    mark, data = f"{result}/shards/00001-of-00003.json", f"{result}/masks.zarr/mask/c/1/0/0/0"
    before = s3.objects(name)
    assert f"{result}/done.json" not in before
    outcome = stages("ingest", url, "--workers", "2", env=s3.env)
    assert (outcome.status, outcome.err) == (0, "")
    after = s3.objects(name)
    assert (after[mark], after[data]) == (before[mark], before[data])
    check_same_group(s3, name, "p", "ingest", finished)


@pytest.mark.parametrize("stage", EXACT)
def test_killed_on_s3(stage: str, s3: S3, recording: Recording, stages: Stages, finished: Path) -> None:
    """As on local files (test_kill.py): killed twice at random points, then finished, finished shards kept."""
    name = s3.bucket()
    config = recording.config(recording.folder)
    s3.client.put_object(Bucket=name, Key="p/tested.yaml", Body=json.dumps(config).encode())
    s3.put_folder(finished / "runs", name, "p/runs")
    s3.client.put_object(Bucket=name, Key="p/latest.json", Body=(finished / "latest.json").read_bytes())
    for ready in FILES_STAGES[stage].reads:
        s3.put_folder(finished / "results" / ready, name, f"p/results/{ready}")
    rng = random.Random(stage)
    for _ in range(2):
        process = stages.start(stage, f"s3://{name}/p", "--workers", "1", env=s3.env)
        time.sleep(rng.uniform(0.2, 1.2))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        stages.finished()
    shards = f"p/results/{stage}/{run_of(finished).result(stage).id}/shards/"
    done = {k: v for k, v in s3.objects(name).items() if k.startswith(shards) and k.endswith(".json")}
    outcome = stages(stage, f"s3://{name}/p", env=s3.env)
    assert (outcome.status, outcome.err) == (0, "")
    objects = s3.objects(name)
    assert done.items() <= objects.items()
    assert not [key for key in objects if key.endswith("lease") and "/results/" in key]
    check_same_group(s3, name, "p", stage, finished)


def test_a_shard_that_was_taken_over_is_not_written_to(
    s3: S3, recording: Recording, stages: Stages, finished: Path, tmp_path: Path
) -> None:
    """Stopped between two blocks for longer than its lease lasts; another run finishes the result; it goes on."""
    name = s3.bucket()
    url = f"s3://{name}/p"
    config = recording.config(recording.folder, scheduling__frames_per_shard=1000)
    s3.client.put_object(Bucket=name, Key="p/tested.yaml", Body=json.dumps(config).encode())
    assert stages("ingest", url, "--prepare", env=s3.env).status == 0
    result = f"p/results/ingest/{run_of(finished).result('ingest').id}"
    process = stages.start("ingest", url, "--shard", "0/1", "--workers", "1", env=s3.env)
    deadline = time.monotonic() + 120
    while f"{result}/masks.zarr/mask/c/0/0/0/0" not in s3.objects(name):
        assert time.monotonic() < deadline
    os.kill(process, signal.SIGSTOP)
    assert f"{result}/shards/00000-of-00001.json" not in s3.objects(name), "the shard was done before it was stopped"
    # A server of its own: that of `stages` waits for the process that is stopped.
    other = type(stages)(tmp_path)
    try:
        outcome = other("ingest", url, env=s3.env)
        assert (outcome.status, outcome.err) == (0, "")
        assert "another run is at work on it; waiting" in outcome.out
    finally:
        other.close()
    before = s3.objects(name)
    assert f"{result}/done.json" in before
    os.kill(process, signal.SIGCONT)
    outcome = stages.finished()
    assert outcome.status == 1
    (line,) = outcome.err.splitlines()
    assert "00000-of-00001.lease: another run has taken this work over; run again, finished work is kept" in line
    assert s3.objects(name) == before
    check_same_group(s3, name, "p", "ingest", finished)


def test_a_fresh_interpreter(s3: S3, bucket: str) -> None:
    """`python -m` itself, to its end: nothing is left open that would say so on standard error."""
    url = f"s3://{bucket}/{PREFIX}"
    command = [sys.executable, "-m", "zoosplat_crop", "--project", url, "--force", "--workers", "1"]
    done = subprocess.run(command, env=s3.env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["stage"] for line in done.stdout.splitlines()]
