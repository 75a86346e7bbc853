from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.geometry import projection, rotations
from zoosplat.geometry.rotations import look_at
from zoosplat.geometry.spherical_harmonics import SH_C0
from zoosplat.stages.contract import Context
from zoosplat.stages.projects import Project
from zoosplat.storage import listing, objects, urls
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize import Rendering, rasterize
from zoosplat_render import ops, stage


# -- media ----------------------------------------------------------------------------------------------------------
def test_zoom_puts_a_box_into_the_middle() -> None:
    # Pixels 10 .. 19 by 4 .. 8 into 30 x 25: 3 times as large, 5 rows to spare above and below.
    matrix = media.zoom_matrix((10, 4, 20, 9), 30, 25)
    # The outer edge of pixel 10 lies at 9.5 and becomes that of pixel 0; that of row 4 becomes that of row 5.
    np.testing.assert_allclose(matrix @ [9.5, 3.5, 1], [-0.5, 4.5, 1])
    np.testing.assert_allclose(matrix @ [19.5, 8.5, 1], [29.5, 19.5, 1])
    picture = np.zeros((12, 24, 3), np.uint8)
    picture[6, 15] = 200
    found = media.zoom(picture, (10, 4, 20, 9), 30, 25)
    assert found.shape == (25, 30, 3)
    assert found[0, 0].tolist() == [0, 0, 0]  # the picture goes on there
    assert divmod(int(found[..., 0].argmax()), 30) == (12, 16)
    assert media.zoom(picture, (20, 0, 40, 10), 40, 20)[10, 30].tolist() == [255, 255, 255]


def test_png_keeps_every_value() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    data = np.frombuffer(media.encode_png(picture), np.uint8)
    np.testing.assert_array_equal(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1], picture)
    np.testing.assert_array_equal(media.to_uint8([-1, 0, 0.5, 1, 2]), [0, 0, 128, 255, 255])
    assert media.side_by_side([picture, picture, picture]).shape == (7, 9 * 3 + 2 * 4, 3)


def read_film(data: bytes) -> tuple[Any, Any]:
    with av.open(io.BytesIO(data), "r") as file:
        stream = file.streams.video[0]
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
        return stream, pictures


def test_film_of_odd_size() -> None:
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    stream, pictures = read_film(media.encode_mp4((np.full((31, 45, 3), c, np.uint8) for c in colors), 12.5))
    assert stream.codec_context.name == "h264"
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == 12.5
    assert pictures.shape == (3, 32, 46, 3)
    for picture, color in zip(pictures, colors, strict=True):
        np.testing.assert_allclose(picture[:28, :40].reshape(-1, 3).mean(0), color, atol=4)


FILM = """
import hashlib
import numpy as np
from zoosplat.formats.media import encode_mp4
y, x = np.mgrid[:80, :96]
film = np.full((8, 80, 96, 3), 255, np.uint8)
for picture, a in zip(film, 2 * np.pi * np.arange(8) / 8):
    u, v = (x - 48) * np.cos(a) + (y - 40) * np.sin(a), (y - 40) * np.cos(a) - (x - 48) * np.sin(a)
    colors = np.stack([120 + 3 * u, 100 + 6 * v, 90 + u + v], -1).clip(0, 255)
    picture[:] = np.where(((u / 30) ** 2 + (v / 14) ** 2 < 1)[..., None], colors, 255)
print(hashlib.sha256(encode_mp4(film, 25)).hexdigest())
"""


def test_the_same_film_whatever_is_in_fresh_memory() -> None:
    """x264 read some that it had not written; glibc fills it with a byte of one's choice."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", FILM], env={**os.environ, "MALLOC_PERTURB_": fill}, capture_output=True, check=True
        )
        for fill in ("0", "1", "170")
    ]
    assert len({run.stdout for run in runs}) == 1


def test_films_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="at least one"):
        media.encode_mp4([], 25)
    sizes = (np.zeros((8, 8 + 2 * i, 3), np.uint8) for i in range(2))
    with pytest.raises(ValueError, match="8 x 8 px got a picture of 10 x 8"):
        media.encode_mp4(sizes, 25)


def test_paths_are_drawn_from_blue_to_red() -> None:
    white = np.full((40, 60, 3), 255, np.uint8)
    pixels = np.stack([np.array([[5.0 + 5 * t, 10.0], [np.nan, np.nan]]) for t in range(10)])
    drawn = ops.draw_tracks(white, pixels).astype(int)
    assert (white == 255).all()
    changed = np.argwhere((drawn != 255).any(-1))
    # One path along row 10, with a dot of two pixels at its end.
    assert changed[:, 0].min() >= 10 - 3
    assert changed[:, 0].max() <= 10 + 3
    assert set(range(6, 50)) <= set(changed[changed[:, 0] == 10][:, 1].tolist())
    assert drawn[10, 8, 2] > drawn[10, 8, 0]
    assert drawn[10, 50, 0] > drawn[10, 50, 2] + 80


def test_points_on_the_mask() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1, 2:5] = True
    pixels = np.array([[2.4, 0.6], [5.0, 1.0], [np.nan, np.nan], [-3.0, 1.0], [4.0, 1.0], [4.0, 9.0]])
    assert ops.on_mask(pixels, mask).tolist() == [0, 4]


# -- PLY ------------------------------------------------------------------------------------------------------------
def read_ply(data: bytes) -> dict[str, Any]:
    header, _, body = data.partition(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert lines[2].startswith("element vertex ")
    names = [line.removeprefix("property float ") for line in lines[3:]]
    found = np.frombuffer(body, dtype=[(name, "<f4") for name in names])
    assert len(found) == int(lines[2].split()[-1])
    return {name: found[name] for name in names}


def test_ply_round_trip() -> None:
    rng = np.random.default_rng(0)
    means, scales, colors = rng.normal(size=(5, 3)), rng.uniform(1e-3, 1e-2, (5, 3)), rng.random((5, 3))
    quats, opacities = rng.normal(size=(5, 4)), np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    found = read_ply(ops.to_ply(means, quats, scales, opacities, colors))
    names = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    assert " ".join(found) == names

    def read(*names: str) -> Any:
        return np.stack([found[name] for name in names], axis=1)

    np.testing.assert_allclose(read("x", "y", "z"), means, rtol=1e-6)
    assert not read("nx", "ny", "nz").any()
    np.testing.assert_allclose(read("f_dc_0", "f_dc_1", "f_dc_2") * SH_C0 + 0.5, colors, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-found["opacity"])), opacities, atol=2e-6)
    assert np.isfinite(found["opacity"]).all()
    np.testing.assert_allclose(np.exp(read("scale_0", "scale_1", "scale_2")), scales, rtol=1e-5)
    unit = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    np.testing.assert_allclose(read("rot_0", "rot_1", "rot_2", "rot_3"), unit, atol=1e-6)


def test_ply_of_one_gaussian_worked_out_by_hand() -> None:
    one = np.array([[1.0, 2, 3]])
    data = ops.to_ply(one, np.array([[2.0, 0, 0, 0]]), np.exp(-one), np.array([0.5]), np.array([[0.5, 1, 0]]))
    values = np.frombuffer(data[-17 * 4 :], "<f4")
    dc = 0.5 / SH_C0
    np.testing.assert_allclose(values, [1, 2, 3, 0, 0, 0, 0, dc, -dc, 0, -1, -2, -3, 1, 0, 0, 0], atol=1e-6)


# -- orbit ----------------------------------------------------------------------------------------------------------
def test_orbit_sees_the_animal_in_the_middle_upright_and_as_large_as_said() -> None:
    center, radius, size = np.array([0.1, -0.2, 0.3]), 0.05, (120, 80)
    poses, k = ops.orbit(center, radius, 0.6, first_rad=0.4, count=8, width=size[0], height=size[1])
    rotations, shifts = poses[:, :3, :3], poses[:, :3, 3]
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(3), (8, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    ks = np.tile(k, (8, 1, 1))
    pixels, depth = projection.project(center, ks, poses)
    np.testing.assert_allclose(pixels, np.tile([(120 - 1) / 2, (80 - 1) / 2], (8, 1)), atol=1e-9)
    np.testing.assert_allclose(depth, 0.6)
    above, _ = projection.project(center + np.array([0, 0, 0.02]), ks, poses)
    np.testing.assert_allclose(above[:, 0], 59.5, atol=1e-9)
    assert (above[:, 1] < 39.5 - 1).all()

    eyes = -np.einsum("cij,ci->cj", rotations, shifts) - center
    np.testing.assert_allclose(np.arctan2(eyes[0, 1], eyes[0, 0]), 0.4)
    np.testing.assert_allclose(np.arctan2(eyes[1, 1], eyes[1, 0]), 0.4 + math.pi / 4)
    np.testing.assert_allclose(eyes[:, 2], 0.6 * math.sin(math.radians(25)))

    sphere = np.random.default_rng(0).normal(size=(20000, 3))
    sphere *= radius / np.linalg.norm(sphere, axis=1, keepdims=True)
    outline, _ = projection.project(center + sphere, ks, poses)
    farthest = np.linalg.norm(outline - [59.5, 39.5], axis=-1).max(axis=1)
    np.testing.assert_allclose(farthest, 0.6 * 80 / 2, rtol=2e-3)


def test_sphere_of_the_opacity() -> None:
    # 99 Gaussians at x = +-0.1 and one that is hardly there, far away.
    means = np.zeros((101, 3))
    means[:50, 0], means[50:100, 0], means[100, 0] = 0.1, -0.1, 5
    center, radius = ops.bounding_sphere(means, np.array([0.9] * 100 + [0.001]))
    np.testing.assert_allclose(center, [0.005 / 90.001, 0, 0], atol=1e-12)
    assert radius == pytest.approx(0.1, abs=1e-4)


# -- the stage ------------------------------------------------------------------------------------------------------
T, WIDTH, HEIGHT, WINDOW = 12, 60, 44, (32, 24)
ANGLE, CENTER = 0.7, (0.02, -0.01, 0.03)


def animal() -> Gaussians:
    """In the animal's frame: a long body along x with a red end in front."""
    means = torch.stack([torch.linspace(-0.05, 0.05, 41), torch.zeros(41), torch.zeros(41)], 1)
    colors = torch.where(means[:, :1] > 0.03, torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.2, 0.2, 0.2]))
    quats = torch.tensor([1.0, 0, 0, 0]).expand(41, 4)
    return Gaussians(means, quats, torch.full((41, 3), 0.008), torch.full((41,), 0.9), colors)


class Reader(SimpleNamespace):
    """What the stage uses of a FrameReader: one camera on each side, a window that does not move."""

    def frame(self, t: int) -> Frame:
        eyes = np.array([[0.8, 0.1, 0.3], [-0.7, 0.2, 0.2]])
        poses = torch.tensor(np.stack([look_at(e, np.array(CENTER)) for e in eyes])).float()
        k = torch.tensor([[150.0, 0, (WINDOW[0] - 1) / 2], [0, 150.0, (WINDOW[1] - 1) / 2], [0, 0, 1]]).expand(2, 3, 3)
        center, angle = torch.tensor(CENTER), torch.tensor(ANGLE)
        rgb, alpha = render(animal().to_world(center, angle), poses, k, *WINDOW)
        return Frame(t, rgb, (alpha > 0.5).float(), k, poses, torch.zeros(2, 2, dtype=torch.int64), center, angle)

    def prefetch(self, frames: Iterable[int]) -> Iterator[Frame]:
        return map(self.frame, frames)

    def pixel_size_m(self, frame: Frame) -> float:
        return FrameReader.pixel_size_m(cast(FrameReader, self), frame)

    def split(self, name: str) -> list[int]:
        assert name == "test"
        return [t for t in range(8, 12) if self.valid[t]]


def render(gaussians: Gaussians, pose: Tensor, k: Tensor, width: int, height: int, cameras: Any = None) -> Rendering:
    return rasterize(*gaussians, pose, k, width, height, background=torch.ones(3))


@pytest.fixture
def context(finish: Callable[..., Any], tmp_path: Path) -> Callable[..., Context]:
    """Makes what the stage is given, for settings of the section `render`."""

    def made(progress: list[tuple[int, int]] | None = None, **settings: Any) -> Context:
        recording = str(tmp_path / "recording")
        data = {"directory": recording, "videos": ["a", "b"], "masks": ["c", "d"], "calibration": "c.h5"}
        cube = {"ell": 0.3}
        values = {"data": data, "center_rotation": cube, "crop": cube, "ingest": {"frame_jump": 3}, "render": settings}
        seen: list[tuple[int, int]] = [] if progress is None else progress
        run = finish(Project.at(str(tmp_path / "project")), Experiment.model_validate(values), {})
        return Context(run, lambda done, total, _: seen.append((done, total)))

    return made


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    valid = np.array([t != 9 for t in range(T)])
    size = {"width": WINDOW[0], "height": WINDOW[1], "full_width": WIDTH, "full_height": HEIGHT}
    seen = np.ones((T, 2), bool)
    names = ["left", "right"]
    made = Reader(n_frames=T, n_cameras=2, observed=[0, 1], camera_names=names, valid=valid, seen=seen, **size)

    def gaussians(t: int) -> Gaussians:
        return animal().to_world(torch.tensor(CENTER), torch.tensor(ANGLE))

    predictor = SimpleNamespace(reader=made, gaussians=gaussians, render=render, tracks=lambda frames, count: None)
    monkeypatch.setattr(stage, "open_reader", lambda *_: made)
    monkeypatch.setattr(stage, "open_predictor", lambda *_: predictor)
    return made


def picture_of(ctx: Context, name: str) -> Any:
    data = np.frombuffer(objects.read_bytes(urls.join(ctx.run.output_url("render"), name)), np.uint8)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1]


def test_everything_is_rendered(context: Callable[..., Context], reader: Reader) -> None:
    steps: list[tuple[int, int]] = []
    ctx = context(steps, orbit_frames=6, sequence_frames=3, camera=1, width=WIDTH, height=HEIGHT)
    plan = stage.STAGE.prepare(ctx)
    # The test third is 8 .. 11 without 9, so its middle is 10 and the film begins at 8.
    assert plan.values == {"frame": 10, "sequence": [8, 10, 11]}
    assert plan.bounds == (0, 2 + 6 + 3)
    result = stage.STAGE.run_shard(ctx, plan.shard(0), plan)
    assert result.frames == 3
    assert steps == [(i + 1, 11) for i in range(11)]

    names = ["frame_000010.ply", "index.json", "orbit.mp4", "sequence.mp4", "still_camera.png", "still_free.png"]
    assert list(listing.list_files(ctx.run.output_url("render"))) == names
    index = json.loads(objects.read_bytes(urls.join(ctx.run.output_url("render"), "index.json")))
    assert sorted(entry["file"] for entry in index["files"]) == [n for n in names if n != "index.json"]
    still = next(entry for entry in index["files"] if entry["file"] == "still_camera.png")
    assert (still["t"], still["frame"], still["camera"]) == (10, 30, "right")

    # 32 x 24 into 60 x 44: 11/6 times as large. The index says where the animal's centre is: in the middle.
    k, pose = np.array(index["view"]["intrinsics"]), np.array(index["view"]["world_to_camera"])
    assert k[0, 0] == pytest.approx(150 * 44 / 24, rel=1e-6)
    pixel, _ = projection.project(np.array(CENTER), k[None], pose[None])
    np.testing.assert_allclose(pixel[0], [(WIDTH - 1) / 2, (HEIGHT - 1) / 2], atol=1e-4)

    ply = read_ply(objects.read_bytes(urls.join(ctx.run.output_url("render"), "frame_000010.ply")))
    world = animal().to_world(torch.tensor(CENTER), torch.tensor(ANGLE))
    np.testing.assert_allclose(np.stack([ply["x"], ply["y"], ply["z"]], 1), world.means, atol=1e-6)

    _, orbit = read_film(objects.read_bytes(urls.join(ctx.run.output_url("render"), "orbit.mp4")))
    assert orbit.shape == (6, HEIGHT, WIDTH, 3)
    # The first camera stands in front: the red end is near, low in the picture. The fourth stands behind it.
    reds = [np.argwhere(p[..., 0].astype(int) - p[..., 1] > 80) for p in orbit]
    assert reds[0].mean(0)[0] > (HEIGHT - 1) / 2 + 3
    assert reds[3].mean(0)[0] < (HEIGHT - 1) / 2 - 3

    _, film = read_film(objects.read_bytes(urls.join(ctx.run.output_url("render"), "sequence.mp4")))
    assert film.shape == (3, HEIGHT, 2 * WIDTH + 4, 3)
    # The photograph is the same rendering, cut at alpha 0.5 and enlarged: the halves differ only along the outline.
    difference = np.abs(film[:, :, :WIDTH].astype(int) - film[:, :, WIDTH + 4 :]).mean(-1)
    assert (difference < 25).mean() > 0.85
    np.testing.assert_array_equal(picture_of(ctx, "still_camera.png"), picture_of(ctx, "still_free.png"))


def test_free_still_turns_and_moves_the_animal(context: Callable[..., Context], reader: Reader) -> None:
    settings: dict[str, Any] = {"angle_offset": math.pi / 2, "delta_z": 0.02, "width": 64, "height": 48}
    ctx = context(orbit_frames=1, sequence_frames=1, frame=3, **settings)
    plan = stage.STAGE.prepare(ctx)
    assert plan.values == {"frame": 3, "sequence": [3]}
    stage.STAGE.run_shard(ctx, plan.shard(0), plan)
    free = picture_of(ctx, "still_free.png")
    assert free.shape == (48, 64, 3)

    # The same by other means: built turned and moved in the animal's frame, then placed.
    built = animal()
    turn = rotations.rotation_about_z(math.pi / 2)
    means = torch.tensor(built.means.numpy() @ turn.T + [0, 0, 0.02]).float()
    turned = Rotation.from_matrix(turn) * Rotation.from_quat(built.quats.numpy(), scalar_first=True)
    placed = built._replace(means=means, quats=torch.tensor(turned.as_quat(scalar_first=True)).float())
    placed = placed.to_world(torch.tensor(CENTER), torch.tensor(ANGLE))
    # A training pixel at the animal, f = 150: its width is the mean distance of the two cameras over 150.
    distances = np.linalg.norm(np.array([[0.8, 0.1, 0.3], [-0.7, 0.2, 0.2]]) - CENTER, axis=1)
    placed = placed._replace(scales=(placed.scales**2 + 0.3 * (distances.mean() / 150) ** 2).sqrt())
    index = json.loads(objects.read_bytes(urls.join(ctx.run.output_url("render"), "index.json")))
    k, pose = (torch.tensor(index["view"][key])[None] for key in ("intrinsics", "world_to_camera"))
    expected = media.to_uint8(render(placed, pose, k, 64, 48).rgb[0].numpy())
    assert np.abs(free.astype(int) - expected).max() <= 1
    assert np.abs(free.astype(int) - picture_of(ctx, "still_camera.png")).max() > 100


def test_film_is_white_where_the_view_is_absent(context: Callable[..., Context], reader: Reader) -> None:
    reader.seen[10, 1] = False
    ctx = context(orbit_frames=1, sequence_frames=3, camera=1, width=WIDTH, height=HEIGHT)
    plan = stage.STAGE.prepare(ctx)
    stage.STAGE.run_shard(ctx, plan.shard(0), plan)
    _, film = read_film(objects.read_bytes(urls.join(ctx.run.output_url("render"), "sequence.mp4")))
    shown = (film[:, :, :WIDTH] < 200).any(-1).mean((1, 2)) > 0.02
    assert shown.tolist() == [True, False, True]  # of frames 8, 10 and 11
    assert ((film[:, :, WIDTH + 4 :] < 200).any(-1).mean((1, 2)) > 0.02).all()


def test_small_recordings_are_enlarged(context: Callable[..., Context], reader: Reader) -> None:
    ctx = context(orbit_frames=1, sequence_frames=1, frame=3)
    plan = stage.STAGE.prepare(ctx)
    stage.STAGE.run_shard(ctx, plan.shard(0), plan)
    # 9 times 60 x 44 is the first multiple whose shorter side has 384 pixels.
    assert picture_of(ctx, "still_camera.png").shape == (9 * HEIGHT, 9 * WIDTH, 3)


def test_moves_are_along_the_animals_own_axes() -> None:
    frame = Reader().frame(0)
    world = animal().to_world(frame.center, frame.angle)
    forward = stage.moved_in_frame(world, frame, angle_offset=0, delta_x=0.1, delta_y=0, delta_z=0)
    expected = torch.tensor([0.1 * math.cos(ANGLE), 0.1 * math.sin(ANGLE), 0])
    torch.testing.assert_close(forward.means - world.means, expected.expand(41, 3), atol=1e-6, rtol=0)
    turned = stage.moved_in_frame(world, frame, angle_offset=math.pi, delta_x=0, delta_y=0, delta_z=0)
    torch.testing.assert_close(turned.means + world.means, (2 * frame.center).expand(41, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (9, r"render.frame = 9: has no visual hull; nearest: 8"),
        (40, r"render.frame = 40: there are 12 kept frames; nearest: 11"),
    ],
)
def test_frames_that_cannot_be_rendered(
    context: Callable[..., Context], reader: Reader, frame: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stage.STAGE.prepare(context(frame=frame))


def test_no_frame_to_choose(context: Callable[..., Context], reader: Reader) -> None:
    reader.valid = np.zeros(T, bool)
    with pytest.raises(UserError, match=r"render.frame = null: no test frame"):
        stage.STAGE.prepare(context())
    with pytest.raises(UserError, match="and no other frame has one"):
        stage.STAGE.prepare(context(frame=2))
