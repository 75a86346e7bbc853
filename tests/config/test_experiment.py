"""The experiment: every refusal with its message, and checks against a recording."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.config.serialization import parse_json
from zoosplat.config.values import MAX_INT
from zoosplat.errors import UserError


def refusal(raw: dict[str, Any]) -> list[str]:
    """The lines of the error that a native configuration is refused with."""
    with pytest.raises(UserError) as caught:
        Experiment.from_yaml(yaml.safe_dump(raw))
    return str(caught.value).splitlines()


def test_defaults_are_those_of_the_published_method_but_for_its_bottom(native: Callable[..., dict[str, Any]]) -> None:
    e = Experiment.from_yaml(yaml.safe_dump(native()))
    assert (e.unit, e.holdout_views, e.adaptive_camera, e.reuse) == ("m", (), False, None)
    assert (e.train.lr, e.train.epochs, e.train.img_lambda, e.train.ssim_lambda) == (1e-4, 50, 0.5, 0.0)
    assert (e.crop.grid_size, e.center_rotation.grid_size, e.crop.volume_idx) == (112, 112, None)
    assert (e.model.num_unets, e.model.base_filters, e.model.poolings, e.model.bottleneck) == (3, 8, 4, 0)
    assert (e.model.min_gaussians, e.model.max_gaussians, e.pack.window) == (1024, 16000, "auto")
    hash(e)
    with pytest.raises(ValidationError):
        e.name = "other"


def test_observed_views_are_the_others_in_order(native: Callable[..., dict[str, Any]]) -> None:
    e = Experiment.model_validate(native(holdout_views=[5, 1]))
    assert e.holdout_views == (1, 5)
    assert e.observed_views(6) == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train__lrr": 1.0}, "unknown key train.lrr (did you mean train.lr?)"),
        ({"lr": 1.0}, "unknown key lr (did you mean train.lr?)"),
        ({"trian__lr": 1.0}, "unknown key trian (did you mean train?)"),
        ({"pack__qqq": 1}, "unknown key pack.qqq; valid: pack.window"),
        ({"train__lr": 0}, "train.lr = 0: must be greater than 0; default: 0.0001"),
        ({"train__lr": float("nan")}, "train.lr = nan: must be finite"),
        ({"train__lr": float("inf")}, "train.lr = inf: must be finite"),
        ({"train__lr": "0.1"}, "train.lr = '0.1': must be a number; nearest: 0.1"),
        ({"train__lr": True}, "train.lr = true: must be a number"),
        ({"train__epochs": True}, "train.epochs = true: must be a whole number"),
        ({"train__epochs": 2.6}, "train.epochs = 2.6: must be a whole number; nearest: 3"),
        ({"train__epochs": 0}, "train.epochs = 0: must be at least 1; nearest: 1"),
        ({"train__epochs": None}, "train.epochs = null: must be a whole number"),
        ({"train__device": "gpu"}, "train.device = 'gpu': must be 'auto', 'cpu' or 'cuda'; nearest: cpu"),
        ({"train__gpus": "all"}, "train.gpus = 'all': must be auto or a whole number, 1 at least"),
        (
            {"train__gpus": 2},
            "train.gpus = 2: they share the frames of a step, which has train.batch_frames = 1; nearest: 1, or more ",
        ),
        ({"model__gaussian_mode": "2D"}, "model.gaussian_mode = '2D': must be '3d' or '2d'; nearest: 2d"),
        ({"model__poolings": 5}, "model.poolings = 5: must be at most 4; nearest: 4"),
        ({"model__volume_fill_color": 1.5}, "model.volume_fill_color = 1.5: must be at most 1.0; nearest: 1.0"),
        (
            {"model__min_gaussians": 20000},
            "model.min_gaussians = 20000: exceeds model.max_gaussians = 16000; nearest: 16000",
        ),
        (
            {"model__min_gaussians": 5000, "crop__volume_idx": [[0, 16], [0, 16], [0, 16]]},
            "model.min_gaussians = 5000: the crop has 4096 voxels; nearest: 4096",
        ),
        ({"adaptive_camera": 1}, "adaptive_camera = 1: must be true or false"),
        ({"train": 5}, "train = 5: must be a section, with keys of its own"),
        ({"crop": {}}, "crop.ell is missing: edge of the model's cube, from which the box is cut; see unit"),
        ({"crop__grid_size": 8}, "crop.grid_size = 8: must be at least 16; nearest: 16"),
        ({"name": "a\nb"}, "name = 'a\\nb': must be one line of text without control characters"),
        (
            {"data__camera_names": ["a"]},
            "data.camera_names: 1 entries for 6 videos; give one a camera, in the order of ",
        ),
        ({"data__masks": ["a", "b"]}, "data.masks: 2 entries for 6 videos; give one a camera, in the order of "),
        ({"data__calibration": ["a", "b"]}, "data.calibration: 2 entries for 6 videos; give one a camera, in the "),
        ({"data__calibration": 3}, "data.calibration = 3: must be the name of a file, or a list of names, one a "),
        ({"data__calibration": "../c.h5"}, "data.calibration = '../c.h5': must be a path below data.directory, or "),
        ({"data__up": [0, 0, 0]}, "data.up = [0, 0, 0]: must be auto, a direction [x, y, z] that is not zero, or the "),
        ({"data__up": [0, 0]}, "data.up = [0, 0]: must be auto, a direction [x, y, z] that is not zero, or the name "),
        ({"data__up": [0, 0, 10**400]}, "data.up = [0, 0, 1000"),
        (
            {"data__up": "up"},
            "data.up = 'up': must be auto, a direction [x, y, z] that is not zero, or the name of an ",
        ),
        ({"data__fps": -1}, "data.fps = -1: must be greater than 0"),
        ({"holdout_views": [6]}, "holdout_views[0] = 6: there are 6 cameras; valid: 0 to 5"),
        ({"holdout_views": [-1]}, "holdout_views[0] = -1: must be at least 0; nearest: 0"),
        ({"holdout_views": [1, 1]}, "holdout_views[1] = 1: is listed twice"),
        (
            {"holdout_views": [0, 1, 2, 3, 4]},
            "holdout_views = [0, 1, 2, 3, 4]: leaves 1 of 6 cameras; hold out at most 4",
        ),
        ({"render__camera": 6}, "render.camera = 6: there are 6 cameras; nearest: 5"),
        (
            {"ingest__image_downsample": 6},
            "ingest.image_downsample = 6: does not divide images of 1152 x 1024; nearest: 4 or 8",
        ),
        (
            {"ingest__image_downsample": 4, "evaluate__image_downsample": 6},
            "evaluate.image_downsample = 6: is not a multiple of ingest.image_downsample = 4; nearest: 4 or 8",
        ),
        (
            {"ingest__image_downsample": 4, "evaluate__image_downsample": 12},
            "evaluate.image_downsample = 12: does not divide images of 1152 x 1024; nearest: 8 or 16",
        ),
    ],
)
def test_refusal_names_key_value_and_what_is_valid(
    native: Callable[..., dict[str, Any]], changes: dict[str, Any], line: str
) -> None:
    lines = refusal(native(**changes))
    assert len(lines) == 1
    assert lines[0].startswith(line)


@pytest.mark.parametrize(
    ("given_range", "fault", "nearest"),
    [
        ((0, 100), "length 100 is not a multiple of 16", (0, 96)),
        ((0, 105), "length 105 is not a multiple of 16", (0, 112)),
        ((8, 111), "length 103 is not a multiple of 16", (8, 104)),
        ((40, 120), "reaches outside the grid of 112", (32, 112)),
        ((0, 200), "reaches outside the grid of 112 and length 200 is not a multiple of 16", (0, 112)),
        ((100, 105), "length 5 is not a multiple of 16", (96, 112)),
        ((30, 30), "is empty", (30, 46)),
        ((90, 20), "is empty", (90, 106)),
    ],
)
def test_crop_ranges(
    native: Callable[..., dict[str, Any]], given_range: tuple[int, int], fault: str, nearest: tuple[int, int]
) -> None:
    raw = native(crop__volume_idx=[[0, 96], list(given_range), [24, 88]])
    assert refusal(raw) == [f"crop.volume_idx[1] = {given_range}: {fault}; nearest: {nearest}"]
    raw["crop"]["volume_idx"][1] = list(nearest)
    assert Experiment.from_yaml(yaml.safe_dump(raw)).crop.volume_idx == ((0, 96), nearest, (24, 88))


def nearest(raw: dict[str, Any]) -> dict[str, str]:
    """Key by key, what a refusal calls nearest; nothing where it is not refused."""
    try:
        Experiment.model_validate(raw)
    except ValidationError as error:
        lines = str(error.errors()[0]["ctx"]["error"]).splitlines()
        return {line.split(" = ")[0]: line.partition("nearest: ")[2] for line in lines}
    return {}


def nearest_by_search(value: int, valid: Any) -> str:
    """The slow twin: all numbers up to the largest size, one by one."""
    below = next((v for v in range(value - 1, 0, -1) if valid(v)), None)
    above = next((v for v in range(value + 1, 200) if valid(v)), None)
    return " or ".join(str(v) for v in (below, above) if v is not None)


def test_nearest_sizes_are_those_that_a_search_finds(native: Callable[..., dict[str, Any]]) -> None:
    sizes = [(None, None), (64, None), (None, 45), (48, 36), (60, 36), (37, 74), (35, 24)]
    for (width, height), working, metrics in itertools.product(sizes, (1, 2, 3, 5, 12, 40), (None, 1, 4, 6, 7, 25, 90)):
        raw = native(data__image_width=width, data__image_height=height, ingest__image_downsample=working)
        raw["evaluate"] = {"image_downsample": metrics}
        divided = [size for size in (width, height) if size is not None]

        def divides(d: int, divided: list[int] = divided) -> bool:
            return all(size % d == 0 for size in divided)

        def fits(d: int, working: int = working, divides: Any = divides) -> bool:
            return d % working == 0 and (divides(d) or not divides(working))

        expected = {}
        if not divides(working):
            expected["ingest.image_downsample"] = nearest_by_search(working, divides)
        if metrics is not None and not fits(metrics):
            expected["evaluate.image_downsample"] = nearest_by_search(metrics, fits)
        assert nearest(raw) == expected, (width, height, working, metrics)


@pytest.mark.parametrize("value", [2_000_000_000, MAX_INT, MAX_INT - 1, 1_999_999_973])
def test_huge_numbers_are_answered_at_once(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], value: int, tmp_path: Path
) -> None:
    path = write(tmp_path, yaml.safe_dump(native()))
    start = time.monotonic()
    for overrides, line in (
        ([f"ingest.image_downsample={value}"], "does not divide images of 1152 x 1024; nearest: 128"),
        ([f"evaluate.image_downsample={value}"], "does not divide images of 1152 x 1024; nearest: 128"),
        (
            [f"data.image_{side}=null" for side in ("width", "height")]
            + ["ingest.image_downsample=13", f"evaluate.image_downsample={value}"],
            f"is not a multiple of ingest.image_downsample = 13; nearest: {value // 13 * 13}",
        ),
        (
            [f"data.image_width={value}", "data.image_height=null", f"ingest.image_downsample={value - 1}"],
            f"does not divide images of {value} x ?; nearest: ",
        ),
        ([f"crop.grid_size={value}"], "must be at most 1024; nearest: 1024"),
        ([f"crop.volume_idx=[[0, {value}], [0, 16], [0, 16]]"], "reaches outside the grid of 112"),
        ([f"crop.volume_idx=[[{value}, {value}], [0, 16], [0, 16]]"], "nearest: (96, 112)"),
        ([f"holdout_views=[{value}]"], "there are 6 cameras; valid: 0 to 5"),
        ([f"render.camera={value}"], "there are 6 cameras; nearest: 5"),
    ):
        with pytest.raises(UserError) as caught:
            read_config(path, overrides)
        assert line in str(caught.value), overrides
    assert time.monotonic() - start < 5


def test_many_problems_are_counted_and_not_all_worded(native: Callable[..., dict[str, Any]]) -> None:
    views, keys = ["7"] * 20_000, [f"trian{i}: 1" for i in range(2000)]
    start = time.monotonic()
    for text, more in ((f"holdout_views: [{', '.join(views)}]", 39_969), ("\n".join(keys), 1970)):
        with pytest.raises(UserError) as caught:
            Experiment.from_yaml(yaml.safe_dump(native()) + text)
        lines = str(caught.value).splitlines()
        assert len(lines) == 31
        assert lines[-1] == f"and {more} more problems"
    many = ",".join(f'"k{i}": 1' for i in range(40_000))
    assert len(parse_json("{" + many + "}")) == 40_000
    assert time.monotonic() - start < 30


def test_every_problem_is_reported_a_line_each(native: Callable[..., dict[str, Any]]) -> None:
    raw = native(train__lrr=1, train__epochs=0, crop__ell=-1, name=3)
    assert [line.split(" = ")[0] for line in sorted(refusal(raw))] == [
        "crop.ell",
        "name",
        "train.epochs",
        "unknown key train.lrr (did you mean train.lr?)",
    ]
    raw = native(holdout_views=[9], render__camera=7, crop__volume_idx=[[0, 1], [0, 2], [0, 16]])
    assert len(refusal(raw)) == 5  # the two ranges leave 32 voxels, fewer than there are Gaussians


@pytest.mark.parametrize("key", ["videos", "masks"])
@pytest.mark.parametrize(
    "name",
    ["../other/0.mp4", "a/../../b.mp4", "/etc/passwd", "~/x.mp4", "..\\x", "C:/x", "s3://b/x", "x::s3://b", "a::b"],
)
def test_videos_stay_inside_the_recording(native: Callable[..., dict[str, Any]], key: str, name: str) -> None:
    raw = native()
    raw["data"][key][2] = name
    (line,) = refusal(raw)
    assert line.startswith(f"data.{key}[2] = {name!r}: must be a file inside data.directory")


def test_a_video_listed_twice_is_refused(native: Callable[..., dict[str, Any]]) -> None:
    raw = native()
    raw["data"]["videos"][3] = "videos/0.mp4"
    assert refusal(raw) == ["data.videos[3] = 'videos/0.mp4': is listed twice; give every camera its own"]


def test_check_accepts_the_recording_it_was_written_for(native: Callable[..., dict[str, Any]]) -> None:
    Experiment.model_validate(native(ingest__image_downsample=4)).check(6, 1152, 1024)


@pytest.mark.parametrize(
    ("recording", "lines"),
    [
        ((7, 1152, 1024), ["data.videos: 6 videos, but the calibration has 7 cameras"]),
        (
            (6, 1280, 1024),
            ["data.image_width = 1152: the videos have 1280; nearest: 1280, or null"],
        ),
        (
            (3, 1152, 1024),
            [
                "data.videos: 6 videos, but the calibration has 3 cameras",
                "holdout_views[1] = 5: there are 3 cameras; valid: 0 to 2",
            ],
        ),
        (
            (6, 1152, 1022),
            [
                "data.image_height = 1024: the videos have 1022; nearest: 1022, or null",
                "ingest.image_downsample = 4: does not divide images of 1152 x 1022; nearest: 2",
            ],
        ),
    ],
)
def test_check_refuses_another_recording(
    native: Callable[..., dict[str, Any]], recording: tuple[int, int, int], lines: list[str]
) -> None:
    e = Experiment.model_validate(native(ingest__image_downsample=4, holdout_views=[1, 5]))
    with pytest.raises(UserError) as caught:
        e.check(*recording)
    assert str(caught.value).splitlines() == lines
