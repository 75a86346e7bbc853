"""Random animals: computed bodies, poses and coats, seen from all around, with exact silhouettes.

A network that has learned from thousands of them what four-footed animals look like has less to learn from a recording
(`zoosplat_train.pretrain`). The ranges below, from which random values are drawn, are wide enough to hold real animals.
None is measured on a recording. Lengths are in metres, and the floor is z = 0; a body is about as long as a mouse's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoosplat.geometry.rotations import axis_angle, level_camera, unit
from zoosplat.synthetic.rendering import View
from zoosplat.synthetic.solids import COAT, EAR, EYE, LIMB, PINK, Floats, Solids, centroid
from zoosplat.synthetic.traits import Traits

VIEWS, WIDTH, HEIGHT = 10, 288, 256
PIXELS_PER_M = 1024.0  # scale of the pictures at the target, pixels per metre
TARGET_HEIGHT = 0.03  # metres; height above the floor of the point that all cameras look at
UP = np.array([0.0, 0.0, 1.0])
STATIONS = 18  # number of stations along the spine
FIRST_S, LENGTH_S = -0.036, 0.0865  # the coat's pattern along the spine, as in `synthetic`
TAIL = 14


class Film(NamedTuple):
    """N animals in V views of one rig.

    Attributes:
        rgb: [N, V, h, w, 3] uint8, white outside the animal.
        mask: [N, V, h, w] uint8, 0 or 1.
        intrinsics: [V, 3, 3] pixels; integer = pixel centre.
        world_to_camera: [V, 4, 4] metres.
        centers: [N, 3] metres, centroid of the animal's volume.
        headings: [N] radians about +z.
        reach: [N, 3] metres, from the centre to the farthest joint, nose or tip along the animal's own axes.
    """

    rgb: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    intrinsics: Floats
    world_to_camera: Floats
    centers: Floats
    headings: Floats
    reach: Floats


def random_rig(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Cameras all around, at heights from below the floor to 70 degrees: intrinsics [V, 3, 3], poses [V, 4, 4]."""
    intrinsics, poses = np.tile(np.eye(3), (VIEWS, 1, 1)), np.tile(np.eye(4), (VIEWS, 1, 1))
    first = rng.uniform(0, 2 * np.pi)
    for i in range(VIEWS):
        azimuth = first + 2 * np.pi * (i + rng.uniform(-0.25, 0.25)) / VIEWS
        elevation, distance = np.deg2rad(rng.uniform(-10, 70)), rng.uniform(0.35, 0.55)
        flat = np.cos(elevation)
        offset = distance * np.array([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(elevation)])
        poses[i, :3, :3] = level_camera(-offset)
        poses[i, :3, 3] = -poses[i, :3, :3] @ (offset + TARGET_HEIGHT * UP)
        intrinsics[i, 0, 0] = intrinsics[i, 1, 1] = PIXELS_PER_M * distance
        intrinsics[i, :2, 2] = (WIDTH - 1) / 2, (HEIGHT - 1) / 2
    return intrinsics, poses


def _wave(rng: np.random.Generator, n: int, knots: int, amplitude: float) -> Floats:
    """[n] random values, linear between knots."""
    return np.interp(np.linspace(0, 1, n), np.linspace(0, 1, knots), rng.normal(0, amplitude, knots))


def _directions(yaw: Floats, pitch: Floats) -> Floats:
    return np.stack([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)], -1)


class _Body:
    """The spine, from the tail's base to the nose, with a radius at every station."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.length = rng.uniform(0.055, 0.095)
        self.girth = self.length * rng.uniform(0.14, 0.28)
        along = np.linspace(0, 1, STATIONS)
        rearing = rng.random() >= 0.55
        pitch = _wave(rng, STATIONS, 4, 0.18)
        if rearing:
            pitch += rng.uniform(0.3, 1.35) * np.clip((along - 0.1) / rng.uniform(0.1, 0.4), 0, 1)
        else:
            pitch += rng.uniform(0, 0.5) * np.cos(np.pi * along)  # an arched back
        nod = rng.uniform(0, 1.0) if rearing else rng.uniform(-0.3, 0.6)
        pitch -= nod * np.clip((along - 0.72) / 0.2, 0, 1)
        yaw = 1.2 * _wave(rng, STATIONS, 3, 0.35) + rng.normal(0, 0.35) * np.clip((along - 0.75) / 0.15, 0, 1)
        self.yaw = yaw - yaw[6]
        steps = _directions(self.yaw, pitch) * self.length / (STATIONS - 1)
        self.points = np.concatenate([np.zeros((1, 3)), np.cumsum(steps[:-1], 0)])

        ranges = [(0.25, 0.5), (0.75, 1), (0.9, 1.15), (0.75, 1.1), (0.6, 0.95), (0.5, 0.75), (0.5, 0.8), (0.2, 0.45),
                  (0.1, 0.25)]  # fmt: skip
        places = [0, 0.12, 0.3, 0.5, 0.66, 0.75, 0.86, 0.96, 1]
        self.radii = self.girth * np.interp(along, places, [rng.uniform(*r) for r in ranges])
        self.radii[1:-1] = (self.radii[:-2] + 2 * self.radii[1:-1] + self.radii[2:]) / 4
        self.points[:, 2] -= (self.points[:, 2] - self.radii).min()
        self.points[:, 2] += rng.uniform(0, 0.004) if rng.random() < 0.5 else rng.uniform(0.004, 0.015)

        tangents = unit(np.gradient(self.points, axis=0))
        left = np.cross(UP, tangents)
        left /= np.maximum(np.linalg.norm(left, axis=1, keepdims=True), 1e-6)
        self.axes = np.stack([tangents, left, np.cross(tangents, left)], 1)  # along, left, dorsal
        self.pattern_s = FIRST_S + LENGTH_S * along

    def at(self, along: float, left: float, dorsal: float) -> tuple[Floats, Floats, float]:
        """A point [3], its axes [3, 3] and the radius there; `along` 0 to 1, the others in radii."""
        i = int(min(along * (STATIONS - 1), STATIONS - 2))
        w = along * (STATIONS - 1) - i
        radius = float(self.radii[i] * (1 - w) + self.radii[i + 1] * w)
        base = self.points[i] * (1 - w) + self.points[i + 1] * w
        return base + radius * (left * self.axes[i, 1] + dorsal * self.axes[i, 2]), self.axes[i], radius

    def trunk(self, solids: Solids) -> None:
        for i in range(STATIONS - 1):
            texture = (float(self.pattern_s[i]), 0.0, 0.0, LENGTH_S / self.length)
            solids.cone(self.points[i], self.points[i + 1], self.radii[i], self.radii[i + 1], self.axes[i, 2], COAT,
                        texture)  # fmt: skip
        for _ in range(self.rng.integers(0, 4)):  # these make some trunks less round
            centre, axes, _ = self.at(self.rng.uniform(0.1, 0.62), 0, self.rng.uniform(-0.3, 0.2))
            sizes = [self.girth * self.rng.uniform(*r) for r in ((0.8, 1.7), (0.75, 1.15), (0.75, 1.15))]
            solids.ellipsoid(centre, axes, sizes, COAT, (float(self.pattern_s[7]), 0, 0, 1))

    def head(self, solids: Solids) -> None:
        nose, axes, radius = self.at(0.99, 0, 0)
        solids.ellipsoid(nose, axes, (0.6 * radius, 0.7 * radius, 0.6 * radius), PINK)
        size = self.rng.uniform(0.35, 0.7) * self.girth * self.rng.choice([0.6, 1])
        ears_at = self.rng.uniform(0.76, 0.84)
        for side in (1.0, -1.0):
            eye, axes, radius = self.at(ears_at + 0.08, 0.62 * side, 0.45)
            solids.ellipsoid(eye, axes, [0.2 * radius] * 3, EYE)
            root, axes, _ = self.at(ears_at - 0.03, 0.8 * side, 0.8)
            face = unit(axes[0] + self.rng.uniform(0.3, 0.9) * side * axes[1])
            rise = axes[2] + 0.6 * side * axes[1]
            rise = unit(rise - face * (rise @ face))
            pinna = (0.2 * size, size * self.rng.uniform(0.7, 1), size)
            solids.ellipsoid(root + 0.4 * size * rise, np.stack([face, np.cross(rise, face), rise]), pinna, EAR)

    def limbs(self, solids: Solids) -> None:
        rng, girth = self.rng, self.girth
        hips, shoulders = rng.uniform(0.16, 0.28), rng.uniform(0.58, 0.7)
        foot_length, thin = rng.uniform(0.6, 1.3) * girth, rng.uniform(0.1, 0.2) * girth

        def on_floor(point: Floats) -> Floats:
            point[2] = thin + (rng.uniform(0, 0.01) if rng.random() < 0.3 else 0)
            return point

        level = np.array([1.0, 1.0, 0.0])
        for side in (1.0, -1.0):
            hip, axes, _ = self.at(hips, side * rng.uniform(0.5, 0.8), -rng.uniform(0.1, 0.5))
            haunch = [girth * rng.uniform(*r) for r in ((0.5, 0.8), (0.3, 0.5), (0.5, 0.85))]
            solids.ellipsoid(hip, axes, haunch, COAT, (float(self.pattern_s[4]), 0.008 * side, -0.004, 1))
            ahead, aside = self.axes[3, 0] * level, self.axes[3, 1]
            foot = on_floor(hip + girth * (rng.uniform(-1, 1.2) * ahead + side * rng.uniform(0, 0.6) * aside))
            if hip[2] - foot[2] > 2.2 * girth:  # out of reach
                foot[2] = hip[2] - rng.uniform(0.8, 2) * girth
            solids.cone(hip, foot, rng.uniform(0.3, 0.5) * girth, thin, UP, LIMB)
            toes_to = self.yaw[4] + side * rng.uniform(-0.1, 0.6)
            toe = foot + foot_length * _directions(toes_to, np.zeros(()))
            toe[2] = max(foot[2] - rng.uniform(0, 0.3) * foot_length, thin)
            solids.cone(foot, toe, thin, 0.8 * thin, UP, PINK)
            for turn in (-0.4, 0.0, 0.4):
                tip = toe + 0.35 * foot_length * _directions(toes_to + turn, np.zeros(()))
                solids.cone(toe, tip, 0.5 * thin, 0.35 * thin, UP, PINK)

            shoulder, axes, _ = self.at(shoulders, side * rng.uniform(0.4, 0.8), -rng.uniform(0.3, 0.7))
            reach = rng.uniform(0.8, 2.2) * girth
            if shoulder[2] < 1.2 * reach:
                step = rng.uniform(-0.6, 1.2) * axes[0] * level + side * rng.uniform(-0.2, 0.5) * axes[1]
                paw = on_floor(shoulder + girth * step)
            else:
                down = -rng.uniform(0.3, 1) * axes[2] + rng.uniform(-0.2, 1) * axes[0]
                paw = shoulder + reach * unit(down + side * rng.uniform(-0.5, 0.7) * axes[1] + rng.normal(0, 0.2, 3))
            elbow = (shoulder + paw) / 2 + girth * rng.normal(0, 0.25, 3)
            elbow[2] = max(elbow[2], thin)
            solids.cone(shoulder, elbow, rng.uniform(0.25, 0.4) * girth, 1.4 * thin, UP, LIMB)
            solids.cone(elbow, paw, 1.4 * thin, thin, UP, LIMB)
            for turn in (-0.6, 0.0, 0.6):
                tip = paw + 0.35 * girth * unit(axes[0] + turn * axes[1] - 0.4 * axes[2])
                tip[2] = max(tip[2], 0.4 * thin)
                solids.cone(paw, tip, 0.7 * thin, 0.35 * thin, UP, PINK)

    def tail(self, solids: Solids) -> None:
        rng = self.rng
        length = rng.uniform(0.3, 1.1) * self.length
        yaw = np.pi + self.yaw[0] + np.cumsum(_wave(rng, TAIL, 4, 0.16))
        pitch = np.append(rng.uniform(-0.6, 0.3), _wave(rng, TAIL - 1, 4, 0.25))
        radii = np.linspace(rng.uniform(0.15, 0.32), rng.uniform(0.03, 0.1), TAIL) * self.girth
        here = self.points[0]
        if here[2] > 0.03:
            pitch -= np.linspace(0.6, 0, TAIL)
        for i in range(TAIL - 1):
            there = here + length / (TAIL - 1) * _directions(yaw[i], pitch[i])
            there[2] = max(there[2], radii[i + 1])
            texture = (-0.04 - 0.05 * i / TAIL, 0.0, 0.0, -1.0)
            solids.cone(here, there, radii[i], radii[i + 1], UP, PINK, texture)
            here = there


def random_animal(rng: np.random.Generator) -> Solids:
    """An animal that heads along +x, near the origin."""
    solids, body = Solids(), _Body(rng)
    body.trunk(solids)
    body.head(solids)
    body.limbs(solids)
    body.tail(solids)
    return solids


def film(seed: int, n: int) -> Film:
    """n animals, each in a pose, place and coat of its own, in the views of one rig."""
    rng = np.random.default_rng((77, seed))
    intrinsics, poses = random_rig(rng)
    views = [View(k, p[:3, :3], p[:3, 3], WIDTH, HEIGHT) for k, p in zip(intrinsics, poses, strict=True)]
    rgb = np.full((n, VIEWS, HEIGHT, WIDTH, 3), 255, np.uint8)
    mask = np.zeros((n, VIEWS, HEIGHT, WIDTH), np.uint8)
    centers, headings, reach = np.zeros((n, 3)), np.zeros(n), np.zeros((n, 3))
    for i in range(n):
        light = rng.uniform(0.1, 1) * rng.uniform(0.7, 1, 3)
        traits = Traits.draw(int(rng.integers(1 << 30)), (float(light[0]), float(light[1]), float(light[2])))
        solids = random_animal(rng)
        ends = np.concatenate([solids.a, solids.b])
        reach[i] = np.abs(ends - centroid(solids, 3e-3)).max(0) + 3e-3
        headings[i] = rng.uniform(0, 2 * np.pi)
        turn, shift = axis_angle((0, 0, 1), headings[i]), np.append(rng.uniform(-0.02, 0.02, 2), 0)
        solids.a, solids.b = ([turn @ p + shift for p in points] for points in (solids.a, solids.b))
        solids.axes = [axes @ turn.T for axes in solids.axes]
        centers[i] = centroid(solids, 3e-3)
        exposure = rng.uniform(0.15, 0.6) if rng.random() < 0.5 else 1.0  # half of the animals are dark
        for c, view in enumerate(views):
            drawn = view.cast(solids, traits)
            if drawn is None:
                continue
            rows, columns, colour, coverage = drawn
            inside = coverage >= 0.5
            picture = exposure * (colour + 128 * (1 - coverage[..., None]))  # a grey ground shows at the outline
            rgb[i, c, rows, columns] = np.where(inside[..., None], np.clip(picture, 0, 255), 255)
            mask[i, c, rows, columns] = inside
    return Film(rgb, mask, intrinsics, poses, centers, headings, reach)
