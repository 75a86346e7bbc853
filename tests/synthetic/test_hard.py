"""Recordings that are hard to segment, against closed forms, slow twins and the easy recording."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from zoosplat.errors import UserError
from zoosplat.synthetic.difficulty import DIFFICULTIES, Difficulty
from zoosplat.synthetic.hard import HardRecording, make_hard_recording
from zoosplat.synthetic.mouse import KEYPOINT_NAMES
from zoosplat.synthetic.recording import SyntheticRecording, render_views
from zoosplat.synthetic.rendering import LIGHT
from zoosplat.synthetic.solids import Solids

WIDTH, HEIGHT, FPS = 144, 128, 25.0
TRUNK = [KEYPOINT_NAMES.index(name) for name in ("neck", "shoulders", "mid_trunk", "pelvis")]
UP = np.array([0.0, 0.0, 1.0])
Floats = NDArray[np.float64]


def recording(kind: str, n_frames: int = 100, noise_std: float = 0.0) -> HardRecording:
    return replace(HardRecording.of_kind(kind, n_frames, 6, WIDTH, HEIGHT, FPS, 0), noise_std=noise_std)


def render(scene: HardRecording, frame: int) -> tuple[Floats, NDArray[np.bool_]]:
    rgb, masks = render_views(scene, frame)
    return rgb.astype(float), masks


def pixels(scene: SyntheticRecording, camera: int, points: Floats) -> NDArray[np.int64]:
    """Columns and rows [N, 2] of points [N, 3] of the arena. They are the nearest whole pixels."""
    view = scene.view(camera)
    seen = (points @ view.rotation.T + view.translation) @ view.intrinsic.T
    return np.rint(seen[:, :2] / seen[:, 2:]).astype(int)


def in_picture(place: NDArray[np.int64]) -> bool:
    return bool((place >= 0).all() and (place < (WIDTH, HEIGHT)).all())


def inside(solids: Solids, points: Floats) -> NDArray[np.bool_]:
    return np.asarray(np.logical_or.reduce([solids.inside(i, points) for i in range(len(solids.a))]))


@pytest.mark.parametrize("kind", ["infrared", "mirror", "light"])
def test_true_masks_are_those_of_the_same_animal_without_scenery(kind: str) -> None:
    scene, easy = recording(kind), SyntheticRecording(100, 6, WIDTH, HEIGHT, FPS)
    for frame in (10, 60):
        masks = render(scene, frame)[1]
        np.testing.assert_array_equal(masks, render_views(easy, frame)[1])
        for camera in range(6):
            column, row = pixels(scene, camera, scene.mouse.pose(frame)[1][TRUNK]).T
            assert masks[camera, row, column].all()


def test_the_animal_rests_for_most_of_the_time_and_then_walks() -> None:
    scene = recording("rest")
    share = scene.difficulty.rest_share
    assert share == 0.8
    points = np.stack([scene.mouse.pose(frame)[1] for frame in range(100)])
    moved = np.linalg.norm(points - points[0], axis=2)[:, KEYPOINT_NAMES.index("pelvis")]
    at_rest = moved < 2e-3
    assert at_rest.mean() == pytest.approx(share, abs=0.03)
    assert at_rest[:80].all()
    assert moved[-1] > 0.04
    nose = points[:80, KEYPOINT_NAMES.index("nose")]
    assert 5e-4 < np.ptp(nose, axis=0).max() < 8e-3
    widths = [render_views(scene, frame, [0])[1].sum() for frame in range(0, 12, 3)]
    assert len(set(widths)) > 1  # it breathes
    steps = np.linalg.norm(np.diff(points, axis=0), axis=2)
    assert steps[:80].max() < 0.2 / FPS  # nothing jumps, also where it begins to walk


def test_a_glass_wall_shows_the_animal_once_more_outside_the_mask() -> None:
    scene = recording("mirror")
    frames = (0, 40)
    drawn = [render(scene, frame) for frame in frames]
    plain = replace(scene, difficulty=replace(scene.difficulty, walls=()))
    without = [render(plain, frame)[0] for frame in frames]
    found = 0
    for azimuth in scene.difficulty.walls:
        normal = np.array([np.cos(azimuth), np.sin(azimuth), 0])
        house = np.eye(3) - 2 * np.outer(normal, normal)
        for camera in range(6):
            center = scene.view(camera).centre
            if center @ normal > 0.17:
                continue
            point = scene.mouse.pose(0)[1][KEYPOINT_NAMES.index("mid_trunk")]
            image = house @ point + 2 * 0.17 * normal
            share = (0.17 - center @ normal) / ((image - center) @ normal)
            aside = (center + share * (image - center)) @ np.cross((0, 0, 1), normal)
            place = pixels(scene, camera, image[None])[0]
            if abs(aside) > 0.2 or not in_picture(place):
                continue
            at = (camera, place[1], place[0])
            assert not drawn[0][1][at]
            assert not drawn[1][1][at]
            differs = np.abs(drawn[0][0][at] - drawn[1][0][at]).max()
            assert np.abs(without[0][at] - without[1][at]).max() < 3
            assert 8 < differs < 60
            found += 1
    assert found >= 3


def test_the_floor_mirrors_the_animal_weakly() -> None:
    scene = recording("mirror")
    dull = replace(scene, difficulty=replace(scene.difficulty, floor_reflectance=0.0))
    shiny, mask = (part[1] for part in render(scene, 40))
    plain = render(dull, 40)[0][1]
    changed = np.abs(shiny - plain).max(-1) > 2
    assert (changed & mask).sum() < 0.2 * changed.sum()  # but for pixels at the outline
    assert changed.sum() > 20
    assert np.abs(shiny - plain).max() < 40
    rows = np.nonzero(mask)[0]
    assert np.nonzero(changed)[0].mean() > rows.mean()  # below the animal


def test_light_drifts_as_configured() -> None:
    scene = recording("light")
    hard = scene.difficulty
    assert hard.lamp_drift == 0.25
    frames = {0.0: render(scene, 0), 0.25: render(scene, 25), 0.75: render(scene, 75)}
    free = ~np.logical_or.reduce([masks for _, masks in frames.values()])
    middle = np.s_[:, HEIGHT // 2 - 12 : HEIGHT // 2 + 12, WIDTH // 2 - 12 : WIDTH // 2 + 12]
    for share, sign in ((0.25, 1), (0.75, -1)):
        ratio = frames[share][0] / np.maximum(frames[0.0][0], 1)
        here = np.median(ratio[middle][free[middle]], axis=0)
        want = (1 + sign * 0.25) * (1 + sign * np.array([1, 0, -1]) * hard.lamp_tint)
        np.testing.assert_allclose(here, want, atol=0.02)
        slopes = []
        for camera in range(6):
            rows, columns = np.nonzero(free[camera])
            design = np.stack([np.ones(len(rows)), columns / WIDTH - 0.5, rows / HEIGHT - 0.5], 1)
            change = ratio[camera, ..., 1][free[camera]]
            kept = np.abs(change - np.median(change)) < 0.25  # without shadows and droppings
            slopes.append(np.linalg.lstsq(design[kept], change[kept], rcond=None)[0][1:])
        size = np.linalg.norm(slopes, axis=1)
        np.testing.assert_allclose(size, 2 * hard.lamp_gradient * (1 + sign * 0.25), rtol=0.15)
        assert np.linalg.norm(np.ptp(slopes, axis=0)) > 0.1  # each camera has its own
    assert max(rgb.max() for rgb, _ in frames.values()) <= 255
    assert np.mean(frames[0.25][0] > 254) < 1e-3


def test_what_cable_and_arm_hide_is_not_in_the_mask() -> None:
    """A slow twin: 1 mm steps along the rays through `inside`, which shares no formula with the ray caster."""
    scene, frame, camera = recording("cable"), 26, 2
    assert scene.arm_is_in(frame)
    bare = replace(scene, difficulty=replace(scene.difficulty, cable=False, arm_spells=()))
    mask, whole = render(scene, frame)[1], render(bare, frame)[1]
    assert not (mask & ~whole).any()
    assert (whole & ~mask).sum() > 50
    view = scene.view(camera)
    rows, columns = np.nonzero(whole[camera])
    k = view.intrinsic
    rays = np.stack([(columns - k[0, 2]) / k[0, 0], (rows - k[1, 2]) / k[1, 1], np.ones(len(rows))], 1) @ view.rotation
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    along = np.arange(0.05, 0.60, 1e-3)
    points = view.centre + along[:, None, None] * rays
    animal, things = inside(scene.mouse.pose(frame)[0], points), inside(scene.things(frame), points)
    first = [np.where(hit.any(0), hit.argmax(0), len(along)) for hit in (animal, things)]
    visible = mask[camera, rows, columns]
    sure = animal.any(0)
    assert sure.mean() > 0.9
    assert (visible == (first[0] < first[1]))[sure].mean() > 0.95


def test_the_arm_is_in_the_pictures_of_its_frames_only() -> None:
    scene = recording("cable")
    armless = replace(scene, difficulty=replace(scene.difficulty, arm_spells=()))
    inside_spells = [scene.arm_is_in(frame) for frame in range(100)]
    assert 0.18 < np.mean(inside_spells) < 0.24
    for frame, is_in in ((26, True), (50, False)):
        assert scene.arm_is_in(frame) == is_in
        rgb, masks = render(scene, frame)
        other, whole = render(armless, frame)
        differs = (np.abs(rgb - other).max(-1) > 10) & ~whole & ~masks
        assert (differs.mean((1, 2)) > 0.03).all() == is_in
        assert differs.any() == is_in


def test_the_cable_touches_the_head_only_now_and_then() -> None:
    scene = recording("cable", 200)
    gaps = []
    for frame in range(0, 200, 5):
        points = scene.mouse.pose(frame)[1]
        ends = np.array(scene.things(frame).b[:24])
        gaps.append(ends[:, 2].min() - points[KEYPOINT_NAMES.index("neck"), 2] - 0.0105)
        assert ends[0, 2] > 0.35  # it comes from above the pictures
    assert min(gaps) < 1e-3
    assert max(gaps) > 8e-3


@pytest.mark.parametrize("kind", ["infrared", "infrared_bright"])
def test_infrared_pictures_are_grey_noisy_and_dark_in_the_corners(kind: str) -> None:
    hard = DIFFICULTIES[kind]
    scene = recording(kind, noise_std=hard.noise_std)
    (first, masks), (second, _) = (render(scene, frame) for frame in (50, 51))
    assert (np.ptp(first, axis=-1) == 0).all()
    rows = np.s_[:, -20:, :20]  # the animal and its shadow are not there
    assert (first - second)[rows].std() == pytest.approx(4 * np.sqrt(2), rel=0.05)
    floor = np.median(first[0][HEIGHT // 2 - 20 : HEIGHT // 2 + 20])
    assert first[masks].mean() < floor - 12
    assert first[masks].mean() > floor - 75  # low contrast
    light = scene.light(0, 0)
    assert light[0, 0, 0] / light[HEIGHT // 2, WIDTH // 2, 0] == pytest.approx(1 - hard.vignetting, abs=0.01)


def test_the_lamp_casts_the_shadow_of_the_animal_in_all_views() -> None:
    """A slow twin: places on the floor from which 1 mm steps towards the lamp meet the animal are dark."""
    scene = replace(recording("rest", 200), difficulty=replace(DIFFICULTIES["rest"], droppings=0))
    (early, masks), (late, later) = render(scene, 0), render(scene, 199)  # It has walked away.
    solids, points, _ = scene.mouse.pose(0)
    spread = np.linspace(-0.07, 0.07, 29)
    x, y = (part.ravel() + points[8, i] for i, part in enumerate(np.meshgrid(spread, spread)))
    floor = np.stack([x, y, np.zeros_like(x)], 1)
    shadowed = inside(solids, floor + np.arange(0, 0.06, 1e-3)[:, None, None] * LIGHT).any(0)
    near = np.linalg.norm(floor[:, None, :2] - floor[None, shadowed, :2], axis=-1).min(1) < 0.02
    for camera in range(6):
        column, row = np.clip(pixels(scene, camera, floor), 0, (WIDTH - 1, HEIGHT - 1)).T
        free = ~masks[camera, row, column] & ~later[camera, row, column]
        ratio = early[camera, row, column].mean(-1) / late[camera, row, column].mean(-1)
        assert np.median(ratio[free & shadowed]) < 0.80
        assert np.median(ratio[free & ~near]) == pytest.approx(1, abs=0.02)


def test_droppings_appear_and_stay() -> None:
    scene = recording("light", 60)
    steady = replace(scene, difficulty=Difficulty(vignetting=0.0))
    first, solids = steady.droppings[2]
    assert [frame for frame, _ in steady.droppings] == sorted(frame for frame, _ in steady.droppings)
    frames = {frame: render(steady, frame) for frame in (0, 58, 59)}
    before = render(steady, first - 1)[0]
    seen = 0
    for camera in range(6):
        column, row = pixels(steady, camera, solids.a[0][None])[0]
        values = {frame: rgb[camera, row, column].mean() for frame, (rgb, _) in frames.items()}
        if not any(masks[camera, row - 1 : row + 2, column - 1 : column + 2].any() for _, masks in frames.values()):
            assert values[59] == pytest.approx(values[58], abs=2)
            assert values[59] < 0.8 * values[0]
            seen += 1
    assert seen >= 2
    np.testing.assert_array_equal(render(steady, first - 1)[0], before)  # whatever was drawn before


def test_files_hold_the_pictures_and_the_visible_animal(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    pytest.importorskip("h5py")
    truth = make_hard_recording(tmp_path, "cable", 4, 96, 80, n_cameras=2, seed=3)
    scene = HardRecording.of_kind("cable", 4, 2, 96, 80, FPS, 3)
    np.testing.assert_array_equal(truth.keypoints, scene.truth.keypoints)
    np.testing.assert_array_equal(np.load(tmp_path / "truth.npz")["centroid"], scene.truth.centroid)
    assert (tmp_path / "camera_params.h5").is_file()
    assert (tmp_path / "vertical_lines.npz").is_file()
    for camera in range(2):
        for name, part in (("videos", 0), ("masks", 1)):
            with av.open(str(tmp_path / name / f"{camera}.mp4")) as file:
                frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            assert len(frames) == 4
            for frame, stored in enumerate(frames):
                wanted = render_views(scene, frame, [camera])[part][0]
                if part:
                    stored = stored[..., 0] >= 128
                    assert (stored & wanted).sum() > 0.97 * (stored | wanted).sum()
                else:
                    assert np.abs(stored.astype(float) - wanted).mean() < 6


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'fog'.*infrared"):
        make_hard_recording(tmp_path, "fog")
