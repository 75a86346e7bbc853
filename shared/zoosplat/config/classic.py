"""The JSON configuration of the published Pose Splatter tool (arXiv 2505.18342), read as it stands."""

from __future__ import annotations

import os
import posixpath
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from zoosplat.errors import UserError
from zoosplat.storage import urls


class GaussianConfig(BaseModel):
    """Settings of the published 2D renderer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    sigma_cutoff: float | None = None
    kernel_size: int | None = None
    batch_size: int | None = None


class Classic(BaseModel):
    """Every key that the published tool knows. Ranges are checked by the experiment that it maps to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    data_directory: str
    project_directory: str
    mask_video_fns: list[str]
    video_fns: list[str]
    holdout_views: list[int] | None = None
    volume_directory: str | None = None
    image_directory: str | None = None
    render_directory: str | None = None
    image_compression_level: int | None = None
    volume_compression_level: int | None = None
    camera_fn: str = "camera_params.h5"
    vertical_lines_fn: str | None = None
    center_rotation_fn: str | None = None
    volume_sum_fn: str | None = None
    model_fn: str | None = None
    feature_fn: str | None = None
    embedding_fn: str | None = None
    image_width: int | None = None
    image_height: int | None = None
    image_downsample: int | None = None
    adaptive_camera: bool | None = None
    fps: float | None = None
    ell: float | None = None
    ell_tracking: float | None = None
    grid_size: int | None = None
    frame_jump: int | None = None
    max_frames: int | None = None
    volume_idx: list[list[int]] | None = None
    volume_fill_color: float | None = None
    img_lambda: float | None = None
    ssim_lambda: float | None = None
    lr: float | None = None
    valid_every: int | None = None
    plot_every: int | None = None
    save_every: int | None = None
    gaussian_mode: Literal["3d", "2d"] | None = None
    gaussian_config: GaussianConfig = GaussianConfig()
    train_time: Any = None
    valid_time: Any = None


DEFAULT_ELL = 0.22  # of the published mouse and rat experiments
_OWN_LAYOUT = "the project folder has a layout of its own"
_NO_EFFECT = {
    "volume_directory": _OWN_LAYOUT,
    "render_directory": _OWN_LAYOUT,
    "center_rotation_fn": _OWN_LAYOUT,
    "volume_sum_fn": _OWN_LAYOUT,
    "model_fn": _OWN_LAYOUT,
    "feature_fn": _OWN_LAYOUT,
    "embedding_fn": _OWN_LAYOUT,
    "image_compression_level": "zarr groups are compressed with zstd",
    "volume_compression_level": "volumes are carved when they are needed and not stored",
    "gaussian_config": "a tile-based rasteriser needs no cutoff, kernel size or batch size",
    "train_time": "the published tool ignores it too; limit training with train.epochs or train.max_minutes",
    "valid_time": "the published tool ignores it too",
}
# Where each classic key goes; also turns the names in messages back into those that the user wrote.
_PLACES = {
    "video_fns": ("data.videos",),
    "mask_video_fns": ("data.masks",),
    "camera_fn": ("data.calibration",),
    "vertical_lines_fn": ("data.up",),
    "data_directory": ("data.directory",),
    "fps": ("data.fps",),
    "image_width": ("data.image_width",),
    "image_height": ("data.image_height",),
    "holdout_views": ("holdout_views",),
    "adaptive_camera": ("adaptive_camera",),
    "frame_jump": ("ingest.frame_jump",),
    "max_frames": ("ingest.max_frames",),
    "image_downsample": ("ingest.image_downsample",),
    "ell_tracking": ("center_rotation.ell",),
    "grid_size": ("center_rotation.grid_size", "crop.grid_size"),
    "ell": ("crop.ell",),
    "volume_idx": ("crop.volume_idx",),
    "volume_fill_color": ("model.volume_fill_color",),
    "gaussian_mode": ("model.gaussian_mode",),
    "img_lambda": ("train.img_lambda",),
    "ssim_lambda": ("train.ssim_lambda",),
    "lr": ("train.lr",),
    "valid_every": ("train.valid_every",),
    "plot_every": ("train.plot_every",),
    "save_every": ("train.save_every",),
}


def is_classic(raw: dict[str, Any]) -> bool:
    """Whether a configuration is a classic one: it has a key that only those have, and none of the native sections."""
    marks = {"data_directory", "project_directory", "video_fns", "mask_video_fns"}
    return bool(marks & raw.keys()) and not {"data", "crop", "center_rotation"} & raw.keys()


def resolve(folder: str, name: str) -> str:
    """Where a path that was written in `folder` leads: an absolute local path or an s3:// URL.

    Raises:
        UserError: an unknown kind of URL, or a relative path that leaves its bucket.
    """
    if "://" in name or name.startswith(("/", "~")):
        return urls.normalize(name)
    if not urls.is_s3(folder):
        return os.path.normpath(os.path.join(folder, name))
    bucket, _, prefix = folder[5:].partition("/")
    path = posixpath.normpath(posixpath.join(prefix, name))
    if path.split("/")[0] == "..":
        raise UserError(f"{name}: leads out of the bucket {bucket}; name a folder inside it or a whole URL")
    return urls.normalize(f"s3://{bucket}/{'' if path == '.' else path}")


def to_native(classic: Classic, folder: str) -> tuple[dict[str, Any], list[str]]:
    """The native configuration that means the same, and one line for each key that has no effect or a default.

    Args:
        classic: the classic configuration.
        folder: absolute folder of the configuration file; `data_directory` and `project_directory` are relative to it,
            videos to `data_directory`, and all other files and folders to `project_directory`.
    """
    given = classic.model_dump(exclude_none=True, exclude_unset=True)
    project = resolve(folder, classic.project_directory)
    notes = [f"{key} has no effect: {reason}" for key, reason in _NO_EFFECT.items() if key in given]
    notes.append("train.epochs has its default, that of the published tool's command line: set it with --set")
    if classic.ell is None:
        given["ell"] = DEFAULT_ELL
        notes.append(f"ell is absent: {DEFAULT_ELL}, as in the published mouse experiments")
    given.setdefault("ell_tracking", given["ell"])
    given["data_directory"] = resolve(folder, classic.data_directory)
    given["camera_fn"] = resolve(project, classic.camera_fn)
    if classic.vertical_lines_fn is not None:
        given["vertical_lines_fn"] = resolve(project, classic.vertical_lines_fn)

    native: dict[str, Any] = {
        "name": re.sub(r"[^\w.-]+", "_", project.rsplit("/", 1)[-1]).strip("_.-") or "experiment",
        "unit": "normalized",
        "pack": {"window": "full"},
    }
    for key, places in _PLACES.items():
        for place in places:
            if key in given:
                section, _, leaf = place.rpartition(".")
                (native.setdefault(section, {}) if section else native)[leaf] = given[key]
    if classic.image_directory is not None:
        images = resolve(project, classic.image_directory)
        if f"{images}/".startswith(f"{project}/"):
            notes.append(f"image_directory has no effect: {_OWN_LAYOUT}")
        else:
            native["reuse"] = images.rpartition("/")[0]
            notes.append(f"image_directory lies in another project: images are read from {native['reuse']} if they fit")
    return native, notes


def in_classic_words(problem: str) -> str:
    """A problem with the native configuration, with the keys that the classic file has instead."""
    for key, places in _PLACES.items():
        for place in places:
            if "." in place:
                problem = re.sub(rf"(?<![\w.]){re.escape(place)}(?![\w])", key, problem)
    return problem
