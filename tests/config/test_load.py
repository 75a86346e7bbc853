"""Reading configurations: files, folders, overrides and dotted keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


CLASSIC = CONFIGS / "classic" / "markerless_mouse_nerf.json"


def test_dotted_keys_are_keys_of_their_sections(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], tmp_path: Path
) -> None:
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
def test_dotted_keys_that_cannot_be(native: Callable[..., dict[str, Any]], more: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        Experiment.from_yaml(yaml.safe_dump(native()) + more)
    assert str(caught.value).splitlines()[0].startswith(line)


def test_a_dotted_key_does_not_leak_through_a_yaml_alias(native: Callable[..., dict[str, Any]]) -> None:
    text = yaml.safe_dump(native()) + "evaluate: &a {device: cpu}\nrender: *a\nrender.camera: 2\n"
    assert Experiment.from_yaml(text).render.camera == 2  # evaluate has no such key
    with pytest.raises(UserError, match="unknown key x"):
        Experiment.from_yaml(yaml.safe_dump(native()) + "x: &a {x: *a, y.z: *a}\n")


@pytest.mark.parametrize("name", ["demo.yaml", "mouse_6cam.yaml", "mouse_6cam_dynamic.yaml", "cylinder_5cam.yaml"])
def test_shipped_configurations_are_valid(name: str) -> None:
    e = read_config(str(CONFIGS / name))
    assert e.unit == "m"
    assert len(e.holdout_views) > 0
    assert e.data.directory == str(CONFIGS / e.data.directory.rsplit("/", 1)[1])


def test_directories_are_relative_to_the_file(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], tmp_path: Path
) -> None:
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


def test_a_configuration_on_s3_keeps_to_its_bucket(
    native: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"s3://bucket/configs/c.yaml": native(data__directory="../rec", reuse="../../bucket2/p")}
    monkeypatch.setattr("zoosplat.storage.objects.read_bytes", lambda url: yaml.safe_dump(texts[url]).encode())
    with pytest.raises(UserError, match=r"c\.yaml: \.\./\.\./bucket2/p: leads out of the bucket bucket"):
        read_config("s3://bucket/configs/c.yaml")
    assert read_config("s3://bucket/configs/c.yaml", ["reuse=p"]).data.directory == "s3://bucket/rec"


def test_overrides_are_typed_and_checked(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], tmp_path: Path
) -> None:
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


def test_an_override_does_not_leak_through_a_yaml_alias(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], tmp_path: Path
) -> None:
    text = yaml.safe_dump(native()) + "evaluate: &a {device: cpu}\nrender: *a\n"
    e = read_config(write(tmp_path, text), ["render.device=cuda"])
    assert (e.evaluate.device, e.render.device) == ("cpu", "cuda")


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    for path, message in {"no.yaml": "no such file", "b.yaml": "not text in UTF-8", ".": "is a folder"}.items():
        with pytest.raises(UserError, match=message):
            read_config(str(tmp_path / path))


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
