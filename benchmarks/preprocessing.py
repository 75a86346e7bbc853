"""Measures the CPU stages on a recording, each as its own process, against ffmpeg decoding the same videos.

    python benchmarks/preprocessing.py [CONFIG]

Without a configuration, a synthetic recording is made. The benchmark prints wall seconds, the peak memory of a process,
and the ratio to the time of decoding, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.machine import peak_bytes_of
from zoosplat.stages.begin import begin_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import PREPROCESSING

STAGES = tuple(spec.name for spec in PREPROCESSING)
SYNTHETIC = """
data:
  directory: {folder}
  videos: [{videos}]
  masks: [{masks}]
  calibration: camera_params.h5
  up: vertical_lines.npz
holdout_views: [1, 5]
ingest: {{image_downsample: 4}}
center_rotation: {{ell: 0.25}}
crop: {{ell: 0.22}}
"""


def decode_seconds(experiment: Experiment) -> float:
    """Wall seconds of `ffmpeg -i VIDEO -f null -` over all videos in turn. PyAV decodes where ffmpeg is missing."""
    files = [experiment.data.url(n) for n in (*experiment.data.masks, *experiment.data.videos)]
    start = time.monotonic()
    for file in files:
        subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-i", file, "-f", "null", "-"], check=True)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    if not shutil.which("ffmpeg"):
        sys.exit("this benchmark compares with ffmpeg: install it first")
    with tempfile.TemporaryDirectory() as scratch:
        config = args.config
        if config is None:
            from zoosplat.synthetic.recording import make_recording

            make_recording(Path(scratch, "data"), n_frames=200, width=1152, height=1024)
            names = {kind: ", ".join(f"{kind}/{c}.mp4" for c in range(6)) for kind in ("videos", "masks")}
            config = str(Path(scratch, "config.yaml"))
            Path(config).write_text(SYNTHETIC.format(folder=Path(scratch, "data"), **names))
        experiment = read_config(config)
        print(f"zoosplat {importlib.metadata.version('zoosplat')}, {experiment.name}, {args.runs} runs, best of each")
        best: dict[str, float] = {}
        peaks: dict[str, float] = {}
        for run in range(args.runs):
            project = Project.at(str(Path(scratch, f"run{run}")))
            with begin_run(project, experiment, list(STAGES), []) as begun_run:
                pass
            seconds = {"ffmpeg": decode_seconds(experiment)}
            for stage in STAGES:
                start = time.monotonic()
                command = [sys.executable, "-m", f"zoosplat_{stage}", "--project", project.url, "--run", begun_run.id]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds[stage] = time.monotonic() - start
                peaks[stage] = begun_run.result(stage).require()["peak_memory_bytes"] / 2**20
            seconds["together"] = sum(seconds[s] for s in STAGES)
            seconds["ratio"] = seconds["together"] / seconds["ffmpeg"]
            print(json.dumps({k: round(v, 2) for k, v in seconds.items()}))
            best = {k: min(v, best.get(k, v)) for k, v in seconds.items()}
        for key, value in best.items():
            memory = f", peak {peaks[key]:.0f} MiB" if key in peaks else ""
            print(f"{key:16} {value:6.2f}{'' if key == 'ratio' else ' s'}{memory}")
        children = peak_bytes_of(resource.getrusage(resource.RUSAGE_CHILDREN)) / 2**20
        print(f"largest process  {children:.0f} MiB")


if __name__ == "__main__":
    main()
