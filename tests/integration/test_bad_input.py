"""Whatever is wrong with input, configuration or storage: one clear line, exit status 2, no success mark."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import h5py
import numpy as np
import pytest
import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.recording.sources import open_source
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.results import Result
from zoosplat.storage import objects, s3_client, schema

if TYPE_CHECKING:
    from tests.conftest import S3, Outcome, Recording, Stages

Edit = Callable[[Any, int], Any]


def line_of(outcome: Outcome, stage: str, status: int = 2) -> str:
    """The one line on standard error of a stage that refused."""
    assert outcome.status == status, outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith(f"zoosplat {stage}: ")
    return lines[0]


def refused(stages: Stages, stage: str, project: str, *args: str, status: int = 2, **options: Any) -> str:
    line = line_of(stages(stage, project, *args, **options), stage, status)
    assert not list(Path(project).glob(f"results/{stage}/*/done.json"))
    return line


def rewrite(path: Path, edit: Edit = lambda luma, index: luma, size: tuple[int, int] = (96, 80)) -> None:
    """Encode a video again, lossless, index in front, its luma changed by `edit` (None: left out), its chroma grey."""
    with av.open(str(path)) as file:
        pictures = [f.to_ndarray()[:80].copy() for f in file.decode(video=0)]
    w, h = size
    with av.open(str(path), "w", options={"movflags": "faststart"}) as file:
        stream: Any = file.add_stream("libx264", rate=Fraction(50))
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        stream.options = {"qp": "0", "threads": "1", "preset": "ultrafast", "bf": "2"}
        for i, picture in enumerate(pictures):
            luma = edit(picture, i)
            if luma is None:
                continue
            planes = np.full((h * 3 // 2, w), 128, np.uint8)
            planes[: luma.shape[0], : luma.shape[1]] = luma
            file.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        file.mux(stream.encode())


def calibration(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    with h5py.File(folder / "camera_params.h5", "r+") as file:
        group = file["camera_parameters"]
        arrays = {key: np.asarray(group[key]) for key in group}
        edit(arrays)
        for key in list(group):
            del group[key]
        for key, value in arrays.items():
            group[key] = value


def with_nan(arrays: dict[str, Any]) -> None:
    arrays["rotation"][2, 0, 0] = np.nan


def with_wrong_shape(arrays: dict[str, Any]) -> None:
    arrays["intrinsic"] = arrays["intrinsic"][:, :2]


def with_fewer(arrays: dict[str, Any]) -> None:
    arrays.update({key: value[:3] for key, value in arrays.items()})


def with_mirrored(arrays: dict[str, Any]) -> None:
    arrays["rotation"][1] *= -1


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def zero_packet(path: Path, index: int) -> None:
    with av.open(str(path)) as file:
        entry = file.streams.video[0].index_entries[index]
    data = bytearray(path.read_bytes())
    data[entry.pos + 4 : entry.pos + entry.size] = bytes(entry.size - 4)
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    """Index in front, half of the pictures there."""
    rewrite(path)
    cut(path, 0.5)


# What neither headers nor the first pictures tell: it is found when the others are decoded.
BY_DECODING = ("corrupt", "all_black")
# What is damaged in the recording, and what the line must name.
RECORDINGS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "mask_missing": (lambda f: (f / "masks/2.mp4").unlink(), ("masks/2.mp4", "no such file")),
    "video_missing": (lambda f: (f / "videos/3.mp4").unlink(), ("videos/3.mp4", "no such file")),
    "folder_missing": (lambda f: shutil.rmtree(f), ("recording", "no such f", "check data.directory")),
    "mask_is_a_folder": (
        lambda f: [change() for change in ((f / "masks/2.mp4").unlink, (f / "masks/2.mp4").mkdir)],
        ("masks/2.mp4", "no such file"),
    ),
    "mask_empty": (lambda f: (f / "masks/1.mp4").write_bytes(b""), ("masks/1.mp4 (mask of camera 1)", "empty")),
    "video_empty": (lambda f: (f / "videos/1.mp4").write_bytes(b""), ("videos/1.mp4 (video of camera 1)", "empty")),
    "not_a_video": (
        lambda f: (f / "masks/0.mp4").write_text("not a video " * 100),
        ("masks/0.mp4 (mask of camera 0)", "not a readable video"),
    ),
    "index_cut_off": (
        lambda f: cut(f / "masks/3.mp4", 0.9),
        ("masks/3.mp4 (mask of camera 3)", "not a readable video"),
    ),
    "pictures_cut_off": (
        lambda f: cut_short(f / "masks/3.mp4"),
        ("masks/3.mp4 (mask of camera 3)", "truncated", "of its 144 frames", "ingest.on_short"),
    ),
    "video_cut_off": (lambda f: cut_short(f / "videos/0.mp4"), ("videos/0.mp4 (video of camera 0)", "truncated")),
    "corrupt": (lambda f: zero_packet(f / "masks/1.mp4", 70), ("masks/1.mp4 (mask of camera 1)", "frame ")),
    "unequal_lengths": (
        lambda f: rewrite(f / "masks/2.mp4", lambda luma, i: luma if i < 140 else None),
        ("masks/2.mp4 (mask of camera 2) has 140 frames", "has 144", "ingest.on_short"),
    ),
    "wrong_size": (
        lambda f: rewrite(f / "masks/2.mp4", size=(112, 80)),
        ("masks/2.mp4 (mask of camera 2)", "112 x 80", "96 x 80"),
    ),
    "grey_mask": (
        lambda f: shutil.copy(f / "videos/2.mp4", f / "masks/2.mp4"),
        ("masks/2.mp4 (mask of camera 2)", "frame 0", "not black and white"),
    ),
    "all_black": (
        lambda f: rewrite(f / "masks/1.mp4", lambda luma, i: luma * 0 + 16),
        ("masks/1.mp4 (mask of camera 1)", "empty in all 144 frames"),
    ),
    "calibration_missing": (lambda f: (f / "camera_params.h5").unlink(), ("camera_params.h5", "no such file")),
    "calibration_not_hdf5": (lambda f: (f / "camera_params.h5").write_text("no"), ("camera_params.h5", "HDF5")),
    "calibration_nan": (lambda f: calibration(f, with_nan), ("camera_params.h5", "camera '2'", "rotation")),
    "calibration_shape": (lambda f: calibration(f, with_wrong_shape), ("camera_params.h5", "camera 0", "[2, 3]")),
    "calibration_fewer": (lambda f: calibration(f, with_fewer), ("4 videos", "3 cameras")),
    "calibration_mirrored": (lambda f: calibration(f, with_mirrored), ("camera_params.h5", "camera '1'", "mirrors")),
    "up_missing": (lambda f: (f / "vertical_lines.npz").unlink(), ("vertical_lines.npz", "no such file")),
    "up_singular": (lambda f: np.savez(f / "vertical_lines.npz", up=np.zeros(3)), ("vertical_lines.npz", "not all 0")),
    "up_nan": (lambda f: np.savez(f / "vertical_lines.npz", up=[0, np.nan, 1]), ("vertical_lines.npz", "finite")),
    "up_without_key": (lambda f: np.savez(f / "vertical_lines.npz", down=[0, 0, 1]), ("vertical_lines.npz", "'up'")),
}


@pytest.mark.parametrize("case", RECORDINGS)
def test_recording(case: str, recording: Recording, stages: Stages, tmp_path: Path) -> None:
    damage, words = RECORDINGS[case]
    folder = recording.copy(tmp_path / "recording")
    damage(folder)
    project = recording.write_project(tmp_path / "project", folder)
    line = refused(stages, "ingest", project)
    assert all(word in line for word in words), line
    # Nothing is taken for done by a second try either, with workers: whichever shard comes first names its own frames.
    again = refused(stages, "ingest", project, "--workers", "2")
    # What is checked before a run says the same.
    experiment = Experiment.model_validate(recording.config(folder))
    if case in BY_DECODING:
        open_source(experiment).check()
    else:
        # What is found before a run begins leaves nothing behind.
        assert [path.name for path in Path(project).iterdir()] == ["tested.yaml"]
        with pytest.raises(UserError) as early:
            open_source(experiment).check()
        assert all(word in str(early.value) for word in words), early.value
    numbers = r"(frames?|shard) [\d/]+( to \d+)?"
    assert re.sub(numbers, r"\1", again) == re.sub(numbers, r"\1", line)


def test_coloured_mask(recording: Recording, stages: Stages, tmp_path: Path) -> None:
    folder = recording.copy(tmp_path / "recording")
    with av.open(str(folder / "masks/2.mp4"), "w") as file:
        stream: Any = file.add_stream("libx264", rate=50)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        red = av.VideoFrame.from_ndarray(np.full((80, 96, 3), (200, 20, 20), np.uint8), format="rgb24")
        for _ in range(144):
            file.mux(stream.encode(red.reformat(format="yuv420p")))
        file.mux(stream.encode())
    line = refused(stages, "ingest", recording.write_project(tmp_path / "project", folder))
    assert "masks/2.mp4 (mask of camera 2): frame 0 is coloured" in line


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown_key": ({"ingest__frame_jmp": 2}, ("ingest.frame_jmp", "ingest.frame_jump")),
    "unknown_section": ({"ingst": {}}, ("ingst", "ingest")),
    "wrong_type": ({"ingest__frame_jump": "two"}, ("ingest.frame_jump", "'two'", "whole number")),
    "all_views_held_out": ({"holdout_views": [0, 1, 2, 3]}, ("holdout_views = [0, 1, 2, 3]", "hold out at most 2")),
    "view_out_of_range": ({"holdout_views": [7]}, ("holdout_views[0] = 7", "0 to 3")),
    "downsample_does_not_divide": ({"ingest__image_downsample": 5}, ("ingest.image_downsample = 5", "96 x 80", "4")),
    "up_zero": ({"data__up": [0, 0, 0]}, ("data.up",)),
    "path_outside": ({"data__masks": ["../m.mp4", "1.mp4", "2.mp4", "3.mp4"]}, ("data.masks[0]", "..")),
    "absolute_path": ({"data__videos": ["/etc/passwd", "1.mp4", "2.mp4", "3.mp4"]}, ("data.videos[0]", "/etc/passwd")),
    "calibration_outside": ({"data__calibration": "../../c.h5"}, ("data.calibration", "..")),
    "size_differs": ({"data__image_width": 640}, ("data.image_width = 640", "96")),
    "one_mask_too_few": ({"data__masks": ["masks/0.mp4", "masks/1.mp4"]}, ("data.masks", "2 entries for 4 videos")),
    "unknown_scheme": ({"data__directory": "ftp://host/x"}, ("ftp://host/x", "s3://")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration(case: str, recording: Recording, stages: Stages, tmp_path: Path) -> None:
    changes, words = CONFIGS[case]
    project = recording.write_project(tmp_path / "project", **changes)
    line = refused(stages, "ingest", project)
    assert all(word in line for word in words), line


def test_project(stages: Stages, recording: Recording, tmp_path: Path) -> None:
    assert f"{tmp_path}/nowhere: holds no run" in refused(stages, "ingest", str(tmp_path / "nowhere"))
    (tmp_path / "tested.yaml").write_text("data: ]")
    assert "tested.yaml: not valid YAML" in refused(stages, "ingest", str(tmp_path))
    (tmp_path / "tested.yaml").write_bytes(b"\xff\xfe\x00")
    assert "tested.yaml" in refused(stages, "ingest", str(tmp_path))
    for url in ("s3://", "s3://bucket/../x", "gs://bucket/x"):
        assert url in line_of(stages("ingest", url), "ingest")


def test_inputs_not_there_yet(stages: Stages, recording: Recording, tmp_path: Path) -> None:
    project = recording.write_project(tmp_path)
    for stage, first in (("center_rotation", "ingest"), ("crop", "ingest"), ("pack", "ingest")):
        assert f"run stage {first} first" in refused(stages, stage, project)


# -- what does not stop a run -------------------------------------------------------------------------------------
def result_of(project: Path | str, stage: str) -> Result:
    """A stage's result in the project's latest run."""
    return open_run(Project.at(str(project))).result(stage)


def mark_of(project: Path, stage: str) -> dict[str, Any]:
    return result_of(project, stage).require()


def open_group(project: Path, stage: str) -> zarr.Group:
    return open_run(Project.at(str(project))).open_input(stage)


def test_truncating_to_the_shortest(recording: Recording, stages: Stages, finished: Path, tmp_path: Path) -> None:
    folder = recording.copy(tmp_path / "recording")
    cut_short(folder / "videos/0.mp4")
    rewrite(folder / "masks/2.mp4", lambda luma, i: luma if i < 140 else None)
    project = tmp_path / "project"
    recording.write_project(project, folder, ingest__on_short="truncate")
    for stage in ("ingest", "center_rotation", "crop", "pack"):
        outcome = stages(stage, str(project))
        assert (outcome.status, outcome.err) == (0, "")
    (warning,) = mark_of(project, "ingest")["warnings"]
    assert "videos/0.mp4 (video of camera 0) is truncated" in warning
    n = mark_of(project, "ingest")["frames"]
    assert 40 < n < 110
    # The frames that are there are those of the whole recording (masks/2 and videos/0 were encoded again, lossless).
    for stage, keys in (("ingest", ("mask", "box")), ("pack", ("mask",))):
        ours, whole = open_group(project, stage), open_group(finished, stage)
        for key in keys:
            mine = schema.read(ours, key)
            assert len(mine) == n
            if stage == "ingest":
                assert (mine == schema.read(whole, key)[:n]).all()


def test_black_frames_are_marked_and_shift_nothing(
    recording: Recording, stages: Stages, finished: Path, tmp_path: Path
) -> None:
    """All cameras lose the animal in frames 60 to 69, camera 1 alone in 100 to 104: the others stay as they were."""
    folder = recording.copy(tmp_path / "recording")

    def edit(camera: int) -> Edit:
        return lambda luma, i: luma * 0 + 16 if 60 <= i < 70 or (camera == 1 and 100 <= i < 105) else luma

    for camera in range(4):
        rewrite(folder / f"masks/{camera}.mp4", edit(camera))
    project = tmp_path / "project"
    recording.write_project(project, folder)
    for stage in ("ingest", "center_rotation", "crop", "pack"):
        outcome = stages(stage, str(project))
        assert (outcome.status, outcome.err) == (0, "")
    warnings = mark_of(project, "ingest")["warnings"]
    assert len(warnings) == 4
    assert "masks/1.mp4 (mask of camera 1): the mask is empty in 15 of 144 frames, first at kept frame 60" in warnings
    assert "10 of 144 frames" in mark_of(project, "center_rotation")["warnings"][0]

    black = np.zeros((144, 4), bool)
    black[60:70] = True
    black[100:105, 1] = True
    ours, whole = (schema.read(open_group(p, "ingest"), "mask") for p in (project, finished))
    assert not ours[black].any()
    assert (ours[~black] == whole[~black]).all()
    tracking, undisturbed = (open_group(p, "center_rotation") for p in (project, finished))
    assert (schema.read(tracking, "valid") == ~black.all(axis=1)).all()
    same = ~black.any(axis=1)
    assert (schema.read(tracking, "hull_mean")[same] == schema.read(undisturbed, "hull_mean")[same]).all()
    centers = schema.read(tracking, "centers")
    # Interpolated in between: linear from frame 59 to frame 70.
    np.testing.assert_allclose(centers[64], centers[59] + (centers[70] - centers[59]) * 5 / 11, atol=1e-12)
    images, before = (open_group(p, "pack") for p in (project, finished))
    assert (schema.read(images, "rgb")[60:70] == 255).all()
    assert not schema.read(images, "mask")[60:70].any()
    if schema.array(images, "rgb").shape == schema.array(before, "rgb").shape:
        assert (schema.read(images, "rgb")[same] == schema.read(before, "rgb")[same]).all()


# -- later stages -------------------------------------------------------------------------------------------------
def copied(finished: Path, folder: Path, stage: str, recording: Recording, data: Path) -> str:
    """A copy of the finished project, on a recording elsewhere, in which one stage has not run."""
    shutil.copytree(finished, folder, symlinks=True)
    shutil.rmtree(result_of(folder, stage).folder)
    return recording.write_project(folder, data)


PACKING: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda f: (f / "videos/3.mp4").unlink(), ("videos/3.mp4", "no such file")),
    "corrupt": (lambda f: zero_packet(f / "videos/1.mp4", 100), ("videos/1.mp4 (video of camera 1)", "frame ")),
    "shorter": (
        lambda f: rewrite(f / "videos/2.mp4", lambda luma, i: luma if i < 100 else None),
        ("videos/2.mp4 (video of camera 2)", "100 frames"),
    ),
    "other_size": (lambda f: rewrite(f / "videos/0.mp4", size=(112, 96)), ("videos/0.mp4", "112 x 96", "96 x 80")),
}


@pytest.mark.parametrize("case", PACKING)
def test_video_changed_after_ingest(
    case: str, recording: Recording, stages: Stages, finished: Path, tmp_path: Path
) -> None:
    """A run that is going on; one that is begun after the change has other masks, too."""
    damage, words = PACKING[case]
    data = recording.copy(tmp_path / "recording")
    project = copied(finished, tmp_path / "project", "pack", recording, data)
    assert stages("ingest", project).out == ""
    run = open_run(Project.at(project)).id
    damage(data)
    line = refused(stages, "pack", project, "--run", run)
    assert all(word in line for word in words), line


def only(shown: int) -> Edit:
    return lambda luma, i: luma if i == shown else luma * 0 + 16


def test_settings_that_find_nothing(recording: Recording, stages: Stages, finished: Path, tmp_path: Path) -> None:
    project = copied(finished, tmp_path / "a", "crop", recording, recording.folder)
    recording.write_project(tmp_path / "a", crop__min_voxels=10**8)
    assert "crop.min_voxels = 100000000" in refused(stages, "crop", project)
    data = recording.copy(tmp_path / "recording")
    for camera in range(4):  # never two at once
        rewrite(data / f"masks/{camera}.mp4", only(10 * camera))
    project = recording.write_project(tmp_path / "b", data)
    assert stages("ingest", project).status == 0
    line = refused(stages, "center_rotation", project)
    assert "tracking.zarr: no visual hull in 144 of 144 frames" in line
    assert "calibration" in line


def test_damaged_input(recording: Recording, stages: Stages, finished: Path, tmp_path: Path) -> None:
    """A flipped byte in a block of masks.zarr, and a group that was removed although its mark is there."""
    project = copied(finished, tmp_path / "project", "crop", recording, recording.folder)
    masks = Path(result_of(project, "ingest").data_url)
    block = masks / "mask/c/1/0/0/0"
    data = bytearray(block.read_bytes())
    data[len(data) // 3] ^= 0xFF
    block.write_bytes(data)
    line = refused(stages, "crop", project)
    assert "masks.zarr" in line
    assert "damaged" in line
    shutil.rmtree(masks)
    line = refused(stages, "crop", project)
    assert "masks.zarr" in line
    assert "ingest" in line


# -- storage ------------------------------------------------------------------------------------------------------
@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small tmpfs; needs root."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if os.geteuid() or subprocess.run(command, check=False).returncode:
            pytest.skip("only root can mount a small file system")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("stage", ["ingest", "pack"])
def test_no_space_left(
    stage: str,
    workers: str,
    recording: Recording,
    stages: Stages,
    finished: Path,
    mounted: Any,
    check_same: Callable[[str, Path, Path], None],
) -> None:
    """The disk fills up within a shard: that shard is not marked, and with more space the run goes on."""
    folder = mounted("size=8m")
    project = copied(finished, folder / "project", stage, recording, recording.folder)
    filler = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    filler.write_bytes(bytes(free - (100 << 10 if stage == "ingest" else 300 << 10)))
    line = refused(stages, stage, project, "--workers", workers)
    assert "no space left" in line
    assert project in line
    subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)
    shards = Path(result_of(project, stage).file("shards"))
    done = {p.name: p.read_bytes() for p in shards.glob("*.json")}
    assert len(done) < 3
    assert stages(stage, project).status == 0
    check_same(stage, Path(project), finished)
    assert not list(Path(project).rglob("*.partial"))
    assert all((shards / name).read_bytes() == data for name, data in done.items())


def test_read_only_target(recording: Recording, stages: Stages, mounted: Any) -> None:
    folder = mounted("size=1m")
    project = recording.write_project(folder / "project")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    line = refused(stages, "ingest", project)
    assert str(folder) in line
    assert "read-only" in line


def test_no_permission(recording: Recording, stages: Stages, tmp_path: Path) -> None:
    """As another user: a project that cannot be written, then a recording that cannot be read."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    # Every folder above must be open to that user, which those of pytest are not.
    top = Path("/var/tmp") / f"zoosplat-test-{os.getpid()}"
    top.mkdir(mode=0o755)
    try:
        data = recording.copy(top / "recording")
        data.chmod(0o755)
        project = recording.write_project(top / "project", data)
        line = refused(stages, "ingest", project, as_nobody=True)
        assert str(top / "project") in line
        assert "permission denied" in line
        (top / "project").chmod(0o777)
        (data / "masks/2.mp4").chmod(0o600)
        line = refused(stages, "ingest", project, as_nobody=True)
        assert "masks/2.mp4" in line
        assert "permission denied" in line
    finally:
        shutil.rmtree(top)


def test_s3_is_down(recording: Recording, stages: Stages, tmp_path: Path) -> None:
    """Nothing listens there: as project, and as recording of a local project."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    env = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    started = time.monotonic()
    # Status 1: it may pass, so a runner tries again.
    line = line_of(stages("ingest", "s3://bucket/project", env=env), "ingest", status=1)
    assert f"{endpoint} cannot be reached" in line
    assert "s3://bucket/project" in line
    local = recording.write_project(tmp_path, "s3://bucket/recording")
    line = refused(stages, "ingest", local, env=env, status=1)
    assert f"{endpoint} cannot be reached" in line
    assert "s3://bucket/recording" in line
    # Not a measurement: what the user was promised, twice.
    assert time.monotonic() - started < 60


def test_s3_does_not_answer(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something listens there and accepts connections, but never says a word: to a stage that reads, to a put."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for key, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{key}", value)
        started = time.monotonic()
        stages.start("ingest", "s3://bucket/project", "--workers", "1")
        open_s3: Any = s3_client.file_system
        open_s3.cache_clear()
        try:
            with pytest.raises(UserError, match=r"s3://bucket/put: .* cannot be reached"):
                objects.write_bytes("s3://bucket/put", b"1")
        finally:
            open_s3.cache_clear()
        line = line_of(stages.finished(), "ingest", status=1)
        assert f"{endpoint} cannot be reached" in line
        assert time.monotonic() - started < 30


def test_s3_refuses(s3: S3, recording: Recording, stages: Stages, tmp_path: Path) -> None:
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket, Key="p/tested.yaml", Body=json.dumps(recording.config()).encode())
    local = recording.write_project(tmp_path, f"s3://{bucket}/recording")
    wrong = {
        "secret": {**s3.env, "AWS_SECRET_ACCESS_KEY": "x" * 32},
        "user": {**s3.env, "AWS_ACCESS_KEY_ID": "nobody"},
        "none": {k: v for k, v in s3.env.items() if "KEY" not in k}
        | {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nonexistent"},
    }
    if s3.kind == "moto":
        wrong = {"none": wrong["none"]}
    for env in wrong.values():
        for project, named in ((f"s3://{bucket}/p", f"s3://{bucket}/p"), (local, f"s3://{bucket}/recording")):
            line = line_of(stages("ingest", project, env=env), "ingest")
            assert named in line, line
            assert "check the credentials" in line, line
    assert list(s3.objects(bucket)) == ["p/tested.yaml"]


def test_s3_bucket_or_recording_missing(s3: S3, recording: Recording, stages: Stages, tmp_path: Path) -> None:
    bucket = s3.bucket()
    line = line_of(stages("ingest", "s3://no-such-bucket-here/project", env=s3.env), "ingest")
    assert "s3://no-such-bucket-here/project/latest.json: the bucket does not exist" in line
    line = line_of(stages("ingest", f"s3://{bucket}/project", env=s3.env), "ingest")
    assert f"s3://{bucket}/project/tested.yaml: no such file" in line
    project = recording.write_project(tmp_path / "a", "s3://no-such-bucket-here/recording")
    line = refused(stages, "ingest", project, env=s3.env)
    assert "s3://no-such-bucket-here/recording" in line
    assert "bucket" in line
    project = recording.write_project(tmp_path / "b", f"s3://{bucket}/recording")
    line = refused(stages, "ingest", project, env=s3.env)
    assert f"no such file: s3://{bucket}/recording/masks/0.mp4; check data.directory" in line
