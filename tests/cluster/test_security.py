"""What a project, its configuration and its recording cannot do: leave their prefix, read the machine, run commands."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import h5py
import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.recording import video
from zoosplat.recording.calibration.reader import read_cameras
from zoosplat.stages.contract import StageProgress
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PREPROCESSING
from zoosplat.stages.run_records import record_run
from zoosplat.storage import listing, objects
from zoosplat_flows.runners import containers
from zoosplat_flows.runners.kubernetes.manifests import job_manifest
from zoosplat_flows.runners.kubernetes.settings import ClusterSettings

if TYPE_CHECKING:
    from tests.conftest import S3, Outcome, Recording, Stages

ROOT = Path(__file__).resolve().parents[2]
POLICY = (ROOT / "deploy" / "s3-policy.json").read_text()
CPU = [spec.name for spec in PREPROCESSING]
NO_PROGRESS: StageProgress = lambda done, total, message: None  # noqa: E731
CONFIG = "tested.yaml"  # in a project, where `Stages` looks for it
HOSTILE = "s3://{bucket}/a b;touch pwned;`touch pwned`$(touch pwned)'\"&|>pwned"


def refusal(outcome: Outcome, stage: str) -> str:
    """The one line of a stage that refuses its input."""
    assert outcome.status == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"zoosplat {stage}: ")
    return line


# -- S3 credentials -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bucket(s3: S3, recording: Recording) -> str:
    """Two laboratories in one bucket, each with a recording and a project; and projects where none may be."""
    if s3.kind != "minio":
        pytest.skip("only MinIO checks policies: make minio")
    name = s3.bucket()
    for lab in ("mine", "theirs"):
        s3.put_folder(recording.folder, name, f"recordings/{lab}")
    for project, recorded in {
        "projects/mine/good": "recordings/mine",
        "projects/mine/reads": "recordings/theirs",
        "projects/theirs/p": "recordings/mine",
        "projects/mine-not/p": "recordings/mine",
        "recordings/mine/p": "recordings/mine",
        "p": "recordings/mine",
    }.items():
        config = json.dumps(recording.config(f"s3://{name}/{recorded}")).encode()
        s3.client.put_object(Bucket=name, Key=f"{project}/{CONFIG}", Body=config)
    return name


@pytest.fixture(scope="module")
def scoped(s3: S3, bucket: str) -> dict[str, str]:
    """Environment with credentials that the documented policy limits to one laboratory, from the server itself."""
    policy = (
        POLICY.replace("BUCKET", bucket).replace("PROJECTS", "projects/mine").replace("RECORDINGS", "recordings/mine")
    )
    sts = boto3.client(
        "sts",
        endpoint_url=s3.endpoint,
        region_name="us-east-1",
        aws_access_key_id=s3.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3.env["AWS_SECRET_ACCESS_KEY"],
    )
    given = sts.assume_role(RoleArn="arn:aws:iam:::role/any", RoleSessionName="scoped", Policy=policy)["Credentials"]
    return {
        **s3.env,
        "AWS_ACCESS_KEY_ID": given["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": given["SecretAccessKey"],
        "AWS_SESSION_TOKEN": given["SessionToken"],
        "ZOOSPLAT_S3_ONLY": "1",
    }


def test_the_policy_allows_all_that_a_project_needs(
    s3: S3, bucket: str, scoped: dict[str, str], stages: Stages
) -> None:
    """Also to make a result again, and to delete the lease that another process held."""
    before = s3.objects(bucket)
    for stage in CPU:
        outcome = stages(stage, f"s3://{bucket}/projects/mine/good", env=scoped)
        assert (outcome.status, outcome.err) == (0, "")
    first = s3.objects(bucket)
    again = stages("ingest", f"s3://{bucket}/projects/mine/good", "--force", env=scoped)
    assert (again.status, again.err) == (0, "")
    after = s3.objects(bucket)
    assert {key for key in after if not key.startswith("projects/mine/good/")} == {
        key for key in before if not key.startswith("projects/mine/good/")
    }
    # All that they write has one of three names; what is finished is not written again, nor deleted.
    below = {key.removeprefix("projects/mine/good/") for key in after if key.startswith("projects/mine/good/")}
    assert {name.partition("/")[0] for name in below} == {CONFIG, "results", "runs", "latest.json"}
    results = {key: what for key, what in first.items() if "/results/" in key}
    assert results.items() <= after.items()
    made = {(stage, folder) for stage in CPU for folder in result_folders(below, stage)}
    assert len(made) == len(CPU) + 1
    assert {f"results/{stage}/{folder}/done.json" for stage, folder in made} <= below


def result_folders(names: set[str], stage: str) -> set[str]:
    """Folders of a stage's results, from the names of all files of a project."""
    return {name.split("/")[2] for name in names if name.startswith(f"results/{stage}/")}


@pytest.mark.parametrize(
    ("project", "named"),
    [
        ("projects/theirs/p", "projects/theirs/p"),
        ("projects/mine-not/p", "projects/mine-not/p"),
        ("p", "p"),
        ("projects/mine/reads", "recordings/theirs/videos/0.mp4"),
        ("recordings/mine/p", "recordings/mine/p"),  # may be read, not written
    ],
)
def test_another_prefix_is_refused(
    project: str, named: str, s3: S3, bucket: str, scoped: dict[str, str], stages: Stages
) -> None:
    before = s3.objects(bucket)
    line = refusal(stages("ingest", f"s3://{bucket}/{project}", env=scoped), "ingest")
    assert f"s3://{bucket}/{named}" in line
    assert "access refused by the S3 server; check the credentials" in line
    assert s3.objects(bucket) == before
    # And they are no obstacle with the credentials of the owner.
    assert stages("ingest", f"s3://{bucket}/{project}", "--prepare", env=s3.env).status == 0


def change_json(s3: S3, bucket: str, key: str, change: Callable[[Any], None]) -> None:
    """Change a record on S3, as someone who may write to the project can."""
    value = json.loads(s3.read(bucket, key))
    change(value)
    s3.client.put_object(Bucket=bucket, Key=key, Body=json.dumps(value).encode())


def misdirect(s3: S3, bucket: str, project: str, kind: str, other: str, data: str) -> str:
    """Let a project's latest run, in which ingest is done, say that its masks lie elsewhere; the run's id.

    Args:
        s3, bucket, project: where the project lies.
        kind: `record` or `mark`, which is to say so.
        other: the project that the record names.
        data: the folder that the mark names.
    """
    run = str(json.loads(s3.read(bucket, f"{project}/latest.json"))["run"])
    record = f"{project}/runs/{run}/run.json"
    if kind == "record":
        change_json(s3, bucket, record, lambda value: value["results"]["ingest"].update(project=other))
    else:
        made = json.loads(s3.read(bucket, record))["results"]["ingest"]["id"]
        done = f"{project}/results/ingest/{made}/done.json"
        change_json(s3, bucket, done, lambda value: value.update(data=data))
    return run


@pytest.mark.parametrize("kind", ["reuse", "record", "mark"])
def test_another_project_is_not_read(
    kind: str, s3: S3, bucket: str, scoped: dict[str, str], recording: Recording, stages: Stages
) -> None:
    """`reuse` names it, the run's record says that a result lies there, or a mark that the group does."""
    project = f"projects/mine/{kind}"
    theirs = f"s3://{bucket}/projects/theirs/p"
    changes: dict[str, Any] = {"reuse": theirs} if kind == "reuse" else {}
    config = json.dumps(recording.config(f"s3://{bucket}/recordings/mine", **changes)).encode()
    s3.client.put_object(Bucket=bucket, Key=f"{project}/{CONFIG}", Body=config)
    if kind == "reuse":
        line = refusal(stages("ingest", f"s3://{bucket}/{project}", env=scoped), "ingest")
    else:
        assert stages("ingest", f"s3://{bucket}/{project}", env=scoped).status == 0
        run = misdirect(s3, bucket, project, kind, theirs, f"{theirs}/results/ingest/x")
        outcome = stages("center_rotation", f"s3://{bucket}/{project}", "--run", run, env=scoped)
        line = refusal(outcome, "center_rotation")
    assert f"{theirs}" in line
    assert "access refused by the S3 server" in line


def test_a_url_is_no_pattern(s3_here: S3) -> None:
    """Deleting results of a project called p[12] leaves those of p1 and p2 alone."""
    name = s3_here.bucket()
    keys = {f"{project}/results/ingest/0/done.json" for project in ("p1", "p2", "p[12]", "p?", "p*", "p")}
    for key in keys:
        s3_here.client.put_object(Bucket=name, Key=key, Body=b"")
    for project in ("p[12]", "p?", "p*"):
        objects.delete(f"s3://{name}/{project}/results")
        keys.remove(f"{project}/results/ingest/0/done.json")
        assert set(s3_here.objects(name)) == keys


def test_what_may_not_be_deleted_is_said(s3: S3, bucket: str, scoped: dict[str, str]) -> None:
    """A group is never taken for empty because the server kept its objects."""
    program = "import sys; from zoosplat.storage import objects; objects.delete(sys.argv[1])"
    command = [sys.executable, "-c", program, f"s3://{bucket}/recordings/mine/masks"]
    done = subprocess.run(command, env={**os.environ, **scoped}, capture_output=True, text=True, check=False)
    assert "UserError" in done.stderr.splitlines()[-1]
    assert "access refused by the S3 server" in done.stderr
    assert len([key for key in s3.objects(bucket) if key.startswith("recordings/mine/masks/")]) == 4


# -- the machine of a container -----------------------------------------------------------------------------------
LOCAL: dict[str, Callable[[Path], dict[str, Any]]] = {
    "directory": lambda folder: {"data__directory": str(folder)},
    "file_url": lambda folder: {"data__directory": f"file://{folder}"},
    "home": lambda folder: {"data__directory": "~/recording"},
    "calibration": lambda folder: {"data__calibration": f"{folder}/camera_params.h5"},
    "up": lambda folder: {"data__up": f"file://{folder}/vertical_lines.npz"},
    "reuse": lambda folder: {"reuse": str(folder)},
}


@pytest.mark.parametrize("case", LOCAL)
def test_a_container_reads_no_local_file(
    case: str, s3: S3, recording: Recording, stages: Stages, tmp_path: Path
) -> None:
    """Although the file is there and good, as the same stage shows outside of a container.

    Neither where it begins a run, nor for one that was begun outside.
    """
    name = s3.bucket()
    s3.put_folder(recording.folder, name, "recording")
    changes = LOCAL[case](recording.folder)
    config = json.dumps(recording.config(f"s3://{name}/recording", **changes)).encode()
    s3.client.put_object(Bucket=name, Key=f"p/{CONFIG}", Body=config)
    inside = {**s3.env, "ZOOSPLAT_S3_ONLY": "1"}
    line = refusal(stages("ingest", f"s3://{name}/p", env=inside), "ingest")
    assert "stages in containers read and write S3 alone; use s3://bucket/prefix" in line
    assert set(s3.objects(name)) - {f"p/{CONFIG}"} == {
        f"recording/{path}" for path in listing.list_files(str(recording.folder))
    }
    if case == "home":
        return
    assert stages("ingest", f"s3://{name}/p", "--prepare", env=s3.env).status == 0
    if case == "reuse":  # names a folder that holds no results, which whoever begins a run finds out
        return
    run = json.loads(s3.read(name, "p/latest.json"))["run"]
    s3.client.delete_object(Bucket=name, Key=result_key(s3, name, run, "plan.json"))
    line = refusal(stages("ingest", f"s3://{name}/p", "--run", run, env=inside), "ingest")
    assert "stages in containers read and write S3 alone; use s3://bucket/prefix" in line


def prepare_ingest(s3: S3, recording: Recording, stages: Stages) -> tuple[str, str]:
    """A bucket with a recording and a project `p`, whose run has its plan of ingest; and the id of the run."""
    name = s3.bucket()
    s3.put_folder(recording.folder, name, "recording")
    config = json.dumps(recording.config(f"s3://{name}/recording")).encode()
    s3.client.put_object(Bucket=name, Key=f"p/{CONFIG}", Body=config)
    assert stages("ingest", f"s3://{name}/p", "--prepare", env=s3.env).status == 0
    run = json.loads(s3.read(name, "p/latest.json"))["run"]
    return name, run


@pytest.mark.parametrize("place", ["recording", "~/recording", "file:///recording", "/recording"])
def test_a_recorded_configuration_cannot_send_a_container_to_a_local_folder(
    place: str, s3: S3, recording: Recording, stages: Stages
) -> None:
    """A run's configuration has whole URLs; someone has put another place into it."""
    name, run = prepare_ingest(s3, recording, stages)
    s3.client.delete_object(Bucket=name, Key=result_key(s3, name, run, "plan.json"))
    recorded = s3.read(name, f"p/runs/{run}/config.yaml").decode()
    changed = recorded.replace(f"s3://{name}/recording", place)
    assert changed != recorded
    s3.client.put_object(Bucket=name, Key=f"p/runs/{run}/config.yaml", Body=changed.encode())
    outcome = stages("ingest", f"s3://{name}/p", "--run", run, env={**s3.env, "ZOOSPLAT_S3_ONLY": "1"})
    assert "stages in containers read and write S3 alone; use s3://bucket/prefix" in refusal(outcome, "ingest")


def test_a_plan_cannot_send_a_container_to_a_local_file(s3: S3, recording: Recording, stages: Stages) -> None:
    """It holds the places of the videos, for the shards."""
    name, run = prepare_ingest(s3, recording, stages)
    local = str(recording.folder / "masks" / "0.mp4")
    plan = result_key(s3, name, run, "plan.json")
    change_json(s3, name, plan, lambda value: value["values"]["infos"][0].update(url=local))
    arguments = ("--run", run, "--shard", "0/3")
    line = refusal(stages("ingest", f"s3://{name}/p", *arguments, env={**s3.env, "ZOOSPLAT_S3_ONLY": "1"}), "ingest")
    assert f"{local}: stages in containers read and write S3 alone" in line
    assert stages("ingest", f"s3://{name}/p", *arguments, env=s3.env).status == 0


def result_key(s3: S3, bucket: str, run: str, name: str) -> str:
    """Key of a file in the folder of a run's result of ingest, in project p."""
    made = json.loads(s3.read(bucket, f"p/runs/{run}/run.json"))["results"]["ingest"]["id"]
    return f"p/results/ingest/{made}/{name}"


@pytest.mark.parametrize("kind", ["record", "mark"])
def test_what_lies_in_a_project_cannot_send_a_container_to_a_local_file(
    kind: str, s3: S3, recording: Recording, stages: Stages, finished: Path
) -> None:
    """A result of this very id is there, as the same stage shows outside of a container."""
    name = s3.bucket()
    s3.put_folder(recording.folder, name, "recording")
    config = json.dumps(recording.config(f"s3://{name}/recording")).encode()
    s3.client.put_object(Bucket=name, Key=f"p/{CONFIG}", Body=config)
    assert stages("ingest", f"s3://{name}/p", env=s3.env).status == 0
    data = open_run(Project.at(str(finished))).result("ingest").folder
    run = misdirect(s3, name, "p", kind, str(finished), data)
    inside = {**s3.env, "ZOOSPLAT_S3_ONLY": "1"}
    line = refusal(stages("center_rotation", f"s3://{name}/p", "--run", run, env=inside), "center_rotation")
    assert f"{data if kind == 'mark' else finished}: stages in containers read and write S3 alone" in line
    assert "S3 alone" in refusal(stages("ingest", str(finished), env=inside), "ingest")
    assert stages("center_rotation", f"s3://{name}/p", "--run", run, "--prepare", env=s3.env).status == 0


def test_every_container_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    words = containers.container_command(["podman"], "n", "crop", [])
    assert words.index("--env=ZOOSPLAT_S3_ONLY=1") < words.index(containers.image_of("crop"))
    job = job_manifest(ClusterSettings(namespace="n"), "s3://b/p", "crop", "prepare", "d", ["--prepare"], run="r")
    assert {"name": "ZOOSPLAT_S3_ONLY", "value": "1"} in job["spec"]["template"]["spec"]["containers"][0]["env"]


@pytest.mark.parametrize(
    "name", ["$HOME/0.mp4", "${AWS_SECRET_ACCESS_KEY}.mp4", "%2e%2e/other/0.mp4", "{other}/0.mp4", "*/0.mp4"]
)
def test_names_are_taken_as_they_stand(
    name: str, s3: S3, recording: Recording, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket()
    s3.put_folder(recording.folder, bucket, "recording")
    s3.put_folder(recording.folder / "videos", bucket, "other")
    config = recording.config(f"s3://{bucket}/recording")
    config["data"]["videos"][0] = name
    s3.client.put_object(Bucket=bucket, Key=f"p/{CONFIG}", Body=json.dumps(config).encode())
    line = refusal(stages("ingest", f"s3://{bucket}/p", env=s3.env), "ingest")
    assert f"{name} (video of camera 0): no such file: s3://{bucket}/recording/{name}; check data.directory" in line
    assert s3.env["AWS_SECRET_ACCESS_KEY"] not in line


@pytest.mark.parametrize("url", ["s3://b/p\n/q", "s3://b/\x1b[2Jp", "s3://b/../c", "s3://b/p/../../c/p"])
def test_urls_are_one_printable_line(url: str, stages: Stages) -> None:
    line = refusal(stages("ingest", url), "ingest")
    assert "an S3 URL is s3://bucket/prefix, without '..' and control characters" in line
    assert line.isprintable()


# -- commands -----------------------------------------------------------------------------------------------------
def expanded(argument: str, env: dict[str, str]) -> str:
    """What a kubelet makes of an argument: $(NAME) is replaced where NAME is known, $$ stands for $."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), argument)


@pytest.mark.parametrize("project", ["p/$(AWS_SECRET_ACCESS_KEY)", "p/$$(AWS_SECRET_ACCESS_KEY)", "p$/$$", "p"])
def test_kubernetes_replaces_nothing_in_a_url(project: str) -> None:
    arguments = ["--shard", "$(JOB_COMPLETION_INDEX)/6"]
    job = job_manifest(
        ClusterSettings(namespace="n"), f"s3://b/{project}", "crop", "shards", "d", arguments, run="r", shards=6
    )
    (container,) = job["spec"]["template"]["spec"]["containers"]
    env = {"AWS_SECRET_ACCESS_KEY": "secret", "JOB_COMPLETION_INDEX": "3"}
    seen = [expanded(argument, env) for argument in container["args"]]
    assert seen == ["--project", f"s3://b/{project}", "--shard", "3/6"]
    assert "command" not in container


def test_no_shell_reads_a_url(
    s3_here: S3, recording: Recording, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner hands it on as one word, whatever it holds; the stage takes it for a name and nothing else."""
    bucket = s3_here.bucket()
    url = HOSTILE.format(bucket=bucket)
    s3_here.put_folder(recording.folder, bucket, "recording")
    raw = recording.config(f"s3://{bucket}/recording")
    s3_here.client.put_object(Bucket=bucket, Key=f"{url[len(bucket) + 6 :]}/{CONFIG}", Body=json.dumps(raw).encode())
    run = record_run(draft_run(Project.at(url), Experiment.model_validate(raw)), ["ingest"])
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\n[ "$1" != run ] || for word in "$@"; do echo "$word"; done > "$0.words"\nexit 0\n')
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("ZOOSPLAT_CONTAINER_ENGINE", str(engine))
    monkeypatch.chdir(tmp_path)
    with containers.ContainerRunner() as runner:
        runner.run("ingest", run, progress=NO_PROGRESS, log=lambda line, source="", at="": None)
    assert (tmp_path / "engine.words").read_text().splitlines()[-4:] == ["--project", url, "--run", run.id]
    outcome = stages("ingest", url, "--prepare", env=s3_here.env)
    assert (outcome.status, outcome.err) == (0, "")
    assert run.result("ingest").plan() is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "engine.words"]


BOMBS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
for text in open(sys.argv[1]).read().split("\\0"):
    try:
        Experiment.from_yaml(text)
    except UserError as error:
        print(len(str(error)), str(error).splitlines()[0])
"""


def test_files_that_grow(tmp_path: Path) -> None:
    """Each is refused by a short message; one that is not would take hours or all memory."""
    levels = range(1, 30)
    lists = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in levels)
    merges = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in levels)
    texts = [
        f"{lists}train: {{device: *a29}}\n",  # a choice
        f"{lists}crop: {{volume_idx: *a29}}\n",
        f"{lists}data: *a29\n",
        f"{merges}train: *a29\n",
        f"train: {{epochs: 1{':1' * 200_000}}}\n",  # sexagesimal
        f"train: {{lr: {'1' * 400_000}}}\n",
        f"name: {'1_' * 200_000}x\n",
        "".join(" " * i + "a:\n" for i in range(900)),
        "&x\ntrain: *x\n",
    ]
    path = tmp_path / "texts"
    path.write_text("\0".join(texts))
    command = [sys.executable, "-c", BOMBS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lengths = [int(line.partition(" ")[0]) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(lengths) == len(texts)
    assert max(lengths) < 20_000


def test_merged_sections_mean_what_yaml_says(recording: Recording) -> None:
    text = json.dumps(recording.config()) + "\n"
    assert text.startswith("{")
    plain = Experiment.from_yaml(text)
    merged = "train: {<<: [{lr: 0.1, epochs: 3}, {lr: 0.2, seed: 4}], epochs: 5}\n"
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in recording.config().items())
    train = Experiment.from_yaml(lines + merged).train
    assert (train.lr, train.epochs, train.seed) == (0.1, 5, 4)
    assert Experiment.from_yaml(lines) == plain


# -- the recording ------------------------------------------------------------------------------------------------
PLAYLISTS = {
    "concat.mp4": "ffconcat version 1.0\nfile videos/0.mp4\n",
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nvideos/0.mp4\n#EXT-X-ENDLIST\n",
    "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_is_no_video(
    name: str, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg would open what it names: a file of the machine, an address of the network."""
    folder = recording.copy(tmp_path / "recording")
    monkeypatch.chdir(folder)
    (folder / name).write_text(PLAYLISTS[name])
    with pytest.raises(UserError, match=r"not a readable video \((Invalid|Operation)"):
        video.probe(str(folder / name), name)
    assert video.probe(str(folder / "videos/0.mp4"), "0").n_frames == 144


@pytest.mark.parametrize("kind", ["external_link", "external_data", "virtual", "group_link"])
def test_a_calibration_is_one_file(kind: str, recording: Recording, tmp_path: Path) -> None:
    """HDF5 would read what it names: any file, as numbers."""
    whole = recording.folder / "camera_params.h5"
    with h5py.File(whole, "r") as stored:
        values = {key: stored["camera_parameters"][key][()] for key in stored["camera_parameters"]}
    raw = tmp_path / "translation.raw"
    raw.write_bytes(values["translation"].astype("f8").tobytes())
    shape, path = values["translation"].shape, "/camera_parameters/translation"
    linking = tmp_path / "linking.h5"
    with h5py.File(linking, "w") as file:
        if kind == "group_link":
            file["camera_parameters"] = h5py.ExternalLink(whole, "/camera_parameters")
        else:
            group = file.create_group("camera_parameters")
            for key in values.keys() - {"translation"}:
                group[key] = values[key]
            if kind == "external_link":
                group["translation"] = h5py.ExternalLink(whole, path)
            elif kind == "external_data":
                group.create_dataset("translation", shape, "f8", external=[(str(raw), 0, raw.stat().st_size)])
            else:
                layout = h5py.VirtualLayout(shape, "f8")
                layout[...] = h5py.VirtualSource(str(whole), path, shape)
                group.create_virtual_dataset("translation", layout)
    with h5py.File(linking, "r") as file:
        assert np.allclose(file[path][()], values["translation"])  # the library itself reads on
    with pytest.raises(UserError, match=r"camera_parameters.* lies in another file"):
        read_cameras(["c.h5"], format="hdf5", unit="auto", names=None, open_bytes=lambda url: linking.read_bytes())
