"""Ray casting of solids: exact silhouettes, textured animals and the table on which they walk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoosplat.geometry.rotations import unit
from zoosplat.synthetic.solids import CABLE, DROPPING, EAR, GLOVE, SLEEVE, Floats, Plane, Solids
from zoosplat.synthetic.traits import Traits, smoothstep

# Direction to the lamp, in the frame of the arena.
LIGHT = unit(np.array([0.35, -0.25, 0.9]))
# RGB, 0 to 1, of materials that are no animal's; chosen by eye.
COLOURS = {
    CABLE: (0.10, 0.10, 0.11),
    GLOVE: (0.24, 0.42, 0.72),
    SLEEVE: (0.86, 0.87, 0.90),
    DROPPING: (0.13, 0.10, 0.08),
}

NEAR_M = 1e-3  # Nothing nearer than this to the camera's plane is drawn, metres.


class Drawing(NamedTuple):
    """Solids in a part of a picture.

    Attributes:
        rows: of the part.
        columns: of the part.
        colour: [h, w, 3] colour (0..255) times coverage.
        coverage: [h, w] share of each pixel that the solids cover.
        ids: [2 h, 2 w] the nearest solid at twice the resolution; -1 where there is none.
    """

    rows: slice
    columns: slice
    colour: Floats
    coverage: Floats
    ids: NDArray[np.int16]


def _distort(xy: Floats, coefficients: Floats) -> Floats:
    """Normalised image points [..., 2] after distortion by OpenCV's Brown-Conrady model (k1, k2, p1, p2, k3)."""
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


class View:
    """One camera, with the rays of its picture at twice the resolution in the frame of the arena.

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
        # Sample j of the fine picture lies at pixel (j + 0.5) / 2 - 0.5.
        x = ((np.arange(self.size[1]) + 0.5) / 2 - 0.5 - intrinsic[0, 2]) / intrinsic[0, 0]
        y = ((np.arange(self.size[0]) + 0.5) / 2 - 0.5 - intrinsic[1, 2]) / intrinsic[1, 1]
        seen = np.stack(np.meshgrid(x, y), -1)
        straight = seen
        if self.distortion is not None:
            for _ in range(30):  # This fixed-point iteration converges for the mild lenses that the model describes.
                straight = straight + seen - _distort(straight, self.distortion)
        rays = np.concatenate([straight, np.ones((*self.size, 1))], -1) @ rotation
        self.rays = np.ascontiguousarray(np.moveaxis(unit(rays), -1, 0))

    def floor_points(self, mirror: Plane | None = None) -> tuple[Floats, Floats]:
        """x and y [2 h, 2 w] in metres where the fine rays meet the floor, far away for those that do not.

        With `mirror`, the rays are those that the mirror throws back.
        """
        centre, rays = self.centre, self.rays
        if mirror is not None:
            centre = mirror.reflect(centre)
            rays = np.moveaxis(mirror.reflect_directions(np.moveaxis(rays, 0, -1)), -1, 0)
        depth = -centre[2] / np.minimum(rays[2], -1e-3)
        return centre[0] + depth * rays[0], centre[1] + depth * rays[1]

    def backdrop(self, seed: int, mirror: Plane | None = None) -> NDArray[np.float32]:
        """Picture [h, w, 3] float32 (0..255) of a pale round table on a grey ground, without the animal.

        The pattern is a function of the place on the floor, so all views show the same table. With `mirror`, every
        ray shows what it meets after the mirror.
        """
        rng = np.random.default_rng((seed, 5))
        waves, phases = rng.normal(size=(5, 2)) * 45, rng.uniform(0, 2 * np.pi, 5)
        x, y = self.floor_points(mirror)
        stain = sum(np.sin(k[0] * x + k[1] * y + p) for k, p in zip(waves, phases, strict=True)) / 5
        radius = np.hypot(x, y)
        table = 214 - 260 * radius + 7 * stain
        ground = 128 - 40 * np.tanh(radius - 0.16)
        grey = np.where(radius < 0.16, table, ground)
        grey = np.where(np.abs(radius - 0.16) < 0.0025, 92, grey)
        fine = grey[..., None] * np.array([1.0, 0.985, 0.955])
        return np.asarray(halve(fine), np.float32)

    def _boxes(self, solids: Solids) -> NDArray[np.int64]:
        """Boxes [P, 4] (first row, end row, first column, end column) of the P solids on the fine picture."""
        corners = np.stack(np.meshgrid(*([(-1.0, 1.0)] * 3), indexing="ij"), -1).reshape(8, 3)
        ends = np.stack([solids.a, solids.b], 1) @ self.rotation.T + self.translation
        cubes = ends[:, :, None] + np.stack([solids.ra, solids.rb], 1)[:, :, None, None] * corners
        # A solid that reaches behind the camera may be anywhere in the picture.
        behind = (cubes[..., 2] < NEAR_M).any((1, 2))
        cubes[behind] = (0.0, 0.0, 1.0)
        xy = cubes[..., :2] / cubes[..., 2:]
        if self.distortion is not None:
            xy = _distort(xy, self.distortion)
        pixels = xy * np.diag(self.intrinsic)[:2] + self.intrinsic[:2, 2]
        fine = (2 * pixels + 0.5).reshape(len(solids.a), 16, 2)
        margin = 2 if self.distortion is None else 6
        low, high = np.floor(fine.min(1)) - margin, np.ceil(fine.max(1)) + margin + 1
        limit = np.array(self.size)
        low[behind], high[behind] = 0, limit[::-1]
        low, high = np.clip(low[:, ::-1], 0, limit), np.clip(high[:, ::-1], 0, limit)
        return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1).astype(np.int64)

    def cast(self, solids: Solids, traits: Traits) -> tuple[slice, slice, Floats, Floats] | None:
        """The animal's part of the picture; None where the picture shows nothing of it.

        Returns:
            Rows and columns of a box round the animal; in it, colour times coverage [h, w, 3] (0..255) and coverage
            [h, w], the share of each pixel that the animal covers.
        """
        drawn = self.draw(solids, traits)
        return None if drawn is None else drawn[:4]

    def draw(self, solids: Solids, traits: Traits, mirror: Plane | None = None) -> Drawing | None:
        """Solids of animals and other things; None where the picture shows nothing of them.

        With `mirror`, their mirror images are drawn. Their light and colours are those of the true solids.
        """
        shown_solids = solids if mirror is None else solids.reflected(mirror)
        boxes = self._boxes(shown_solids)
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
            depth = self._hit(shown_solids, int(i), self.rays[:, r0:r1, c0:c1])
            window = (slice(r0 - top, r1 - top), slice(c0 - left, c1 - left))
            closer = (depth < nearest[window]) & (depth > 0)
            nearest[window][closer] = depth[closer]
            which[window][closer] = i
        rows, columns = np.nonzero(which >= 0)
        ids = which[rows, columns]
        hits = self.centre + nearest[rows, columns, None] * self.rays[:, rows + top, columns + left].T
        if mirror is not None:
            hits = mirror.reflect(hits)
        animal = np.array(solids.material)[ids] <= EAR
        colours = np.zeros((len(ids), 3))
        colours[animal] = _shade(solids, ids[animal], hits[animal], traits)
        colours[~animal] = _shade_things(solids, ids[~animal], hits[~animal])
        fine = np.zeros((*nearest.shape, 3))
        fine[rows, columns] = colours
        box = (slice(top // 2, bottom // 2), slice(left // 2, right // 2))
        return Drawing(*box, halve(fine), halve((which >= 0).astype(float)), which)

    def _hit(self, solids: Solids, i: int, rays: Floats) -> Floats:
        """Distance in metres along unit rays [3, h, w] to solid i; inf where a ray misses it."""
        radii = solids.radii[i]
        with np.errstate(invalid="ignore"):
            if radii is not None:
                squash = solids.axes[i] / radii[:, None]
                origin = squash @ (self.centre - solids.a[i])
                d = [squash[k, 0] * rays[0] + squash[k, 1] * rays[1] + squash[k, 2] * rays[2] for k in range(3)]
                dd, od = d[0] * d[0] + d[1] * d[1] + d[2] * d[2], origin[0] * d[0] + origin[1] * d[1] + origin[2] * d[2]
                depth = (-od - np.sqrt(od * od - dd * (origin @ origin - 1))) / dd
                return np.where(np.isnan(depth), np.inf, depth)
            # The cone between the circles of tangency comes first, then the two spheres (Inigo Quilez, "round cone -
            # intersection").
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


def halve(fine: Floats) -> Floats:
    """A picture averaged over blocks of 2 x 2 samples."""
    return (fine[0::2, 0::2] + fine[1::2, 0::2] + fine[0::2, 1::2] + fine[1::2, 1::2]) / 4


def _surface(solids: Solids, ids: NDArray[np.int16], hits: Floats) -> tuple[Floats, Floats]:
    """Surface points [N, 3] in the axes of their solids, and unit normals [N, 3]; arguments as of `_shade`."""
    axes = np.stack(solids.axes)[ids]
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
    return local, normal


def _light(normal: Floats, hits: Floats) -> Floats:
    """Light [N] on surface points [N, 3] with unit normals [N, 3]; it is dimmer near the floor."""
    sky = 0.5 + 0.5 * normal[:, 2]
    light = 0.42 + 0.33 * sky + 0.36 * np.maximum(normal @ LIGHT, 0.0)
    return np.asarray(light * (0.72 + 0.28 * smoothstep(hits[:, 2], 0.0, 0.016)))


def _shade(solids: Solids, ids: NDArray[np.int16], hits: Floats, traits: Traits) -> Floats:
    """Colour [N, 3] (0..255) of surface points.

    No term depends on the camera, so all views agree on the colour of a point.

    Args:
        solids: the animal.
        ids: [N] the solid on which each point lies.
        hits: [N, 3] the points in the frame of the arena, metres.
        traits: of the animal's coat.
    """
    material = np.array(solids.material)[ids]
    local, normal = _surface(solids, ids, hits)
    texture = np.array(solids.texture)[ids]
    rest = texture[:, :3] + local * np.stack([texture[:, 3], np.ones(len(ids)), np.ones(len(ids))], 1)
    s, y, z = rest.T
    patch = np.sin(rest @ traits.patch_waves.T + traits.patch_phases).sum(1)
    grain = np.sin(rest @ traits.grain_waves.T).sum(1)

    def blend(colour: Floats, other: Sequence[float], weight: Floats) -> Floats:
        return colour + (np.asarray(other) - colour) * weight[:, None]

    coat = traits.coat_color
    fur = np.tile(coat, (len(ids), 1))
    fur = blend(fur, tuple(coat * (0.48, 0.42, 0.40)), smoothstep(patch, 0.5, 1.1))
    fur = blend(fur, (0.72, 0.55, 0.36), 0.6 * smoothstep(-patch, 1.0, 1.6))
    saddle = np.linalg.norm((rest - traits.saddle) / (0.0085, 0.0080, 0.0085), axis=1)
    fur = blend(fur, (0.90, 0.86, 0.80), 1 - smoothstep(saddle, 0.75, 1.0))
    stripe = np.exp(-((np.arctan2(y, z) / 0.26) ** 2)) * smoothstep(-s, -0.040, -0.030)
    fur = blend(fur, (0.12, 0.09, 0.08), 0.9 * stripe)
    fur = blend(fur, (0.88, 0.83, 0.76), smoothstep(-z, 0.0015, 0.0065))
    fur = blend(fur, (0.84, 0.58, 0.54), 0.7 * smoothstep(s, 0.0475, 0.0520))
    fur = fur * (1 + 0.030 * grain)[:, None]
    limb = np.tile(coat * 0.9, (len(ids), 1))
    pink = np.tile((0.86, 0.60, 0.56), (len(ids), 1)) * (1 + 0.10 * np.sin(2 * np.pi * s / 0.005))[:, None]
    eye = np.where((normal @ LIGHT > 0.90)[:, None], 0.85, 0.06) * np.ones((len(ids), 3))
    rim = np.hypot(local[:, 1] / 0.0060, local[:, 2] / 0.0068)
    ear = blend(np.tile((0.90, 0.62, 0.58), (len(ids), 1)), tuple(coat * 0.8), smoothstep(rim, 0.72, 0.92))
    ear = blend(ear, tuple(coat * 0.85 + 0.06), (local[:, 0] < -1e-4).astype(float))
    albedo = np.choose(material[:, None], [fur, limb, pink, eye, ear])

    return np.asarray(255 * np.clip(albedo * _light(normal, hits)[:, None], 0, 1), float)


def _shade_things(solids: Solids, ids: NDArray[np.int16], hits: Floats) -> Floats:
    """As `_shade` for surface points of things that are no animal."""
    colours = np.array([COLOURS.get(material, (0.0, 0.0, 0.0)) for material in solids.material])[ids]
    return np.asarray(255 * np.clip(colours * _light(_surface(solids, ids, hits)[1], hits)[:, None], 0, 1), float)
