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
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zoosplat import schema, stores
from zoosplat.stages.registry import PREPROCESSING, STAGES

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
    s3.client.put_object(Bucket=name, Key=f"{PREFIX}/experiment.yaml", Body=json.dumps(config).encode())
    before = s3.objects(name)
    for stage in EXACT:
        outcome = stages(stage, f"s3://{name}/{PREFIX}", env=s3.env)
        assert (outcome.status, outcome.err) == (0, "")
    after = s3.objects(name)
    assert all(after[key] == value for key, value in before.items())
    return name


def digest(mark: bytes) -> str:
    return str(json.loads(mark)["digest"])


@pytest.mark.parametrize("stage", EXACT)
def test_the_same_objects_as_on_local_files(stage: str, s3: S3, bucket: str, finished: Path) -> None:
    group = STAGES[stage].writes
    keys = [key for key in s3.objects(bucket) if key.startswith(f"{PREFIX}/{group}/")]
    there = {key.removeprefix(f"{PREFIX}/{group}/"): s3.read(bucket, key) for key in keys}
    assert there == {name: (finished / group / name).read_bytes() for name in stores.list_files(str(finished / group))}
    # The digest knows content and settings, not places.
    mark = s3.read(bucket, f"{PREFIX}/_marks/{stage}.json")
    assert digest(mark) == digest((finished / "_marks" / f"{stage}.json").read_bytes())


def test_arrays_read_back(s3: S3, bucket: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the reader that the next stages use, in this process."""
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    caches: tuple[Any, ...] = (stores._s3, stores._boto3_session)
    for cache in caches:
        cache.cache_clear()
    try:
        for stage in EXACT:
            remote = stores.open_group(f"s3://{bucket}/{PREFIX}/{STAGES[stage].writes}")
            local = stores.open_group(str(finished / STAGES[stage].writes))
            assert dict(remote.attrs) == dict(local.attrs)
            assert sorted(remote.array_keys()) == sorted(local.array_keys())
            for key in remote.array_keys():
                np.testing.assert_array_equal(schema.read(remote, key), schema.read(local, key))
        names = list(stores.list_files(f"s3://{bucket}/{PREFIX}"))
        assert names == sorted(names)
        assert "masks.zarr/zarr.json" in names
        assert not stores.exists(f"s3://{bucket}/{PREFIX}/masks.zar")
        assert stores.read_json(f"s3://{bucket}/{PREFIX}/_marks/none.json") is None
        with stores.open_read(f"s3://{bucket}/recording/videos/0.mp4") as file:
            file.seek(-10, 2)
            assert len(file.read()) == 10
    finally:
        for cache in caches:
            cache.cache_clear()


def test_nothing_outside_the_prefix(s3: S3, bucket: str, finished: Path) -> None:
    keys = set(s3.objects(bucket))
    outside = {key for key in keys if not key.startswith(f"{PREFIX}/")}
    videos = {f"recording/{kind}/{c}.mp4" for kind in ("masks", "videos") for c in range(4)}
    assert outside == videos | {
        "recording/camera_params.h5",
        "recording/vertical_lines.npz",
        "labs/one/tiny project neighbour/experiment.yaml",
    }
    local = set(stores.list_files(str(finished)))
    assert {key.removeprefix(f"{PREFIX}/") for key in keys - outside} == local


def test_a_second_run_computes_nothing(s3: S3, bucket: str, stages: Stages) -> None:
    before = s3.objects(bucket)
    for stage in EXACT:
        outcome = stages(stage, f"s3://{bucket}/{PREFIX}", env=s3.env)
        assert (outcome.status, outcome.out, outcome.err) == (0, "", "")
    assert s3.objects(bucket) == before


def test_starting_again_leaves_the_neighbours_alone(
    s3: S3, recording: Recording, stages: Stages, finished: Path
) -> None:
    """Another setting: the old group goes, objects whose names only begin alike stay."""
    name = s3.bucket()
    config = recording.config(recording.folder, ingest__max_frames=8)
    s3.client.put_object(Bucket=name, Key="p/experiment.yaml", Body=json.dumps(config).encode())
    for key in ("p/masks.zarr.backup/zarr.json", "p/masks.zarr/mask/c/9/0/0/0", "p2/masks.zarr/zarr.json"):
        s3.client.put_object(Bucket=name, Key=key, Body=b"old")
    assert stages("ingest", f"s3://{name}/p", env=s3.env).status == 0
    keys = s3.objects(name)
    assert "p/masks.zarr/mask/c/9/0/0/0" not in keys
    assert {"p/masks.zarr.backup/zarr.json", "p2/masks.zarr/zarr.json", "p/masks.zarr/mask/c/0/0/0/0"} <= set(keys)


def test_resumes_on_s3_with_workers(s3: S3, recording: Recording, stages: Stages, finished: Path) -> None:
    """One shard alone, then the rest in two processes: the shard is not computed again."""
    name = s3.bucket()
    config = recording.config(recording.folder)
    s3.client.put_object(Bucket=name, Key="p/experiment.yaml", Body=json.dumps(config).encode())
    url = f"s3://{name}/p"
    assert stages("ingest", url, "--prepare", env=s3.env).status == 0
    assert stages("ingest", url, "--shard", "1/3", env=s3.env).status == 0
    mark = "p/_marks/ingest/shard-00001-of-00003.json"
    data = "p/masks.zarr/mask/c/1/0/0/0"
    before = s3.objects(name)
    assert "p/_marks/ingest.json" not in before
    outcome = stages("ingest", url, "--workers", "2", env=s3.env)
    assert (outcome.status, outcome.err) == (0, "")
    after = s3.objects(name)
    assert (after[mark], after[data]) == (before[mark], before[data])
    for path in stores.list_files(str(finished / "masks.zarr")):
        assert s3.read(name, f"p/masks.zarr/{path}") == (finished / "masks.zarr" / path).read_bytes()


@pytest.mark.parametrize("stage", EXACT)
def test_killed_on_s3(stage: str, s3: S3, recording: Recording, stages: Stages, finished: Path) -> None:
    """As on local files (test_kill.py): killed twice at random points, then finished, finished shards kept."""
    name = s3.bucket()
    config = recording.config(recording.folder)
    s3.client.put_object(Bucket=name, Key="p/experiment.yaml", Body=json.dumps(config).encode())
    for ready in STAGES[stage].reads:
        s3.put_folder(finished / STAGES[ready].writes, name, f"p/{STAGES[ready].writes}")
        mark = (finished / "_marks" / f"{ready}.json").read_bytes()
        s3.client.put_object(Bucket=name, Key=f"p/_marks/{ready}.json", Body=mark)
    rng = random.Random(stage)
    for _ in range(2):
        process = stages.start(stage, f"s3://{name}/p", "--workers", "1", env=s3.env)
        time.sleep(rng.uniform(0.2, 1.2))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        stages.finished()
    done = {k: v for k, v in s3.objects(name).items() if k.startswith(f"p/_marks/{stage}/shard-")}
    outcome = stages(stage, f"s3://{name}/p", env=s3.env)
    assert (outcome.status, outcome.err) == (0, "")
    objects = s3.objects(name)
    assert done.items() <= objects.items()
    group = f"p/{STAGES[stage].writes}/"
    there = {key.removeprefix(group): s3.read(name, key) for key in objects if key.startswith(group)}
    local = finished / STAGES[stage].writes
    assert there == {path: (local / path).read_bytes() for path in stores.list_files(str(local))}


def test_a_fresh_interpreter(s3: S3, bucket: str) -> None:
    """`python -m` itself, to its end: nothing is left open that would say so on standard error."""
    url = f"s3://{bucket}/{PREFIX}"
    command = [sys.executable, "-m", "zoosplat_crop", "--project", url, "--force", "--workers", "1"]
    done = subprocess.run(command, env=s3.env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["stage"] for line in done.stdout.splitlines()]
