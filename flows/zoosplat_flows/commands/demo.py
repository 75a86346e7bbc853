"""`zoosplat demo`: makes a synthetic recording and runs the whole pipeline on it."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from rich.console import Console

from zoosplat.config.load import read_config
from zoosplat.storage import urls
from zoosplat_flows.commands.run import run_stages
from zoosplat_flows.commands.storage_probe import check_writable

CONFIG = importlib.resources.files("zoosplat_flows.commands") / "demo.yaml"  # the configuration of the demo


def run_demo(url: str, frames: int, overrides: list[str], workers: int | None) -> None:
    """Make the synthetic recording, in the project or in ./demo for a project on S3, and run demo.yaml on it.

    Args:
        url: path or URL of the project.
        frames: frames of the recording.
        overrides: changes of the configuration, such as `train.lr=5e-5`.
        workers: processes for the shards of a stage; None: one for each core.

    Raises:
        UserError: the project cannot be written.
        typer.Exit: see `run_stages`.
    """
    check_writable(urls.normalize(url))
    folder = (Path("demo") if urls.is_s3(url) else Path(urls.normalize(url))) / "recording"
    marker = folder / "frames.txt"  # written last: a recording whose making was stopped has none
    if not marker.exists() or marker.read_text() != str(frames):
        from zoosplat.synthetic.recording import make_recording

        marker.unlink(missing_ok=True)
        with Console(stderr=True).status(f"filming {frames} frames of a synthetic animal"):
            make_recording(folder, n_frames=frames)
        marker.write_text(str(frames))
    with importlib.resources.as_file(CONFIG) as config:
        experiment = read_config(str(config), [f"data.directory={folder.absolute()}", *overrides])
    run_stages(url, experiment, None, None, [], workers)
