"""Calls of the `zoosplat` command in the test's own process, and a configuration for them."""

from __future__ import annotations

from typer.testing import CliRunner

from zoosplat_flows.cli.app import app

TWO_CAMERAS = """
data:
  directory: recording
  videos: [a.mp4, b.mp4]
  masks: [am.mp4, bm.mp4]
  calibration: cameras.h5
center_rotation: {ell: 0.3}
crop: {ell: 0.2}
"""


def call(*arguments: str, columns: int = 200) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `zoosplat ARGUMENTS` in a terminal of so many columns."""
    result = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb"}).invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
