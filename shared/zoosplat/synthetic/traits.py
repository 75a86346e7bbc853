"""Seeded traits of a synthetic animal: where it starts, how it moves and what its coat looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoosplat.geometry.rotations import unit
from zoosplat.synthetic.solids import Floats


@dataclass(frozen=True, eq=False)
class Traits:
    """Constants of one animal. They are drawn from ranges that were chosen by eye.

    Attributes:
        path_phases: [2] radians, phase of the path's small circle and angle on the large circle at which it starts.
        motion_phases: [4] radians, phases of the slow and the fast yaw of the head, of the tail's sway and of its lift.
        patch_waves: [4, 3] wave vectors of the coat's patches, radians per metre.
        patch_phases: [4] radians.
        grain_waves: [3, 3] wave vectors of the coat's grain, radians per metre.
        saddle: [3] centre of the pale patch on the side, metres in rest coordinates (see `mouse`).
        coat_color: [3] RGB of the back, 0 to 1.
    """

    path_phases: Floats
    motion_phases: Floats
    patch_waves: Floats
    patch_phases: Floats
    grain_waves: Floats
    saddle: Floats
    coat_color: Floats

    @classmethod
    def draw(cls, seed: int, coat_color: tuple[float, float, float]) -> Traits:
        """The traits of the animal with this seed and this colour of the back."""
        rng = np.random.default_rng((seed, 2))
        directions = unit(rng.normal(size=(7, 3)))
        return cls(
            path_phases=rng.uniform(0, 2 * np.pi, 2),
            motion_phases=rng.uniform(0, 2 * np.pi, 4),
            patch_waves=directions[:4] * 2 * np.pi / rng.uniform(0.020, 0.034, (4, 1)),
            patch_phases=rng.uniform(0, 2 * np.pi, 4),
            grain_waves=directions[4:] * 2 * np.pi / rng.uniform(0.0035, 0.006, (3, 1)),
            saddle=np.array([rng.uniform(-0.018, 0.004), rng.choice([-1.0, 1.0]) * 0.011, 0.007]),
            coat_color=np.asarray(coat_color),
        )


def smoothstep(x: Any, low: float = 0.0, high: float = 1.0) -> Any:
    """0 below `low`, 1 above `high`, and the cubic 3 u^2 - 2 u^3 in between. Scalars or arrays."""
    u = np.clip((x - low) / (high - low), 0.0, 1.0)
    return u * u * (3 - 2 * u)
