"""`zoosplat logs`: what stages have printed, by stage, by time, and as it comes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import TWO_CAMERAS
from typer.testing import CliRunner

from zoosplat.config.experiment import Experiment
from zoosplat.stages.runs import Run
from zoosplat.storage import leases, objects
from zoosplat_flows.cli.app import app
from zoosplat_flows.execution.recorder import keep_record

if TYPE_CHECKING:
    from tests.conftest import S3, ByHand


def logs(*arguments: str) -> tuple[int, list[str], str]:
    done = CliRunner(env={"TERM": "dumb"}).invoke(app, ["logs", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout.splitlines(), done.stderr


@pytest.fixture
def run(tmp_path: Path, by_hand: ByHand) -> Run:
    experiment = Experiment.from_yaml(TWO_CAMERAS.replace("directory: ", f"directory: {tmp_path}/"))
    begun: Run = by_hand.begin(tmp_path / "project", experiment)
    return begun


def words(lines: list[str]) -> list[str]:
    """Without times."""
    return [" ".join(word for word in line.split() if "+00:00" not in word) for line in lines]


def test_logs_of_a_stage_and_of_all_by_time(run: Run, by_hand: ByHand) -> None:
    written = {
        "ingest": [f"2026-01-01T00:00:0{i}.000+00:00 pod-7 frame {i}" for i in range(3)],
        "pack": [f"2026-01-01T00:00:0{i}.500+00:00 pod-8 block {i}" for i in range(3)],
    }
    written["pack"].append("2026-01-01T00:00:02.500+00:00 pod-8 ends with [brackets]")
    for stage, lines in written.items():
        objects.write_bytes(run.path("logs", f"{stage}.log"), "".join(f"{line}\n" for line in lines).encode())
    url = run.project.url
    status, lines, _ = logs(url, "pack")
    assert status == 0
    assert lines == written["pack"]
    assert words(logs(url, "--follow")[1])[:4] == [
        *("ingest pod-7 frame 0", "pack pod-8 block 0", "ingest pod-7 frame 1", "pack pod-8 block 1"),
    ]
    assert logs(url, "packing")[0] == 2

    by_hand.mark(run, "pack")
    later = by_hand.begin(Path(url), run.experiment, "pack")
    assert later.result("pack").id == f"{run.result('pack').id}-2"
    status, _, err = logs(url, "pack")
    assert (status, "stage pack has printed nothing in run" in err) == (2, True)
    assert logs(url, "pack", "--run", run.id)[0] == 0
    assert "no stage has printed anything" in logs(url)[2]


def test_a_stage_that_an_earlier_run_made_leads_to_its_log(run: Run, by_hand: ByHand) -> None:
    with keep_record(run, ["ingest"]) as recorder:
        recorder.log("ingest", "made here")
    by_hand.mark(run, "ingest")
    train = run.experiment.train.model_copy(update={"epochs": 2})
    by_hand.begin(Path(run.project.url), run.experiment.model_copy(update={"train": train}))
    status, _, err = logs(run.project.url, "ingest")
    assert status == 2
    assert f"its result is of run {run.id}; see `zoosplat logs {run.project.url} ingest --run {run.id}`" in err


@pytest.mark.parametrize("ends", ["run", "ctrl-c"])
def test_followed_until_the_run_ends_or_ctrl_c(run: Run, ends: str) -> None:
    code = "from zoosplat_flows.cli.entry import main; main()"
    command = [sys.executable, "-c", code, "logs", run.project.url, "pack", "--follow"]
    with leases.locked(run.path("lease"), lambda: None), keep_record(run, ["pack"]) as recorder:
        recorder.log("pack", "one")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().endswith("one\n")
        recorder.log("pack", "two")
        assert process.stdout.readline().endswith("two\n")
        if ends == "ctrl-c":
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        recorder.log("pack", "three")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.count("three") == (ends == "run")


def test_logs_on_s3(run: Run, s3_here: S3) -> None:
    bucket = s3_here.bucket()
    with keep_record(run, ["pack"]) as recorder:
        recorder.log("pack", "one")
    s3_here.put_folder(Path(run.project.url), bucket, "project")
    url = f"s3://{bucket}/project"
    assert words(logs(url, "pack")[1])[0].endswith("one")
    objects.write_bytes(f"{url}/runs/{run.id}/logs/ingest.log", b"2026-01-01T00:00:00.000+00:00 pod no end of line yet")
    assert len(logs(url)[1]) == 1
