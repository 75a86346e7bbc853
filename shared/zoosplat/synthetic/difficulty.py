"""What makes a synthetic recording hard to segment: one set of parameters for each kind of recording."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zoosplat.errors import UserError


@dataclass(frozen=True)
class Difficulty:
    """Parameters of a kind of hard recording. Grey levels are 0 to 255; the values of the kinds were chosen by eye.

    Attributes:
        rest_share: share of the frames for which the animal first rests in one place; it walks in the others.
        coat: RGB of the back, 0 to 1.
        animal_brightness: factor on the colours of the animal alone.
        grey: whether the cameras see grey only, as infrared cameras do.
        contrast: factor on the differences to the grey level 128.
        vignetting: share of the light that is missing in the corners of a picture.
        bedding: standard deviation of the bedding's texture on the floor, as a share of its grey level.
        bedding_brightness: factor on the grey levels of floor and surroundings.
        noise_std: standard deviation of the sensor noise in grey levels.
        walls: azimuths in radians of glass walls, which stand upright `scenery.WALL_M` metres from the middle.
        wall_reflectance: share of the light that a wall throws back.
        floor_reflectance: share of the light that the floor throws back as a mirror does.
        cable: whether a cable hangs from above to the animal's head.
        arm_spells: first and last share of the recording of each spell in which a person's arm reaches in.
        lamp_drift: share by which the light grows and falls in the course of the recording.
        lamp_gradient: share by which the drift differs between the middle and the edge of a picture.
        lamp_tint: share by which the drift moves red up and blue down, or the other way.
        exposure_spread: largest share by which a camera's exposure differs from that of the middle one.
        droppings: number of droppings that appear in the course of the recording.
        video_crf: constant rate factor of H.264 for the videos.
    """

    rest_share: float = 0.0
    coat: tuple[float, float, float] = (0.47, 0.35, 0.25)
    animal_brightness: float = 1.0
    grey: bool = False
    contrast: float = 1.0
    vignetting: float = 0.08
    bedding: float = 0.03
    bedding_brightness: float = 0.88
    noise_std: float = 1.8
    walls: tuple[float, ...] = ()
    wall_reflectance: float = 0.0
    floor_reflectance: float = 0.0
    cable: bool = False
    arm_spells: tuple[tuple[float, float], ...] = ()
    lamp_drift: float = 0.0
    lamp_gradient: float = 0.0
    lamp_tint: float = 0.0
    exposure_spread: float = 0.04
    droppings: int = 6
    video_crf: int = 20

    def light(self, time_share: float, camera: int, seed: int, width: int, height: int) -> NDArray[np.float32]:
        """Factor [h, w, 3] of lamp, exposure and vignetting on the colours of a picture.

        Args:
            time_share: share of the recording that is over, 0 to 1.
            camera: number of the camera, whose exposure and gradient of light are its own.
            seed: of the exposures and gradients.
            width: of the picture, pixels.
            height: of the picture, pixels.
        """
        rng = np.random.default_rng((seed, 6, camera))
        exposure, angle = 1 + self.exposure_spread * rng.uniform(-1, 1), rng.uniform(0, 2 * np.pi)
        drift = float(np.sin(2 * np.pi * time_share))
        x, y = np.linspace(-1, 1, width, dtype=np.float32)[None], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        slope = np.float32(drift * self.lamp_gradient) * (np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y)
        corner = 1 - np.float32(self.vignetting / 2) * (x * x + y * y)
        even = np.float32(exposure * (1 + self.lamp_drift * drift))
        tint = 1 + drift * self.lamp_tint * np.array([1.0, 0.0, -1.0])
        return (even * (1 + slope) * corner)[..., None] * tint.astype(np.float32)


_INFRARED = Difficulty(
    coat=(0.32, 0.32, 0.32), animal_brightness=0.5, grey=True, contrast=0.55, vignetting=0.35, bedding=0.12,
    bedding_brightness=0.62, noise_std=4.0,
)  # fmt: skip
DIFFICULTIES = {
    "rest": Difficulty(rest_share=0.8),
    "infrared": _INFRARED,
    "infrared_bright": replace(_INFRARED, bedding=0.10, bedding_brightness=0.95),
    "mirror": Difficulty(walls=(np.deg2rad(210.0), np.deg2rad(330.0)), wall_reflectance=0.35, floor_reflectance=0.12),
    "cable": Difficulty(cable=True, arm_spells=((0.2, 0.32), (0.7, 0.8))),
    "light": Difficulty(
        bedding_brightness=0.76, lamp_drift=0.25, lamp_gradient=0.12, lamp_tint=0.03, exposure_spread=0.1
    ),
}


def difficulty_of(kind: str) -> Difficulty:
    """The parameters of a kind of hard recording. Raises UserError where there is no such kind."""
    if kind not in DIFFICULTIES:
        raise UserError(f"synthetic scene: no kind {kind!r}; there are {', '.join(DIFFICULTIES)}")
    return DIFFICULTIES[kind]
