"""Which keys of a configuration to change so that a training fits into a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from zoosplat.config.experiment import Experiment
from zoosplat.config.sections import CROP_MULTIPLE
from zoosplat.config.training import RANDOM
from zoosplat.stages.memory import TrainingSizes, peak_gpu_bytes


def suggest_smaller(experiment: Experiment, room: float, sizes: TrainingSizes | None = None) -> str:
    """What to set so that a training fits into `room` bytes, in words; what costs least quality comes first.

    The experiment so changed is valid and predicted to fit. Where no key alone is enough, the words name several.

    Args:
        sizes: those of the recording as it is cropped now; default: the most that each configuration can come to.
    """
    for changes in _smaller_settings(experiment):
        tried = _changed(experiment, changes)
        if tried is None:
            continue
        scale = (tried.crop.grid_size / experiment.crop.grid_size) ** 3
        then = None if sizes is None else sizes._replace(voxels=int(sizes.voxels * scale))
        if peak_gpu_bytes(tried, then) <= room:
            words = [f"{key} to {'null' if value is None else value}" for key, value in changes.items()]
            return f"set {' and '.join(words)}"
    if experiment.train.method == "dynamic":
        return "raise ingest.image_downsample or ingest.frame_jump, and lower dynamic.max_gaussians"
    filters = "model.base_filters, " if experiment.train.start_from == RANDOM else ""
    return (
        f"raise ingest.image_downsample and lower crop.grid_size, {filters}model.max_gaussians and train.batch_frames"
    )


def _smaller_settings(experiment: Experiment) -> Iterator[dict[str, int | None]]:
    """Dotted keys and values that make a training smaller, not all of them valid; the mildest of each key first."""
    train, model, crop = experiment.train, experiment.model, experiment.crop
    if train.method == "dynamic":
        halved = {"dynamic.max_gaussians": experiment.dynamic.max_gaussians, "dynamic.views": experiment.dynamic.views}
    else:
        halved = {"train.batch_frames": train.batch_frames}
        if train.start_from == RANDOM:  # Weights that are given are of a network of one size.
            halved |= {"model.bottleneck": model.bottleneck, "model.base_filters": model.base_filters}
        halved |= {"model.max_gaussians": model.max_gaussians}
    for key, value in halved.items():
        while value:
            value //= 2
            yield {key: value}
    if train.method == "dynamic":
        return
    whole = {} if crop.volume_idx is None else {"crop.volume_idx": None}  # Its indices count in one grid.
    for edge in range((crop.grid_size - 1) // CROP_MULTIPLE * CROP_MULTIPLE, 0, -CROP_MULTIPLE):
        yield {"crop.grid_size": edge, **whole}


def _changed(experiment: Experiment, changes: dict[str, int | None]) -> Experiment | None:
    """An experiment with some keys changed; None where that is not valid."""
    raw = experiment.model_dump()
    for key, value in changes.items():
        section, leaf = key.split(".")
        raw[section][leaf] = value
    try:
        return Experiment.model_validate(raw)
    except ValidationError:
        return None
