"""The synthetic mouse: its shape at rest, its walk along a smooth curve and its pose at every frame.

The animal is a union of ellipsoids and round cones. It pauses and rears once in 2.4 s, and its paws stay in place on
the floor while they are in stance. Lengths are in metres, in the frame of the arena, whose floor is z = 0.

Rest coordinates are s along the spine (0 at mid trunk, positive towards the nose), y to the left and z up.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from zoosplat.geometry.rotations import unit
from zoosplat.synthetic.solids import COAT, EAR, EYE, LIMB, PINK, Floats, Solids
from zoosplat.synthetic.traits import Traits, smoothstep

KEYPOINT_NAMES = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "head", "neck", "shoulders", "mid_trunk", "pelvis",
    "tail_base", "tail_mid", "tail_tip", "left_fore_paw", "right_fore_paw", "left_hind_paw", "right_hind_paw",
)  # fmt: skip

# Stations of the spine at rest, from the tail's base to the nose: s, radius of the body, height of its axis; metres.
SPINE_S = (-0.036, -0.030, -0.022, -0.012, 0.000, 0.010, 0.018, 0.026, 0.034, 0.042, 0.0500)
SPINE_RADIUS = (0.0050, 0.0095, 0.0137, 0.0150, 0.0142, 0.0123, 0.0107, 0.0100, 0.0090, 0.0066, 0.0032)
SPINE_Z = (0.0120, 0.0140, 0.0165, 0.0178, 0.0182, 0.0172, 0.0170, 0.0182, 0.0188, 0.0168, 0.0140)
# s of the pelvis, about which the body rears, and of the neck, in front of which the head turns; metres.
PELVIS_S, NECK_S = -0.022, 0.022
TAIL_LENGTH = 0.070  # metres
STRIDE = 0.050  # Distance in metres that the body advances in one cycle of the legs.
STANCE = 0.62  # Share of a cycle of the legs for which a paw stays on the floor.
SPEED = 0.14  # Walking speed, m/s.
CYCLE_S = 2.4  # Period of walking, pausing and rearing, s.
REARING_RAD = 0.95  # Largest pitch of the trunk when the animal rears.
# Radii in metres of the two circles that make up the path, and turns of the small one in a turn of the large one.
LARGE_CIRCLE, SMALL_CIRCLE, CIRCLE_RATIO = 0.080, 0.014, 0.62
# A resting animal runs through so many seconds of its movements, to and fro, so often a second.
FIDGET_S, FIDGET_HZ = 0.05, 0.3
BREATH, BREATH_HZ = 0.02, 2.3  # Share of the trunk's radius by which it swells, and breaths per second.
UP = np.array([0.0, 0.0, 1.0])


def _pulse(x: Any, start: float, end: float, ramp: float) -> Any:
    """1 between `start` and `end` and 0 outside, with smooth ramps of this length on the inner side of both."""
    return smoothstep(x, start, start + ramp) - smoothstep(x, end - ramp, end)


class Mouse:
    """A walking mouse.

    Args:
        traits: seeded constants of the path and the movement.
        n_frames: number of frames for which `pose` can be asked.
        fps: frames per second.
    """

    def __init__(self, traits: Traits, n_frames: int, fps: float) -> None:
        self.traits, self.n_frames, self.fps = traits, n_frames, fps

    def path_at(self, u: Floats) -> tuple[Floats, Floats]:
        """Position and derivative [..., 2] of the path at parameter u [...].

        The path is a circle with a slower, counter-turning small one on it. Its radius of curvature stays above 5 cm,
        so the spine, which lies on the path, is never folded.
        """
        big, small, ratio, phase = LARGE_CIRCLE, SMALL_CIRCLE, CIRCLE_RATIO, self.traits.path_phases[0]
        v = phase - ratio * u
        return (
            np.stack([big * np.cos(u) + small * np.cos(v), big * np.sin(u) + small * np.sin(v)], -1),
            np.stack([-big * np.sin(u) + ratio * small * np.sin(v), big * np.cos(u) - ratio * small * np.cos(v)], -1),
        )

    @cached_property
    def walk(self) -> tuple[Floats, Floats, Floats]:
        """Distance walked [T] at every frame, and a table of the path: arc length [N] and parameter u [N]; metres."""
        times = np.arange(int(np.ceil(self.n_frames / self.fps / 1e-3)) + 2) * 1e-3
        phase = times % CYCLE_S
        speed = SPEED * (1 - _pulse(phase, 0.85, 1.30, 0.12) - _pulse(phase, 1.70, 2.38, 0.12))
        walked = np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2 * 1e-3)])
        # A unit of u is at least 0.07 m of path, so this range of u holds the whole walk and 14 cm before and after it.
        u = np.arange(-2.0, 2.0 + walked[-1] / 0.07, 2e-3)
        step = np.linalg.norm(self.path_at(u + self.traits.path_phases[1])[1], axis=1)
        length = np.concatenate([[0.0], np.cumsum((step[1:] + step[:-1]) / 2 * 2e-3)])
        length -= np.interp(0.0, u, length)
        return np.interp(np.arange(self.n_frames) / self.fps, times, walked), length, u + self.traits.path_phases[1]

    def motion_time(self, frame: int) -> float:
        """Time in seconds that tells the pose of the head, of the tail and of the rearing body at a frame."""
        return frame / self.fps

    def pose(self, frame: int) -> tuple[Solids, Floats, Floats]:
        """The solids, the keypoints [K, 3] in the order of KEYPOINT_NAMES and the forward direction [3] of a frame."""
        posture = _Posture(self, frame)
        solids = Solids()
        points: dict[str, Floats] = {}
        posture.add_trunk(solids)
        posture.add_nose(solids, points)
        for name, left in (("left", 1.0), ("right", -1.0)):
            posture.add_side_of_head(solids, points, name, left)
            posture.add_legs(solids, points, name, left)
        posture.add_tail(solids, points)
        for name, s in (("head", 0.034), ("neck", 0.022), ("shoulders", 0.014), ("mid_trunk", 0.0), ("pelvis", -0.022)):
            points[name] = posture.body(s, 0, 0)
        forward = unit((points["shoulders"] - points["pelvis"]) * (1, 1, 0))
        return solids, np.stack([points[name] for name in KEYPOINT_NAMES]), forward


class RestingMouse(Mouse):
    """A mouse that first rests in one place, where it breathes and moves its head a little, and then walks.

    Args:
        traits: seeded constants of the path and the movement.
        n_frames: number of frames for which `pose` can be asked.
        fps: frames per second.
        rest_frames: number of frames for which it rests.
    """

    def __init__(self, traits: Traits, n_frames: int, fps: float, rest_frames: int) -> None:
        super().__init__(traits, n_frames, fps)
        self.rest_frames = rest_frames

    @cached_property
    def walk(self) -> tuple[Floats, Floats, Floats]:
        """As `Mouse.walk`; the distance is 0 while the animal rests."""
        walked, length, u = super().walk
        moving = np.maximum(np.arange(self.n_frames) - self.rest_frames, 0)
        return walked[moving], length, u

    def motion_time(self, frame: int) -> float:
        """As `Mouse.motion_time`; while the animal rests, it swings slowly about 0, so that head and tail do."""
        left = (self.rest_frames - frame) / self.fps
        return FIDGET_S * float(np.sin(2 * np.pi * FIDGET_HZ * left)) if left > 0 else -left

    def pose(self, frame: int) -> tuple[Solids, Floats, Floats]:
        """As `Mouse.pose`; the trunk widens and narrows with the breath while the animal rests."""
        solids, points, forward = super().pose(frame)
        if frame < self.rest_frames:
            swell = 1 + BREATH * float(np.sin(2 * np.pi * BREATH_HZ * frame / self.fps))
            for i, material in enumerate(solids.material):
                if material == COAT and solids.radii[i] is None:
                    solids.ra[i], solids.rb[i] = solids.ra[i] * swell, solids.rb[i] * swell
        return solids, points, forward


class _Posture:
    """The deformation of the mouse at rest into its pose at one frame."""

    def __init__(self, mouse: Mouse, frame: int) -> None:
        walked, self.arc, self.arc_u = mouse.walk
        self.mouse, self.time_s, self.distance = mouse, mouse.motion_time(frame), walked[frame]
        time_s, phases = self.time_s, mouse.traits.motion_phases
        self.rearing = REARING_RAD * float(_pulse(time_s % CYCLE_S, 1.76, 2.36, 0.22))
        self.yaw = 0.35 * np.sin(2 * np.pi * 0.9 * time_s + phases[0]) + 0.10 * np.sin(
            2 * np.pi * 2.3 * time_s + phases[1]
        )
        self.bob = 0.0008 * np.sin(4 * np.pi * self.distance / STRIDE)
        # Where the spine lies after rearing: its pitch is integrated from the pelvis forwards.
        self.grid = np.arange(PELVIS_S, 0.08, 5e-4)
        reared = self.rearing * smoothstep(self.grid, -0.022, 0.010)
        self.pitch = reared * (1 - 0.55 * smoothstep(self.grid, 0.020, 0.034))
        self.bent_s = PELVIS_S + np.concatenate([[0.0], np.cumsum(np.cos(self.pitch[:-1]) * 5e-4)])
        self.bent_z = np.concatenate([[0.0], np.cumsum(np.sin(self.pitch[:-1]) * 5e-4)])
        self.pelvis_z = float(np.interp(PELVIS_S, SPINE_S, SPINE_Z))

    def floor(self, s: Any, y: Any, z: Any) -> Floats:
        """Points [..., 3]: s along the path from the animal's place on it, y to the left of it, z above the floor."""
        place = np.interp(self.distance + np.asarray(s, float), self.arc, self.arc_u)
        position, tangent = self.mouse.path_at(place)
        tangent = unit(tangent)
        flat = position + np.asarray(y, float)[..., None] * np.stack([-tangent[..., 1], tangent[..., 0]], -1)
        return np.concatenate([flat, np.broadcast_to(np.asarray(z, float)[..., None], (*flat.shape[:-1], 1))], -1)

    def body(self, s: Any, y: Any, dz: Any) -> Floats:
        """Points [..., 3] of the body at rest coordinates s and y, and dz above the spine's axis.

        They are deformed by the head's yaw, by rearing and by the bend of the path.
        """
        s, y, dz = np.broadcast_arrays(np.asarray(s, float), np.asarray(y, float), np.asarray(dz, float))
        height = np.interp(s, SPINE_S, SPINE_Z) - self.pelvis_z + dz
        ahead = np.maximum(s - NECK_S, 0.0)
        turn = self.yaw * smoothstep(ahead, 0.0, 0.008)
        s, y = s - ahead + ahead * np.cos(turn) - y * np.sin(turn), ahead * np.sin(turn) + y * np.cos(turn)
        tilt = np.interp(s, self.grid, self.pitch)
        along = np.where(s > PELVIS_S, np.interp(s, self.grid, self.bent_s), s)
        lifted = np.where(s > PELVIS_S, np.interp(s, self.grid, self.bent_z), 0.0)
        z = self.pelvis_z + self.bob + lifted + height * np.cos(tilt)
        return self.floor(along - height * np.sin(tilt), y, z)

    def axes_at(self, s: float, y: float, dz: float) -> Floats:
        """Unit vectors along, left and dorsal, the rows of [3, 3], at a point of the body."""
        along = unit(self.body(s + 1e-3, y, dz) - self.body(s - 1e-3, y, dz))
        left = self.body(s, y + 1e-3, dz) - self.body(s, y - 1e-3, dz)
        left = unit(left - along * (left @ along))
        return np.stack([along, left, np.cross(along, left)])

    def add_trunk(self, solids: Solids) -> None:
        # More cones than stations, with smoothed radii, so that neither the outline nor the shading shows joints.
        fine = np.linspace(SPINE_S[0], SPINE_S[-1], 19)
        spine, back = self.body(fine, 0, 0), self.body(fine, 0, 1e-3)
        radius = np.interp(fine, SPINE_S, SPINE_RADIUS)
        radius[1:-1] = (radius[:-2] + 2 * radius[1:-1] + radius[2:]) / 4
        for i in range(len(fine) - 1):
            stretch = (fine[i + 1] - fine[i]) / float(np.linalg.norm(spine[i + 1] - spine[i]))
            solids.cone(spine[i], spine[i + 1], radius[i], radius[i + 1], back[i] - spine[i], COAT,
                        (float(fine[i]), 0.0, 0.0, stretch))  # fmt: skip

    def add_nose(self, solids: Solids, points: dict[str, Floats]) -> None:
        points["nose"] = self.body(0.0525, 0, -0.0003)
        solids.ellipsoid(points["nose"], self.axes_at(0.0525, 0, 0), (0.0016, 0.0019, 0.0015), PINK)

    def add_side_of_head(self, solids: Solids, points: dict[str, Floats], name: str, left: float) -> None:
        """Add eye and ear of one side; `left` is 1 on the left and -1 on the right."""
        eye = self.body(0.0405, left * 0.0062, 0.0032)
        solids.ellipsoid(eye, self.axes_at(0.0405, 0, 0), (0.0019, 0.0019, 0.0019), EYE)
        ear = self.body(0.0265, left * 0.0092, 0.0098)
        along, aside, above = self.axes_at(0.030, 0, 0)
        face = unit(along + 0.75 * left * aside + 0.25 * above)  # The pinna opens to the front and outwards.
        rise = unit(above + 0.55 * left * aside - face * ((above + 0.55 * left * aside) @ face))
        solids.ellipsoid(ear, np.stack([face, np.cross(rise, face), rise]), (0.0013, 0.0060, 0.0068), EAR)
        points[f"{name}_eye"], points[f"{name}_ear"] = eye, ear

    def add_legs(self, solids: Solids, points: dict[str, Floats], name: str, left: float) -> None:
        """Add haunch, fore leg and hind leg of one side; `left` is 1 on the left and -1 on the right."""
        haunch_s = -0.0195
        haunch = self.body(haunch_s, left * 0.0085, -0.0045)
        solids.ellipsoid(haunch, self.axes_at(haunch_s, 0, 0), (0.0110, 0.0068, 0.0105), COAT,
                         (haunch_s, left * 0.0085, -0.0045, 1.0))  # fmt: skip
        for limb, s, spread, offset in (("fore", 0.014, 0.0085, 0.0), ("hind", -0.020, 0.0125, 0.5)):
            # Diagonal legs move together. A paw in stance moves back relative to the body as fast as the body advances.
            cycle = (self.distance / STRIDE + offset + (0.5 if left < 0 else 0.0)) % 1.0
            swing = max(0.0, (cycle - STANCE) / (1 - STANCE))
            reach = STANCE * STRIDE / 2
            step = reach - cycle * STRIDE if swing == 0 else reach * (2 * float(smoothstep(swing)) - 1)
            lift = 0.005 * np.sin(np.pi * swing)
            paw = self.floor(s + step, left * spread, 0.0022 + lift)
            toe = self.floor(s + step + (0.0065 if limb == "hind" else 0.0040), left * (spread + 0.001),
                             0.0016 + 0.6 * lift)  # fmt: skip
            heel = self.floor(s + step - 0.0055, left * spread, 0.0022 + 1.3 * lift) if limb == "hind" else paw
            hip = self.body(s, left * (0.0070 if limb == "fore" else 0.0090), -0.0060)
            if limb == "fore" and self.rearing:
                hang = self.body(s + 0.006, left * 0.0075, -0.0185)
                raised = float(smoothstep(self.rearing / REARING_RAD, 0.0, 0.5))
                drop = self.body(s + 0.009, left * 0.0080, -0.0200) - hang
                paw, toe = paw + raised * (hang - paw), toe + raised * (hang + drop - toe)
                heel = paw
            solids.cone(hip, heel, 0.0052 if limb == "fore" else 0.0060, 0.0021, UP, LIMB)
            solids.cone(heel, toe, 0.0019, 0.0018, UP, PINK)
            points[f"{name}_{limb}_paw"] = (heel + toe) / 2

    def add_tail(self, solids: Solids, points: dict[str, Floats]) -> None:
        time_s, phases = self.time_s, self.mouse.traits.motion_phases
        along_tail = np.linspace(0.0, 1.0, 11)
        sway = 0.013 * along_tail**1.3 * np.sin(2 * np.pi * (0.8 * along_tail - 0.7 * time_s) + phases[2])
        tail_s = SPINE_S[0] + 0.004 - 0.94 * TAIL_LENGTH * along_tail
        tail_z = 0.0118 + self.bob * (1 - along_tail) - 0.0092 * smoothstep(along_tail, 0.0, 0.45)
        tail_z = tail_z + 0.012 * smoothstep(along_tail, 0.55, 1.0) * (0.5 + 0.5 * np.sin(2.6 * time_s + phases[3]))
        tail = self.floor(tail_s, sway, tail_z)
        thick = 0.0029 - 0.0020 * along_tail**0.7
        for i in range(len(tail) - 1):
            solids.cone(tail[i], tail[i + 1], float(thick[i]), float(thick[i + 1]), UP, PINK,
                        (float(tail_s[i]), 0.0, 0.0, -1.0))  # fmt: skip
        points["tail_base"], points["tail_mid"], points["tail_tip"] = tail[0], tail[5], tail[-1]
