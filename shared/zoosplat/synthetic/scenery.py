"""What stands and moves around a synthetic animal: cable, arm, droppings, glass walls and shadows on the floor.

Lengths are in metres, in the frame of the arena, whose floor is z = 0.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoosplat.geometry.rotations import unit
from zoosplat.synthetic.rendering import LIGHT, View, halve
from zoosplat.synthetic.solids import CABLE, DROPPING, GLOVE, SLEEVE, Bools, Floats, Plane, Solids
from zoosplat.synthetic.traits import smoothstep

UP = np.array([0.0, 0.0, 1.0])
CABLE_TOP = np.array([0.015, -0.010, 0.40])  # where the cable is fastened
CABLE_RADIUS, CABLE_PIECES = 0.0013, 24
NECK_RADIUS = 0.0105  # height of the neck's skin above the keypoint in it
WALL_M, WALL_WIDTH, WALL_HEIGHT = 0.17, 0.46, 0.25  # distance from the middle, and size, of a glass wall
WALL_EDGE = 0.0015  # width of the dark edge of a glass wall
GLASS_DIMS, GLASS_HAZE = 0.93, 5.0  # What a wall lets through of the light behind it, and grey levels that it adds.
CELL_M = 1e-3  # of the map of light on the floor
LAMP_RADIUS = 0.07  # tangent of the angle from the middle of the lamp to its edge, as the floor sees it
CAST_SHADOW = 0.30  # share of the floor's light that comes from the lamp
CONTACT_SHADOW = 0.60  # share of the floor's light that comes from all around


def cable(neck: Floats, time_s: float) -> Solids:
    """A cable that hangs from above to a place over the neck [3], which it touches now and then, and sways."""
    gap = 0.009 * max(0.0, np.sin(2 * np.pi * 0.31 * time_s) + 0.6)
    end = neck + (NECK_RADIUS + gap) * UP
    end[:2] += 0.006 * np.sin(2 * np.pi * np.array([0.43, 0.37]) * time_s) * gap / 0.0144
    sway = 0.035 * np.array([np.sin(2 * np.pi * 0.23 * time_s), np.cos(2 * np.pi * 0.29 * time_s + 0.7), 0.0])
    bend = 0.5 * (CABLE_TOP + end) + sway + (0.0, 0.0, -0.03)
    above = end + 0.035 * UP + 0.3 * sway  # The cable arrives at the head from above.
    share = np.linspace(0.0, 1.0, CABLE_PIECES + 1)[:, None]
    rest = 1 - share
    points = rest**3 * CABLE_TOP + 3 * rest**2 * share * bend + 3 * rest * share**2 * above + share**3 * end
    solids = Solids()
    for a, b in pairwise(points):
        solids.cone(a, b, CABLE_RADIUS, CABLE_RADIUS, np.array([1.0, 0.3, 0.0]), CABLE)
    plug = points[-1]
    solids.cone(plug, plug + 0.006 * UP, 0.0026, 0.0022, np.array([1.0, 0.0, 0.0]), CABLE)
    return solids


def arm(target: Floats, azimuth: float, reach: float) -> Solids:
    """A person's forearm in a sleeve, with a gloved hand.

    Args:
        target: [3] the place beside and above which the hand is when the arm has reached in.
        azimuth: radians, from which the arm comes.
        reach: 0 where the arm is out of the pictures, to 1.
    """
    outwards = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    aside = np.cross(UP, outwards)
    back = unit(outwards + 1.1 * UP)  # from the hand to the elbow
    hand = target * (1, 1, 0) + 0.085 * outwards + 0.085 * UP + 0.45 * (1 - reach) * back
    wrist, knuckles = hand + 0.045 * back, hand - 0.035 * unit(back - 0.5 * UP)
    solids = Solids()
    solids.cone(wrist + 0.05 * back, wrist + 0.45 * back, 0.032, 0.042, aside, SLEEVE)
    solids.cone(wrist + 0.055 * back, wrist, 0.026, 0.021, aside, GLOVE)
    solids.cone(wrist, hand, 0.021, 0.018, aside, GLOVE)
    for spread in (-1.5, -0.5, 0.5, 1.5):
        root = knuckles + 0.015 * spread * aside
        solids.cone(hand + 0.006 * spread * aside, root, 0.017, 0.010, UP, GLOVE)
        middle = root - 0.028 * unit(outwards + 0.45 * UP)
        solids.cone(root, middle, 0.0095, 0.0085, aside, GLOVE)
        solids.cone(middle, middle - 0.022 * unit(0.45 * outwards + UP), 0.0085, 0.0070, aside, GLOVE)
    thumb = hand + 0.030 * aside - 0.012 * UP
    solids.cone(hand + 0.01 * back, thumb, 0.016, 0.011, UP, GLOVE)
    solids.cone(thumb, thumb - 0.030 * unit(outwards - 0.3 * aside + 0.6 * UP), 0.010, 0.0080, UP, GLOVE)
    return solids


def reach_at(share: float, spells: tuple[tuple[float, float], ...]) -> float:
    """How far, 0 to 1, the arm has reached in when this share of the recording is over; 0 outside the spells."""
    reach = 0.0
    for first, last in spells:
        ramp = 0.3 * (last - first)
        reach += float(smoothstep(share, first, first + ramp) - smoothstep(share, last - ramp, last))
    return reach


def dropping(place: Floats, turn: float) -> Solids:
    """A dropping on the floor at [2], turned by radians."""
    along = np.array([np.cos(turn), np.sin(turn), 0.0])
    solids, centre = Solids(), np.append(place, 0.0011)
    solids.ellipsoid(centre, np.stack([along, np.cross(UP, along), UP]), (0.0032, 0.0013, 0.0012), DROPPING)
    return solids


def glass_wall(azimuth: float) -> Plane:
    """The plane of the glass wall that stands in this direction, radians."""
    return Plane(np.array([np.cos(azimuth), np.sin(azimuth), 0.0]), WALL_M)


class Glass(NamedTuple):
    """A glass wall in a picture.

    Attributes:
        plane: of the wall.
        inside: whether the camera stands on the animal's side of it, and so sees mirror images in it.
        pane: [h, w] share of each pixel that the pane covers.
        edge: [h, w] share of each pixel that its dark edge covers.
    """

    plane: Plane
    inside: bool
    pane: NDArray[np.float32]
    edge: NDArray[np.float32]


def glass_in(view: View, azimuth: float) -> Glass:
    """The glass wall that stands in the direction `azimuth`, as a camera sees it."""
    plane = glass_wall(azimuth)
    towards = np.einsum("i,ihw->hw", plane.normal, view.rays)
    ahead = plane.offset - float(view.centre @ plane.normal)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(ahead * towards > 0, ahead / towards, np.inf)
        along = np.cross(UP, plane.normal)
        side = np.abs(view.centre @ along + depth * np.einsum("i,ihw->hw", along, view.rays))
        height = view.centre[2] + depth * view.rays[2]
    inset = np.minimum(np.minimum(WALL_WIDTH / 2 - side, height), WALL_HEIGHT - height)
    inset = np.where(np.isfinite(inset), inset, -1.0)
    pane, edge = halve((inset > 0).astype(float)), halve(((inset > 0) & (inset < WALL_EDGE)).astype(float))
    return Glass(plane, ahead > 0, np.asarray(pane, np.float32), np.asarray(edge, np.float32))


class FloorLight(NamedTuple):
    """Light on a rectangle of the floor, outside of which it is 1.

    Attributes:
        x: of the first column's cells, metres.
        y: of the first row's cells, metres.
        factor: [rows, columns] on the colour of the floor, in cells of `CELL_M`.
    """

    x: float
    y: float
    factor: NDArray[np.float32]

    def covers(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> Bools:
        """Whether places [...] of the floor lie on the rectangle."""
        rows, columns = self.factor.shape
        across = (x >= self.x) & (x <= self.x + CELL_M * (columns - 1))
        return np.asarray(across & (y >= self.y) & (y <= self.y + CELL_M * (rows - 1)))

    def at(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
        """The factor, linear between cells, at places [...] of the floor."""
        rows, columns = self.factor.shape
        u, v = np.clip((x - self.x) / CELL_M, 0, columns - 1.001), np.clip((y - self.y) / CELL_M, 0, rows - 1.001)
        j, i = u.astype(np.int32), v.astype(np.int32)
        u, v, flat, first = u - j, v - i, self.factor.ravel(), i * columns + j
        upper = flat[first] * (1 - u) + flat[first + 1] * u
        lower = flat[first + columns] * (1 - u) + flat[first + columns + 1] * u
        return np.asarray(upper * (1 - v) + lower * v, np.float32)


def _spheres(solids: Solids) -> Floats:
    """Spheres [N, 4] (centre, radius) that fill the solids, closer to each other where shadows are sharper."""
    found = []
    for a, b, ra, rb, radii in zip(solids.a, solids.b, solids.ra, solids.rb, solids.radii, strict=True):
        if radii is not None:
            found.append(np.append(a, np.prod(radii) ** (1 / 3))[None])
            continue
        spacing = max(0.6 * min(ra, rb), 0.4 * LAMP_RADIUS * min(a[2], b[2]))
        share = np.linspace(0, 1, int(np.ceil(float(np.linalg.norm(b - a)) / spacing)) + 1)[:, None]
        found.append(np.concatenate([a + share * (b - a), ra + share * (rb - ra)], 1))
    return np.concatenate(found)


def floor_light(solids: Solids) -> FloorLight:
    """The soft shadow that the lamp casts of the solids on the floor, and the darkness close to where they touch it.

    The shadow of a sphere is as wide as the sphere, with a penumbra in proportion to its height. What a sphere hides
    of the sky is height / distance * (radius / distance)^2 (Inigo Quilez, "sphere ambient occlusion"). Of several
    spheres the darkest counts.
    """
    spheres = _spheres(solids)
    radius, height = spheres[:, 3], np.maximum(spheres[:, 2], spheres[:, 3])
    blur = LAMP_RADIUS * height / LIGHT[2] + CELL_M
    cast = spheres[:, :2] - LIGHT[:2] / LIGHT[2] * height[:, None]
    cast_reach = (radius + blur) / LIGHT[2]
    near_reach = 4 * radius
    touches = height < 4 * radius  # A sphere farther up hides less than a sixteenth of the sky.
    low = np.minimum(cast - cast_reach[:, None], spheres[:, :2] - near_reach[:, None]).min(0) - 2 * CELL_M
    high = np.maximum(cast + cast_reach[:, None], spheres[:, :2] + near_reach[:, None]).max(0) + 2 * CELL_M
    low, high = np.maximum(low, -0.4), np.minimum(high, 0.4)  # Nothing farther out is in the pictures.
    columns, rows = np.maximum(np.ceil((high - low) / CELL_M).astype(int), 2)
    x, y = low[0] + CELL_M * np.arange(columns), low[1] + CELL_M * np.arange(rows)
    shade, occlusion = np.zeros((rows, columns), np.float32), np.zeros((rows, columns), np.float32)

    def part(centre: Floats, reach: float) -> tuple[slice, slice]:
        first = np.maximum(np.floor((centre - reach - low) / CELL_M), 0).astype(int)
        last = np.maximum(np.ceil((centre + reach - low) / CELL_M) + 1, 0).astype(int)
        return slice(first[1], last[1]), slice(first[0], last[0])

    for k in range(len(spheres)):
        window = part(cast[k], cast_reach[k])
        dx, dy = x[None, window[1]] - cast[k, 0], y[window[0], None] - cast[k, 1]
        away = np.sqrt(np.maximum(dx * dx + dy * dy - (dx * LIGHT[0] + dy * LIGHT[1]) ** 2, 0))
        # A sphere that is smaller than its penumbra hides only a part of the lamp.
        dark = min(1.0, radius[k] / blur[k]) * smoothstep(-away, -radius[k] - blur[k], -radius[k] + blur[k])
        np.maximum(shade[window], dark, out=shade[window])
        if touches[k]:
            window = part(spheres[k, :2], near_reach[k])
            dx, dy = x[None, window[1]] - spheres[k, 0], y[window[0], None] - spheres[k, 1]
            distance = np.sqrt(dx * dx + dy * dy + height[k] ** 2)
            near = height[k] * radius[k] ** 2 / distance**3
            np.maximum(occlusion[window], near, out=occlusion[window])
    factor = (1 - CAST_SHADOW * shade) * (1 - CONTACT_SHADOW * occlusion)
    return FloorLight(float(x[0]), float(y[0]), np.asarray(factor, np.float32))


def bedding(seed: int, x: Floats, y: Floats) -> NDArray[np.float32]:
    """Texture of the bedding at places [h, w] of the floor: mean 0, standard deviation about 1."""
    rng = np.random.default_rng((seed, 7))
    total = np.zeros(x.shape)
    for cell_m, weight in ((0.0022, 0.75), (0.009, 0.65)):
        knots = rng.standard_normal((256, 256))
        u, v = x / cell_m, y / cell_m
        j, i = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
        u, v = u - j, v - i
        upper = knots[i % 256, j % 256] * (1 - u) + knots[i % 256, (j + 1) % 256] * u
        lower = knots[(i + 1) % 256, j % 256] * (1 - u) + knots[(i + 1) % 256, (j + 1) % 256] * u
        total += 1.5 * weight * (upper * (1 - v) + lower * v)
    return np.asarray(np.clip(total, -2.5, 2.5), np.float32)
