"""The zoosplat command."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import h5py
import numpy as np
import pytest
from command_line import TWO_CAMERAS, call

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import load_config
from zoosplat.stages.results import DONE, PLAN, Result
from zoosplat.stages.run_state import find_run_state
from zoosplat.stages.runs import Run
from zoosplat.storage import leases, objects
from zoosplat_flows.commands.run import summarize_metrics
from zoosplat_flows.execution.recorder import RunRecorder, StageEvent
from zoosplat_flows.execution.stage_states import stage_states
from zoosplat_flows.formatting import format_duration

if TYPE_CHECKING:
    from tests.conftest import ByHand, Recording

CONFIG = f"\nname: two cameras{TWO_CAMERAS}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def classic(tmp_path: Path) -> Path:
    path = tmp_path / "classic.json"
    values = {
        "data_directory": "recording",
        "project_directory": "results",
        "mask_video_fns": ["am.mp4", "bm.mp4"],
        "video_fns": ["a.mp4", "b.mp4"],
        "ell": 0.25,
        "train_time": 3,
    }
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def run(tmp_path: Path, config: Path, by_hand: ByHand) -> Run:
    """ingest done, center_rotation done with another ell, crop of that, pack partial (2 of 3 shards)."""
    folder = tmp_path / "project"
    before = by_hand.begin(folder, load_config(str(config), ["center_rotation.ell=0.4"]).experiment)
    for stage, warnings in (("ingest", ["camera [1] is dim"]), ("center_rotation", []), ("crop", [])):
        by_hand.mark(before, stage, warnings=warnings)
    run: Run = by_hand.begin(folder, load_config(str(config)).experiment)
    pack = run.result("pack")
    objects.write_json(pack.file(PLAN), {"bounds": [0, 10, 20, 30]})
    for i in (0, 2):
        objects.write_json(pack.shard_mark_url(i, 3), {})
    return run


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    status, out, _ = call("--help")
    assert status == 0
    for name in (
        "run",
        "demo",
        "embed",
        "status",
        "runs",
        "compare",
        "logs",
        "report",
        "gc",
        "upgrade",
        "doctor",
        "config",
    ):
        assert name in out
    heavy = "{'torch', 'prefect', 'zarr', 'cv2', 'matplotlib', 's3fs'}"
    check = f"import sys, zoosplat_flows.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_status_tells_done_partial_and_missing(run: Run) -> None:
    found = {s.stage: s for s in stage_states(run)}
    assert {name: s.state for name, s in found.items()} == {
        "ingest": "done",
        "center_rotation": "missing",
        "crop": "missing",
        "pack": "partial",
        "train": "missing",
        "evaluate": "missing",
        "render": "missing",
        "features": "missing",
        "embedding": "missing",
    }
    assert (found["pack"].shards_done, found["pack"].shards) == (2, 3)

    status, out, _ = call("status", run.project.url)
    assert status == 0
    ingest = next(line for line in out.splitlines() if line.startswith("│ ingest"))
    # 90 s from begin to end, although its four shards worked 300 s; 1.5 GiB.
    for text in ("4/4", "1 min 30 s", "1.50 GiB"):
        assert text in ingest
    assert "2/3" in next(line for line in out.splitlines() if line.startswith("│ pack"))
    assert "ingest: camera [1] is dim" in out.splitlines()
    # Names of runs that began in the same second are in no order.
    (first,) = {*run.project.run_ids()} - {run.id}
    earlier = call("status", run.project.url, "--run", first[:-2])[1]
    assert earlier.count("│ done") == 3
    assert first in earlier


def test_status_says_what_an_earlier_version_of_a_stage_has_left(run: Run, by_hand: ByHand) -> None:
    assert run.older_version("pack") is None
    by_hand.mark(run, "pack")
    earlier = run.request("pack")
    newer = Result.at(run.project.url, "pack", replace(earlier, version=earlier.version + 1).id)
    versions = {**run.versions, "pack": earlier.version + 1}
    now = replace(run, versions=versions, results={**run.results, "pack": newer})
    pack = next(s for s in stage_states(now) if s.stage == "pack")
    assert pack.state == "missing"
    assert pack.reason.startswith(f"the result of version {earlier.version} of the stage is kept; this is version")


def test_status_says_how_the_run_stands_and_what_failed(run: Run, by_hand: ByHand) -> None:
    def shown() -> str:
        return call("status", run.project.url, columns=60)[1]

    assert f"run {run.id}: begun" in shown()
    recorder = RunRecorder(run)
    recorder.start(["ingest", "center_rotation"])
    recorder(StageEvent("center_rotation", "started"))
    with leases.locked(run.path("lease"), lambda: None):
        assert f"run {run.id}: running (ingest to center_rotation)" in shown()
    assert f"run {run.id}: interrupted" in shown()
    message = "masks of [2] of 4 cameras are empty in frame 17, so there is no hull; see ingest.on_empty"
    recorder(StageEvent("center_rotation", "failed", message=message))
    recorder.end("failed")
    # On one line, also where the table has little room.
    assert f"center_rotation: failed: {message}" in shown().splitlines()
    assert f"run {run.id}: failed" in shown()
    by_hand.mark(run, "center_rotation")
    assert message not in shown()


def test_a_run_whose_stages_are_run_one_by_one_is_done_with_the_last(run: Run, by_hand: ByHand, config: Path) -> None:
    other = by_hand.begin(Path(run.project.url), load_config(str(config), ["crop.ell=0.21"]).experiment, until="crop")
    assert find_run_state(run.project, other.record()) == "begun"
    by_hand.mark(other, "center_rotation")
    by_hand.mark(other, "crop")
    assert find_run_state(run.project, other.record()) == "done"


def test_a_damaged_mark_costs_its_own_stage_only(run: Run) -> None:
    path = Path(run.result("ingest").file(DONE))
    path.write_bytes(path.read_bytes()[:40])
    status, out, _ = call("status", run.project.url)
    assert (status, "damaged" in out, "partial" in out) == (0, True, True)
    assert f"ingest: {path}: is damaged" in out


def test_durations_read_well() -> None:
    assert [format_duration(s) for s in (0.04, 59.9, 185, 7620)] == ["0.0 s", "59.9 s", "3 min 05 s", "2 h 07 min"]


def test_headline_gives_the_means_of_the_held_out_views_first(run: Run, by_hand: ByHand) -> None:
    assert summarize_metrics(run) == []
    figures = {"observed": {"iou": 0.91, "psnr": 30.0}, "held_out": {"iou": 0.85, "psnr": None}}
    by_hand.mark(run, "evaluate", figures=figures)
    assert summarize_metrics(run) == [
        "held-out views, test frames: iou 0.850",
        "observed views, test frames: iou 0.910, psnr 30.000",
    ]


def test_user_errors_are_one_line_and_status_2(tmp_path: Path, config: Path) -> None:
    cases = {
        ("status", str(tmp_path)): "holds no run",
        ("report", str(tmp_path)): "holds no run",
        ("runs", str(tmp_path)): "holds no run",
        ("logs", str(tmp_path)): "holds no run",
        ("gc", str(tmp_path)): "holds no run",
        ("upgrade", str(tmp_path)): "there is nothing to upgrade",
        ("compare", str(tmp_path), "1", "2"): "there is no run 1",
        ("run", str(config)): "say where results go with --project URL",
        ("run", str(tmp_path / "none.yaml"), "--project", "x"): "none.yaml",
        ("config", "show", str(config), "--set", "train.lr=fast"): "train.lr",
        ("cameras", "show", str(tmp_path / "none.h5")): "none.h5: no such file",
        ("cameras", "show", str(config), "--format", "csv"): "--format csv: choose one of auto, hdf5",
    }
    for arguments, text in cases.items():
        status, _, err = call(*arguments)
        assert status == 2, arguments
        assert err.startswith("zoosplat: ")
        assert text in err
        assert err.count("\n") == 1


def test_run_refuses_a_wrong_stage_before_it_touches_the_project(tmp_path: Path, config: Path) -> None:
    project = tmp_path / "fresh"
    for option in ("--from", "--until", "--force"):
        status, _, err = call("run", str(config), "--project", str(project), option, "trian")
        assert (status, "there is no stage trian" in err) == (2, True)
    assert not project.exists()


def test_run_needs_a_place_that_can_be_written(tmp_path: Path, config: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    status, _, err = call("run", str(config), "--project", str(tmp_path / "file" / "project"))
    assert status == 2
    assert str(tmp_path / "file") in err


def test_run_says_so_when_s3_is_down(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    # In a process of its own: the connection to S3 is made once a process.
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    program = "from zoosplat_flows.cli.entry import main; main()"
    command = [sys.executable, "-c", program, "run", str(config), "--project", "s3://bucket/project"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"http://127.0.0.1:{port} cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1


def test_run_hands_the_configuration_on(classic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("zoosplat_flows.commands.run.run_stages", lambda *arguments: seen.append(arguments))
    status, _, err = call(
        "run", str(classic), "--set", "train.lr=0.5", "--from", "crop", "--until", "pack", "--force", "crop",
        "--force", "pack", "--workers", "3",
    )  # fmt: skip
    assert status == 0
    assert "note: train_time has no effect" in err
    url, experiment, *rest = seen[0]
    # A classic file names its own project.
    assert url == str(classic.parent / "results")
    assert experiment.train.lr == 0.5
    assert rest == ["crop", "pack", ["crop", "pack"], 3]
    call("run", str(classic), "--project", "elsewhere")
    assert seen[1][0] == "elsewhere"


def test_demo_films_once_and_runs_its_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filmed: list[int] = []
    ran: list[Any] = []

    def film(folder: Path, *, n_frames: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        filmed.append(n_frames)

    monkeypatch.setattr("zoosplat.synthetic.recording.make_recording", film)
    monkeypatch.setattr("zoosplat_flows.commands.demo.run_stages", lambda *arguments: ran.append(arguments))
    ious = np.array([[0.9, 0.8], [1.0, np.nan]])
    monkeypatch.setattr("zoosplat_flows.commands.demo.mask_ious", lambda run, folder: ious)
    project = str(tmp_path / "demo")
    for frames in ("24", "24", "30"):
        status, out, _ = call("demo", "--project", project, "--frames", frames, "--set", "train.epochs=2")
        assert status == 0
        assert "IoU 0.900 in the mean, 0.800 in the worst camera (1); 1 of 4 views left out" in " ".join(out.split())
    assert filmed == [24, 30]
    url, experiment, *_ = ran[0]
    assert url == project
    assert experiment.name == "demo"
    assert experiment.data.masks == "auto"
    assert experiment.train.epochs == 2
    assert experiment.data.directory == f"{project}/recording"


def test_config_show_and_convert_keep_the_meaning(tmp_path: Path, classic: Path) -> None:
    expected = load_config(str(classic), ["train.epochs=7"]).experiment
    status, out, err = call("config", "show", str(classic), "--set", "train.epochs=7")
    assert (status, Experiment.from_yaml(out)) == (0, expected)
    assert "# " in out
    assert "train_time" in err
    target = tmp_path / "deeper" / "native.yaml"
    assert call("config", "convert", str(classic), str(target), "--set", "train.epochs=7")[0] == 0
    assert load_config(str(target)).experiment == expected


def test_config_check_names_all_that_is_missing(config: Path, tmp_path: Path) -> None:
    status, _, err = call("config", "check", str(config))
    assert status == 2
    assert f"{tmp_path}/recording: no such folder" in err
    (tmp_path / "recording").mkdir()
    weights = tmp_path / "weights.safetensors"
    status, _, err = call("config", "check", str(config), "--set", f"train.start_from={weights}")
    assert status == 2
    missing = [
        *("am.mp4 (mask of camera 0)", "bm.mp4 (mask of camera 1)"),
        *("a.mp4 (video of camera 0)", "b.mp4 (video of camera 1)"),
        *("recording/cameras.h5", f"train.start_from = {weights}"),
    ]
    lines = err.splitlines()
    assert [name in line and "no such file" in line for name, line in zip(missing, lines, strict=True)] == [True] * 6


def cut_off(path: Path, kept: int) -> None:
    """Put a film's index in front and cut it off after so many packets, as a copy that was stopped."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        packets = [packet for packet in file.demux(stream) if packet.size]
        with av.open(str(path.with_suffix(".new.mp4")), "w", options={"movflags": "faststart"}) as copy:
            target: Any = copy.add_stream_from_template(stream)
            for packet in packets:
                packet.stream = target
                copy.mux(packet)
    path.with_suffix(".new.mp4").replace(path)
    with av.open(str(path)) as file:
        end = file.streams.video[0].index_entries[kept].pos
    path.write_bytes(path.read_bytes()[: end + 1])


def test_config_check_finds_what_ingest_refuses(recording: Recording, tmp_path: Path) -> None:
    config, data = tmp_path / "config.yaml", recording.copy(tmp_path / "recording")
    config.write_text(json.dumps(recording.config(data)))
    status, out, err = call("config", "check", str(config))
    assert (status, err) == (0, "")
    assert "the configuration fits the recording" in out
    assert sum("96 x 80" in line and "144" in line and "50.00" in line for line in out.splitlines()) == 8

    status, out, err = call("config", "check", str(config), "--set", "data.masks=auto")
    assert (status, err) == (0, "")
    assert "stage segment makes the masks from the videos" in out
    assert sum("96 x 80" in line and "144" in line and "50.00" in line for line in out.splitlines()) == 4

    assert "there are 144 kept frames" in call("config", "check", str(config), "--set", "render.frame=144")[2]
    up = (data / "vertical_lines.npz").read_bytes()
    (data / "vertical_lines.npz").write_text("no numbers")
    assert "vertical_lines.npz: cannot read the key 'up'" in call("config", "check", str(config))[2]
    (data / "vertical_lines.npz").unlink()
    status, out, err = call("config", "check", str(config))
    assert (status, out) == (2, "")
    assert "vertical_lines.npz: no such file" in err
    (data / "vertical_lines.npz").write_bytes(up)
    for path in (*data.glob("masks/*"), *data.glob("videos/*")):
        cut_off(path, 100)
    status, _, err = call("config", "check", str(config))
    assert status == 2
    assert len([line for line in err.splitlines() if "is truncated" in line]) == 8
    status, out, err = call("config", "check", str(config), "--set", "ingest.on_short=truncate")
    assert status == 0
    assert "note: masks/0.mp4 (mask of camera 0) is truncated" in err
    assert "of 144" in out


def test_cameras_are_converted_to_metres(tmp_path: Path) -> None:
    source, target = tmp_path / "in.h5", tmp_path / "out.h5"
    k = np.array([[[1000.0, 0, 320], [0, 1100, 240], [0, 0, 1]], [[900.0, 0, 300], [0, 950, 200], [0, 0, 1]]])
    with h5py.File(source, "w") as file:
        group = file.create_group("camera_parameters")
        group["intrinsic"] = k
        group["rotation"] = np.stack([np.eye(3), np.diag([1.0, -1.0, -1.0])])
        group["translation"] = np.array([[0.0, 0.0, 500.0], [10.0, 20.0, 700.0]])
    status, out, _ = call("cameras", "show", str(source), "--unit", "mm")
    assert status == 0
    # The centre is -R^T t: (0, 0, -0.5) and (-0.01, 0.02, 0.7) metres.
    assert "1000.0, 1100.0" in out
    assert "-0.010, 0.020, 0.700" in out
    assert call("cameras", "convert", str(source), str(target), "--unit", "mm")[0] == 0
    with h5py.File(target) as file:
        np.testing.assert_allclose(file["camera_parameters/translation"][1], [0.01, 0.02, 0.7])
        np.testing.assert_array_equal(file["camera_parameters/intrinsic"], k)


def test_doctor_is_content_here_and_not_with_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    status, out, _ = call("doctor", str(tmp_path / "new"))
    assert status == 0
    assert "can be read and written" in out
    assert "python" in out
    (tmp_path / "file").touch()
    status, out, _ = call("doctor", str(tmp_path / "file" / "x"))
    assert status == 1
    assert "broken" in out
