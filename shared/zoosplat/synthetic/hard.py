"""Synthetic recordings that are hard to segment, with truth: see `difficulty.DIFFICULTIES` for their kinds.

Shadows, mirror images, cable, arm and droppings are computed from the same solids for all cameras, so what a camera
shows of them is what the others' pictures ask for. The true masks hold the visible part of the animal alone: no shadow,
no mirror image, and nothing that a cable or an arm hides.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zoosplat.synthetic.difficulty import Difficulty, difficulty_of
from zoosplat.synthetic.mouse import KEYPOINT_NAMES, Mouse, RestingMouse
from zoosplat.synthetic.recording import NOISE_OFFSETS, SyntheticRecording, Truth, write_recording
from zoosplat.synthetic.rendering import Drawing, View, halve
from zoosplat.synthetic.scenery import (
    GLASS_DIMS,
    GLASS_HAZE,
    FloorLight,
    Glass,
    arm,
    bedding,
    cable,
    dropping,
    floor_light,
    glass_in,
    reach_at,
)
from zoosplat.synthetic.solids import Bools, Floats, Plane, Solids
from zoosplat.synthetic.traits import Traits

Picture = NDArray[np.float32]

FLOOR = Plane(np.array([0.0, 0.0, 1.0]), 0.0)
EDGE_GREY = 60.0  # grey level of the edges of glass walls
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # weights of R, G and B in the luma of ITU-R BT.709


class _Floor:
    """The floor as a camera sees it, directly or in a mirror: its picture, to which droppings are added."""

    def __init__(self, view: View, seed: int, difficulty: Difficulty, mirror: Plane | None = None) -> None:
        self.view, self.mirror = view, mirror
        x, y = (halve(part) for part in view.floor_points(mirror))
        self.x, self.y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        texture = difficulty.bedding_brightness * (1 + difficulty.bedding * bedding(seed, x, y))
        self.empty: Picture = view.backdrop(seed, mirror) * texture[..., None]
        self.picture, self.n_droppings = self.empty, 0

    def darken(self, picture: Picture, light: FloorLight) -> None:
        """Darken a picture of this floor in place."""
        shaded = light.covers(self.x, self.y)
        picture[shaded] *= light.at(self.x[shaded], self.y[shaded])[:, None]

    def with_droppings(self, droppings: list[Solids], traits: Traits) -> Picture:
        """A copy of the picture with these droppings, of which later calls mostly pass the same and more."""
        if self.n_droppings > len(droppings):
            self.picture, self.n_droppings = self.empty, 0
        for solids in droppings[self.n_droppings :]:
            self.picture = self.picture.copy()
            self.darken(self.picture, floor_light(solids))
            _lay(self.picture, self.view.draw(solids, traits, self.mirror))
        self.n_droppings = len(droppings)
        return self.picture.copy()


class _Set:
    """What a camera sees that stands still."""

    def __init__(self, view: View, seed: int, difficulty: Difficulty) -> None:
        self.view, self.floor = view, _Floor(view, seed, difficulty)
        self.glass = [glass_in(view, azimuth) for azimuth in difficulty.walls]
        self.mirrors: list[tuple[Glass, _Floor]] = [
            (glass, _Floor(view, seed, difficulty, glass.plane)) for glass in self.glass if glass.inside
        ]


def _lay(picture: Picture, drawn: Drawing | None, opacity: float = 1.0, brightness: float | Floats = 1.0) -> None:
    """Lay a drawing over a picture in place."""
    if drawn is not None:
        cover = opacity * drawn.coverage[..., None]
        window = drawn.rows, drawn.columns
        picture[window] = picture[window] * (1 - cover) + opacity * brightness * drawn.colour


@dataclass(frozen=True)
class HardRecording(SyntheticRecording):
    """A seeded recording that is hard to segment.

    Attributes:
        difficulty: what makes it hard. `coat` and `noise_std` are taken from it. It places events by the share of the
            recording that is over, so the start of a longer recording differs from a shorter one.
    """

    difficulty: Difficulty = field(default_factory=Difficulty)

    @classmethod
    def of_kind(
        cls, kind: str, n_frames: int, n_cameras: int, width: int, height: int, fps: float, seed: int
    ) -> HardRecording:
        """A recording of one of the kinds. Raises UserError as `difficulty_of` and SyntheticRecording."""
        difficulty = difficulty_of(kind)
        return cls(
            n_frames, n_cameras, width, height, fps, seed, difficulty.coat, None, difficulty.noise_std, difficulty
        )

    @cached_property
    def mouse(self) -> Mouse:
        """The animal, in the frame of the arena."""
        traits = Traits.draw(self.seed, self.coat)
        if self.difficulty.rest_share > 0:
            return RestingMouse(traits, self.n_frames, self.fps, round(self.difficulty.rest_share * self.n_frames))
        return Mouse(traits, self.n_frames, self.fps)

    @cached_property
    def droppings(self) -> list[tuple[int, Solids]]:
        """The droppings, each with the frame in which it appears, in their order."""
        rng, n = np.random.default_rng((self.seed, 8)), self.difficulty.droppings
        found = []
        for i in range(n):
            frame = int((i + rng.uniform(0, 1)) / n * self.n_frames)
            tail_base = self.mouse.pose(frame)[1][KEYPOINT_NAMES.index("tail_base")]
            found.append((frame, dropping(tail_base[:2] + rng.uniform(-0.008, 0.008, 2), rng.uniform(0, np.pi))))
        return found

    @cached_property
    def _arm_azimuths(self) -> list[float]:
        """Radians from which the arm comes in each spell: between two neighbouring cameras."""
        rng = np.random.default_rng((self.seed, 9))
        gaps = rng.integers(0, self.n_cameras, len(self.difficulty.arm_spells)) + 0.5
        return [float(2 * np.pi * gap / self.n_cameras) for gap in gaps]

    def things(self, frame: int) -> Solids:
        """Cable and arm in a frame, in the frame of the arena: solids that are no part of the animal."""
        found, points = Solids(), self.mouse.pose(frame)[1]
        if self.difficulty.cable:
            found = found.joined(cable(points[KEYPOINT_NAMES.index("neck")], frame / self.fps))
        share = frame / self.n_frames
        for spell, azimuth in zip(self.difficulty.arm_spells, self._arm_azimuths, strict=True):
            reach = reach_at(share, (spell,))
            if reach > 0:
                found = found.joined(arm(points[KEYPOINT_NAMES.index("mid_trunk")], azimuth, reach))
        return found

    def arm_is_in(self, frame: int) -> bool:
        """Whether the arm is in the scene in a frame."""
        return reach_at(frame / self.n_frames, self.difficulty.arm_spells) > 0

    @cached_property
    def sets(self) -> dict[int, _Set]:
        """What stands still, by camera; `render` fills it."""
        return {}

    def forget(self, camera: int) -> None:
        """As `SyntheticRecording.forget`."""
        self.sets.pop(camera, None)

    def light(self, frame: int, camera: int) -> Picture:
        """Factor [h, w, 3] of lamp, exposure and vignetting on the picture of a frame."""
        return self.difficulty.light(frame / self.n_frames, camera, self.seed, self.width, self.height)

    def render(self, solids: Solids, frame: int, camera: int) -> tuple[NDArray[np.uint8], Bools]:
        """As `SyntheticRecording.render`; `frame` also selects the scenery."""
        if camera not in self.sets:
            self.sets[camera] = _Set(self.view(camera), self.seed, self.difficulty)
        set_, hard = self.sets[camera], self.difficulty
        view, traits, n_animal = set_.view, self.mouse.traits, len(solids.a)
        fallen = [thing for first, thing in self.droppings if first <= frame]
        everything = solids.joined(self.things(frame))
        shadow = floor_light(everything)

        picture = set_.floor.with_droppings(fallen, traits)
        set_.floor.darken(picture, shadow)
        if hard.floor_reflectance > 0:
            _lay(picture, view.draw(everything, traits, FLOOR), hard.floor_reflectance, hard.animal_brightness)
        for glass, floor in set_.mirrors:
            image = floor.with_droppings(fallen, traits)
            floor.darken(image, shadow)
            _lay(image, view.draw(everything, traits, glass.plane), 1.0, hard.animal_brightness)
            weight = hard.wall_reflectance * glass.pane[..., None]
            picture += weight * (image - picture)
            picture += glass.edge[..., None] * (EDGE_GREY - picture)

        mask = np.zeros((self.height, self.width), bool)
        drawn = view.draw(everything, traits)
        if drawn is not None:
            animal = halve(((drawn.ids >= 0) & (drawn.ids < n_animal)).astype(float))
            share = animal / np.maximum(drawn.coverage, 0.25)
            _lay(picture, drawn, 1.0, (1 - (1 - hard.animal_brightness) * share)[..., None])
            mask[drawn.rows, drawn.columns] = animal >= 0.5
        for glass in set_.glass:
            if not glass.inside:
                picture += glass.pane[..., None] * (GLASS_HAZE - (1 - GLASS_DIMS) * picture)
                picture += glass.edge[..., None] * (EDGE_GREY - picture)
                mask &= glass.edge < 0.5
        return self._exposed(picture, frame, camera), mask

    def _exposed(self, picture: Picture, frame: int, camera: int) -> NDArray[np.uint8]:
        """The picture [h, w, 3] as the sensor sees it. `picture` is changed."""
        picture *= self.light(frame, camera)
        if self.difficulty.grey:
            picture = np.repeat((picture @ LUMA)[..., None], 3, 2)
        if self.difficulty.contrast != 1:
            picture = 128 + self.difficulty.contrast * (picture - 128)
        dy, dx = np.random.default_rng((self.seed, 3, camera, frame)).integers(0, NOISE_OFFSETS, 2)
        noise = self.noise[dy : dy + self.height, dx : dx + self.width]
        picture += noise[..., :1] if self.difficulty.grey else noise
        return np.asarray(np.clip(picture + 0.5, 0, 255), np.uint8)


def make_hard_recording(
    folder: Path,
    kind: str,
    n_frames: int = 200,
    width: int = 576,
    height: int = 512,
    *,
    n_cameras: int = 6,
    fps: float = 25.0,
    seed: int = 0,
) -> Truth:
    """Write a recording that is hard to segment into `folder` and return its truth.

    The files are those of `recording.make_recording`. The silhouettes in masks/ are the visible part of the animal.

    Args:
        folder: is made if it is absent. Files in it are replaced.
        kind: a key of `difficulty.DIFFICULTIES`.
        n_frames: number of frames.
        width: of the pictures, pixels, even and at least 16.
        height: of the pictures, pixels, even and at least 16.
        n_cameras: number of cameras, which stand on a ring.
        fps: frames per second.
        seed: of the animal, the world, the scenery and the noise.

    Raises:
        UserError: an unknown kind, sizes that a yuv420p video cannot hold, or counts that are not positive.
    """
    recording = HardRecording.of_kind(kind, n_frames, n_cameras, width, height, fps, seed)
    # Drawing takes many small steps in Python, which threads cannot do at the same time.
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return write_recording(Path(folder), recording, pool, recording.difficulty.video_crf)
