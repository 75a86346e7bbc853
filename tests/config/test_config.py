"""Configuration: every refusal with its message, round trips, the classic JSON, overrides, hostile files."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from zoosplat.config.classic import classic_project_directory, parse_classic
from zoosplat.config.experiment import Experiment
from zoosplat.config.load import load_config, read_config
from zoosplat.config.serialization import dump, parse_json, parse_yaml
from zoosplat.config.values import MAX_INT
from zoosplat.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSIC = CONFIGS / "classic" / "markerless_mouse_nerf.json"


def native(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "data": {
            "directory": "rec",
            "videos": [f"videos/{i}.mp4" for i in range(6)],
            "masks": [f"masks/{i}.mp4" for i in range(6)],
            "calibration": "camera_params.h5",
            "image_width": 1152,
            "image_height": 1024,
        },
        "center_rotation": {"ell": 0.25},
        "crop": {"ell": 0.22},
    }
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        target = raw
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return raw


def classic_keys(**changes: Any) -> dict[str, Any]:
    return {**json.loads(CLASSIC.read_text()), **changes}


def refusal(raw: dict[str, Any]) -> list[str]:
    """The lines of the error that a native configuration is refused with."""
    with pytest.raises(UserError) as caught:
        Experiment.from_yaml(yaml.safe_dump(raw))
    return str(caught.value).splitlines()


# -- defaults and types -------------------------------------------------------------------------------------------
def test_defaults_are_those_of_the_published_method_but_for_its_bottom() -> None:
    e = Experiment.from_yaml(yaml.safe_dump(native()))
    assert (e.unit, e.holdout_views, e.adaptive_camera, e.reuse) == ("m", (), False, None)
    assert (e.train.lr, e.train.epochs, e.train.img_lambda, e.train.ssim_lambda) == (1e-4, 50, 0.5, 0.0)
    assert (e.crop.grid_size, e.center_rotation.grid_size, e.crop.volume_idx) == (112, 112, None)
    assert (e.model.num_unets, e.model.base_filters, e.model.poolings, e.model.bottleneck) == (3, 8, 4, 0)
    assert (e.model.min_gaussians, e.model.max_gaussians, e.pack.window) == (1024, 16000, "auto")
    hash(e)
    with pytest.raises(ValidationError):
        e.name = "other"


def test_observed_views_are_the_others_in_order() -> None:
    e = Experiment.model_validate(native(holdout_views=[5, 1]))
    assert e.holdout_views == (1, 5)
    assert e.observed_views(6) == (0, 2, 3, 4)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_exponents_are_numbers(text: str) -> None:
    assert Experiment.from_yaml(yaml.safe_dump(native()) + f"train: {{lr: {text}}}\n").train.lr == 1e-4


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0o17", 15),
        ("0x1F", 31),
        ("+5", 5),
        ("-0", 0),
        ("1.", 1.0),
        (".5", 0.5),
        ("1E3", 1000.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, number: float) -> None:
    value = parse_yaml(f"[{text}]")[0]
    assert (value, type(value)) == (number, type(number))
    assert math.isnan(parse_yaml(".NaN"))


NO_NUMBERS = [
    ("1:30", "90 (1:30 in sixties)"),
    ("1:00", "60 (1:00 in sixties)"),
    ("1:30:00.5", "5400.5 (1:30:00.5 in sixties)"),
    ("0100", "100 (decimal) or 0o100 (octal: 64)"),
    ("007", "7"),
    ("08", "8"),
    ("-0100", "-100"),
    ("1_0", "10"),
    ("1_000.5", "1000.5"),
    ("0b11", "3"),
    ("-0x1F", "-31"),
]


@pytest.mark.parametrize(("text", "nearest"), NO_NUMBERS)
def test_other_numbers_are_refused_with_what_to_write(text: str, nearest: str, tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(native()))
    for key, rule in (("train.max_minutes", "must be a number"), ("train.epochs", "must be a whole number")):
        with pytest.raises(UserError) as caught:
            Experiment.from_yaml(yaml.safe_dump(native()) + f"train: {{{key[6:]}: {text}}}\n")
        assert str(caught.value) == f"{key} = {text!r}: {rule}; nearest: {nearest}"
        with pytest.raises(UserError) as caught:
            read_config(path, [f"{key}={text}"])
        assert str(caught.value) == f"{path}: {key} = {text!r}: {rule}; nearest: {nearest}"
    for override, line in {
        f"holdout_views=[1, {text}]": f"holdout_views[1] = {text!r}: must be a whole number; nearest: {nearest}",
        f"train.gpus={text}": f"train.gpus = {text!r}: must be auto or a whole number, 1 at least; nearest: {nearest}",
        f"data.up=[0, {text}, 1]": f"data.up = [0, {text!r}, 1]: must be auto, a direction [x, y, z] that is not zero, "
        f"or the name of an .npz file; nearest: {nearest} for {text}",
    }.items():
        with pytest.raises(UserError) as caught:
            read_config(path, [override])
        assert str(caught.value) == f"{path}: {line}"


LIKE_NUMBERS = [text for text, _ in NO_NUMBERS] + ["2024-01-01", "2024-01-01 10:00:00", "yes", "no", "on", "off", "y"]


@pytest.mark.parametrize("text", LIKE_NUMBERS)
def test_text_is_as_it_is_written(text: str, tmp_path: Path) -> None:
    e = Experiment.from_yaml(yaml.safe_dump(native()) + f"name: {text}\n")
    assert e.name == text
    path = write(tmp_path, yaml.safe_dump(native()))
    e = read_config(path, [f"name={text}", f"data.camera_names=[{text}, b, c, d, e, 0x]"])
    assert e.name == text
    assert e.data.camera_names == (text, "b", "c", "d", "e", "0x")


@pytest.mark.parametrize(("text", "nearest"), [("yes", "true"), ("ON", "true"), ("no", "false"), ("off", "false")])
def test_true_and_false_are_the_only_switches(text: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        Experiment.from_yaml(yaml.safe_dump(native()) + f"adaptive_camera: {text}\n")
    assert str(caught.value) == f"adaptive_camera = {text!r}: must be true or false; nearest: {nearest}"


@pytest.mark.parametrize("tagged", ["!!int 0100", "!!int ''", "!!float 1:30", "!!bool yes", "!!bool x", "!!null x"])
def test_tags_do_not_bring_yaml_1_1_back(tagged: str) -> None:
    with pytest.raises(UserError, match=r"not valid YAML: line 1: .* is no (int|float|bool|null) of YAML 1\.2"):
        parse_yaml(f"a: {tagged}")
    for other in ("!!timestamp 2024-01-01", "!!timestamp x", "!!binary eA==", "!!set {a}"):
        with pytest.raises(UserError, match="could not determine a constructor for the tag"):
            parse_yaml(other)
    assert parse_yaml("[!!str 0100, !!int 100, <<]") == ["0100", 100, "<<"]


# -- dotted keys --------------------------------------------------------------------------------------------------
def test_dotted_keys_are_keys_of_their_sections(tmp_path: Path) -> None:
    plain = native(crop__grid_size=256, train__lr=1e-3, train__epochs=7)
    flat = {"data": plain["data"], "center_rotation.ell": 0.25, "crop": {"ell": 0.22}, "crop.grid_size": 256}
    flat |= {"train.lr": 1e-3, "train": {"epochs": 7}}
    expected = Experiment.from_yaml(yaml.safe_dump(plain))
    assert Experiment.from_yaml(yaml.safe_dump(flat, sort_keys=False)) == expected
    assert Experiment.from_yaml(yaml.safe_dump(dict(reversed(flat.items())), sort_keys=False)) == expected
    read = read_config(write(tmp_path, yaml.safe_dump(flat)), ["crop.grid_size=128"])
    assert (read.crop.grid_size, read.crop.ell) == (128, 0.22)
    assert read.data.directory == str(tmp_path / "rec")
    flat.pop("data")
    flat |= {f"data.{key}": value for key, value in plain["data"].items()}
    assert read_config(write(tmp_path, yaml.safe_dump(flat))).data.directory == str(tmp_path / "rec")
    assert read_config(write(tmp_path, json.dumps(flat))).crop.grid_size == 256
    profile = (CONFIGS / "profiles" / "24gb.yaml").read_text()
    raw = {key: value for key, value in plain.items() if key not in ("crop", "train")}
    e = Experiment.from_yaml(yaml.safe_dump(raw | {"crop.ell": 0.22}) + profile)
    assert (e.crop.grid_size, e.model.base_filters) == (224, 16)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            "crop.ell: 0.3",
            "crop.ell is given twice, once with dots and once in its section; keep one of them",
        ),
        ("crop.grid_sise: 64", "unknown key crop.grid_sise (did you mean crop.grid_size?)"),
        ("crop.grid_size: 8", "crop.grid_size = 8: must be at least 16; nearest: 16"),
        ("name.first: a\nname: b", "name is given twice, once with dots and once in its section; keep one of them"),
        ("name: b\nname.first: a", "name.first: name is given a value of its own as well; keep one of them"),
        ("crop..ell: 1", "unknown key crop..ell (did you mean "),
    ],
)
def test_dotted_keys_that_cannot_be(more: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        Experiment.from_yaml(yaml.safe_dump(native()) + more)
    assert str(caught.value).splitlines()[0].startswith(line)


def test_a_dotted_key_does_not_leak_through_a_yaml_alias() -> None:
    text = yaml.safe_dump(native()) + "evaluate: &a {device: cpu}\nrender: *a\nrender.camera: 2\n"
    assert Experiment.from_yaml(text).render.camera == 2  # evaluate has no such key
    with pytest.raises(UserError, match="unknown key x"):
        Experiment.from_yaml(yaml.safe_dump(native()) + "x: &a {x: *a, y.z: *a}\n")


def test_classic_files_have_no_dotted_keys() -> None:
    with pytest.raises(UserError, match=r"^unknown key crop\.grid_size"):
        parse_classic(classic_keys(**{"crop.grid_size": 64}), "/configs")


# -- refusals -----------------------------------------------------------------------------------------------------
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
def test_refusal_names_key_value_and_what_is_valid(changes: dict[str, Any], line: str) -> None:
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
def test_crop_ranges(given_range: tuple[int, int], fault: str, nearest: tuple[int, int]) -> None:
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


def test_nearest_sizes_are_those_that_a_search_finds() -> None:
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
def test_huge_numbers_are_answered_at_once(value: int, tmp_path: Path) -> None:
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


def test_many_problems_are_counted_and_not_all_worded() -> None:
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


def test_every_problem_is_reported_a_line_each() -> None:
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
def test_videos_stay_inside_the_recording(key: str, name: str) -> None:
    raw = native()
    raw["data"][key][2] = name
    (line,) = refusal(raw)
    assert line.startswith(f"data.{key}[2] = {name!r}: must be a file inside data.directory")

    classic_key = {"videos": "video_fns", "masks": "mask_video_fns"}[key]
    names = classic_keys()[classic_key]
    with pytest.raises(UserError, match=rf"^{classic_key}\[2\] = .*inside data_directory"):
        parse_classic(classic_keys(**{classic_key: [*names[:2], name, *names[3:]]}), "/configs")


def test_a_video_listed_twice_is_refused() -> None:
    raw = native()
    raw["data"]["videos"][3] = "videos/0.mp4"
    assert refusal(raw) == ["data.videos[3] = 'videos/0.mp4': is listed twice; give every camera its own"]


# -- against the recording ----------------------------------------------------------------------------------------
def test_check_accepts_the_recording_it_was_written_for() -> None:
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
def test_check_refuses_another_recording(recording: tuple[int, int, int], lines: list[str]) -> None:
    e = Experiment.model_validate(native(ingest__image_downsample=4, holdout_views=[1, 5]))
    with pytest.raises(UserError) as caught:
        e.check(*recording)
    assert str(caught.value).splitlines() == lines


# -- files --------------------------------------------------------------------------------------------------------
def write(folder: Path, text: str, name: str = "c.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("name", ["demo.yaml", "mouse_6cam.yaml", "mouse_6cam_dynamic.yaml", "cylinder_5cam.yaml"])
def test_shipped_configurations_are_valid(name: str) -> None:
    e = read_config(str(CONFIGS / name))
    assert e.unit == "m"
    assert len(e.holdout_views) > 0
    assert e.data.directory == str(CONFIGS / e.data.directory.rsplit("/", 1)[1])


def test_directories_are_relative_to_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(native(data__directory="../rec/./a", reuse="p")))
    e = read_config(path)
    assert e.data.directory == str(tmp_path.parent / "rec" / "a")
    assert e.reuse == str(tmp_path / "p")
    assert e.data.url("videos/0.mp4") == f"{e.data.directory}/videos/0.mp4"
    assert e.data.url("/elsewhere/c.h5") == "/elsewhere/c.h5"
    e = read_config(path, ["data.directory=s3://bucket/rec/"])
    assert e.data.directory == "s3://bucket/rec"
    assert e.data.url("videos/0.mp4") == "s3://bucket/rec/videos/0.mp4"
    assert Experiment.model_validate(native(data__directory="file:///rec/")).data.url("c.h5") == "/rec/c.h5"


def test_a_configuration_on_s3_keeps_to_its_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"s3://bucket/configs/c.yaml": native(data__directory="../rec", reuse="../../bucket2/p")}
    monkeypatch.setattr("zoosplat.storage.objects.read_bytes", lambda url: yaml.safe_dump(texts[url]).encode())
    with pytest.raises(UserError, match=r"c\.yaml: \.\./\.\./bucket2/p: leads out of the bucket bucket"):
        read_config("s3://bucket/configs/c.yaml")
    assert read_config("s3://bucket/configs/c.yaml", ["reuse=p"]).data.directory == "s3://bucket/rec"


def test_overrides_are_typed_and_checked(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(native(crop__volume_idx=[[0, 100], [0, 96], [0, 96]])))
    e = read_config(
        path,
        ["train.lr=3e-4", "crop.volume_idx=null", "holdout_views=[5, 1]", "adaptive_camera=true", "name='12'"],
    )
    assert (e.train.lr, e.crop.volume_idx, e.holdout_views, e.adaptive_camera, e.name) == (
        3e-4,
        None,
        (1, 5),
        True,
        "12",
    )
    for override, message in {
        "train.lrr=1": "unknown key train.lrr (did you mean train.lr?)",
        "train.lr": "--set train.lr: write section.key=value, for example train.lr=1e-4",
        "name.a.b=1": "--set name.a.b=1: name is not a section",
        "train.lr=[": "--set train.lr=[: not valid YAML: line 1: ",
    }.items():
        with pytest.raises(UserError) as caught:
            read_config(path, ["crop.volume_idx=null", "name=x", override])
        assert str(caught.value).startswith(f"{path}: {message}")


def test_an_override_does_not_leak_through_a_yaml_alias(tmp_path: Path) -> None:
    text = yaml.safe_dump(native()) + "evaluate: &a {device: cpu}\nrender: *a\n"
    e = read_config(write(tmp_path, text), ["render.device=cuda"])
    assert (e.evaluate.device, e.render.device) == ("cpu", "cuda")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor for the tag"),
        (
            "!!python/object/new:zoosplat.config.experiment.Experiment []",
            "could not determine a constructor for the tag",
        ),
        ("name: a\nname: b\n", "not valid YAML: line 2: key name is given twice"),
        ("? [a, b]\n: 1\n", "not valid YAML: line 1: found unhashable key"),
        ("name: [", "not valid YAML: line 1: "),
        ("name: \x07", "not valid YAML: "),
        ("[" * 5000, "not valid YAML: "),
        ('{"name": "a", "name": "b"}', "not valid JSON: key name is given twice"),
        ('{"name": }', "not valid JSON: Expecting value: line 1 column 10"),
        ("", "must be a mapping of keys to values"),
        ("- a", "must be a mapping of keys to values"),
        ("1: 2", "keys should be strings"),
        ("x" * (1 << 20) + "xx", "1048578 bytes are too many for a configuration"),
    ],
)
def test_hostile_and_broken_files(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert message in str(caught.value)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_bomb_of_aliases_is_refused_with_a_short_message(tmp_path: Path) -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    path = write(tmp_path, f"a0: &a0 [x, x]\n{levels}holdout_views: *a29\n{yaml.safe_dump(native())}")
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert len(str(caught.value)) < 30 * 1000


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    for path, message in {"no.yaml": "no such file", "b.yaml": "not text in UTF-8", ".": "is a folder"}.items():
        with pytest.raises(UserError, match=message):
            read_config(str(tmp_path / path))


# -- classic JSON -------------------------------------------------------------------------------------------------
def test_classic_file_maps_to_the_same_experiment() -> None:
    loaded = load_config(str(CLASSIC))
    e, folder = loaded.experiment, CLASSIC.parent
    project = str(folder / "output/markerless_mouse_nerf")
    assert loaded.project == project
    assert e.name == "markerless_mouse_nerf"
    assert (e.unit, e.pack.window, e.reuse) == ("normalized", "full", None)
    assert e.data.directory == str(folder / "data/markerless_mouse_1_nerf")
    assert e.data.videos == tuple(f"videos/{i}.mp4" for i in range(6))
    assert e.data.masks == tuple(f"masks/{i}.mp4" for i in range(6))
    assert (e.data.calibration, e.data.up) == (f"{project}/camera_params.h5", f"{project}/vertical_lines.npz")
    assert (e.data.fps, e.data.image_width, e.data.image_height) == (100, 1152, 1024)
    assert (e.ingest.frame_jump, e.ingest.max_frames, e.ingest.image_downsample) == (5, 3600, 4)
    assert (e.center_rotation.ell, e.center_rotation.grid_size) == (0.25, 112)
    assert (e.crop.ell, e.crop.grid_size, e.crop.volume_idx) == (0.22, 112, ((0, 96), (16, 96), (24, 88)))
    assert (e.model.volume_fill_color, e.model.gaussian_mode) == (0.38, "3d")
    assert (e.train.lr, e.train.img_lambda, e.train.ssim_lambda) == (1e-4, 0.5, 0.0)
    assert (e.train.valid_every, e.train.plot_every, e.train.save_every, e.train.epochs) == (5, 1, 1, 50)
    e.check(6, 1152, 1024)


def test_classic_keys_without_effect_are_named() -> None:
    gaussians = {"sigma_cutoff": 3.0, "kernel_size": 5, "batch_size": 5}
    raw = classic_keys(gaussian_mode="2d", gaussian_config=gaussians, train_time=3600, valid_time=60)
    e, notes = parse_classic(raw, "/configs")
    assert e.model.gaussian_mode == "2d"
    named = {note.split(" has no effect: ")[0] for note in notes if " has no effect: " in note}
    assert named == {
        *("volume_directory", "image_directory", "render_directory", "image_compression_level"),
        *("volume_compression_level", "center_rotation_fn", "volume_sum_fn", "model_fn", "feature_fn"),
        *("embedding_fn", "gaussian_config", "train_time", "valid_time"),
    }
    # Every key that has an effect changes the experiment, and no other does.
    for key, other in {"volume_sum_fn": "x.npy", "model_fn": "x.pt", "train_time": 1, "render_directory": "x"}.items():
        assert parse_classic({**raw, key: other}, "/configs")[0] == e
    for key, other in {
        "ell": 0.2,
        "ell_tracking": 0.3,
        "grid_size": 128,
        "lr": 1e-3,
        "fps": 50,
        "frame_jump": 1,
    }.items():
        assert parse_classic({**raw, key: other}, "/configs")[0] != e


def test_classic_optional_keys_may_be_absent_or_null() -> None:
    needed = ("data_directory", "project_directory", "video_fns", "mask_video_fns")
    raw = {key: value for key, value in classic_keys().items() if key in needed}
    e, notes = parse_classic(raw, "/configs")
    assert (e.crop.ell, e.center_rotation.ell, e.crop.volume_idx, e.holdout_views) == (0.22, 0.22, None, ())
    assert (e.data.up, e.data.fps, e.data.image_width, e.ingest.image_downsample) == ("auto", None, None, 1)
    assert e.data.calibration == "/configs/output/markerless_mouse_nerf/camera_params.h5"
    assert any(note.startswith("ell is absent: 0.22") for note in notes)
    assert parse_classic({**dict.fromkeys(classic_keys()), **raw}, "/configs") == (e, notes)
    for key in needed:
        with pytest.raises(UserError, match=f"^{key} is missing"):
            parse_classic({k: v for k, v in raw.items() if k != key}, "/configs")


@pytest.mark.parametrize(
    ("project", "images", "reuse"),
    [
        ("/out/mouse_4", "../mouse_6_cameras/images", "/out/mouse_6_cameras"),
        ("s3://b/out/mouse_4/", "../mouse_6_cameras/images/", "s3://b/out/mouse_6_cameras"),
        ("/out/mouse_4", "/big/mouse_6_cameras/images", "/big/mouse_6_cameras"),
        ("out/mouse_4/", "images", None),
        ("/out/mouse_4", "../mouse_4/images", None),
        ("/out/mouse_4", ".", None),
    ],
)
def test_classic_images_of_another_project_are_reused(project: str, images: str, reuse: str | None) -> None:
    raw = classic_keys(project_directory=project, image_directory=images, holdout_views=[5, 1])
    e, notes = parse_classic(raw, "/configs")
    assert (e.reuse, e.holdout_views) == (reuse, (1, 5))
    assert any(note.startswith("image_directory") and (reuse or "no effect") in note for note in notes)


def test_classic_shared_calibration_is_found_beside_the_project() -> None:
    e, _ = parse_classic(classic_keys(project_directory="/out/a", camera_fn="../b/c.h5"), "/configs")
    assert e.data.calibration == "/out/b/c.h5"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"holdout_view": []}, "unknown key holdout_view (did you mean holdout_views?)"),
        ({"gaussian_config": {"sigma": 3.0}}, "unknown key gaussian_config.sigma (did you mean gaussian_config.sigma_"),
        ({"lr": "fast"}, "lr = 'fast': must be a number"),
        ({"lr": -1}, "lr = -1"),
        ({"adaptive_camera": 0}, "adaptive_camera = 0: must be true or false"),
        (
            {"volume_idx": [[0, 96], [16, 96], [25, 90]]},
            "volume_idx[2] = (25, 90): length 65 is not a multiple of 16; ",
        ),
        ({"image_downsample": 3}, "image_downsample = 3: does not divide images of 1152 x 1024; nearest: 2 or 4"),
        ({"video_fns": ["0.mp4"]}, "video_fns = ['0.mp4']: must have at least 2 entries"),
        (
            {"vertical_lines_fn": "up.txt"},
            "vertical_lines_fn = '/configs/output/markerless_mouse_nerf/up.txt': must be ",
        ),
    ],
)
def test_classic_refusals_use_the_classic_names(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_classic(classic_keys(**changes), "/configs")
    assert str(caught.value).startswith(line)


def test_classic_overrides_use_native_names_and_mend(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(classic_keys(volume_idx=[[0, 100], [0, 96], [0, 96]])), "c.json")
    with pytest.raises(UserError, match=r"c\.json: volume_idx\[0\] = \(0, 100\)"):
        read_config(path)
    e = read_config(path, ["crop.volume_idx=null", "train.epochs=3"])
    assert (e.crop.volume_idx, e.train.epochs, e.unit) == (None, 3, "normalized")


def test_classic_files_are_told_by_content(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, yaml.safe_dump(classic_keys()), "a.yaml")).unit == "normalized"
    assert read_config(write(tmp_path, json.dumps(native()), "b.json")).unit == "m"


def test_classic_project_directory() -> None:
    assert classic_project_directory({"project_directory": "out/a/"}, "/configs") == "/configs/out/a"
    assert classic_project_directory({"project_directory": "s3://b/a/"}) == "s3://b/a"
    with pytest.raises(UserError, match="project_directory is missing"):
        classic_project_directory({})


# -- round trips --------------------------------------------------------------------------------------------------
TEXT = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)
NAMES = TEXT.filter(lambda s: not (s.startswith(("/", "\\", "~")) or ".." in s or "::" in s or ":/" in s))
POSITIVE = st.floats(1e-12, 1e12)


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    n = draw(st.integers(2, 5))
    names = st.lists(NAMES, min_size=n, max_size=n, unique=True)
    grid = draw(st.integers(48, 128))
    ranges = st.tuples(st.integers(0, grid - 48), st.integers(1, 3)).map(lambda r: (r[0], r[0] + 16 * r[1]))
    working = draw(st.integers(1, 8))
    vector = st.tuples(*[st.floats(-10, 10)] * 3).filter(lambda v: max(map(abs, v)) > 1e-3)
    raw = {
        "name": draw(
            TEXT | st.sampled_from(["1e-4", "no", "null", "0x1", "0o17", "- a", "a: b", "#", "~", *LIKE_NUMBERS])
        ),
        "data": {
            "directory": draw(TEXT),
            "videos": draw(names),
            "masks": draw(names),
            "camera_names": draw(st.none() | names),
            "calibration": draw(NAMES | names),
            "up": draw(st.just("auto") | vector | NAMES.map(lambda s: s + ".npz")),
            "fps": draw(st.none() | POSITIVE),
            "image_width": draw(st.none() | st.integers(1, 100).map(lambda k: k * working)),
        },
        "holdout_views": draw(st.permutations(range(n)).map(lambda p: p[: n - 2])),
        "adaptive_camera": draw(st.booleans()),
        "reuse": draw(st.none() | TEXT),
        "ingest": {"image_downsample": working, "max_frames": draw(st.none() | st.integers(1, 10**6))},
        "center_rotation": {"ell": draw(POSITIVE)},
        "crop": {
            "ell": draw(POSITIVE),
            "grid_size": grid,
            "volume_idx": draw(st.none() | st.tuples(ranges, ranges, ranges)),
        },
        "train": {"lr": draw(POSITIVE), "max_minutes": draw(st.none() | POSITIVE)},
        "render": {"angle_offset": draw(st.floats(allow_nan=False, allow_infinity=False))},
    }
    return Experiment.model_validate(raw)


@settings(max_examples=100, deadline=None)
@given(experiments())
def test_round_trip_is_exact(experiment: Experiment) -> None:
    assert Experiment.from_yaml(experiment.to_yaml()) == experiment
    assert Experiment.from_yaml(experiment.describe()) == experiment


SCALARS = st.one_of(
    st.sampled_from([*LIKE_NUMBERS, "0o17", "0x1F", "1e-4", "1E3", ".5", "5.", ".inf", "null", "~", "<<", "=", "true"]),
    st.from_regex(r"[-+]?[0-9][0-9_:.]{0,6}([eE][-+]?[0-9]{1,2})?", fullmatch=True),
    st.text(st.characters(exclude_categories=("C", "Z")), max_size=6),
)


@settings(max_examples=150, deadline=None)
@given(SCALARS)
def test_text_is_written_so_that_every_reader_takes_it_for_text(text: str) -> None:
    """PyYAML's own reader is one of YAML 1.1."""
    for flow in (False, True):
        written = dump({"key": text, "list": [text]}, default_flow_style=flow)
        for read in (parse_yaml, yaml.safe_load):
            assert read(written) == {"key": text, "list": [text]}, written


def test_describe_documents_every_key() -> None:
    e = read_config(str(CLASSIC))
    lines = {line.split(":")[0].strip(): line for line in e.describe().splitlines() if line}

    def leaves(section: BaseModel) -> None:
        for name, field in type(section).model_fields.items():
            assert field.description, name
            assert "  # " in lines[name], name
            if isinstance(getattr(section, name), BaseModel):
                leaves(getattr(section, name))

    leaves(e)


def test_weights_to_start_from(tmp_path: Path) -> None:
    text = (CONFIGS / "mouse_6cam.yaml").read_text()
    assert read_config(str(CONFIGS / "mouse_6cam.yaml")).train.start_from == "animals"
    file = tmp_path / "mouse.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"model\.base_filters = 8: train\.start_from = animals are weights .* with 16"):
        read_config(str(file), ["model.base_filters=8"])
    assert read_config(str(file), ["model.base_filters=8", "train.start_from=random"]).train.start_from == "random"
    file.write_text(text.replace("start_from: animals", "start_from: ../other mouse"))
    assert read_config(str(file)).train.start_from == str(tmp_path.parent / "other mouse")
    file.write_text(text.replace("start_from: animals", "start_from: s3://lab/results/mouse 6"))
    assert read_config(str(file), ["model.base_filters=8"]).train.start_from == "s3://lab/results/mouse 6"
