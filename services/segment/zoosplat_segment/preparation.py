"""What is found out about a whole recording before any of its frames is segmented.

The cut between this package's parts: `stage.py` reads videos and writes groups and knows nothing of how an animal is
told from its background. `prepare_recording` looks at frames spread over the recording and returns a `Preparation`,
which is stored. A `Segmenter` (segmenter.py) is made from a stored `Preparation` alone, in any process, and segments
one instant after the other, each without regard to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.facts import RecordingFacts
from zoosplat.recording.video import Planes, window_rgb

# From kept frames, ascending, to an instant each: C whole frames as the cameras saw them.
ReadFrames = Callable[[Sequence[int]], Iterator[list[Planes]]]
# Takes steps done, their total, and a message.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Preparation:
    """What is known of a recording of C cameras of W x H pixels. Pictures are as the cameras saw them (distorted).

    Attributes:
        plates: [C, H, W, 3] uint8, RGB of the background.
        noise: [C] float32, standard deviation of a pixel against the plate, grey levels.
        floor_m: height of the floor in the oriented world (+z up, origin at the mean camera), metres; None: not known.
        weights: tensors of the network by name, as they are after it has learned from the recording; may be empty.
        warnings: lines for the user about what is odd.
    """

    plates: npt.NDArray[np.uint8]
    noise: npt.NDArray[np.float32]
    floor_m: float | None
    weights: dict[str, Tensor]
    warnings: tuple[str, ...] = ()


def prepare_recording(
    experiment: Experiment,
    facts: RecordingFacts,
    cameras: Cameras,
    n_kept: int,
    read_frames: ReadFrames,
    empty_scenes: Sequence[npt.NDArray[np.uint8]] | None,
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
        progress: told what is done.
    """
    size = facts.width, facts.height
    n_frames = min(n_kept, experiment.segment.background_frames)
    instants = np.unique(np.linspace(0, n_kept - 1, n_frames).astype(int)).tolist()
    stacks: list[list[npt.NDArray[np.uint8]]] = [[] for _ in cameras.names]
    for i, instant in enumerate(read_frames(instants)):
        for stack, frame in zip(stacks, instant, strict=True):
            stack.append(window_rgb(frame, (0, 0), size, 1))
        progress(i + 1, len(instants), "background")
    plates: list[Any] = [np.median(stack, axis=0) for stack in stacks] if empty_scenes is None else [*empty_scenes]
    noise = [1.4826 * np.median(np.abs(np.stack(s) - p)) for s, p in zip(stacks, plates, strict=True)]
    rounded = np.rint(np.stack(plates)).astype(np.uint8)
    return Preparation(rounded, np.maximum(noise, 1).astype(np.float32), None, {})
