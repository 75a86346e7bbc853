"""Checks before a run writes anything, so that a configuration that cannot work fails at once and harms nothing."""

from __future__ import annotations

import os
from collections.abc import Collection

from zoosplat.config.experiment import Experiment
from zoosplat.errors import Problems, UserError
from zoosplat.stages.outside_file_checks import check_outside_files
from zoosplat.stages.ownership import RESERVED
from zoosplat.stages.registry import SEGMENT
from zoosplat.storage import groups, urls
from zoosplat.storage.errors import damaged_result_error

MIN_TRACKED_FRAMES = 2  # Frames: a path and a heading are interpolated between at least two.
MIN_EMBEDDED_FRAMES = 2  # Frames: a single one has no variation that an embedding could be fitted to.


def check_before_run(
    experiment: Experiment,
    stages: Collection[str],
    masks_url: str | None,
) -> tuple[str, ...]:
    """Check all that can be checked before these stages run. Videos are opened for segment, ingest and pack.

    Args:
        experiment: the configuration.
        stages: Names of the stages that are to run, without those that are finished.
        masks_url: The finished masks.zarr that they read. None: stage ingest is to make it.

    Returns:
        A line for each thing that is odd and does not stop a run.

    Raises:
        UserError: a line for each problem.
    """
    problems, warnings, kept = Problems(), tuple[str, ...](), None
    with problems.collect():
        if SEGMENT in stages or "ingest" in stages:
            # The import is here, because it takes half a second and only these stages need it.
            from zoosplat.recording.facts import kept_frames
            from zoosplat.recording.sources import open_source

            facts = open_source(experiment).check()
            warnings, kept = facts.warnings, kept_frames(experiment, facts.n_frames)
        elif masks_url is not None and stages:
            kept = _check_finished_masks(experiment, masks_url, also_videos="pack" in stages)
    if kept is not None:
        with problems.collect():
            check_kept_frames(experiment, stages, kept)
    with problems.collect():
        check_outside_files(experiment, stages)
    problems.report()
    return warnings


def _check_finished_masks(experiment: Experiment, url: str, also_videos: bool) -> int:
    """Check a configuration, and the videos, against finished masks, and return the number of kept frames."""
    try:
        group = groups.open_group(url)
    except FileNotFoundError:
        raise damaged_result_error(url, "is missing") from None
    attributes = {key: group.attrs[key] for key in ("full_width", "full_height", "image_downsample", "frame_jump")}
    width, height, d, jump = (int(str(value)) for value in attributes.values())
    kept, n_cameras, *_ = (int(n) for n in group["mask"].shape)  # type: ignore[union-attr]
    problems = Problems()
    with problems.collect():
        experiment.check(n_cameras, width * d, height * d)
    if also_videos:
        from zoosplat.recording.sources import open_source

        with problems.collect():
            open_source(experiment).check_pictures().check_against_masks(width * d, height * d, (kept - 1) * jump)
    problems.report()
    return kept


def check_kept_frames(experiment: Experiment, stages: Collection[str], n_frames: int) -> None:
    """Check what a configuration says about the kept frames of a recording.

    Args:
        experiment: the configuration.
        stages: names of the stages that are to run.
        n_frames: how many frames are kept.

    Raises:
        UserError: a line for each problem.
    """
    problems, frame = [], experiment.render.frame
    if "render" in stages and frame is not None and frame >= n_frames:
        problems.append(
            f"render.frame = {frame}: there are {n_frames} kept frames; nearest: {n_frames - 1}, or null for the "
            "middle of the test split"
        )
    third = n_frames // 3
    in_split = {"train": third, "valid": 2 * n_frames // 3 - third, "test": n_frames - 2 * n_frames // 3}
    # In a scene of moving cameras all frames are trained on, and all frames with a held-out picture are tested on.
    thirds = experiment.ingest.source != "dnerf"
    fits_third = experiment.embedding.fit_to == "third"
    needs = {
        "center_rotation": (n_frames if thirds else MIN_TRACKED_FRAMES, MIN_TRACKED_FRAMES, "frames"),
        "train": (
            third if thirds and experiment.train.fit_to == "third" else n_frames,
            1,
            "frame in the first third (train.fit_to = third)",
        ),
        "evaluate": (
            in_split[experiment.evaluate.split] if thirds else n_frames,
            1,
            f"frame in its third (evaluate.split = {experiment.evaluate.split})",
        ),
        "embedding": (
            third if fits_third else n_frames,
            MIN_EMBEDDED_FRAMES,
            "frames in the first third (embedding.fit_to = third)" if fits_third else "frames",
        ),
    }
    for stage, (there, fewest, what) in needs.items():
        if stage in stages and there < fewest:
            problems.append(
                f"{n_frames} frames are kept: stage {stage} needs {fewest} {what}; lower ingest.frame_jump, raise "
                "ingest.max_frames, or end the run before that stage with --until"
            )
    if problems:
        raise UserError("\n".join(problems))


# -- where results go ---------------------------------------------------------------------------------------------
def check_project_place(project_url: str, experiment: Experiment) -> None:
    """Check that results will not lie among what was recorded.

    A recording may lie in a folder of its own inside the project, and a project in one inside the recording's.

    Raises:
        UserError: the project is the recording's folder or one of its input files, holds some of those, or has the
            recording where results go.
    """
    project, recording = _resolved(project_url), _resolved(experiment.data.directory)
    if project == recording:
        raise UserError(
            f"{project_url}: the project would be the folder of the recording (data.directory = "
            f"{experiment.data.directory}); give results a place of their own with --project, or the parameter project"
        )
    within = _below(recording, project)
    if within is not None and within.split("/")[0] in RESERVED:
        raise UserError(
            f"{project_url}: the recording (data.directory = {experiment.data.directory}) lies in its "
            f"{within.split('/')[0]}, where results go; move it, or choose another project"
        )
    for key, url in _inputs(experiment):
        file = _resolved(url)
        if project == file or _below(project, file) is not None:
            raise UserError(f"{project_url}: is a file of the recording ({key}: {url}); choose another project")
        inside = _below(file, project)
        if inside is None:
            continue
        if inside.split("/")[0] in RESERVED:
            raise UserError(
                f"{project_url}: {inside.split('/')[0]} is where results go, but holds an input ({key}: {url}); move "
                "it, or choose another project"
            )
        if _below(project, recording) is not None:
            raise UserError(
                f"{project_url}: the project would be a folder of the recording that holds its files ({key}: {url}); "
                "give results a place of their own with --project, or the parameter project"
            )


def _inputs(experiment: Experiment) -> list[tuple[str, str]]:
    """Key and URL of each file of a recording."""
    data = experiment.data
    calibration = [data.calibration] if isinstance(data.calibration, str) else list(data.calibration)
    lists = {"videos": data.videos, "masks": data.masks, "backgrounds": data.backgrounds, "keypoints": data.keypoints}
    named = [(f"data.{key}", name) for key, names in lists.items() if isinstance(names, tuple) for name in names]
    named += [("data.calibration", name) for name in calibration]
    if isinstance(data.up, str) and data.up != "auto":
        named.append(("data.up", data.up))
    return [(key, data.url(name)) for key, name in named]


def _resolved(url: str) -> str:
    """The URL in a form that can be compared: a local path has its symbolic links resolved."""
    normal = urls.normalize(url)
    return normal if urls.is_s3(normal) else os.path.realpath(normal)


def _below(url: str, folder: str) -> str | None:
    """The relative path of `url` in `folder`; None if it does not lie inside."""
    prefix = folder.rstrip("/") + "/"
    return url[len(prefix) :] if url.startswith(prefix) else None
