"""How much GPU memory a training needs, predicted from its configuration alone.

The coefficients are bytes of the tensors that live at once in `zoosplat_train.trainer`, counted over a step: what
autograd keeps of the U-Nets (bfloat16), and the volumes, samples and pictures of carving, drawing and losses (float32).
Those that are called measured come from benchmarks/memory.py and benchmarks/profiles.py, which compare the prediction
with a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from zoosplat.config.experiment import Experiment
from zoosplat.stages.runs import Run
from zoosplat.storage.schema import read

GIB = 1 << 30  # Bytes of a gibibyte.
CACHE_BYTES = 2 * GIB  # Recordings up to this size stay in memory, the GPU's if there is one, once they are read.
MAX_VALIDATION_FRAMES = 24  # Frames that a validation has at most, evenly spread over the split.
READ_AHEAD_FRAMES = 16  # Frames that are read while one is worked on.
GPU_PROFILES = ("12gb", "24gb", "48gb", "80gb")  # Kinds of GPUs, by their memory in GiB.
USABLE_SHARE = 0.95  # Of a GPU's memory. The rest is left to the driver and a desktop.
# Pixels that a view counts as having where the configuration does not say: of a camera of 1280 x 960.
ASSUMED_WIDTH, ASSUMED_HEIGHT = 1280, 960

# -- around the tensors -------------------------------------------------------------------------------------------
CUDA_CONTEXT_BYTES = 1.0 * GIB  # Of CUDA, cuDNN and the kernels, outside PyTorch's own memory; measured on an H200.
# PyTorch's memory over that of its tensors, because freed blocks do not always fit the next tensor; measured.
FRAGMENTATION = 1.15
FIRST_VALIDATION_FRAGMENTATION = 1.6  # The same in the first validation, for which all blocks are new; measured.
STORED_PIXEL_BYTES = 4  # A pixel of a camera in the cache: three colours and the mask, uint8.
USED_PIXEL_BYTES = 16.0  # A pixel of a camera in a step: the same as float32.
FRAMES_IN_FLIGHT = 3  # Copies of the frames of a step that are on the GPU at a time.

# -- weights and U-Nets -------------------------------------------------------------------------------------------
WEIGHT_BYTES = 20.0  # A weight, its running average and the optimiser's state, float32.
SHARED_WEIGHT_BYTES = 24.0  # The same where GPUs share the frames of a step: a copy of the gradients is added.
GRADIENT_BYTES = 8.0  # A weight's gradient in the step of the optimiser.
INPUT_CHANNELS = 9  # Channels that a U-Net is given at each voxel, see `zoosplat_model.network.unet`.
FOLDED_INPUT_CHANNELS = 8 * INPUT_CHANNELS  # The same, 2 x 2 x 2 voxels folded into channels.
UNFOLDING_WEIGHTS = 33  # Of the last layer, for each channel: to 4 channels of 2 x 2 x 2 voxels, and a bias.
PUBLISHED_INPUT_CHANNELS = 4  # Occupancy and colour, which are all that the published network is given.
PUBLISHED_BOTTLENECK = 512  # Width of the published network's perceptron where model.bottleneck is 0.
# Elements that autograd keeps for each voxel and channel of a level: 4 results of the block on the way down, and on all
# levels but the deepest those of the block on the way up, with the input that was joined for it.
KEPT_DOWN, KEPT_UP = 4, 7.1
# The same of a level of the published network: 4 results of each of its two blocks, 2 inputs of the block going up,
# and 3/8 of what was halved, which are its maxima and their places.
PUBLISHED_KEPT = 10.4
PLAIN_NORMALISATION = 2.6  # What normalisation without Triton keeps, over what it keeps with Triton; measured.

# -- volumes, carving and drawing, in bytes of float32 tensors ----------------------------------------------------
VOLUME_BYTES = 128  # A voxel's float32 values before and after the U-Nets.
VOLUME_ELEMENTS = 16  # A voxel's values in the precision of the U-Nets.
GRID_BYTES = 24  # A voxel of the grid, which stays on the GPU for the whole training.
CARVED_VOXEL_BYTES = 40  # A voxel while a frame is carved.
WAITING_VOXEL_BYTES = 32  # A voxel of each other frame of the step meanwhile.
CARVED_PIXEL_BYTES = 80  # A pixel of a view that is carved with.
SSIM_PIXEL_BYTES = 190  # A pixel of a view in the loss 1 - SSIM.
PLATE_PIXEL_BYTES = 100  # A pixel of a view in the colour error over the plates.
DRAWN_PIXEL_BYTES = 130  # A pixel of a view while it is drawn and compared.
WAITING_PIXEL_BYTES = 53  # A pixel of a view of a frame that waits for its gradients.
DRAWN_GAUSSIAN_BYTES = 1400  # A Gaussian of a frame while it is drawn.
WAITING_GAUSSIAN_BYTES = 1300  # A Gaussian of a frame that waits for its gradients.
TILES_PER_GAUSSIAN = 3  # Tiles of 8 x 8 pixels that a Gaussian covers in a view, in the recordings measured.
TILE_ENTRY_BYTES = 381  # An entry in the lists of the tiles' Gaussians, with what their sorting takes.
VALIDATED_VOXEL_BYTES = 120  # A voxel in a validation.

# -- the dynamic trainer ------------------------------------------------------------------------------------------
DYNAMIC_GAUSSIAN_BYTES = 17_000  # A Gaussian in an iteration; measured.
DYNAMIC_GAUSSIAN_VIEW_BYTES = 2_400  # A Gaussian for each view of an iteration; measured.
PLANE_CHANNELS = 32  # Features of a cell of the planes.
PLANE_VALUE_BYTES = 16.0  # A feature with its gradient and the two moments of Adam, float32.
DYNAMIC_PIXEL_BYTES = 200.0  # A pixel of a view in an iteration.


class TrainingSizes(NamedTuple):
    """The sizes of a recording that decide how much memory its training needs, besides the configuration's numbers.

    Attributes:
        voxels: Of the cropped grid.
        pixels: Of a view's window.
        views: How many cameras are observed.
        cameras: How many cameras there are, held-out ones included.
        frames: How many frames are kept. None: that is not known, and as many count as stay on the GPU.
    """

    voxels: int
    pixels: int
    views: int
    cameras: int
    frames: int | None


def largest_sizes(experiment: Experiment) -> TrainingSizes:
    """The most that a configuration can come to: whole frames, and the whole grid where it does not name a crop."""
    n, cameras = experiment.crop.grid_size, len(experiment.data.videos)
    voxels: int = math.prod(stop - start for start, stop in experiment.crop.volume_idx or ((0, n),) * 3)
    size = (experiment.data.image_width or ASSUMED_WIDTH) * (experiment.data.image_height or ASSUMED_HEIGHT)
    pixels = size // experiment.ingest.image_downsample**2
    return TrainingSizes(voxels, pixels, len(experiment.observed_views(cameras)), cameras, experiment.ingest.max_frames)


def measured_sizes(run: Run) -> TrainingSizes:
    """The sizes of a run whose stages crop and pack are done. Raises UserError where they are not."""
    frames, cameras, height, width = (int(n) for n in run.open_input("pack")["mask"].shape)  # type: ignore[union-attr]
    crop = read(run.open_input("crop"), "volume_idx")
    voxels: int = math.prod(int(stop - start) for start, stop in crop)
    return TrainingSizes(voxels, height * width, len(run.experiment.observed_views(cameras)), cameras, frames)


def count_parameters(experiment: Experiment, voxels: int) -> int:
    """How many weights the U-Nets have. Those of the head are left out: they are a few hundred."""
    model = experiment.model
    if model.network == "published":
        widths = [model.base_filters << level for level in range(model.poolings + 1)]
        blocks = [*pairwise([PUBLISHED_INPUT_CHANNELS, *widths]), *((2 * here, here) for here in widths[:-1])]
        doublings = sum(8 * here * deep for here, deep in pairwise(widths))
        width = model.bottleneck or PUBLISHED_BOTTLENECK
        bottom = 2 * width * widths[-1] * (voxels >> 3 * model.poolings) + width**2
    else:
        widths = [model.base_filters << level for level in range(1, model.poolings + 1)]
        blocks = [
            *pairwise([FOLDED_INPUT_CHANNELS, *widths]),
            *((deep + here, here) for here, deep in pairwise(widths)),
        ]
        doublings = UNFOLDING_WEIGHTS * widths[0]
        bottom = 2 * model.bottleneck * widths[-1] * (voxels >> 3 * model.poolings)
    convolutions: int = sum(27 * (a * b + b * b) + 4 * b for a, b in blocks)
    return model.num_unets * (convolutions + doublings + bottom)


def training_memory(experiment: Experiment, sizes: TrainingSizes | None = None) -> dict[str, float]:
    """The parts of the peak of a training's GPU memory, bytes, largest last. Their sum is the peak.

    Evaluation and rendering need less.

    Args:
        sizes: those of the recording; default: the most that the configuration can come to.
    """
    size = sizes or largest_sizes(experiment)
    if experiment.train.method == "dynamic":
        return _dynamic_memory(experiment, size)
    model, gpus = experiment.model, experiment.train.gpus
    # With auto, one GPU may have to hold all frames of a step.
    batch = -(-experiment.train.batch_frames // (1 if gpus == "auto" else gpus))
    weights = count_parameters(experiment, size.voxels)
    # A level deeper has an eighth of the voxels and twice the channels, so a quarter of the elements.
    if model.network == "published":
        levels = range(model.poolings)
        kept = KEPT_DOWN / 4**model.poolings + sum(PUBLISHED_KEPT / 4**k for k in levels)
        cast, element = 0.0, 4
    else:
        levels = range(1, model.poolings + 1)
        kept = sum(KEPT_DOWN / 4**k for k in levels) + sum(KEPT_UP / 4**k for k in levels[:-1])
        if model.base_filters & (model.base_filters - 1):  # Triton's kernels need a power of 2.
            kept *= PLAIN_NORMALISATION
        element = 4 if model.precision == "fp32" else 2
        cast = 0.0 if model.precision == "fp32" else 2.0 * weights
    unets = batch * size.voxels * model.num_unets * element * (INPUT_CHANNELS + kept * model.base_filters) + cast
    volumes = batch * size.voxels * (VOLUME_BYTES + VOLUME_ELEMENTS * element)
    pixels, gaussians = size.views * size.pixels, model.max_gaussians
    carving = size.voxels * (CARVED_VOXEL_BYTES + WAITING_VOXEL_BYTES * (batch - 1)) + CARVED_PIXEL_BYTES * pixels
    compared = SSIM_PIXEL_BYTES if experiment.train.ssim_lambda > 0 else 0
    compared += PLATE_PIXEL_BYTES if experiment.train.plate_lambda > 0 else 0
    # The frames of a step are drawn one after the other; those before the last one wait for their gradients.
    waiting = (batch - 1) * ((WAITING_PIXEL_BYTES + compared) * pixels + WAITING_GAUSSIAN_BYTES * gaussians)
    pictures = (DRAWN_PIXEL_BYTES + compared) * pixels + DRAWN_GAUSSIAN_BYTES * gaussians
    entries = TILES_PER_GAUSSIAN * size.views * gaussians
    lists = WAITING_PIXEL_BYTES * pixels + TILE_ENTRY_BYTES * entries
    drawing = waiting + max(pictures, lists)
    phases = {
        "carving": {"carving": float(carving)},
        "network": {"U-Nets": unets, "volumes": float(volumes)},
        "drawing": {"U-Nets": unets, "pictures and Gaussians": float(drawing)},
        "optimiser": {"gradients": GRADIENT_BYTES * weights},
    }
    peak = max(phases.values(), key=lambda parts: sum(parts.values()))
    frame = size.cameras * size.pixels
    most_cached = CACHE_BYTES // (STORED_PIXEL_BYTES * frame)
    frames = most_cached if size.frames is None else size.frames
    shown = frames if experiment.train.fit_to == "all" else min(frames, frames // 3 + MAX_VALIDATION_FRAMES)
    recording = STORED_PIXEL_BYTES * frame * (shown if frames <= most_cached else READ_AHEAD_FRAMES)
    # The first validation runs beside the memory that the CUDA graph of the step keeps: a volume, its way through the
    # U-Nets, of which autograd keeps nothing, and pictures.
    volume = size.voxels * (VALIDATED_VOXEL_BYTES + element * (VOLUME_ELEMENTS + model.base_filters))
    alone = volume + CARVED_PIXEL_BYTES * pixels
    validation = FIRST_VALIDATION_FRAGMENTATION * alone if model.gaussian_mode == "3d" else 0.0
    weight_bytes = WEIGHT_BYTES if gpus in (1, "auto") else SHARED_WEIGHT_BYTES
    parts = {
        "CUDA": CUDA_CONTEXT_BYTES,
        "first validation": validation,
        "weights, averages, optimiser": weight_bytes * weights + GRID_BYTES * size.voxels,
        "recording": float(recording),
        "frames of a step": USED_PIXEL_BYTES * frame * FRAMES_IN_FLIGHT * batch,
        **{name: FRAGMENTATION * value for name, value in peak.items()},
    }
    return _largest_last(parts)


def _dynamic_memory(experiment: Experiment, size: TrainingSizes) -> dict[str, float]:
    """The parts for `train.method: dynamic`, with as many Gaussians as it may come to: see `training_memory`."""
    config = experiment.dynamic
    edges = [m * config.resolution for m in config.multires]
    planes: int = PLANE_CHANNELS * sum(3 * n * n + 3 * n * config.time_resolution for n in edges)
    views = min(config.views, size.views)
    frame = STORED_PIXEL_BYTES * size.pixels
    frames = CACHE_BYTES // (frame * size.cameras) if size.frames is None else size.frames
    cached = frame * size.cameras * frames
    gaussian = DYNAMIC_GAUSSIAN_BYTES + DYNAMIC_GAUSSIAN_VIEW_BYTES * views
    parts = {
        "CUDA": CUDA_CONTEXT_BYTES,
        "planes, gradients, optimiser": PLANE_VALUE_BYTES * planes,
        # In the cache, and twice more while the scene is put together.
        "recording": (cached if cached <= CACHE_BYTES else 0.0) + 2.0 * frame * size.views * frames,
        "Gaussians": FRAGMENTATION * float(config.max_gaussians * gaussian),
        "pictures": DYNAMIC_PIXEL_BYTES * size.pixels * views,
    }
    return _largest_last(parts)


def _largest_last(parts: dict[str, float]) -> dict[str, float]:
    return dict(sorted(parts.items(), key=lambda part: part[1]))


def peak_gpu_bytes(experiment: Experiment, sizes: TrainingSizes | None = None) -> int:
    """The peak of a training's GPU memory, bytes: see `training_memory`."""
    return int(sum(training_memory(experiment, sizes).values()))


def profile_gib(profile: str) -> int:
    """GiB of memory of one GPU of a profile: `24gb` -> 24."""
    return int(profile.removesuffix("gb"))


def smallest_profile(experiment: Experiment, profiles: Sequence[str], sizes: TrainingSizes | None = None) -> str | None:
    """The first of `profiles`, smallest first, whose GPU holds `peak_gpu_bytes`; None if none does."""
    peak = peak_gpu_bytes(experiment, sizes)
    return next((name for name in profiles if peak <= USABLE_SHARE * profile_gib(name) * GIB), None)
