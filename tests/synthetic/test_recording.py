"""The synthetic recording against closed forms, slow twins and its own truth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zoosplat.errors import UserError
from zoosplat.formats.media import Mp4Writer
from zoosplat.synthetic.cameras import ring_of_cameras
from zoosplat.synthetic.mouse import KEYPOINT_NAMES
from zoosplat.synthetic.recording import SyntheticRecording, Truth, make_recording, render_views

SIZE: dict[str, Any] = {"width": 96, "height": 80}
TRUNK_KEYPOINTS = ("head", "neck", "shoulders", "mid_trunk", "pelvis")
REARING_FRAME = 100  # 2.0 s into the 2.4 s cycle


def project(scene: SyntheticRecording, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels [C, N, 2] of world points [N, 3], without distortion."""
    intrinsic, rotation, translation = scene.cameras
    seen = np.einsum("cij,nj->cni", intrinsic @ rotation, points) + (intrinsic @ translation[..., None])[:, None, :, 0]
    return np.asarray(seen[..., :2] / seen[..., 2:])


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def decoded(path: Path) -> NDArray[np.float64]:
    """RGB [T, H, W, 3] by the definition of BT.709 limited range; swscale's default rounding is 1.4 levels low."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    assert {(int(frame.colorspace), int(frame.color_range)) for frame in frames} == {(1, 1)}
    luma, blue, red = np.stack([frame.to_ndarray(format="yuv444p").astype(float) for frame in frames], 1)
    luma, blue, red = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    return np.asarray(np.clip(255 * np.stack([r, g, b], -1), 0, 255), float)


@pytest.fixture(scope="module")
def scene() -> SyntheticRecording:
    return SyntheticRecording(n_frames=120, **SIZE)


@pytest.fixture(scope="module")
def truth(scene: SyntheticRecording) -> Truth:
    return scene.truth


def test_the_ring_looks_at_its_target_from_where_it_should() -> None:
    intrinsic, rotation, translation = ring_of_cameras(4, 3.0, [0, 1, 2, 4], target=(1, 2, 3), width=64, height=48)
    np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.tile(np.eye(3), (4, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotation), 1)
    centers_m = -np.einsum("cji,cj->ci", rotation, translation)
    np.testing.assert_allclose(centers_m, [[4, 2, 3], [1, 5, 4], [-2, 2, 5], [1, -1, 7]], atol=1e-12)
    target = rotation @ (1, 2, 3) + translation
    np.testing.assert_allclose(target, [[0, 0, d] for d in (3, np.sqrt(10), np.sqrt(13), 5)], atol=1e-12)
    np.testing.assert_allclose((intrinsic[0] @ target[0])[:2] / target[0, 2], [31.5, 23.5])
    # Camera 0 is at +x of the target and level: its right is +y, its down is -z.
    np.testing.assert_allclose(rotation[0], [[0, 1, 0], [0, 0, -1], [-1, 0, 0]], atol=1e-12)


def test_the_same_seed_gives_the_same_arrays_and_a_longer_recording_the_same_start() -> None:
    one, same, longer, other = (
        SyntheticRecording(n_frames=n, seed=seed, **SIZE) for n, seed in ((5, 3), (5, 3), (140, 3), (5, 4))
    )
    for left, right in zip(render_views(one, 4), render_views(same, 4), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(render_views(one, 4, [2])[0], render_views(longer, 4)[0][2:3])
    np.testing.assert_array_equal(one.truth.keypoints, same.truth.keypoints)
    assert not np.allclose(one.truth.keypoints, other.truth.keypoints)
    assert (render_views(one, 3)[0] != render_views(one, 4)[0]).mean() > 0.2  # sensor noise differs between frames


def test_masks_are_where_marched_rays_meet_the_solid() -> None:
    """A slow twin: 0.75 mm steps through `inside`, which shares no formula with the ray caster, four rays a pixel."""
    scene, camera, frame = SyntheticRecording(width=64, height=56), 1, REARING_FRAME
    intrinsic, rotation, translation = (part[camera] for part in scene.cameras)
    mask = render_views(scene, frame, [camera])[1][0]
    rows, columns = np.nonzero(mask)
    top, left = rows.min() - 2, columns.min() - 2
    row, column = np.indices((2 * (rows.max() + 3 - top), 2 * (columns.max() + 3 - left))) / 2 - 0.25
    pixels = np.stack([column + left, row + top], -1)  # pixel centres are integers
    rays = np.concatenate([(pixels - intrinsic[:2, 2]) / intrinsic[0, 0], np.ones((*row.shape, 1))], -1)
    middle = float((rotation @ scene.truth.centroid[frame] + translation)[2])
    hit = np.zeros(row.shape, bool)
    for depth in np.arange(middle - 0.09, middle + 0.09, 7.5e-4).reshape(12, -1):
        hit |= scene.inside(frame, (depth[:, None, None, None] * rays - translation) @ rotation).any(0)
    twin = hit.reshape(hit.shape[0] // 2, 2, -1, 2).mean((1, 3)) >= 0.5
    assert mask.sum() > 60
    assert iou(mask[top : rows.max() + 3, left : columns.max() + 3], twin) > 0.97


def test_trunk_keypoints_and_centroid_project_into_every_mask(scene: SyntheticRecording, truth: Truth) -> None:
    trunk = [KEYPOINT_NAMES.index(name) for name in TRUNK_KEYPOINTS]
    for frame in (0, 30, 60, REARING_FRAME):
        masks = render_views(scene, frame)[1]
        points = np.concatenate([truth.keypoints[frame, trunk], truth.centroid[frame, None]])
        column, row = np.rint(project(scene, points)).astype(int).transpose(2, 0, 1)
        assert masks[np.arange(6)[:, None], row, column].all()
        assert scene.inside(frame, points).all()
        assert 0.005 < masks.mean() < 0.06


@pytest.mark.parametrize("seed", [0, 1])
def test_the_animal_stays_in_every_picture(seed: int) -> None:
    scene = SyntheticRecording(n_frames=80, fps=0.7, seed=seed, **SIZE)  # two minutes, all over the arena
    pixels = project(scene, scene.truth.keypoints.reshape(-1, 3))
    assert (pixels > 1).all()
    assert (pixels < np.array([SIZE["width"], SIZE["height"]]) - 2).all()


def test_centroid_is_the_mean_of_random_points_inside(scene: SyntheticRecording, truth: Truth) -> None:
    low, high = truth.keypoints[REARING_FRAME].min(0) - 0.02, truth.keypoints[REARING_FRAME].max(0) + 0.02
    points = np.random.default_rng(0).uniform(low, high, (60_000, 3))
    kept = points[scene.inside(REARING_FRAME, points)]
    error = np.abs(kept.mean(0) - truth.centroid[REARING_FRAME])
    assert (error < 4 * kept.std(0) / np.sqrt(len(kept)) + 1e-4).all()
    volume_m3 = len(kept) / len(points) * np.prod(high - low)
    assert 15e-6 < volume_m3 < 45e-6  # a mouse of 15 to 45 g


def test_the_animal_walks_where_it_looks_pauses_and_rears(scene: SyntheticRecording, truth: Truth) -> None:
    walked = np.diff(truth.centroid, axis=0)
    speed = np.linalg.norm(walked, axis=1) * scene.fps
    moving = speed > 0.10
    assert 50 < moving.sum() < 100
    along = np.einsum("ti,ti->t", walked, truth.forward[:-1]) / np.linalg.norm(walked, axis=1)
    assert along[moving].min() > np.cos(0.35)
    assert np.linalg.norm(np.diff(truth.root_position, axis=0), axis=1).min() * scene.fps < 0.01  # a pause
    nose_m = truth.keypoints[:, KEYPOINT_NAMES.index("nose")] @ truth.up
    assert nose_m.max() - nose_m[:80].max() > 0.02
    assert np.argmax(nose_m) == pytest.approx(REARING_FRAME, abs=8)
    assert np.ptp(np.unwrap(truth.heading)) > 1.5


def test_paws_in_stance_do_not_slide(scene: SyntheticRecording, truth: Truth) -> None:
    paw = truth.keypoints[:40, KEYPOINT_NAMES.index("left_hind_paw")]
    slip = np.linalg.norm(np.diff(paw, axis=0), axis=1)
    on_floor = (paw @ truth.up)[:-1] < (paw @ truth.up).min() + 1e-4
    assert on_floor.sum() > 15
    assert np.median(slip[on_floor]) < 2e-4
    assert np.median(slip[~on_floor]) > 3e-3


def test_heading_is_the_angle_after_the_smallest_rotation_to_z(truth: Truth) -> None:
    np.testing.assert_allclose(truth.forward @ truth.up, 0, atol=1e-12)
    assert truth.up[2] == pytest.approx(np.cos(np.deg2rad(12)))  # tilted
    # Its twin: a half turn about the bisector of up and z, then one about z.
    half = truth.up + np.array([0, 0, 1])
    half /= np.linalg.norm(half)
    turn = (2 * np.outer((0, 0, 1), (0, 0, 1)) - np.eye(3)) @ (2 * np.outer(half, half) - np.eye(3))
    np.testing.assert_allclose(turn @ truth.up, [0, 0, 1], atol=1e-12)
    assert np.trace(turn) == pytest.approx(1 + 2 * truth.up[2])  # the smallest: by the angle between up and z
    flat = truth.forward @ turn.T
    np.testing.assert_allclose(np.cos(truth.heading), flat[:, 0], atol=1e-12)
    np.testing.assert_allclose(np.sin(truth.heading), flat[:, 1], atol=1e-12)


def test_views_agree_on_the_colour_of_the_back() -> None:
    """A point of the back that two cameras see has one colour: nothing in the shading depends on the camera."""
    scene = SyntheticRecording(n_frames=1, width=288, height=256, noise_std=0)
    rgb, masks = render_views(scene, 0)
    # The highest surface point above mid trunk, found through `inside`.
    mid = scene.truth.keypoints[0, KEYPOINT_NAMES.index("mid_trunk")]
    heights = np.arange(0, 0.03, 2e-5)
    top = mid + heights[scene.inside(0, mid + heights[:, None] * scene.up)].max() * scene.up
    column, row = np.rint(project(scene, top[None])[:, 0]).astype(int).T
    high = [0, 2, 4]  # the cameras above, from which nothing hides the back
    assert masks[high, row[high], column[high]].all()
    colours = rgb[high, row[high], column[high]].astype(float)
    assert np.ptp(colours, axis=0).max() < 30
    background = rgb[~masks].astype(float)
    assert colours.mean() < 110 < background.mean() < 235


def test_a_distorted_picture_undistorts_to_the_straight_one() -> None:
    cv2 = pytest.importorskip("cv2")
    coefficients = (-0.30, 0.08, 0.002, -0.001)
    straight = SyntheticRecording(n_frames=1, width=288, height=256)
    bent = SyntheticRecording(n_frames=1, width=288, height=256, distortion=coefficients)
    wanted, given = render_views(straight, 0, [0, 3])[1], render_views(bent, 0, [0, 3])[1]
    for left, right in zip(given, wanted, strict=True):
        undone = cv2.undistort(left.astype(np.float32), straight.cameras[0][0], np.array(coefficients))
        assert iou(undone >= 0.5, right) > 0.95
    assert min(map(iou, wanted, given)) < 0.93


def test_files_hold_the_pictures_the_calibration_and_the_truth(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    size: dict[str, Any] = {"width": 160, "height": 128}
    truth = make_recording(tmp_path, n_frames=6, n_cameras=3, seed=5, distortion=(-0.1, 0.02, 0, 0), **size)
    scene = SyntheticRecording(n_frames=6, n_cameras=3, seed=5, distortion=(-0.1, 0.02, 0, 0), **size)
    for camera in range(3):
        video, silhouettes = decoded(tmp_path / f"videos/{camera}.mp4"), decoded(tmp_path / f"masks/{camera}.mp4")
        assert video.shape == silhouettes.shape == (6, 128, 160, 3)
        for frame in range(6):
            rgb, mask = (part[0] for part in render_views(scene, frame, [camera]))
            error = video[frame] - rgb
            assert np.abs(error).mean() < 2.5
            assert np.abs(error.mean((0, 1))).max() < 0.5
            assert iou(silhouettes[frame, ..., 0] >= 128, mask) > 0.99
    with h5py.File(tmp_path / "camera_params.h5") as file:
        group = file["camera_parameters"]
        for key, value in zip(("intrinsic", "rotation", "translation"), scene.cameras, strict=True):
            np.testing.assert_array_equal(group[key][()], value)
        np.testing.assert_array_equal(group["distortion"][()], np.tile([-0.1, 0.02, 0, 0, 0], (3, 1)))
    np.testing.assert_array_equal(np.load(tmp_path / "vertical_lines.npz")["up"], -scene.up)
    stored = np.load(tmp_path / "truth.npz")
    assert tuple(stored["keypoint_names"]) == KEYPOINT_NAMES
    for key, value in vars(truth).items():
        np.testing.assert_array_equal(stored[key], value)


def test_saturated_colours_survive_the_codec(tmp_path: Path) -> None:
    """BT.601 taken for BT.709, or full range for limited, moves some of these by 10 levels and more."""
    wanted = np.array([(200, 40, 40), (40, 180, 60), (60, 50, 200), (230, 225, 215), (30, 25, 20), (220, 160, 150)])
    writer = Mp4Writer(str(tmp_path / "patches.mp4"), 30.0, {"crf": "16", "preset": "veryfast"})
    writer.add(np.tile(np.repeat(wanted, 16, 0).astype(np.uint8), (64, 1, 1)))
    writer.close()
    np.testing.assert_allclose(decoded(tmp_path / "patches.mp4")[0, 32, 8::16], wanted, atol=3)


def test_sizes_that_cannot_be_encoded_are_refused() -> None:
    with pytest.raises(UserError, match="97 x 80"):
        SyntheticRecording(width=97, height=80)
    with pytest.raises(UserError, match="distortion"):
        SyntheticRecording(distortion=(0.1,))
    with pytest.raises(UserError, match="positive"):
        SyntheticRecording(n_frames=0)


def test_import_needs_numpy_only() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['av', 'h5py', 'cv2', 'torch', 'scipy']));"
        "from zoosplat.synthetic.recording import SyntheticRecording, render_views;"
        "render_views(SyntheticRecording(n_frames=1, width=32, height=32), 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
