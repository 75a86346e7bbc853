from __future__ import annotations

import numpy as np
import pytest

from zoosplat.synthetic import random_animals
from zoosplat.synthetic.random_animals import HEIGHT, VIEWS, WIDTH, Film, random_animal, random_rig
from zoosplat.synthetic.rendering import View
from zoosplat.synthetic.solids import Solids
from zoosplat.synthetic.traits import Traits
from zoosplat_model import animals


@pytest.fixture(scope="module")
def film() -> Film:
    return random_animals.film(3, 4)


def extent(solids: Solids) -> tuple[np.ndarray, np.ndarray]:
    ends, radii = np.concatenate([solids.a, solids.b]), np.concatenate([solids.ra, solids.rb])[:, None]
    return (ends - radii).min(0), (ends + radii).max(0)


def test_animals_stand_on_the_floor_head_along_x_and_have_the_size_of_mice() -> None:
    lengths = []
    for seed in range(40):
        solids = random_animal(np.random.default_rng(seed))
        low, high = extent(solids)
        points = np.random.default_rng(seed).uniform(low, high, (4000, 3))
        inside = points[np.logical_or.reduce([solids.inside(i, points) for i in range(len(solids.a))])]
        assert inside[:, 2].min() > -0.005  # haunches of some reach a little below
        assert (inside[:, 2] > 0).mean() > 0.97
        assert inside[:, 2].max() < 0.14
        assert (high - low)[:2].max() < 0.26
        spine = np.stack(solids.a[: random_animals.STATIONS - 1])
        assert (spine[-1] - spine[0])[0] > 0.2 * abs((spine[-1] - spine[0])[1])
        lengths.append(np.linalg.norm(np.diff(spine, axis=0), axis=1).sum())
    assert 0.045 < min(lengths) < 0.065
    assert 0.075 < max(lengths) < 0.095


def test_every_view_shows_what_is_inside_the_solids() -> None:
    rng = np.random.default_rng(5)
    solids, (intrinsics, poses) = random_animal(rng), random_rig(rng)
    low, high = extent(solids)
    points = rng.uniform(low, high, (20_000, 3))
    inside = points[np.logical_or.reduce([solids.inside(i, points) for i in range(len(solids.a))])]
    assert len(inside) > 300
    for k, pose in zip(intrinsics, poses, strict=True):
        drawn = View(k, pose[:3, :3], pose[:3, 3], WIDTH, HEIGHT).cast(solids, Traits.draw(0, (0.47, 0.35, 0.25)))
        assert drawn is not None
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[drawn[0], drawn[1]] = drawn[3] >= 0.5
        image = (inside @ pose[:3, :3].T + pose[:3, 3]) @ k.T
        column, row = np.rint(image[:, :2] / image[:, 2:]).astype(int).T
        assert mask[row, column].mean() > 0.97  # the others lie at the outline
        hit = np.zeros_like(mask)
        hit[row, column] = True
        assert hit.sum() > 0.2 * mask.sum()  # and it shows not much else


def test_a_film_is_white_outside_and_the_same_again(film: Film) -> None:
    assert film.rgb.shape == (4, VIEWS, HEIGHT, WIDTH, 3)
    inside = film.mask.astype(bool)
    assert (film.rgb[~inside] == 255).all()
    assert film.rgb[inside].mean() < 200
    assert (inside.sum((2, 3)) > 200).all()
    again = random_animals.film(3, 2)
    assert np.array_equal(again.rgb, film.rgb[:2])
    assert not np.array_equal(random_animals.film(4, 1).rgb[0], film.rgb[0])


def test_the_place_of_an_animal_holds_all_of_its_pictures(film: Film) -> None:
    """The corners of a box about its centre and heading, of its reach and a body's radius, enclose every mask."""
    signs = np.stack(np.meshgrid(*[(-1, 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for i in range(4):
        c, s = np.cos(film.headings[i]), np.sin(film.headings[i])
        corners = film.centers[i] + (signs * (film.reach[i] + 0.015)) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        for v in range(VIEWS):
            pose = film.world_to_camera[v]
            image = (corners @ pose[:3, :3].T + pose[:3, 3]) @ film.intrinsics[v].T
            pixels = image[:, :2] / image[:, 2:]
            rows, columns = np.nonzero(film.mask[i, v])
            assert (pixels.min(0) < (columns.min() + 2, rows.min() + 2)).all()
            assert (pixels.max(0) > (columns.max() - 2, rows.max() - 2)).all()


def test_animals_filmed_by_several_processes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animals, "RIGS", 2)
    filmed = animals.film_rigs(2, first=3)
    assert len(filmed) == 2
    for rig, film in zip((3, 4), filmed, strict=True):
        alone = random_animals.film(rig, 1)
        for name in ("rgb", "mask", "centers", "headings"):
            np.testing.assert_array_equal(getattr(film, name), getattr(alone, name))
