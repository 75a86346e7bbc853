"""What is wrong with a recording is found before anything is decoded, all of it at once."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.errors import Unreachable, UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.calibration.hdf5 import write_hdf5
from zoosplat.recording.facts import kept_frames
from zoosplat.recording.sources import open_source
from zoosplat.storage import s3_client

if TYPE_CHECKING:
    from tests.conftest import S3

CAMERAS, FRAMES, WIDTH, HEIGHT = 3, 12, 32, 16


def film(path: Path, n: int = FRAMES, size: tuple[int, int] = (WIDTH, HEIGHT), fps: int = 50) -> None:
    """Pictures of noise, or masks of a white square if the folder is `masks`; each a keyframe, behind the index."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as file:
        stream: Any = file.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": "1", "qp": "0", "preset": "ultrafast", "threads": "1"}
        for i in range(n):
            picture = np.random.default_rng(i).integers(0, 255, (size[1] * 3 // 2, size[0]), np.uint8)
            if path.parent.name == "masks":
                picture[: size[1]], picture[size[1] :] = 16, 128
                picture[4:12, 4 + i % 8 : 12 + i % 8] = 235
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        file.mux(stream.encode())


def cut(path: Path, kept: int) -> None:
    """Cut a film off after a number of frames, as a copy that was stopped; its index stays whole."""
    with av.open(str(path)) as file:
        entry = file.streams.video[0].index_entries[kept]
    path.write_bytes(path.read_bytes()[: entry.pos + 3])


def ring(radius_m: float = 0.5) -> Cameras:
    """Cameras round the origin, upright: the world's up is their negative y."""
    rotation = []
    for angle in 2 * np.pi * np.arange(CAMERAS) / CAMERAS:
        forward = -np.array([np.cos(angle), np.sin(angle), 0.0])
        down = np.array([0.0, 0.0, -1.0])
        rotation.append(np.stack([np.cross(down, forward), down, forward]))
    k = np.array([[40.0, 0, 15.5], [0, 40, 7.5], [0, 0, 1]])
    return Cameras(
        names=tuple("abc"),
        intrinsics=np.tile(k, (CAMERAS, 1, 1)),
        rotation=np.stack(rotation),
        translation_m=np.tile([0, 0, radius_m], (CAMERAS, 1)),
        distortion=np.zeros((CAMERAS, 5)),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound recording: 12 frames of 32 x 16 pixels from the cameras a, b and c."""
    place = tmp_path / "recording"
    place.mkdir()
    for name in "abc":
        film(place / "videos" / f"{name}.mp4")
        film(place / "masks" / f"{name}.mp4")
    write_hdf5(ring(), place / "cameras.h5")
    np.savez(place / "up.npz", up=[0.0, 0.0, -2.0])
    return place


def configured(directory: Path | str, **changes: Any) -> Experiment:
    """Of that recording; `changes` are dotted keys with `__` for the dot."""
    raw: dict[str, Any] = {
        "data": {
            "directory": str(directory),
            "videos": [f"videos/{name}.mp4" for name in "abc"],
            "masks": [f"masks/{name}.mp4" for name in "abc"],
            "camera_names": list("abc"),
            "calibration": "cameras.h5",
            "up": "up.npz",
        },
        "center_rotation": {"ell": 0.2},
        "crop": {"ell": 0.2},
    }
    for key, value in changes.items():
        section, leaf = key.split("__")
        raw.setdefault(section, {})[leaf] = value
    return Experiment.model_validate(raw)


def problems(experiment: Experiment) -> list[str]:
    with pytest.raises(UserError) as refused:
        open_source(experiment).check()
    return str(refused.value).splitlines()


def test_facts_of_a_sound_recording(folder: Path) -> None:
    facts = open_source(configured(folder)).check()
    assert facts.cameras.names == ("a", "b", "c")
    assert facts.up.tolist() == [0, 0, 1]
    assert (facts.width, facts.height, facts.n_frames, facts.fps, facts.warnings) == (WIDTH, HEIGHT, FRAMES, 50.0, ())
    assert [info.label for info in facts.masks] == [f"masks/{c}.mp4 (mask of camera {c})" for c in "abc"]
    assert [info.label for info in facts.videos] == [f"videos/{c}.mp4 (video of camera {c})" for c in "abc"]
    # Frames 0, 5 and 10.
    assert kept_frames(configured(folder, ingest__frame_jump=5), facts.n_frames) == 3
    assert kept_frames(configured(folder, ingest__frame_jump=5, ingest__max_frames=2), facts.n_frames) == 2


def test_all_problems_are_reported_together(folder: Path) -> None:
    (folder / "masks/b.mp4").unlink()
    (folder / "masks/c.mp4").unlink()
    (folder / "masks/c.mp4").mkdir()
    film(folder / "videos/a.mp4", size=(48, 16))
    cut(folder / "videos/c.mp4", 7)
    (folder / "cameras.h5").write_text("no calibration")
    (folder / "up.npz").unlink()
    expected = (
        ("masks/b.mp4 (mask of camera b)", "no such file", "check data.directory"),
        ("masks/c.mp4 (mask of camera c)", "a folder", "check the names"),
        ("videos/a.mp4 (video of camera a): 48 x 16 pixels", "masks/a.mp4", "32 x 16", "export it again"),
        ("videos/c.mp4 (video of camera c) is truncated: 7 of its 12 frames", "ingest.on_short"),
        (f"{folder}/cameras.h5", "HDF5"),
        (f"{folder}/up.npz: no such file; check data.up",),
    )
    found = problems(configured(folder))
    assert len(found) == len(expected), found
    for line, words in zip(found, expected, strict=True):
        assert all(word in line for word in words), line


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "up_without_key": (lambda f: np.savez(f / "up.npz", down=[0, 0, 1]), r"up\.npz: cannot read the key 'up'"),
    "up_zero": (lambda f: np.savez(f / "up.npz", up=np.zeros(3)), r"up\.npz: up must be 3 finite numbers, not all 0"),
    "up_no_file_of_numpy": (lambda f: (f / "up.npz").write_text("up"), r"up\.npz: cannot read"),
    "same_place": (
        lambda f: write_hdf5(ring(0.0), f / "cameras.h5"),
        r"cameras\.h5: all cameras are at the same place",
    ),
    "one_frame_more": (
        lambda f: film(f / "videos/b.mp4", FRAMES + 1),
        r"^videos/b\.mp4 .* has 13 frames, masks/a\.mp4",
    ),
    "first_one_differs": (lambda f: film(f / "masks/a.mp4", size=(48, 32)), r"^masks/a\.mp4 .* 48 x 32 .* has 32 x 16"),
    "folder": (lambda f: f.rename(f.parent / "elsewhere"), r"recording: no such folder; check data\.directory"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_one_line_for_one_problem(case: str, folder: Path) -> None:
    damage, message = DAMAGED[case]
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        open_source(configured(folder, data__calibration_unit="m")).check()
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["up.npz", "cameras.h5"])
def test_damaged_bytes_are_one_line_or_harmless(name: str, folder: Path) -> None:
    whole, rng, refusals = (folder / name).read_bytes(), np.random.default_rng(0), list[str]()
    experiment = configured(folder)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=8):
            data[at] = rng.integers(256)
        (folder / name).write_bytes(data)
        try:
            open_source(experiment).check()
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 8
    for refusal in refusals:
        assert f"{folder}/{name}" in refusal
        assert len(refusal.splitlines()) == 1


def test_configuration_that_does_not_fit_is_reported_with_the_rest(folder: Path) -> None:
    (folder / "up.npz").unlink()
    found = problems(configured(folder, ingest__image_downsample=3, data__image_width=33))
    assert [line.split(" = ")[0].split(": no")[0] for line in found] == [
        f"{folder}/up.npz",
        "data.image_width",
        "ingest.image_downsample",
    ]


def test_all_files_cut_off_alike_are_found(folder: Path) -> None:
    """Their lengths agree with each other, and not with what each of them declares."""
    files = [folder / kind / f"{name}.mp4" for kind in ("masks", "videos") for name in "abc"]
    for path in files:
        cut(path, 8)
    found = problems(configured(folder))
    assert len(found) == 6
    assert all("is truncated: 8 of its 12 frames are there" in line for line in found)
    facts = open_source(configured(folder, ingest__on_short="truncate")).check()
    assert facts.n_frames == 8
    assert [(info.n_frames, info.n_declared) for info in (*facts.masks, *facts.videos)] == [(8, 12)] * 6
    (warning,) = facts.warnings
    assert warning.endswith("all are used up to frame 8")


def test_masks_shorter_than_the_videos(folder: Path) -> None:
    film(folder / "masks/c.mp4", 10)
    assert problems(configured(folder)) == [
        "masks/c.mp4 (mask of camera c) has 10 frames, masks/a.mp4 (mask of camera a) has 12; export it again, or set "
        "ingest.on_short: truncate"
    ]
    facts = open_source(configured(folder, ingest__on_short="truncate")).check()
    assert {info.n_frames for info in (*facts.masks, *facts.videos)} == {10}


def test_frame_rate_is_that_of_the_videos(folder: Path) -> None:
    for name in "abc":
        film(folder / "masks" / f"{name}.mp4", fps=25)
    film(folder / "videos/c.mp4", fps=60)
    facts = open_source(configured(folder)).check()
    assert facts.fps == 50
    assert open_source(configured(folder, data__fps=200.0)).check().fps == 200
    assert sum("25 frames/s" in line and "(mask of camera" in line for line in facts.warnings) == 3
    assert sum("videos/c.mp4" in line and "60 frames/s" in line for line in facts.warnings) == 1


def test_videos_alone_are_compared_with_masks_that_are_finished(folder: Path) -> None:
    for name in "abc":
        (folder / "masks" / f"{name}.mp4").unlink()
    footage = open_source(configured(folder)).check_pictures()
    assert (footage.masks, len(footage.videos), footage.n_frames) == ((), 3, FRAMES)
    footage.check_against_masks(WIDTH, HEIGHT, FRAMES - 1)
    with pytest.raises(UserError) as refused:
        footage.check_against_masks(64, 48, FRAMES)
    size, length = str(refused.value).splitlines()
    assert "videos/a.mp4 (video of camera a): 32 x 16 pixels, but the masks were made from 64 x 48" in size
    assert "12 frames, but the masks need 13" in length
    cut(folder / "videos/b.mp4", 5)
    with pytest.raises(UserError, match=r"videos/b\.mp4 \(video of camera b\) is truncated"):
        open_source(configured(folder)).check_pictures()


def test_recording_on_s3(folder: Path, s3_here: S3) -> None:
    bucket = s3_here.bucket()
    s3_here.put_folder(folder, bucket, "lab/mouse")
    facts = open_source(configured(f"s3://{bucket}/lab/mouse")).check()
    assert (facts.n_frames, facts.up.tolist()) == (FRAMES, [0, 0, 1])
    for key in ("lab/mouse/up.npz", "lab/mouse/masks/a.mp4"):
        s3_here.client.delete_object(Bucket=bucket, Key=key)
    mask, up = problems(configured(f"s3://{bucket}/lab/mouse"))
    assert f"masks/a.mp4 (mask of camera a): no such file: s3://{bucket}/lab/mouse/masks/a.mp4" in mask
    assert f"s3://{bucket}/lab/mouse/up.npz: no such file" in up


@pytest.fixture
def nothing_listens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 endpoint where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connected: Any = s3_client.file_system
    for key, value in {
        "ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    connected.cache_clear()
    yield
    connected.cache_clear()


@pytest.mark.usefixtures("nothing_listens")
def test_server_that_does_not_answer_is_no_problem_of_the_recording() -> None:
    """It may pass, so a runner tries again, which it does not after bad input."""
    with pytest.raises(Unreachable) as refused:
        open_source(configured("s3://bucket/recording")).check()
    assert len(str(refused.value).splitlines()) == 1


# -- D-NeRF scenes ------------------------------------------------------------------------------------------------
def write_png(path: Path, size: tuple[int, int] = (24, 24), channels: int = 4, kind: type = np.uint8) -> None:
    cv2.imwrite(str(path), np.zeros((size[1], size[0], channels), kind))


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Four times of training and two of testing, pictures of 24 x 24 pixels."""
    folder = tmp_path / "scene"
    for split, n in (("train", 4), ("test", 2)):
        (folder / split).mkdir(parents=True)
        frames = []
        for i in range(n):
            write_png(folder / split / f"r_{i}.png")
            frames.append({"file_path": f"./{split}/r_{i}", "time": i / 10, "transform_matrix": np.eye(4).tolist()})
        text = json.dumps({"camera_angle_x": 0.7, "frames": frames})
        (folder / f"transforms_{split}.json").write_text(text)
    return folder


def of_scene(folder: Path, **ingest: Any) -> Experiment:
    raw = {"data": {"directory": str(folder)}, "ingest": {"source": "dnerf", **ingest}, "train": {"method": "dynamic"}}
    return Experiment.model_validate(raw)


def test_pictures_of_a_scene_are_checked_by_their_headers(scene: Path) -> None:
    facts = open_source(of_scene(scene)).check()
    assert (facts.width, facts.height, facts.n_frames, facts.masks, facts.videos) == (24, 24, 4, (), ())
    assert open_source(of_scene(scene)).check_pictures().n_frames == 4
    (scene / "train/r_1.png").unlink()
    write_png(scene / "train/r_2.png", size=(32, 24))
    write_png(scene / "train/r_3.png", channels=3)
    write_png(scene / "test/r_1.png", kind=np.uint16)
    found = problems(of_scene(scene, image_downsample=5))
    assert len(found) == 5, found
    for name, what in (
        ("train/r_1.png", "no such picture"),
        ("train/r_2.png", "32 x 24 pixels, but others have 24 x 24"),
        ("train/r_3.png", "not a PNG of 8 bits with transparency"),
        ("test/r_1.png", "not a PNG of 8 bits with transparency"),
        ("ingest.image_downsample = 5", "does not divide"),
    ):
        assert sum(name in line and what in line for line in found) == 1, found
    # Pictures of frames that are not kept are never read.
    assert open_source(of_scene(scene, max_frames=1)).check().n_frames == 4
