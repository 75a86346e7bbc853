"""What is found out about a whole recording before any of its frames is segmented.

The cut between this package's parts: `stage.py` reads videos and writes groups and knows nothing of how an animal is
told from its background. `prepare_recording` looks at frames spread over the recording and returns a `Preparation`,
which is stored. A `Segmenter` (segmenter.py) is made from a stored `Preparation` alone, in any process, and segments
one instant after the other, each without regard to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.facts import RecordingFacts
from zoosplat.recording.video import Planes
from zoosplat_segment import adaptation
from zoosplat_segment.network import load_network, package_weights
from zoosplat_segment.plates import find_static, full_plate, grow, masked_plates, small_plates
from zoosplat_segment.results import Preparation, Study
from zoosplat_segment.segmenter import Segmenter
from zoosplat_segment.windows import as_tensor, whole_picture

# From kept frames, ascending, to an instant each: C whole frames as the cameras saw them.
ReadFrames = Callable[[Sequence[int]], Iterator[list[Planes]]]
# Takes steps done, their total, and a message.
Progress = Callable[[int, int, str], None]
FULL_FRAMES = 24  # frames from which plates of full resolution are made
FLOOR_ROOM = 0.04  # room below the lowest points of the hulls, in edges of the tracking cube
STUDIED = 2  # every so many of them are segmented by all views, for the final plates
FEWEST_INSTANTS = 5  # instants with a hull from which the floor is told
KEPT_BYTES = 400 << 20  # largest size of the frames that are kept in memory
FIRST_NOISE = 3.0  # grey levels; the noise before it is measured
MIN_NOISE, MAX_NOISE = 1.0, 12.0  # grey levels; range of the noise


def prepare_recording(
    experiment: Experiment,
    facts: RecordingFacts,
    cameras: Cameras,
    n_kept: int,
    read_frames: ReadFrames,
    empty_scenes: Sequence[npt.NDArray[np.uint8]] | None,
    device: torch.device,
    progress: Progress,
) -> Preparation:
    """Find the background of each camera, and all else that holds for the whole recording.

    Args:
        experiment: the configuration.
        facts: of the videos and the calibration.
        cameras: at full resolution, with distortion, in the oriented world, metres.
        n_kept: number of kept frames.
        read_frames: decodes kept frames by their ascending numbers.
        empty_scenes: pictures [H, W, 3] without the animal, one a camera; None: there are none.
        device: where to compute.
        progress: told what is done.
    """
    size = facts.width, facts.height
    whole = whole_picture(size)
    instants = _choose_instants(experiment, n_kept, len(cameras), size)
    kept, small = [], []
    for i, frames in enumerate(read_frames(instants)):
        kept.append(frames)
        small.append(as_tensor([whole.cut(frame, size) for frame in frames], device).byte())
        progress(i + 1, len(instants), "reading frames for the background")
    first = None
    if empty_scenes is not None:
        first = as_tensor([whole.cut_picture(scene, size) for scene in empty_scenes], device)
    network = load_network(None, device)
    start_noise = torch.full((len(cameras),), FIRST_NOISE / 255, device=device)
    stacked = torch.stack(small)
    with torch.inference_mode():
        coarse, masks, lights = small_plates(network, stacked, start_noise, first, whole.extent(size), progress)
        chosen = [int(k) for k in np.unique(np.linspace(0, len(kept) - 1, FULL_FRAMES).astype(int))]
        taken = [kept[k] for k in chosen]
        prepared = _full_plates(taken, masks[chosen], lights[chosen], coarse, size, empty_scenes, progress)
        segmenter = Segmenter(prepared, experiment, cameras, size, device)
        studies = []
        studied = range(0, len(taken), STUDIED)
        for i in studied:
            studies.append(segmenter.study(taken[i]))
            masks[chosen[i]] = studies[-1].masks.half()
            progress(i + 1, len(taken), "masks by all views")
        chosen, taken = [chosen[i] for i in studied], [taken[i] for i in studied]
        if first is None:
            again = stacked[chosen]
            coarse = masked_plates(again, masks[chosen], lights[chosen], find_static(again), whole.extent(size))
        prepared = _full_plates(taken, masks[chosen], lights[chosen], coarse, size, empty_scenes, progress)
    floor = _find_floor(studies, segmenter.ell_m)
    prepared = replace(prepared, floor_m=floor, warnings=tuple(_warnings(studies)))
    return replace(prepared, weights=_learn(prepared, experiment, cameras, size, taken, device, progress))


def _find_floor(studies: Sequence[Study], ell_m: float) -> float | None:
    """A height below which nothing of the animal was in nearly all instants; None where there are few."""
    lowest = [study.lowest_m for study in studies if study.lowest_m is not None]
    return float(np.quantile(lowest, 0.1)) - FLOOR_ROOM * ell_m if len(lowest) >= FEWEST_INSTANTS else None


def _warnings(studies: Sequence[Study]) -> Iterator[str]:
    lost = sum(study.lowest_m is None for study in studies)
    if lost > len(studies) / 2:
        yield (
            f"in {lost} of {len(studies)} frames that were looked at the views do not agree on where the animal is; "
            "check calibration, that the videos are in step, and that center_rotation.ell has room for the animal"
        )


def _learn(
    prepared: Preparation,
    experiment: Experiment,
    cameras: Cameras,
    size: tuple[int, int],
    taken: Sequence[list[Planes]],
    device: torch.device,
    progress: Progress,
) -> dict[str, Tensor]:
    """Weights that have learned from the recording, or else those of the package."""
    minutes = experiment.segment.adapt_minutes
    # SAM does not learn, and what the network learns is for windows, in which SAM looks.
    if minutes > 0 and experiment.segment.method == "network":
        segmenter = Segmenter(prepared, experiment, cameras, size, device)
        tests = taken[:: adaptation.TESTED]
        lessons = [segmenter.study(f).lesson for i, f in enumerate(taken) if i % adaptation.TESTED]

        def agreement(weights: dict[str, Tensor] | None) -> float:
            other = Segmenter(replace(prepared, weights=weights or {}), experiment, cameras, size, device)
            found = [other.study(frames).agreement for frames in tests]
            return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0

        known = [lesson for lesson in lessons if lesson is not None]
        weights = adaptation.adapt(known, minutes, device, agreement, progress)
        if weights:
            return weights
    return package_weights()


def _full_plates(
    taken: Sequence[list[Planes]],
    masks: Tensor,
    lights: Tensor,
    coarse: Tensor,
    size: tuple[int, int],
    empty_scenes: Sequence[npt.NDArray[np.uint8]] | None,
    progress: Progress,
) -> Preparation:
    plates, noises = [], []
    for c in range(len(coarse)):
        frames, hidden = [frames[c] for frames in taken], grow(masks[:, c] > 0.5).cpu()
        plate, noise = full_plate(frames, hidden, lights[:, c].cpu(), coarse[c].cpu(), whole_picture(size), size)
        plates.append(plate if empty_scenes is None else empty_scenes[c])
        noises.append(noise)
        progress(c + 1, len(coarse), "plates")
    return Preparation(np.stack(plates), np.clip(noises, MIN_NOISE, MAX_NOISE).astype(np.float32), None, {})


def _choose_instants(experiment: Experiment, n_kept: int, n_cameras: int, size: tuple[int, int]) -> list[int]:
    """Kept frames spread over the recording, as many as memory holds."""
    most = KEPT_BYTES // (n_cameras * size[0] * size[1] * 3 // 2)
    count = max(2, min(n_kept, experiment.segment.background_frames, most))
    return [int(t) for t in np.unique(np.linspace(0, n_kept - 1, count).astype(int))]
