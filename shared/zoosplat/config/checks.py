"""Problems between keys of the configuration that are valid each by itself, a line for the user each."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence

from zoosplat.config.sections import AUTO, CROP_MULTIPLE, Crop, Data, Evaluate, Ingest, Render
from zoosplat.config.training import ANIMALS, ANIMALS_NETWORK, RANDOM, Model, Train
from zoosplat.config.values import MAX_INT


def mask_problems(data: Data, ingest: Ingest) -> Iterator[str]:
    """Masks that this kind of recording cannot have."""
    if data.masks_are_made and ingest.source == "dnerf":
        yield f"data.masks = {AUTO}: the pictures of a D-NeRF scene hold their masks; leave data.masks out"
    if data.masks_are_made and data.mask_values != "auto":
        yield f"data.mask_values = {data.mask_values}: says how files are read, but data.masks = {AUTO}; leave it out"
    if data.keypoints is not None and not data.masks_are_made:
        yield f"data.keypoints: help to make masks, but data.masks names files; leave it out, or set data.masks: {AUTO}"


def plate_problems(data: Data, ingest: Ingest, train: Train) -> Iterator[str]:
    """Uses of the cameras' plates in recordings that have none."""
    if data.backgrounds is not None and ingest.source == "dnerf":
        yield "data.backgrounds: the cameras of a D-NeRF scene move, so there is no background; leave it out"
    known = data.masks_are_made or data.backgrounds is not None
    if train.plate_lambda > 0 and train.method == "pose_splatter" and not known:
        yield (
            f"train.plate_lambda = {train.plate_lambda}: the cameras' backgrounds are not known; set data.masks to "
            f"{AUTO}, or data.backgrounds to pictures of the empty scene, or this to 0"
        )


def list_problems(data: Data) -> Iterator[str]:
    """Lists that do not fit the list of videos, and files that a list has twice."""
    n = len(data.videos)
    lists = {"backgrounds": data.backgrounds, "keypoints": data.keypoints, "camera_names": data.camera_names}
    if not isinstance(data.masks, str):
        lists = {"masks": data.masks, **lists}
    if not isinstance(data.calibration, str) and len(data.calibration) > 1:
        lists["calibration"] = data.calibration
    for key, values in lists.items():
        if values is not None and len(values) != n:
            yield f"data.{key}: {len(values)} entries for {n} videos; give one a camera, in the order of data.videos"
    for key, values in {"videos": data.videos, **lists}.items():
        seen = set()
        for i, value in enumerate(values or ()):
            if value in seen:
                yield f"data.{key}[{i}] = {value!r}: is listed twice; give every camera its own"
            seen.add(value)


def camera_problems(
    holdout_views: Sequence[int], n_cameras: int, ingest: Ingest, train: Train, render: Render
) -> Iterator[str]:
    """Choices of cameras that cannot work with as many as there are; `holdout_views` ascends."""
    for i, view in enumerate(holdout_views):
        if view >= n_cameras:
            yield f"holdout_views[{i}] = {view}: there are {n_cameras} cameras; valid: 0 to {n_cameras - 1}"
        if i and view == holdout_views[i - 1]:
            yield f"holdout_views[{i}] = {view}: is listed twice"
    one_picture_at_a_time = ingest.source == "dnerf"
    if one_picture_at_a_time and train.method != "dynamic":
        yield "ingest.source = 'dnerf': has one picture at a time; only train.method = dynamic can use it"
    observed = len(set(range(n_cameras)) - set(holdout_views))
    if observed < 2 and not (one_picture_at_a_time and observed):
        most = f"hold out at most {max(n_cameras - 2, 0)}"
        yield f"holdout_views = {list(holdout_views)}: leaves {observed} of {n_cameras} cameras; {most}"
    if render.camera >= n_cameras:
        yield f"render.camera = {render.camera}: there are {n_cameras} cameras; nearest: {n_cameras - 1}"


def image_size_problems(
    data: Data, ingest: Ingest, evaluate: Evaluate, width: int | None, height: int | None
) -> Iterator[str]:
    """Downsampling that does not divide the images; sizes in pixels, None where only `data` may know them."""
    width, height = width or data.image_width, height or data.image_height
    common = math.gcd(width or 0, height or 0)  # It is 0, which everything divides, where no size is known.
    working, metrics = ingest.image_downsample, evaluate.image_downsample
    size = f"{width or '?'} x {height or '?'}"
    if common % working:
        near = _nearest(working, _divisors(common))
        yield f"ingest.image_downsample = {working}: does not divide images of {size}; nearest: {near}"
    if metrics is not None and (metrics % working or (common % metrics and not common % working)):
        if common and not common % working:
            near = _nearest(metrics, [d for d in _divisors(common) if d % working == 0])
        else:
            below = metrics // working * working
            near = _nearest(metrics, [d for d in (below, below + working) if 0 < d <= MAX_INT])
        fault = (
            f"is not a multiple of ingest.image_downsample = {working}"
            if metrics % working
            else f"does not divide images of {size}"
        )
        yield f"evaluate.image_downsample = {metrics}: {fault}; nearest: {near}"


def crop_problems(crop: Crop) -> Iterator[str]:
    """Index ranges of the crop that its grid or the U-Nets cannot have."""
    n = crop.grid_size
    for i, (start, end) in enumerate(crop.volume_idx or ()):
        faults = []
        if end > n:
            faults.append(f"reaches outside the grid of {n}")
        if end <= start:
            faults.append("is empty")
        elif (end - start) % CROP_MULTIPLE:
            faults.append(f"length {end - start} is not a multiple of {CROP_MULTIPLE}")
        if faults:
            fault = " and ".join(faults)
            yield f"crop.volume_idx[{i}] = ({start}, {end}): {fault}; nearest: {_nearest_range(start, end, n)}"


def training_problems(train: Train, model: Model, crop: Crop) -> Iterator[str]:
    """Choices of the training and its model that contradict each other or the crop."""
    if train.gpus != "auto" and train.gpus > train.batch_frames:
        yield (
            f"train.gpus = {train.gpus}: they share the frames of a step, which has train.batch_frames = "
            f"{train.batch_frames}; nearest: {train.batch_frames}, or more frames"
        )
    if train.start_from == ANIMALS:
        for key, needed in ANIMALS_NETWORK.items():
            if (given := getattr(model, key)) != needed:
                yield (
                    f"model.{key} = {given}: train.start_from = {ANIMALS} are weights of a network with {needed}; set "
                    f"it so, or train.start_from to {RANDOM}"
                )
    if model.min_gaussians > model.max_gaussians:
        limit = model.max_gaussians
        yield f"model.min_gaussians = {model.min_gaussians}: exceeds model.max_gaussians = {limit}; nearest: {limit}"
    voxels = math.prod(max(end - start, 0) for start, end in crop.volume_idx or ((0, crop.grid_size),) * 3)
    if 0 < voxels < model.min_gaussians:
        yield f"model.min_gaussians = {model.min_gaussians}: the crop has {voxels} voxels; nearest: {voxels}"


def _divisors(n: int) -> list[int]:
    """Divisors of a positive n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def _nearest(value: int, valid: Sequence[int]) -> str:
    """Those next to a value on both sides, of ascending numbers that it is not one of."""
    at = bisect.bisect(valid, value)
    return " or ".join(str(v) for v in valid[max(at - 1, 0) : at + 1])


def _nearest_range(start: int, end: int, n: int) -> tuple[int, int]:
    """The range inside a grid of n, a multiple of 16 long, that is nearest in length, then in place."""
    length = CROP_MULTIPLE * max(1, math.ceil((end - start) / CROP_MULTIPLE - 0.5))
    length = min(length, n // CROP_MULTIPLE * CROP_MULTIPLE)
    start = min(start, n - length)
    return start, start + length
