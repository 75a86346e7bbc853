"""Animals as unions of simple solids, whose inside, centroid and silhouette can be computed exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoosplat.geometry.rotations import unit

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Materials of a solid, which select its colours in `rendering`.
COAT, LIMB, PINK, EYE, EAR = range(5)
# Materials of things that are no animal.
CABLE, GLOVE, SLEEVE, DROPPING = range(5, 9)


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane in which things are mirrored: the points p with normal . p = offset.

    Attributes:
        normal: [3] unit vector.
        offset: metres.
    """

    normal: Floats
    offset: float

    def reflect(self, points: Floats) -> Floats:
        """Mirror images [..., 3] of points [..., 3], metres."""
        return np.asarray(points - 2 * ((points @ self.normal) - self.offset)[..., None] * self.normal)

    def reflect_directions(self, directions: Floats) -> Floats:
        """Mirror images [..., 3] of directions [..., 3]."""
        return np.asarray(directions - 2 * (directions @ self.normal)[..., None] * self.normal)


@dataclass
class Solids:
    """P solids that make up a posed animal: round cones, which are hulls of two spheres, and ellipsoids.

    Attributes:
        a: centres [3] of the first spheres, metres.
        b: centres [3] of the second spheres, metres.
        ra: radii of the first spheres, metres.
        rb: radii of the second spheres, metres.
        axes: [3, 3] each; the rows are the unit vectors along, left and dorsal.
        radii: half axes [3] of an ellipsoid, metres, whose spheres a and b are bounding spheres; None for a round cone.
        texture: rest coordinates s, y, z of the solid's point a, metres, and the stretch of the coat along s.
        material: COAT, LIMB, PINK, EYE or EAR of an animal, or CABLE, GLOVE, SLEEVE or DROPPING of something else.
    """

    a: list[Floats] = field(default_factory=list)
    b: list[Floats] = field(default_factory=list)
    ra: list[float] = field(default_factory=list)
    rb: list[float] = field(default_factory=list)
    axes: list[Floats] = field(default_factory=list)
    radii: list[Floats | None] = field(default_factory=list)
    texture: list[tuple[float, float, float, float]] = field(default_factory=list)
    material: list[int] = field(default_factory=list)

    def cone(self, a: Floats, b: Floats, ra: float, rb: float, dorsal: Floats, material: int,
             texture: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)) -> None:  # fmt: skip
        """Add a round cone between spheres (a, ra) and (b, rb); just the larger sphere where it holds the other."""
        along = b - a
        length = float(np.linalg.norm(along))
        if length <= abs(ra - rb):
            a, ra, along = (a, ra, along) if ra >= rb else (b, rb, along)
            b, rb = a + 1e-6 * unit(along), ra
        left = unit(np.cross(dorsal, along))
        along = unit(along)
        self._add(a, b, ra, rb, np.stack([along, left, np.cross(along, left)]), None, texture, material)

    def ellipsoid(self, centre: Floats, axes: Floats, radii: Sequence[float], material: int,
                  texture: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)) -> None:  # fmt: skip
        """Add an ellipsoid with half axes `radii` [3] along the rows of `axes` [3, 3]."""
        r = float(max(radii))
        self._add(centre, centre, r, r, axes, np.asarray(radii, float), texture, material)

    def _add(self, *values: Any) -> None:
        for column, value in zip(_columns(self), values, strict=True):
            column.append(value)

    def joined(self, other: Solids) -> Solids:
        """These solids, and after them those of `other`."""
        return Solids(*(list(mine) + list(theirs) for mine, theirs in zip(*map(_columns, (self, other)), strict=True)))

    def reflected(self, plane: Plane) -> Solids:
        """The mirror images of the solids. Their axes are left-handed."""
        a, b = ([plane.reflect(point) for point in points] for points in (self.a, self.b))
        axes = [plane.reflect_directions(axes) for axes in self.axes]
        return Solids(a, b, self.ra, self.rb, axes, self.radii, self.texture, self.material)

    def inside(self, index: int, points: Floats) -> Bools:
        """Whether points [..., 3], metres, lie in solid `index`: [...] bool."""
        radii = self.radii[index]
        local = (points - self.a[index]) @ self.axes[index].T
        if radii is not None:
            return np.asarray(np.sum((local / radii) ** 2, -1) <= 1)
        length = float(np.linalg.norm(self.b[index] - self.a[index]))
        slope = (self.ra[index] - self.rb[index]) / length
        away = np.hypot(local[..., 1], local[..., 2])
        # At the nearest of the swept spheres the derivative of sqrt((x - x0)^2 + y^2) - r(x0) by x0 is zero.
        nearest = np.clip(local[..., 0] - slope * away / np.sqrt(1 - slope**2), 0, length)
        return np.asarray(np.hypot(local[..., 0] - nearest, away) <= self.ra[index] - slope * nearest)


def _columns(solids: Solids) -> tuple[list[Any], ...]:
    """The lists of the solids' attributes in their order."""
    return tuple(vars(solids).values())


def centroid(solids: Solids, cell_m: float) -> Floats:
    """Centroid [3] in metres of the animal's volume, by counting the cells of a grid whose centres lie inside."""
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
