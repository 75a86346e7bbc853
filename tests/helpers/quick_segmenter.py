"""Stage segment with masks that take no time: what it writes and when can be tested with many frames.

Run as a script it is the stage's service, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zoosplat.config.experiment import Experiment
from zoosplat.recording.facts import RecordingFacts
from zoosplat.recording.video import Planes
from zoosplat_segment import stage
from zoosplat_segment.results import InstantMasks, Preparation


def prepare_recording(experiment: Experiment, facts: RecordingFacts, *_: object) -> Preparation:
    """Grey backgrounds."""
    n = len(facts.videos)
    plates = np.full((n, facts.height, facts.width, 3), 90, np.uint8)
    return Preparation(plates, np.ones(n, np.float32), None, {})


class Segmenter:
    """Masks are the brightness of the frames, which differs from frame to frame."""

    def __init__(self, preparation: Preparation, experiment: Experiment, *_: object) -> None:
        self._held_out = list(experiment.holdout_views)

    def segment(self, frames: Sequence[Planes], *_: object) -> InstantMasks:
        probability = np.stack([frame.y for frame in frames])
        n = len(probability)
        light = np.tile(np.array([1, 0, 0, 0], np.float32), (n, 3, 1))
        agreement = probability.mean((1, 2)).astype(np.float32) / 255
        return InstantMasks(probability, probability[self._held_out] // 2, light, agreement, np.ones(n, bool))


def make_quick(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Let the stage of this process make such masks; `set_attribute` is that of pytest's monkeypatch, or `setattr`."""
    set_attribute(stage, "prepare_recording", prepare_recording)
    set_attribute(stage, "Segmenter", Segmenter)


if __name__ == "__main__":
    from zoosplat.stages.service import run_service

    make_quick(setattr)
    run_service("segment")
