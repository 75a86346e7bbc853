"""An instant of rendered frames: what cameras may and may not tell each other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from zoosplat.config.experiment import Experiment
from zoosplat.recording import video
from zoosplat.recording.segmented_source import SegmentedSource
from zoosplat.recording.video import Planes
from zoosplat_segment.background import fit_light
from zoosplat_segment.network import package_weights
from zoosplat_segment.preparation import prepare_recording
from zoosplat_segment.reading import InstantReader
from zoosplat_segment.results import InstantMasks, Preparation
from zoosplat_segment.segmenter import Segmenter

if TYPE_CHECKING:
    from tests.conftest import Recording

CPU = torch.device("cpu")
HELD_OUT = [3]
FRAME = 24


class Instant:
    """A frame of the tiny recording, a preparation with true backgrounds, and a segmenter."""

    def __init__(self, recording: Recording) -> None:
        settings = {"rounds": 2, "adapt_minutes": 0, "device": "cpu", "background_frames": 8}
        raw = recording.config(data__masks="auto", segment=settings, holdout_views=HELD_OUT)
        self.experiment = Experiment.model_validate(raw)
        self.facts = SegmentedSource(self.experiment, None).check()
        self.cameras, _ = self.facts.cameras.oriented(self.facts.up)
        self.reader = InstantReader(self.facts.videos, 18)
        self.frames = next(iter(InstantReader(self.facts.videos, 1).read([FRAME])))

    def prepare(self, frames: list[list[Planes]]) -> Preparation:
        def read(instants: Any) -> Any:
            return iter([frames[t] for t in instants])

        return prepare_recording(
            self.experiment, self.facts, self.cameras, len(frames), read, None, CPU, lambda *told: None
        )

    def segmenter(self, preparation: Preparation) -> Segmenter:
        size = self.facts.width, self.facts.height
        return Segmenter(preparation, self.experiment, self.cameras, size, CPU)


@pytest.fixture(scope="module")
def instant(recording: Recording) -> Instant:
    return Instant(recording)


@pytest.fixture(scope="module")
def background_frames(instant: Instant) -> list[list[Planes]]:
    return list(instant.reader.read(range(8)))


@pytest.fixture(scope="module")
def prepared(instant: Instant, background_frames: list[list[Planes]]) -> Preparation:
    return instant.prepare(background_frames)


@pytest.fixture(scope="module")
def masks(instant: Instant, prepared: Preparation) -> InstantMasks:
    return instant.segmenter(prepared).segment(instant.frames)


def disturbed(frame: Planes) -> Planes:
    """The frame with another animal, so to say: a dark block over a part of it, and noise."""
    y = frame.y.copy()
    y[5:45, 50:90] = 30
    y += np.random.default_rng(0).integers(0, 9, y.shape, np.uint8)
    return replace(frame, y=y)


def test_masks_are_near_the_truth(masks: InstantMasks, recording: Recording) -> None:
    ious = []
    for c in range(4):
        info = video.probe(str(recording.folder / f"masks/{c}.mp4"), "mask")
        truth = video.luma_mask(video.planes(next(iter(video.read_frames(info, FRAME, FRAME + 1)))), 1)
        found = masks.probability[c] >= 128
        ious.append((found & truth).sum() / (found | truth).sum())
    assert np.mean(ious) > 0.6, ious
    assert masks.all_views.shape == (1, 80, 96)
    assert masks.seen.all()
    assert np.isfinite(masks.agreement).all()


@pytest.mark.parametrize("c", HELD_OUT)
def test_a_held_out_camera_tells_the_others_nothing(
    instant: Instant, prepared: Preparation, masks: InstantMasks, c: int
) -> None:
    frames = [disturbed(frame) if i == c else frame for i, frame in enumerate(instant.frames)]
    found = instant.segmenter(prepared).segment(frames)
    others = [i for i in range(4) if i != c]
    np.testing.assert_array_equal(found.probability[others], masks.probability[others])
    np.testing.assert_array_equal(found.agreement[others], masks.agreement[others])
    assert (found.probability[c] != masks.probability[c]).any()


@pytest.mark.parametrize("c", HELD_OUT)
def test_the_others_tell_a_held_out_camera_nothing_about_its_own_mask(
    instant: Instant, prepared: Preparation, masks: InstantMasks, c: int
) -> None:
    """Nor do the weights that the others have taught."""
    weights = package_weights()
    weights["head.bias"] = weights["head.bias"] + 0.5
    taught = replace(prepared, weights=weights)
    for frames in (
        [frame if i == c else disturbed(frame) for i, frame in enumerate(instant.frames)],
        # The others see nothing at all, so that no views agree on a place.
        [frame if i == c else replace(frame, y=np.full_like(frame.y, 90)) for i, frame in enumerate(instant.frames)],
    ):
        found = instant.segmenter(taught).segment(frames)
        np.testing.assert_array_equal(found.probability[c], masks.probability[c])
        np.testing.assert_array_equal(found.light[c], masks.light[c])


def test_a_preparation_has_no_circle_either(
    instant: Instant, prepared: Preparation, background_frames: list[list[Planes]]
) -> None:
    """Backgrounds and noise of a camera, and the floor, do not depend on what a held-out camera shows."""
    c, others = 3, [0, 1, 2]
    changed = [[disturbed(f) if i == c else f for i, f in enumerate(frames)] for frames in background_frames]
    found = instant.prepare(changed)
    np.testing.assert_array_equal(found.plates[others], prepared.plates[others])
    np.testing.assert_array_equal(found.noise[others], prepared.noise[others])
    assert found.floor_m == prepared.floor_m
    assert (found.plates[c] != prepared.plates[c]).any()


def test_light_of_a_frame_is_that_of_its_small_picture(
    instant: Instant, prepared: Preparation, masks: InstantMasks
) -> None:
    frames = [torch.from_numpy(video.window_rgb(f, (0, 0), (96, 80), 1)) for f in instant.frames]
    shown = torch.stack(frames).permute(0, 3, 1, 2).float()
    plates = torch.from_numpy(prepared.plates).permute(0, 3, 1, 2).float()
    light = fit_light(shown, plates, (96, 80))
    assert light.shape == (4, 3, 4)
    np.testing.assert_allclose(masks.light[..., 0], light[..., 0], atol=0.03)


def test_two_observed_cameras_are_left_with_what_each_sees(instant: Instant, prepared: Preparation) -> None:
    """A view is told what at least two others see; with fewer there is no hull, and masks are not emptied by it."""
    experiment = instant.experiment.model_copy(update={"holdout_views": (1, 3)})
    size = instant.facts.width, instant.facts.height
    found = Segmenter(prepared, experiment, instant.cameras, size, CPU).segment(instant.frames)
    assert all((found.probability[c] >= 128).sum() > 50 for c in (0, 2))
    assert np.isnan(found.agreement).all()
    assert found.seen.all()
