"""A synthetic recording with known truth: a walking, articulated, textured mouse filmed by calibrated cameras.

The animal is a union of ellipsoids and round cones (the hull of two spheres), so silhouettes are exact: every picture
is ray cast analytically at twice the resolution and averaged, and the same solids answer "is this point inside".
It follows a smooth curve with pauses and rears once in 2.4 s; paws in stance stay where they are on the floor.
The calibration's world is tilted and shifted against the arena, so nothing may assume that its z axis is up.

Everything is a function of (seed, time): the first n frames of a longer recording are those of a shorter one.
Importing this module needs NumPy only; writing a recording needs PyAV and h5py.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoosplat.errors import UserError

if TYPE_CHECKING:
    from av import VideoFrame

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

KEYPOINT_NAMES = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "head", "neck", "shoulders", "mid_trunk", "pelvis",
    "tail_base", "tail_mid", "tail_tip", "left_fore_paw", "right_fore_paw", "left_hind_paw", "right_hind_paw",
)  # fmt: skip
TRUNK_KEYPOINTS = ("head", "neck", "shoulders", "mid_trunk", "pelvis")

# Rest shape in body coordinates (metres): s along the spine (0 at mid trunk, nose forward), y to the left, z up.
_SPINE_S = (-0.036, -0.030, -0.022, -0.012, 0.000, 0.010, 0.018, 0.026, 0.034, 0.042, 0.0500)
_SPINE_R = (0.0050, 0.0095, 0.0137, 0.0150, 0.0142, 0.0123, 0.0107, 0.0100, 0.0090, 0.0066, 0.0032)
_SPINE_Z = (0.0120, 0.0140, 0.0165, 0.0178, 0.0182, 0.0172, 0.0170, 0.0182, 0.0188, 0.0168, 0.0140)
_PELVIS_S, _NECK_S, _TAIL_LENGTH = -0.022, 0.022, 0.070
_STRIDE, _STANCE, _SPEED, _CYCLE_S = 0.050, 0.62, 0.14, 2.4
COAT, LIMB, PINK, EYE, EAR = range(5)


@dataclass(frozen=True)
class Truth:
    """What is known of a recording. Lengths in metres and positions in the frame of the calibration.

    root_position: [T, 3] pelvis, inside the body.
    centroid: [T, 3] centroid of the animal's volume.
    forward: [T, 3] unit vector, horizontal, from pelvis to shoulders.
    heading: [T] angle_rad of `forward` about up, in (-pi, pi], in the frame that the smallest rotation taking `up` to
        +z makes of the calibration's: atan2(y, x).
    keypoints: [T, K, 3] in the order of KEYPOINT_NAMES.
    up: [3] unit vector from floor to ceiling.
    """

    root_position: Floats
    centroid: Floats
    forward: Floats
    heading: Floats
    keypoints: Floats
    up: Floats


def ring_of_cameras(
    n: int,
    radius_m: float,
    height_m: float | Sequence[float],
    *,
    focal_px: float = 400.0,
    width: int = 288,
    height: int = 256,
    target: Sequence[float] = (0.0, 0.0, 0.0),
) -> tuple[Floats, Floats, Floats]:
    """n cameras evenly on a circle about the z axis through `target`, all looking at it, none rolled.

    height_m is above the target, one number or one a camera. Camera i stands at azimuth 2 pi i / n.
    Returns K [n, 3, 3], R [n, 3, 3], t [n, 3], float64: x_cam = R x_world + t, OpenCV axes, calibration pixels
    (the target projects to ((width - 1) / 2, (height - 1) / 2), the centre of the picture).
    """
    azimuth = 2 * np.pi * np.arange(n) / n
    offset = np.stack(
        [radius_m * np.cos(azimuth), radius_m * np.sin(azimuth), np.broadcast_to(np.asarray(height_m, float), (n,))], 1
    )
    forward = -offset / np.linalg.norm(offset, axis=1, keepdims=True)
    right = np.stack([forward[:, 1], -forward[:, 0], np.zeros(n)], 1)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    rotation = np.stack([right, np.cross(forward, right), forward], 1)
    translation = -np.einsum("cij,cj->ci", rotation, offset + np.asarray(target, float))
    intrinsic = np.array([[focal_px, 0, (width - 1) / 2], [0, focal_px, (height - 1) / 2], [0, 0, 1]])
    return np.tile(intrinsic, (n, 1, 1)), rotation, translation


def _smoothstep(x: Any, low: float = 0.0, high: float = 1.0) -> Any:
    u = np.clip((x - low) / (high - low), 0.0, 1.0)
    return u * u * (3 - 2 * u)


def _pulse(x: Any, start: float, end: float, ramp: float) -> Any:
    return _smoothstep(x, start, start + ramp) - _smoothstep(x, end - ramp, end)


def unit(v: Floats) -> Floats:
    """Vectors [..., n] at length 1."""
    return np.asarray(v / np.linalg.norm(v, axis=-1, keepdims=True), float)


def axis_angle(axis: Sequence[float], angle_rad: float) -> Floats:
    """[3, 3] rotation by an angle about an axis (Rodrigues)."""
    x, y, z = unit(np.asarray(axis, float))
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle_rad) * k + (1 - np.cos(angle_rad)) * k @ k, float)


def _distort(xy: Floats, coefficients: Floats) -> Floats:
    """Normalised image points [..., 2] through the Brown-Conrady model (k1, k2, p1, p2, k3), as OpenCV has it."""
    k1, k2, p1, p2, k3 = coefficients
    x, y = xy[..., 0], xy[..., 1]
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ],
        -1,
    )


@dataclass
class Solids:
    """The posed animal: P round cones (an ellipsoid is one with `radii`), arena frame, metres."""

    a: list[Floats] = field(default_factory=list)
    b: list[Floats] = field(default_factory=list)
    ra: list[float] = field(default_factory=list)
    rb: list[float] = field(default_factory=list)
    axes: list[Floats] = field(default_factory=list)  # rows: along, left, dorsal
    radii: list[Floats | None] = field(default_factory=list)
    texture: list[tuple[float, float, float, float]] = field(default_factory=list)  # origin s, y, z; stretch along s
    material: list[int] = field(default_factory=list)

    def cone(self, a: Floats, b: Floats, ra: float, rb: float, dorsal: Floats, material: int,
             texture: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)) -> None:  # fmt: skip
        along = b - a
        length = float(np.linalg.norm(along))
        if length <= abs(ra - rb):  # one sphere holds the other: keep it only
            a, ra, along = (a, ra, along) if ra >= rb else (b, rb, along)
            b, rb = a + 1e-6 * unit(along), ra
        left = unit(np.cross(dorsal, along))
        along = unit(along)
        self._add(a, b, ra, rb, np.stack([along, left, np.cross(along, left)]), None, texture, material)

    def ellipsoid(self, centre: Floats, axes: Floats, radii: Sequence[float], material: int,
                  texture: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)) -> None:  # fmt: skip
        r = float(max(radii))
        self._add(centre, centre, r, r, axes, np.asarray(radii, float), texture, material)

    def _add(self, *values: Any) -> None:
        columns: tuple[list[Any], ...] = (
            self.a, self.b, self.ra, self.rb, self.axes, self.radii, self.texture, self.material,
        )  # fmt: skip
        for column, value in zip(columns, values, strict=True):
            column.append(value)

    def inside(self, index: int, points: Floats) -> Bools:
        """Whether points [..., 3] lie in solid `index`."""
        radii = self.radii[index]
        local = (points - self.a[index]) @ self.axes[index].T
        if radii is not None:
            return np.asarray(np.sum((local / radii) ** 2, -1) <= 1)
        length = float(np.linalg.norm(self.b[index] - self.a[index]))
        slope = (self.ra[index] - self.rb[index]) / length
        away = np.hypot(local[..., 1], local[..., 2])
        # The nearest of the swept spheres: d/dx0 of sqrt((x - x0)^2 + y^2) - r(x0) is zero.
        nearest = np.clip(local[..., 0] - slope * away / np.sqrt(1 - slope**2), 0, length)
        return np.asarray(np.hypot(local[..., 0] - nearest, away) <= self.ra[index] - slope * nearest)


@dataclass(frozen=True)
class Scene:
    """A seeded recording, computed and never read from disk.

    coat: RGB in 0..1 of the back. distortion: (k1, k2, p1, p2[, k3]) of OpenCV for all cameras, or None.
    noise_std: sensor noise in grey levels. Raises UserError for sizes that a yuv420p video cannot hold.
    """

    n_frames: int = 120
    n_cameras: int = 6
    width: int = 288
    height: int = 256
    fps: float = 50.0
    seed: int = 0
    coat: tuple[float, float, float] = (0.47, 0.35, 0.25)
    distortion: tuple[float, ...] | None = None
    noise_std: float = 1.2

    def __post_init__(self) -> None:
        if self.n_frames < 1 or self.n_cameras < 1 or self.fps <= 0:
            raise UserError("synthetic scene: n_frames, n_cameras and fps must be positive")
        if min(self.width, self.height) < 16 or self.width % 2 or self.height % 2:
            raise UserError(f"synthetic scene: {self.width} x {self.height} px: both must be even and at least 16")
        if self.distortion is not None and len(self.distortion) not in (4, 5):
            raise UserError("synthetic scene: distortion is (k1, k2, p1, p2) or (k1, k2, p1, p2, k3)")

    # Cameras and frames of reference

    @cached_property
    def _world(self) -> tuple[Floats, Floats]:
        """x_world = Q x_arena + o."""
        rng = np.random.default_rng((self.seed, 1))
        lean = rng.uniform(0, 2 * np.pi)
        tilt = axis_angle((np.cos(lean), np.sin(lean), 0.0), np.deg2rad(12.0))
        return tilt @ axis_angle((0, 0, 1), rng.uniform(0, 2 * np.pi)), rng.uniform(-0.1, 0.1, 3)

    @cached_property
    def _arena_cameras(self) -> tuple[Floats, Floats, Floats]:
        heights = [0.17 if i % 2 else 0.28 for i in range(self.n_cameras)]
        focal_px = 1.40 * min(self.width, 1.1 * self.height)
        return ring_of_cameras(
            self.n_cameras, 0.36, heights, focal_px=focal_px, width=self.width, height=self.height, target=(0, 0, 0.015)
        )

    @property
    def cameras(self) -> tuple[Floats, Floats, Floats]:
        """K [C, 3, 3], R [C, 3, 3], t [C, 3] of the calibration (tilted world, metres): x_cam = R x_world + t."""
        intrinsic, rotation, translation = self._arena_cameras
        to_world, origin = self._world
        rotation = rotation @ to_world.T
        return intrinsic, rotation, translation - rotation @ origin

    @property
    def up(self) -> Floats:
        """[3] unit vector from floor to ceiling in the calibration's world."""
        return self._world[0][:, 2].copy()

    # The animal

    @cached_property
    def _traits(self) -> dict[str, Floats]:
        """Seeded constants of the path, the movement and the coat."""
        rng = np.random.default_rng((self.seed, 2))
        directions = unit(rng.normal(size=(7, 3)))
        return {
            "start": rng.uniform(0, 2 * np.pi, 2),
            "wag": rng.uniform(0, 2 * np.pi, 4),
            "patch_k": directions[:4] * 2 * np.pi / rng.uniform(0.020, 0.034, (4, 1)),
            "patch_phase": rng.uniform(0, 2 * np.pi, 4),
            "grain_k": directions[4:] * 2 * np.pi / rng.uniform(0.0035, 0.006, (3, 1)),
            "saddle": np.array([rng.uniform(-0.018, 0.004), rng.choice([-1.0, 1.0]) * 0.011, 0.007]),
        }

    def _path(self, u: Floats) -> tuple[Floats, Floats]:
        """Position and derivative [..., 2]: a circle of 8 cm with a slower counter-turning one of 1.4 cm on it.

        The radius of curvature stays above 5 cm, so that the spine, which lies on the path, is never folded.
        """
        big, small, ratio, phase = 0.080, 0.014, 0.62, self._traits["start"][0]
        v = phase - ratio * u
        return (
            np.stack([big * np.cos(u) + small * np.cos(v), big * np.sin(u) + small * np.sin(v)], -1),
            np.stack([-big * np.sin(u) + ratio * small * np.sin(v), big * np.cos(u) - ratio * small * np.cos(v)], -1),
        )

    @cached_property
    def _tables(self) -> tuple[Floats, Floats, Floats]:
        """Distance walked [T] (metres), and the path's arc length with its parameter u."""
        times = np.arange(int(np.ceil(self.n_frames / self.fps / 1e-3)) + 2) * 1e-3
        phase = times % _CYCLE_S
        speed = _SPEED * (1 - _pulse(phase, 0.85, 1.30, 0.12) - _pulse(phase, 1.70, 2.38, 0.12))
        walked = np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2 * 1e-3)])
        # |c'(u)| is at least 0.07 m: this range of u holds the whole walk and 14 cm before and after it.
        u = np.arange(-2.0, 2.0 + walked[-1] / 0.07, 2e-3)
        step = np.linalg.norm(self._path(u + self._traits["start"][1])[1], axis=1)
        length = np.concatenate([[0.0], np.cumsum((step[1:] + step[:-1]) / 2 * 2e-3)])
        length -= np.interp(0.0, u, length)
        return np.interp(np.arange(self.n_frames) / self.fps, times, walked), length, u + self._traits["start"][1]

    def _pose(self, frame: int) -> tuple[Solids, Floats, Floats]:
        """Solids, keypoints [K, 3] and forward direction [3] of a frame, arena frame."""
        walked, arc, arc_u = self._tables
        time_s, distance = frame / self.fps, walked[frame]
        wag = self._traits["wag"]
        rear = 0.95 * float(_pulse(time_s % _CYCLE_S, 1.76, 2.36, 0.22))
        yaw = 0.35 * np.sin(2 * np.pi * 0.9 * time_s + wag[0]) + 0.10 * np.sin(2 * np.pi * 2.3 * time_s + wag[1])
        bob = 0.0008 * np.sin(4 * np.pi * distance / _STRIDE)

        grid = np.arange(_PELVIS_S, 0.08, 5e-4)
        pitch = rear * _smoothstep(grid, -0.022, 0.010) * (1 - 0.55 * _smoothstep(grid, 0.020, 0.034))
        bent_s = _PELVIS_S + np.concatenate([[0.0], np.cumsum(np.cos(pitch[:-1]) * 5e-4)])
        bent_z = np.concatenate([[0.0], np.cumsum(np.sin(pitch[:-1]) * 5e-4)])

        def floor(s: Any, y: Any, z: Any) -> Floats:
            """Along the path, to the left of it, above the floor."""
            position, tangent = self._path(np.interp(distance + np.asarray(s, float), arc, arc_u))
            tangent = unit(tangent)
            flat = position + np.asarray(y, float)[..., None] * np.stack([-tangent[..., 1], tangent[..., 0]], -1)
            return np.concatenate([flat, np.broadcast_to(np.asarray(z, float)[..., None], (*flat.shape[:-1], 1))], -1)

        pelvis_z = float(np.interp(_PELVIS_S, _SPINE_S, _SPINE_Z))

        def body(s: Any, y: Any, dz: Any) -> Floats:
            """Rest coordinates, dz from the spine's line, through head yaw, rearing and the path's bend."""
            s, y, dz = np.broadcast_arrays(np.asarray(s, float), np.asarray(y, float), np.asarray(dz, float))
            height = np.interp(s, _SPINE_S, _SPINE_Z) - pelvis_z + dz
            ahead = np.maximum(s - _NECK_S, 0.0)
            turn = yaw * _smoothstep(ahead, 0.0, 0.008)
            s, y = s - ahead + ahead * np.cos(turn) - y * np.sin(turn), ahead * np.sin(turn) + y * np.cos(turn)
            tilt = np.interp(s, grid, pitch)
            along = np.where(s > _PELVIS_S, np.interp(s, grid, bent_s), s)
            lifted = np.where(s > _PELVIS_S, np.interp(s, grid, bent_z), 0.0)
            return floor(along - height * np.sin(tilt), y, pelvis_z + bob + lifted + height * np.cos(tilt))

        def axes_at(s: float, y: float, dz: float) -> Floats:
            along = unit(body(s + 1e-3, y, dz) - body(s - 1e-3, y, dz))
            left = body(s, y + 1e-3, dz) - body(s, y - 1e-3, dz)
            left = unit(left - along * (left @ along))
            return np.stack([along, left, np.cross(along, left)])

        solids = Solids()
        points: dict[str, Floats] = {}
        # Finer than the stations, through a smooth radius, so that neither outline nor shading shows joints.
        fine = np.linspace(_SPINE_S[0], _SPINE_S[-1], 19)
        spine, back = body(fine, 0, 0), body(fine, 0, 1e-3)
        radius = np.interp(fine, _SPINE_S, _SPINE_R)
        radius[1:-1] = (radius[:-2] + 2 * radius[1:-1] + radius[2:]) / 4
        for i in range(len(fine) - 1):
            stretch = (fine[i + 1] - fine[i]) / float(np.linalg.norm(spine[i + 1] - spine[i]))
            solids.cone(spine[i], spine[i + 1], radius[i], radius[i + 1], back[i] - spine[i], COAT,
                        (float(fine[i]), 0.0, 0.0, stretch))  # fmt: skip
        points["nose"] = body(0.0525, 0, -0.0003)
        solids.ellipsoid(points["nose"], axes_at(0.0525, 0, 0), (0.0016, 0.0019, 0.0015), PINK)
        for name, left in (("left", 1.0), ("right", -1.0)):
            eye = body(0.0405, left * 0.0062, 0.0032)
            solids.ellipsoid(eye, axes_at(0.0405, 0, 0), (0.0019, 0.0019, 0.0019), EYE)
            ear = body(0.0265, left * 0.0092, 0.0098)
            along, aside, above = axes_at(0.030, 0, 0)
            face = unit(along + 0.75 * left * aside + 0.25 * above)  # the pinna's opening looks forward and out
            rise = unit(above + 0.55 * left * aside - face * ((above + 0.55 * left * aside) @ face))
            solids.ellipsoid(ear, np.stack([face, np.cross(rise, face), rise]), (0.0013, 0.0060, 0.0068), EAR)
            points[f"{name}_eye"], points[f"{name}_ear"] = eye, ear

            haunch_s = -0.0195
            haunch = body(haunch_s, left * 0.0085, -0.0045)
            solids.ellipsoid(haunch, axes_at(haunch_s, 0, 0), (0.0110, 0.0068, 0.0105), COAT,
                             (haunch_s, left * 0.0085, -0.0045, 1.0))  # fmt: skip
            up = np.array([0.0, 0.0, 1.0])
            for limb, s, spread, offset in (("fore", 0.014, 0.0085, 0.0), ("hind", -0.020, 0.0125, 0.5)):
                # Diagonal pairs together; a stance paw moves back relative to the body exactly as the body advances.
                cycle = (distance / _STRIDE + offset + (0.5 if left < 0 else 0.0)) % 1.0
                swing = max(0.0, (cycle - _STANCE) / (1 - _STANCE))
                reach = _STANCE * _STRIDE / 2
                step = reach - cycle * _STRIDE if swing == 0 else reach * (2 * float(_smoothstep(swing)) - 1)
                lift = 0.005 * np.sin(np.pi * swing)
                paw = floor(s + step, left * spread, 0.0022 + lift)
                toe = floor(s + step + (0.0065 if limb == "hind" else 0.0040), left * (spread + 0.001),
                            0.0016 + 0.6 * lift)  # fmt: skip
                heel = floor(s + step - 0.0055, left * spread, 0.0022 + 1.3 * lift) if limb == "hind" else paw
                hip = body(s, left * (0.0070 if limb == "fore" else 0.0090), -0.0060)
                if limb == "fore" and rear:
                    hang = body(s + 0.006, left * 0.0075, -0.0185)
                    raised = float(_smoothstep(rear / 0.95, 0.0, 0.5))
                    drop = body(s + 0.009, left * 0.0080, -0.0200) - hang
                    paw, toe = paw + raised * (hang - paw), toe + raised * (hang + drop - toe)
                    heel = paw
                solids.cone(hip, heel, 0.0052 if limb == "fore" else 0.0060, 0.0021, up, LIMB)
                solids.cone(heel, toe, 0.0019, 0.0018, up, PINK)
                points[f"{name}_{limb}_paw"] = (heel + toe) / 2

        along_tail = np.linspace(0.0, 1.0, 11)
        sway = 0.013 * along_tail**1.3 * np.sin(2 * np.pi * (0.8 * along_tail - 0.7 * time_s) + wag[2])
        tail_s = _SPINE_S[0] + 0.004 - 0.94 * _TAIL_LENGTH * along_tail
        tail_z = 0.0118 + bob * (1 - along_tail) - 0.0092 * _smoothstep(along_tail, 0.0, 0.45)
        tail_z = tail_z + 0.012 * _smoothstep(along_tail, 0.55, 1.0) * (0.5 + 0.5 * np.sin(2.6 * time_s + wag[3]))
        tail = floor(tail_s, sway, tail_z)
        thick = 0.0029 - 0.0020 * along_tail**0.7
        for i in range(len(tail) - 1):
            solids.cone(tail[i], tail[i + 1], float(thick[i]), float(thick[i + 1]), np.array([0.0, 0.0, 1.0]), PINK,
                        (float(tail_s[i]), 0.0, 0.0, -1.0))  # fmt: skip

        for name, s in (("head", 0.034), ("neck", 0.022), ("shoulders", 0.014), ("mid_trunk", 0.0), ("pelvis", -0.022)):
            points[name] = body(s, 0, 0)
        points["tail_base"], points["tail_mid"], points["tail_tip"] = tail[0], tail[5], tail[-1]
        forward = unit((points["shoulders"] - points["pelvis"]) * (1, 1, 0))
        return solids, np.stack([points[name] for name in KEYPOINT_NAMES]), forward

    def inside(self, frame: int, points: Floats) -> Bools:
        """Whether points [..., 3] of the calibration's world lie in the animal: [...] bool."""
        to_world, origin = self._world
        solids = self._pose(frame)[0]
        local = (np.asarray(points, float) - origin) @ to_world
        return np.asarray(np.logical_or.reduce([solids.inside(i, local) for i in range(len(solids.a))]))

    @cached_property
    def truth(self) -> Truth:
        """The truth of every frame; the centroid by counting the cells of a 1.5 mm grid."""
        to_world, origin = self._world
        keypoints, forwards, centroids = [], [], []
        for frame in range(self.n_frames):
            solids, points, forward = self._pose(frame)
            keypoints.append(points @ to_world.T + origin)
            forwards.append(to_world @ forward)
            centroids.append(to_world @ centroid(solids, 1.5e-3) + origin)
        forward_world = np.stack(forwards)
        up = self.up
        axis = np.cross(up, (0.0, 0.0, 1.0))
        level = axis_angle(tuple(axis), float(np.arctan2(np.linalg.norm(axis), up[2]))) if axis.any() else np.eye(3)
        flat = forward_world @ level.T
        stacked = np.stack(keypoints)
        root = stacked[:, KEYPOINT_NAMES.index("pelvis")]
        return Truth(root, np.stack(centroids), forward_world, np.arctan2(flat[:, 1], flat[:, 0]), stacked, up)

    # Pictures

    @property
    def _coefficients(self) -> Floats | None:
        return None if self.distortion is None else np.append(self.distortion, 0.0)[:5]

    @cached_property
    def _views(self) -> dict[int, tuple[View, NDArray[np.float32]]]:
        return {}

    def _render(self, solids: Solids, frame: int, camera: int) -> tuple[NDArray[np.uint8], Bools]:
        if camera not in self._views:
            intrinsic, rotation, translation = (part[camera] for part in self._arena_cameras)
            view = View(intrinsic, rotation, translation, self.width, self.height, self._coefficients)
            self._views[camera] = view, view.backdrop(self.seed)
        view, background = self._views[camera]
        picture = background.copy()
        mask = np.zeros((self.height, self.width), bool)
        drawn = view.cast(solids, self)
        if drawn is not None:
            rows, columns, colour, coverage = drawn
            picture[rows, columns] = picture[rows, columns] * (1 - coverage[..., None]) + colour
            mask[rows, columns] = coverage >= 0.5
        if self.noise_std > 0:
            dy, dx = np.random.default_rng((self.seed, 3, camera, frame)).integers(0, _NOISE_MARGIN, 2)
            picture += self._noise[dy : dy + self.height, dx : dx + self.width]
        return np.clip(picture + 0.5, 0, 255).astype(np.uint8), mask

    @cached_property
    def _noise(self) -> NDArray[np.float32]:
        rng = np.random.default_rng((self.seed, 4))
        shape = (self.height + _NOISE_MARGIN, self.width + _NOISE_MARGIN, 3)
        return self.noise_std * rng.standard_normal(shape, np.float32)


_NOISE_MARGIN = 97
_LIGHT = unit(np.array([0.35, -0.25, 0.9]))


def centroid(solids: Solids, cell_m: float) -> Floats:
    """Centroid [3] of the volume, by counting cells."""
    ends = np.concatenate([solids.a, solids.b])
    reach = np.concatenate([solids.ra, solids.rb])[:, None]
    low = (ends - reach).min(0)
    shape = np.ceil(((ends + reach).max(0) - low) / cell_m).astype(int) + 1
    occupied = np.zeros(shape, bool)
    for i in range(len(solids.a)):
        first = np.minimum(solids.a[i] - solids.ra[i], solids.b[i] - solids.rb[i])
        last = np.maximum(solids.a[i] + solids.ra[i], solids.b[i] + solids.rb[i])
        start, stop = ((first - low) / cell_m).astype(int), ((last - low) / cell_m).astype(int) + 1
        cells = np.stack(np.meshgrid(*(np.arange(s, e) for s, e in zip(start, stop, strict=True)), indexing="ij"), -1)
        block = occupied[tuple(slice(s, e) for s, e in zip(start, stop, strict=True))]
        block |= solids.inside(i, low + (cells + 0.5) * cell_m)
    return np.asarray(low + (np.argwhere(occupied).mean(0) + 0.5) * cell_m, float)


class View:
    """One camera: the rays of its picture at twice the resolution, arena frame.

    Args:
        intrinsic: [3, 3] calibration pixels.
        rotation, translation: [3, 3] and [3] metres, x_cam = R x_arena + t.
        width, height: of the picture, pixels.
        distortion: [5] of OpenCV, or None.
    """

    def __init__(
        self,
        intrinsic: Floats,
        rotation: Floats,
        translation: Floats,
        width: int,
        height: int,
        distortion: Floats | None = None,
    ) -> None:
        self.intrinsic, self.rotation, self.translation, self.distortion = intrinsic, rotation, translation, distortion
        self.centre = -rotation.T @ translation
        self.size = (2 * height, 2 * width)
        # Half pixels: sample j of the fine picture lies at pixel (j + 0.5) / 2 - 0.5.
        x = ((np.arange(self.size[1]) + 0.5) / 2 - 0.5 - intrinsic[0, 2]) / intrinsic[0, 0]
        y = ((np.arange(self.size[0]) + 0.5) / 2 - 0.5 - intrinsic[1, 2]) / intrinsic[1, 1]
        seen = np.stack(np.meshgrid(x, y), -1)
        straight = seen
        if self.distortion is not None:
            for _ in range(30):  # fixed point; contracts for the mild lenses that the model describes
                straight = straight + seen - _distort(straight, self.distortion)
        rays = np.concatenate([straight, np.ones((*self.size, 1))], -1) @ rotation
        self.rays = np.ascontiguousarray(np.moveaxis(unit(rays), -1, 0))

    def backdrop(self, seed: int) -> NDArray[np.float32]:
        """A pale round table on a grey ground [h, w, 3], the pattern fixed on the floor, so that the views agree."""
        rng = np.random.default_rng((seed, 5))
        waves, phases = rng.normal(size=(5, 2)) * 45, rng.uniform(0, 2 * np.pi, 5)
        depth = -self.centre[2] / np.minimum(self.rays[2], -1e-3)
        x, y = self.centre[0] + depth * self.rays[0], self.centre[1] + depth * self.rays[1]
        stain = sum(np.sin(k[0] * x + k[1] * y + p) for k, p in zip(waves, phases, strict=True)) / 5
        radius = np.hypot(x, y)
        table = 214 - 260 * radius + 7 * stain
        ground = 128 - 40 * np.tanh(radius - 0.16)
        grey = np.where(radius < 0.16, table, ground)
        grey = np.where(np.abs(radius - 0.16) < 0.0025, 92, grey)
        fine = grey[..., None] * np.array([1.0, 0.985, 0.955])
        return np.asarray(_halve(fine), np.float32)

    def _boxes(self, solids: Solids) -> NDArray[np.int64]:
        """Boxes [P, 4] (first row, end row, first column, end column) on the fine picture that hold every solid."""
        corners = np.stack(np.meshgrid(*([(-1.0, 1.0)] * 3), indexing="ij"), -1).reshape(8, 3)
        ends = np.stack([solids.a, solids.b], 1) @ self.rotation.T + self.translation
        cubes = ends[:, :, None] + np.stack([solids.ra, solids.rb], 1)[:, :, None, None] * corners
        xy = cubes[..., :2] / cubes[..., 2:]
        if self.distortion is not None:
            xy = _distort(xy, self.distortion)
        pixels = xy * np.diag(self.intrinsic)[:2] + self.intrinsic[:2, 2]
        fine = (2 * pixels + 0.5).reshape(len(solids.a), 16, 2)
        margin = 2 if self.distortion is None else 6
        low, high = np.floor(fine.min(1)) - margin, np.ceil(fine.max(1)) + margin + 1
        limit = np.array(self.size)
        low, high = np.clip(low[:, ::-1], 0, limit), np.clip(high[:, ::-1], 0, limit)
        return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1).astype(np.int64)

    def cast(self, solids: Solids, scene: Scene) -> tuple[slice, slice, Floats, Floats] | None:
        """Rows and columns of the animal's box, its colour times coverage [h, w, 3] (0..255), coverage [h, w].

        The coat is that of `scene`. None where the picture shows nothing of the animal.
        """
        boxes = self._boxes(solids)
        boxes = np.where((boxes[:, :1] < boxes[:, 1:2]) & (boxes[:, 2:3] < boxes[:, 3:]), boxes, -1)
        shown = np.flatnonzero(boxes[:, 0] >= 0)
        if not len(shown):
            return None
        top, left = (boxes[shown][:, [0, 2]].min(0) // 2) * 2
        bottom, right = ((boxes[shown][:, [1, 3]].max(0) + 1) // 2) * 2
        nearest = np.full((bottom - top, right - left), np.inf)
        which = np.full(nearest.shape, -1, np.int16)
        for i in shown:
            r0, r1, c0, c1 = boxes[i]
            depth = self._hit(solids, int(i), self.rays[:, r0:r1, c0:c1])
            window = (slice(r0 - top, r1 - top), slice(c0 - left, c1 - left))
            closer = depth < nearest[window]
            nearest[window][closer] = depth[closer]
            which[window][closer] = i
        rows, columns = np.nonzero(which >= 0)
        ids = which[rows, columns]
        hits = self.centre + nearest[rows, columns, None] * self.rays[:, rows + top, columns + left].T
        fine = np.zeros((*nearest.shape, 3))
        fine[rows, columns] = _shade(solids, ids, hits, scene)
        box = (slice(top // 2, bottom // 2), slice(left // 2, right // 2))
        return *box, _halve(fine), _halve((which >= 0).astype(float))

    def _hit(self, solids: Solids, i: int, rays: Floats) -> Floats:
        """Distance along unit rays [3, h, w] to solid i, inf where it is missed."""
        radii = solids.radii[i]
        with np.errstate(invalid="ignore"):
            if radii is not None:
                squash = solids.axes[i] / radii[:, None]
                origin = squash @ (self.centre - solids.a[i])
                d = [squash[k, 0] * rays[0] + squash[k, 1] * rays[1] + squash[k, 2] * rays[2] for k in range(3)]
                dd, od = d[0] * d[0] + d[1] * d[1] + d[2] * d[2], origin[0] * d[0] + origin[1] * d[1] + origin[2] * d[2]
                depth = (-od - np.sqrt(od * od - dd * (origin @ origin - 1))) / dd
                return np.where(np.isnan(depth), np.inf, depth)
            # The cone between the circles of tangency, then the two spheres (Quilez, "round cone - intersection").
            ra, rb, a, b = solids.ra[i], solids.rb[i], solids.a[i], solids.b[i]
            ba, oa = b - a, self.centre - a
            ob, rr = oa - ba, ra - rb
            m0, m1, m5, m7 = ba @ ba, ba @ oa, oa @ oa, ob @ ob
            m2 = ba[0] * rays[0] + ba[1] * rays[1] + ba[2] * rays[2]
            m3 = oa[0] * rays[0] + oa[1] * rays[1] + oa[2] * rays[2]
            d2 = m0 - rr * rr
            k2 = d2 - m2 * m2
            k1 = d2 * m3 - m2 * (m1 - rr * ra)
            k0 = d2 * m5 - m1 * m1 + 2 * m1 * rr * ra - m0 * ra * ra
            depth = (-np.sqrt(k1 * k1 - k0 * k2) - k1) / k2
            along = m1 - ra * rr + depth * m2
            m6 = m3 - m2
            first = -m3 - np.sqrt(m3 * m3 - (m5 - ra * ra))
            second = -m6 - np.sqrt(m6 * m6 - (m7 - rb * rb))
            caps = np.fmin(first, second)
            depth = np.where((along > 0) & (along < d2), depth, caps)
            return np.where(np.isnan(depth), np.inf, depth)


def _halve(fine: Floats) -> Floats:
    return (fine[0::2, 0::2] + fine[1::2, 0::2] + fine[0::2, 1::2] + fine[1::2, 1::2]) / 4


def _shade(solids: Solids, ids: NDArray[np.int16], hits: Floats, scene: Scene) -> Floats:
    """Colour [N, 3] (0..255) of surface points [N, 3] on solids ids [N]: no term depends on the camera."""
    axes, material = np.stack(solids.axes)[ids], np.array(solids.material)[ids]
    local = np.einsum("nij,nj->ni", axes, hits - np.stack(solids.a)[ids])
    radii = np.stack([np.zeros(3) if r is None else r for r in solids.radii])[ids]
    ra, rb = np.array(solids.ra)[ids], np.array(solids.rb)[ids]
    length = np.linalg.norm(np.stack(solids.b) - np.stack(solids.a), axis=1)[ids]
    slope = (ra - rb) / np.maximum(length, 1e-9)
    away = np.hypot(local[:, 1], local[:, 2])
    axial = np.clip(local[:, 0] - slope * away / np.sqrt(1 - np.minimum(slope**2, 0.999)), 0, length)
    ellipsoid = radii[:, 0] > 0
    round_slant = local - axial[:, None] * (1.0, 0.0, 0.0)
    slant = np.where(ellipsoid[:, None], local / np.where(radii > 0, radii, 1.0) ** 2, round_slant)
    normal = unit(np.einsum("nij,ni->nj", axes, slant))

    traits = scene._traits
    texture = np.array(solids.texture)[ids]
    rest = texture[:, :3] + local * np.stack([texture[:, 3], np.ones(len(ids)), np.ones(len(ids))], 1)
    s, y, z = rest.T
    patch = np.sin(rest @ traits["patch_k"].T + traits["patch_phase"]).sum(1)
    grain = np.sin(rest @ traits["grain_k"].T).sum(1)

    def blend(colour: Floats, other: Sequence[float], weight: Floats) -> Floats:
        return colour + (np.asarray(other) - colour) * weight[:, None]

    coat = np.asarray(scene.coat)
    fur = np.tile(coat, (len(ids), 1))
    fur = blend(fur, tuple(coat * (0.48, 0.42, 0.40)), _smoothstep(patch, 0.5, 1.1))
    fur = blend(fur, (0.72, 0.55, 0.36), 0.6 * _smoothstep(-patch, 1.0, 1.6))
    saddle = np.linalg.norm((rest - traits["saddle"]) / (0.0085, 0.0080, 0.0085), axis=1)
    fur = blend(fur, (0.90, 0.86, 0.80), 1 - _smoothstep(saddle, 0.75, 1.0))
    stripe = np.exp(-((np.arctan2(y, z) / 0.26) ** 2)) * _smoothstep(-s, -0.040, -0.030)
    fur = blend(fur, (0.12, 0.09, 0.08), 0.9 * stripe)
    fur = blend(fur, (0.88, 0.83, 0.76), _smoothstep(-z, 0.0015, 0.0065))
    fur = blend(fur, (0.84, 0.58, 0.54), 0.7 * _smoothstep(s, 0.0475, 0.0520))
    fur = fur * (1 + 0.030 * grain)[:, None]
    limb = np.tile(coat * 0.9, (len(ids), 1))
    pink = np.tile((0.86, 0.60, 0.56), (len(ids), 1)) * (1 + 0.10 * np.sin(2 * np.pi * s / 0.005))[:, None]
    eye = np.where((normal @ _LIGHT > 0.90)[:, None], 0.85, 0.06) * np.ones((len(ids), 3))
    rim = np.hypot(local[:, 1] / 0.0060, local[:, 2] / 0.0068)
    ear = blend(np.tile((0.90, 0.62, 0.58), (len(ids), 1)), tuple(coat * 0.8), _smoothstep(rim, 0.72, 0.92))
    ear = blend(ear, tuple(coat * 0.85 + 0.06), (local[:, 0] < -1e-4).astype(float))
    albedo = np.choose(material[:, None], [fur, limb, pink, eye, ear])

    sky = 0.5 + 0.5 * normal[:, 2]
    light = 0.42 + 0.33 * sky + 0.36 * np.maximum(normal @ _LIGHT, 0.0)
    light = light * (0.72 + 0.28 * _smoothstep(hits[:, 2], 0.0, 0.016))
    return np.asarray(255 * np.clip(albedo * light[:, None], 0, 1), float)


def render_views(scene: Scene, frame: int, cameras: Sequence[int] | None = None) -> tuple[NDArray[np.uint8], Bools]:
    """The exact pictures of a frame: rgb [C, H, W, 3] uint8 and mask [C, H, W] bool (coverage of the pixel >= 0.5).

    cameras: which of the scene's cameras, all by default. The same arrays that `make_recording` encodes.
    """
    chosen = range(scene.n_cameras) if cameras is None else cameras
    solids = scene._pose(frame)[0]
    drawn = [scene._render(solids, frame, camera) for camera in chosen]
    return np.stack([rgb for rgb, _ in drawn]), np.stack([mask for _, mask in drawn])


def make_recording(
    folder: Path,
    *,
    n_frames: int = 120,
    n_cameras: int = 6,
    width: int = 288,
    height: int = 256,
    fps: float = 50.0,
    seed: int = 0,
    distortion: tuple[float, ...] | None = None,
) -> Truth:
    """Write a recording into `folder` (made if absent, files replaced) and return its truth.

    videos/{c}.mp4: H.264, yuv420p, BT.709 limited range, tagged. masks/{c}.mp4: the silhouettes, grey 0 or 255.
    camera_params.h5: camera_parameters/{rotation [C, 3, 3], translation [C, 3], intrinsic [C, 3, 3]}, metres, and
    with `distortion` also distortion [C, 5] (k1, k2, p1, p2, k3).
    vertical_lines.npz: `up` [3], MINUS the true up, as the classic tool writes it.
    truth.npz: the fields of Truth, and keypoint_names [K].
    Raises UserError as Scene does.
    """
    import h5py

    scene = Scene(n_frames, n_cameras, width, height, fps, seed, distortion=distortion)
    folder = Path(folder)
    for name in ("videos", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    intrinsic, rotation, translation = scene.cameras
    with h5py.File(folder / "camera_params.h5", "w") as file:
        group = file.create_group("camera_parameters")
        for key, value in (("rotation", rotation), ("translation", translation), ("intrinsic", intrinsic)):
            group.create_dataset(key, data=value)
        if scene._coefficients is not None:
            group.create_dataset("distortion", data=np.tile(scene._coefficients, (n_cameras, 1)))
    np.savez(folder / "vertical_lines.npz", up=-scene.up)
    truth = scene.truth
    np.savez(folder / "truth.npz", **vars(truth), keypoint_names=np.array(KEYPOINT_NAMES))

    poses = [scene._pose(frame)[0] for frame in range(n_frames)]
    _ = scene._noise, scene._views  # made before the threads ask for them

    def film(camera: int) -> None:
        pictures = _Writer(folder / "videos" / f"{camera}.mp4", (width, height), fps, crf=16)
        silhouettes = _Writer(folder / "masks" / f"{camera}.mp4", (width, height), fps, crf=12)
        for frame, solids in enumerate(poses):
            rgb, mask = scene._render(solids, frame, camera)
            pictures.add(rgb)
            silhouettes.add(np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[..., None], 3, 2))
        pictures.close()
        silhouettes.close()
        del scene._views[camera]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(film, range(n_cameras)))
    return truth


class _Writer:
    """An H.264 file. One encoder thread: the bytes do not depend on the machine's cores."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float, *, crf: int) -> None:
        import av
        from av.video.reformatter import ColorRange, Colorspace

        def converted(rgb: NDArray[np.uint8]) -> VideoFrame:
            # Tagged and converted as BT.709 limited range; untagged RGB would be converted as BT.601.
            return av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )

        self._converted = converted
        self._file = av.open(str(path), "w")
        self._stream = self._file.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(crf), "preset": "veryfast", "g": "50", "threads": "1"}
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = 1

    def add(self, rgb: NDArray[np.uint8]) -> None:
        for packet in self._stream.encode(self._converted(rgb)):
            self._file.mux(packet)

    def close(self) -> None:
        for packet in self._stream.encode():
            self._file.mux(packet)
        self._file.close()
