"""Reads and names the values of results that a report shows."""

from __future__ import annotations

import csv
import io
from typing import Any

from zoosplat.stages.runs import Run
from zoosplat.storage import listing, objects


def check_result_files(run: Run, stage: str) -> None:
    """Raise UserError, naming the file, where a file of a stage's complete result is missing or truncated."""
    result = run.result(stage)
    files = result.manifest()
    if files is not None:
        listing.check_manifest(result.data_folder, files)


def read_csv(url: str) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, as column -> text."""
    return list(csv.DictReader(io.StringIO(objects.read_bytes(url).decode())))


def metric_label(name: str) -> str:
    """The name of a metric, from a column of a table, as people write it: `psnr` -> `PSNR (dB)`."""
    known = {"psnr": "PSNR (dB)", "ssim": "SSIM", "l1": "L1", "mae": "MAE", "absent": "absent views"}
    known |= {f"{key}_corrected": f"{known[key]}, colours corrected" for key in ("l1", "psnr")}
    known |= {"lpips": "LPIPS", "foreground_psnr": "foreground PSNR (dB)"}
    known |= {f"raw_{key}": f"raw {known[key]}" for key in ("l1", "psnr", "ssim", "lpips")}
    return known.get(name) or name.replace("_", " ").replace("iou", "IoU").replace("ssim", "SSIM")


def format_value(value: Any) -> str:
    """A number or text in a few digits."""
    if not isinstance(value, float) or value == int(value):
        return str(int(value) if isinstance(value, float) else value)
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"
