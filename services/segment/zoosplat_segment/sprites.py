"""Random animals, cut out: pictures with exact coverage in many views, from which training scenes are composed."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoosplat.geometry.rotations import axis_angle
from zoosplat.machine import usable_cores
from zoosplat.synthetic.random_animals import HEIGHT, VIEWS, WIDTH, random_animal, random_rig
from zoosplat.synthetic.rendering import View
from zoosplat.synthetic.solids import Floats, Solids
from zoosplat.synthetic.traits import Traits

VIEWS_USED = 6  # views that are rendered of the rig's, for every animal another choice
SCALE = 1.5  # enlargement of the pictures of `random_animals`
SPRITE_WIDTH, SPRITE_HEIGHT = int(WIDTH * SCALE), int(HEIGHT * SCALE)
POINTS = 4096  # points of the body that cast a shadow
THINNEST = 0.004  # metres; thinner parts get as many points as if they were so thick


@dataclass(frozen=True)
class Sprites:
    """N animals in V views each.

    Attributes:
        rgba: [N, V, h, w, 4] uint8, colour times coverage, and coverage.
        intrinsics: [N, V, 3, 3] pixels; integer = pixel centre.
        world_to_camera: [N, V, 4, 4] metres; the floor is z = 0.
        points: [N, P, 3] metres, points in the body.
    """

    rgba: NDArray[np.uint8]
    intrinsics: Floats
    world_to_camera: Floats
    points: Floats


def _points_inside(solids: Solids, rng: np.random.Generator) -> Floats:
    """[P, 3] points in the solids, each solid by about the area of its shadow."""
    a, b = np.asarray(solids.a), np.asarray(solids.b)
    ra, rb = np.asarray(solids.ra), np.asarray(solids.rb)
    size = np.maximum(np.linalg.norm(b - a, axis=1), ra) * np.maximum(np.maximum(ra, rb), THINNEST)
    chosen = rng.choice(len(a), POINTS, p=size / size.sum())
    along = rng.random((POINTS, 1))
    radius = ra[chosen, None] * (1 - along) + rb[chosen, None] * along
    direction = rng.normal(size=(POINTS, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return np.asarray(a[chosen] * (1 - along) + b[chosen] * along + direction * radius * rng.random((POINTS, 1)) ** 0.5)


def render_sprites(seed: int, n: int) -> Sprites:
    """n animals, each in a pose, coat and rig of its own."""
    rng = np.random.default_rng((78, seed))
    rgba = np.zeros((n, VIEWS_USED, SPRITE_HEIGHT, SPRITE_WIDTH, 4), np.uint8)
    intrinsics, poses = np.zeros((n, VIEWS_USED, 3, 3)), np.zeros((n, VIEWS_USED, 4, 4))
    points = np.zeros((n, POINTS, 3))
    for i in range(n):
        k, p = random_rig(rng)
        chosen = rng.permutation(VIEWS)[:VIEWS_USED]
        k, poses[i] = k[chosen], p[chosen]
        k[:, :2, 2] = SCALE * (k[:, :2, 2] + 0.5) - 0.5
        k[:, 0, 0] *= SCALE
        k[:, 1, 1] *= SCALE
        intrinsics[i] = k
        light = rng.uniform(0.35, 1) * rng.uniform(0.8, 1, 3)
        traits = Traits.draw(int(rng.integers(1 << 30)), (float(light[0]), float(light[1]), float(light[2])))
        solids = random_animal(rng)
        turn, shift = axis_angle((0, 0, 1), rng.uniform(0, 2 * np.pi)), np.append(rng.uniform(-0.02, 0.02, 2), 0)
        solids.a, solids.b = ([turn @ q + shift for q in ends] for ends in (solids.a, solids.b))
        solids.axes = [axes @ turn.T for axes in solids.axes]
        points[i] = _points_inside(solids, rng)
        for c in range(VIEWS_USED):
            pose = poses[i, c]
            view = View(k[c], pose[:3, :3], pose[:3, 3], SPRITE_WIDTH, SPRITE_HEIGHT)
            drawn = view.cast(solids, traits)
            if drawn is not None:
                rows, columns, colour, coverage = drawn
                rgba[i, c, rows, columns, :3] = np.clip(colour, 0, 255)
                rgba[i, c, rows, columns, 3] = np.round(255 * np.clip(coverage, 0, 1))
    return Sprites(rgba, intrinsics, poses, points)


def render_many(animals: int, first: int = 0) -> Sprites:
    """At least so many animals, rendered on all CPU cores; `first` selects others of the endless number."""
    each = 8
    jobs = [(first + job, each) for job in range(-(-animals // each))]
    with multiprocessing.get_context("spawn").Pool(usable_cores()) as pool:
        parts = pool.starmap(render_sprites, jobs, chunksize=1)
    return Sprites(*(np.concatenate(values) for values in zip(*(vars(p).values() for p in parts), strict=True)))
