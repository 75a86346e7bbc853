"""YAML and JSON: numbers and text as YAML 1.2 has them, hostile files, and round trips."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.config.serialization import dump, parse_yaml
from zoosplat.errors import UserError


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_exponents_are_numbers(native: Callable[..., dict[str, Any]], text: str) -> None:
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
def test_other_numbers_are_refused_with_what_to_write(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], text: str, nearest: str, tmp_path: Path
) -> None:
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
def test_text_is_as_it_is_written(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], text: str, tmp_path: Path
) -> None:
    e = Experiment.from_yaml(yaml.safe_dump(native()) + f"name: {text}\n")
    assert e.name == text
    path = write(tmp_path, yaml.safe_dump(native()))
    e = read_config(path, [f"name={text}", f"data.camera_names=[{text}, b, c, d, e, 0x]"])
    assert e.name == text
    assert e.data.camera_names == (text, "b", "c", "d", "e", "0x")


@pytest.mark.parametrize(("text", "nearest"), [("yes", "true"), ("ON", "true"), ("no", "false"), ("off", "false")])
def test_true_and_false_are_the_only_switches(native: Callable[..., dict[str, Any]], text: str, nearest: str) -> None:
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
def test_hostile_and_broken_files(
    write: Callable[..., str], text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert message in str(caught.value)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_bomb_of_aliases_is_refused_with_a_short_message(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], tmp_path: Path
) -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    path = write(tmp_path, f"a0: &a0 [x, x]\n{levels}holdout_views: *a29\n{yaml.safe_dump(native())}")
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert len(str(caught.value)) < 30 * 1000


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
