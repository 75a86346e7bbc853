"""The JSON configuration of the published Pose Splatter tool (arXiv 2505.18342), read as it stands."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from zoosplat.config.experiment import Experiment
from zoosplat.config.messages import describe_errors
from zoosplat.config.paths import resolve_path
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


DEFAULT_ELL = 0.22  # Metres; the edge of the model's cube in the published mouse and rat experiments.
_LAYOUT_IS_FIXED = "the project folder has a layout of its own"
_NO_EFFECT = {
    "volume_directory": _LAYOUT_IS_FIXED,
    "render_directory": _LAYOUT_IS_FIXED,
    "center_rotation_fn": _LAYOUT_IS_FIXED,
    "volume_sum_fn": _LAYOUT_IS_FIXED,
    "model_fn": _LAYOUT_IS_FIXED,
    "feature_fn": _LAYOUT_IS_FIXED,
    "embedding_fn": _LAYOUT_IS_FIXED,
    "image_compression_level": "zarr groups are compressed with zstd",
    "volume_compression_level": "volumes are carved when they are needed and not stored",
    "gaussian_config": "a tile-based rasteriser needs no cutoff, kernel size or batch size",
    "train_time": "the published tool ignores it too; limit training with train.epochs or train.max_minutes",
    "valid_time": "the published tool ignores it too",
}
# The native keys that each classic key sets. Messages are translated back with it, into the keys that the user wrote.
_NATIVE_KEYS = {
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


def _to_native(classic: Classic, folder: str) -> tuple[dict[str, Any], list[str]]:
    """The native configuration that means the same, and one line for each key that has no effect or a default.

    Args:
        classic: the classic configuration.
        folder: absolute folder of the configuration file; `data_directory` and `project_directory` are relative to it,
            videos to `data_directory`, and all other files and folders to `project_directory`.
    """
    given = classic.model_dump(exclude_none=True, exclude_unset=True)
    project = resolve_path(folder, classic.project_directory)
    notes = [f"{key} has no effect: {reason}" for key, reason in _NO_EFFECT.items() if key in given]
    notes.append("train.epochs has its default, that of the published tool's command line: set it with --set")
    if classic.ell is None:
        given["ell"] = DEFAULT_ELL
        notes.append(f"ell is absent: {DEFAULT_ELL}, as in the published mouse experiments")
    given.setdefault("ell_tracking", given["ell"])
    given["data_directory"] = resolve_path(folder, classic.data_directory)
    given["camera_fn"] = resolve_path(project, classic.camera_fn)
    if classic.vertical_lines_fn is not None:
        given["vertical_lines_fn"] = resolve_path(project, classic.vertical_lines_fn)

    native: dict[str, Any] = {
        "name": re.sub(r"[^\w.-]+", "_", project.rsplit("/", 1)[-1]).strip("_.-") or "experiment",
        "unit": "normalized",
        "pack": {"window": "full"},
    }
    for key, places in _NATIVE_KEYS.items():
        for place in places:
            if key in given:
                section, _, leaf = place.rpartition(".")
                (native.setdefault(section, {}) if section else native)[leaf] = given[key]
    if classic.image_directory is not None:
        images = resolve_path(project, classic.image_directory)
        if f"{images}/".startswith(f"{project}/"):
            notes.append(f"image_directory has no effect: {_LAYOUT_IS_FIXED}")
        else:
            native["reuse"] = images.rpartition("/")[0]
            notes.append(f"image_directory lies in another project: images are read from {native['reuse']} if they fit")
    return native, notes


def _in_classic_words(problem: str) -> str:
    """A problem with the native configuration, with the keys that the classic file has instead."""
    for key, places in _NATIVE_KEYS.items():
        for place in places:
            if "." in place:
                problem = re.sub(rf"(?<![\w.]){re.escape(place)}(?![\w])", key, problem)
    return problem


def parse_classic(raw: dict[str, Any], config_folder: str) -> tuple[Experiment, list[str]]:
    """Map a configuration of the published tool.

    Args:
        raw: the JSON object; absent and null keys have the published defaults.
        config_folder: folder of the file, against which its two directories are resolved.

    Returns:
        The experiment, and a line for each key that has no effect or that got a notable default.

    Raises:
        UserError: a line for each problem, with the classic names of the keys.
    """
    native, notes = native_from_classic(raw, urls.normalize(config_folder))
    try:
        return Experiment.from_raw(native), notes
    except UserError as error:
        raise UserError("\n".join(_in_classic_words(line) for line in str(error).splitlines())) from None


def classic_project_directory(raw: dict[str, Any], config_folder: str = ".") -> str:
    """The project URL that a classic configuration names. Raises UserError where it names none."""
    value = raw.get("project_directory")
    if not isinstance(value, str) or not value:
        raise UserError("project_directory is missing: give the folder of the project")
    return resolve_path(urls.normalize(config_folder), value)


def native_from_classic(raw: dict[str, Any], folder: str) -> tuple[dict[str, Any], list[str]]:
    """The native configuration that a classic one means, not yet checked, and notes on it.

    Raises:
        UserError: a key is unknown, missing or of another type, a line each.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    try:
        return _to_native(Classic.model_validate(given), folder)
    except ValidationError as error:
        raise UserError("\n".join(describe_errors(error, Classic))) from None
