"""How much GPU memory a training needs, from its configuration alone, and which key to change where that is too much.

The coefficients are bytes of the tensors that live at once in `zoosplat_train.ops.Trainer`, counted over a step: what
autograd keeps of the U-Nets (bfloat16), the volumes, samples and pictures of carving, drawing and losses (float32).
What surrounds them, CONTEXT and UNUSED, is from benchmarks/memory.py and benchmarks/profiles.py, which compare the
prediction with a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from pydantic import ValidationError

from zoosplat.config.experiment import Experiment
from zoosplat.config.sections import CROP_MULTIPLE
from zoosplat.config.training import RANDOM
from zoosplat.stages.runs import Run
from zoosplat.storage.schema import read

GIB = 1 << 30
CACHE_BYTES = 2 * GIB  # recordings up to this size stay in memory, the GPU's if there is one, after their first reading
VALID_FRAMES = 24  # frames in a validation at most, evenly spread over the split
AHEAD = 16  # frames that are read while one is worked on
CONTEXT = 1.0 * GIB  # of CUDA, cuDNN and the kernels, outside PyTorch's own memory; measured on an H200
UNUSED = 1.15  # memory that PyTorch holds over what its tensors take: blocks that fit nothing
UNUSED_ONCE = 1.6  # the same in the first validation, whose blocks are new
TILES = 3  # of 8 x 8 pixels that a Gaussian covers in a view, in the recordings measured
PER_GAUSSIAN, PER_VIEW = 17_000, 2_400  # bytes of a dynamic Gaussian in an iteration, and for each view; measured
PLAIN = 2.6  # what normalisation without Triton keeps, over that with it
USABLE = 0.95  # of a GPU's memory: the rest is the driver's and the desktop's
PROFILES = ("12gb", "24gb", "48gb", "80gb")  # kinds of GPUs, by their memory


class Sizes(NamedTuple):
    """What decides besides the configuration's own numbers.

    Attributes:
        voxels: of the cropped grid.
        pixels: of a view's window.
        views: that are observed.
        cameras: all of them, held-out ones too.
        frames: kept frames; None: not known, then as many as stay on the GPU.
    """

    voxels: int
    pixels: int
    views: int
    cameras: int
    frames: int | None


def sizes_of(experiment: Experiment) -> Sizes:
    """The most that a configuration can come to: whole frames and the whole grid, where it does not say more.

    Frames whose size is not known count as 1280 x 960.
    """
    n, cameras = experiment.crop.grid_size, len(experiment.data.videos)
    voxels: int = math.prod(stop - start for start, stop in experiment.crop.volume_idx or ((0, n),) * 3)
    size = (experiment.data.image_width or 1280) * (experiment.data.image_height or 960)
    pixels = size // experiment.ingest.image_downsample**2
    return Sizes(voxels, pixels, len(experiment.observed_views(cameras)), cameras, experiment.ingest.max_frames)


def measured_sizes(run: Run) -> Sizes:
    """Those of a run whose stages crop and pack are done. Raises UserError where they are not."""
    frames, cameras, height, width = (int(n) for n in run.open_input("pack")["mask"].shape)  # type: ignore[union-attr]
    crop = read(run.open_input("crop"), "volume_idx")
    voxels: int = math.prod(int(stop - start) for start, stop in crop)
    return Sizes(voxels, height * width, len(run.experiment.observed_views(cameras)), cameras, frames)


def parameters(experiment: Experiment, voxels: int) -> int:
    """Weights of the U-Nets; the head has a few hundred."""
    model = experiment.model
    if model.network == "published":
        widths = [model.base_filters << level for level in range(model.poolings + 1)]
        blocks = [*pairwise([4, *widths]), *((2 * here, here) for here in widths[:-1])]
        doublings = sum(8 * here * deep for here, deep in pairwise(widths))
        width = model.bottleneck or 512
        bottom = 2 * width * widths[-1] * (voxels >> 3 * model.poolings) + width**2
    else:
        widths = [model.base_filters << level for level in range(1, model.poolings + 1)]
        blocks = [*pairwise([72, *widths]), *((deep + here, here) for here, deep in pairwise(widths))]
        doublings = 33 * widths[0]  # the last one, which unfolds
        bottom = 2 * model.bottleneck * widths[-1] * (voxels >> 3 * model.poolings)
    convolutions: int = sum(27 * (a * b + b * b) + 4 * b for a, b in blocks)
    return model.num_unets * (convolutions + doublings + bottom)


def training(experiment: Experiment, sizes: Sizes | None = None) -> dict[str, float]:
    """Parts of the peak of a training's GPU memory, bytes, largest last; their sum is the peak.

    Evaluation and rendering need less.

    Args:
        sizes: those of the recording; default: the most that the configuration can come to.
    """
    size = sizes or sizes_of(experiment)
    if experiment.train.method == "dynamic":
        return _dynamic(experiment, size)
    model, gpus = experiment.model, experiment.train.gpus
    # With auto, one GPU may have to hold them all.
    batch = -(-experiment.train.batch_frames // (1 if gpus == "auto" else gpus))
    weights = parameters(experiment, size.voxels)
    # Kept for the gradients, an element of a level's width each. A level deeper has an eighth of the voxels and twice
    # the channels.
    if model.network == "published":
        # 4 results of a block, 2 inputs of one going up, and 3/8 of what was halved: its maxima and their places.
        levels = range(model.poolings)
        kept = 4 / 4**model.poolings + sum(10.4 / 4**k for k in levels)
        cast, element = 0.0, 4
    else:
        # 4 results of a block going down, 3 more where it is joined with the deeper one, going up.
        levels = range(1, model.poolings + 1)
        kept = sum(4 / 4**k for k in levels) + sum(7.1 / 4**k for k in levels[:-1])
        if model.base_filters & (model.base_filters - 1):  # Triton wants powers of 2; the plain functions keep more
            kept *= PLAIN
        element = 4 if model.precision == "fp32" else 2
        cast = 0.0 if model.precision == "fp32" else 2.0 * weights
    unets = batch * size.voxels * model.num_unets * element * (9 + kept * model.base_filters) + cast
    volumes = batch * size.voxels * (128 + 16 * element)
    carving = size.voxels * (40 + 32 * (batch - 1)) + 80 * size.views * size.pixels
    # Frames drawn before the last one wait for their gradients.
    pixels, gaussians = size.views * size.pixels, model.max_gaussians
    similarity = 190 if experiment.train.ssim_lambda > 0 else 0
    waiting = (batch - 1) * ((53 + similarity) * pixels + 1300 * gaussians)
    pictures = (130 + similarity) * pixels + 1400 * gaussians
    lists = 53 * pixels + 3 * TILES * size.views * gaussians * 127
    drawing = waiting + max(pictures, lists)
    phases = {
        "carving": {"carving": float(carving)},
        "network": {"U-Nets": unets, "volumes": float(volumes)},
        "drawing": {"U-Nets": unets, "pictures and Gaussians": float(drawing)},
        "optimiser": {"gradients": 8.0 * weights},
    }
    peak = max(phases.values(), key=lambda parts: sum(parts.values()))
    frame = size.cameras * size.pixels  # 4 bytes a pixel as it is stored, 16 as it is used
    most = CACHE_BYTES // (4 * frame)
    frames = most if size.frames is None else size.frames
    shown = frames if experiment.train.fit_to == "all" else min(frames, frames // 3 + VALID_FRAMES)
    recording = 4 * frame * (shown if frames <= most else AHEAD)
    # It runs once unrecorded, beside the memory that the recorded step keeps: a volume, its way through the U-Nets, of
    # which nothing is kept, and pictures.
    alone = size.voxels * (120 + element * (16 + model.base_filters)) + 80 * size.views * size.pixels
    validation = UNUSED_ONCE * alone if model.gaussian_mode == "3d" else 0.0
    parts = {
        "CUDA": CONTEXT,
        "first validation": validation,
        "weights, averages, optimiser": (20.0 if gpus in (1, "auto") else 24.0) * weights + 24 * size.voxels,
        "recording": float(recording),
        "frames of a step": 16.0 * frame * 3 * batch,
        **{name: UNUSED * value for name, value in peak.items()},
    }
    return dict(sorted(parts.items(), key=lambda part: part[1]))


def _dynamic(experiment: Experiment, size: Sizes) -> dict[str, float]:
    """`training` for `train.method: dynamic`, with as many Gaussians as it may come to."""
    config = experiment.dynamic
    edges = [m * config.resolution for m in config.multires]
    planes: int = 32 * sum(3 * n * n + 3 * n * config.time_resolution for n in edges)
    views = min(config.views, size.views)
    frame = 4 * size.pixels  # a view's colours and mask
    frames = CACHE_BYTES // (frame * size.cameras) if size.frames is None else size.frames
    cached = frame * size.cameras * frames
    parts = {
        "CUDA": CONTEXT,
        "planes, gradients, optimiser": 16.0 * planes,
        # As read, and twice while the scene is put together.
        "recording": (cached if cached <= CACHE_BYTES else 0.0) + 2.0 * frame * size.views * frames,
        "Gaussians": UNUSED * float(config.max_gaussians * (PER_GAUSSIAN + PER_VIEW * views)),
        "pictures": 200.0 * size.pixels * views,
    }
    return dict(sorted(parts.items(), key=lambda part: part[1]))


def peak_gpu_bytes(experiment: Experiment, sizes: Sizes | None = None) -> int:
    """Peak of a training's GPU memory: see `training`."""
    return int(sum(training(experiment, sizes).values()))


def gpu_gib(profile: str) -> int:
    """Memory of one GPU of a profile: `24gb` -> 24."""
    return int(profile.removesuffix("gb"))


def smallest_fitting(experiment: Experiment, profiles: Sequence[str], sizes: Sizes | None = None) -> str | None:
    """The first of `profiles`, smallest first, whose GPU holds `peak_gpu_bytes`; None if none does."""
    peak = peak_gpu_bytes(experiment, sizes)
    return next((name for name in profiles if peak <= USABLE * gpu_gib(name) * GIB), None)


def advice(experiment: Experiment, room: float, sizes: Sizes | None = None) -> str:
    """What to set so that a training fits into `room` bytes, in words; what costs least quality comes first.

    The experiment so changed is valid and predicted to fit. Where no key alone is enough, the words name several.

    Args:
        sizes: those of the recording as it is cropped now; default: the most that each configuration can come to.
    """
    for changes in _smaller(experiment):
        tried = _with(experiment, changes)
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


def _smaller(experiment: Experiment) -> Iterator[dict[str, int | None]]:
    """Dotted keys and values that make a training smaller, not all of them valid; the mildest of each key first."""
    train, model, crop = experiment.train, experiment.model, experiment.crop
    if train.method == "dynamic":
        halved = {"dynamic.max_gaussians": experiment.dynamic.max_gaussians, "dynamic.views": experiment.dynamic.views}
    else:
        halved = {"train.batch_frames": train.batch_frames}
        if train.start_from == RANDOM:  # other weights are those of a network of one size
            halved |= {"model.bottleneck": model.bottleneck, "model.base_filters": model.base_filters}
        halved |= {"model.max_gaussians": model.max_gaussians}
    for key, value in halved.items():
        while value:
            value //= 2
            yield {key: value}
    if train.method == "dynamic":
        return
    whole = {} if crop.volume_idx is None else {"crop.volume_idx": None}  # its indices are those of one grid
    for edge in range((crop.grid_size - 1) // CROP_MULTIPLE * CROP_MULTIPLE, 0, -CROP_MULTIPLE):
        yield {"crop.grid_size": edge, **whole}


def _with(experiment: Experiment, changes: dict[str, int | None]) -> Experiment | None:
    """An experiment with some keys changed; None where that is not valid."""
    raw = experiment.model_dump()
    for key, value in changes.items():
        section, leaf = key.split(".")
        raw[section][leaf] = value
    try:
        return Experiment.model_validate(raw)
    except ValidationError:
        return None
