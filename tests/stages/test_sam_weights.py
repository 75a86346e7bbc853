"""Folders of `segment.sam_weights`: what is refused before a run, and which results they determine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import load_config
from zoosplat.errors import UserError
from zoosplat.stages.dependencies import outside_files, settings_of
from zoosplat.stages.outside_file_checks import check_outside_files
from zoosplat.stages.registry import STAGES

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")


def experiment(*overrides: str) -> Experiment:
    return load_config(DEMO, ["data.masks=auto", *overrides]).experiment


def with_sam(weights: Any, *overrides: str) -> Experiment:
    return experiment("segment.method=sam", f"segment.sam_weights={weights}", *overrides)


def folder(path: Path, kind: str = "sam2", *names: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    for name in ("model.safetensors", *names):
        (path / name).write_text(name)
    return path


def test_the_files_of_a_folder_determine_the_result_and_its_place_does_not(tmp_path: Path) -> None:
    made = folder(tmp_path / "a", "sam2", "processor_config.json", "sam2.pt", "README.md")
    e = with_sam(made)
    assert outside_files("segment", e).keys() - {f"data.videos[{c}]" for c in range(6)} >= {
        f"segment.sam_weights/{name}" for name in ("config.json", "model.safetensors", "processor_config.json")
    }
    assert not any(name.endswith((".pt", ".md")) for name in outside_files("segment", e))
    assert "segment.sam_weights" not in settings_of("segment", e)
    other = with_sam(folder(tmp_path / "b", "sam2", "processor_config.json"))
    assert outside_files("segment", other).keys() == outside_files("segment", e).keys()


def test_a_name_at_the_hub_stands_for_itself() -> None:
    e = with_sam("facebook/sam2.1-hiera-tiny")
    assert settings_of("segment", e)["segment.sam_weights"] == "facebook/sam2.1-hiera-tiny"
    assert not any(key.startswith("segment.") for key in outside_files("segment", e))
    check_outside_files(e, STAGES)
    # The network has none of it.
    assert not any(key.startswith("segment.sam_") for key in settings_of("segment", experiment()))


def test_a_relative_folder_lies_beside_the_configuration() -> None:
    assert with_sam("./weights").segment.sam_weights == str(Path(DEMO).parent / "weights")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    empty, torn = folder(tmp_path / "empty"), folder(tmp_path / "torn")
    (empty / "model.safetensors").unlink()
    (torn / "config.json").write_text("{")
    bare = folder(tmp_path / "bare")
    (bare / "config.json").unlink()
    sam2, sam3, other = (folder(tmp_path / kind, kind) for kind in ("sam2", "sam3", "vit"))
    text = "segment.sam_prompt=mouse"
    for e, line in (
        (with_sam(tmp_path / "none"), "no folder with weights; check segment.sam_weights"),
        (with_sam(empty), "has no .safetensors; other weights are not read, because they may run code"),
        (with_sam(torn), "its config.json is damaged"),
        (with_sam(bare), "has no config.json"),
        (with_sam("s3://lab/sam2"), "transformers reads folders of a file system"),
        (with_sam(other), "are of a model vit; give those of SAM 2 or SAM 3"),
        (with_sam(sam3), "are of a model sam3, which needs a text"),
        (with_sam(sam2, text), "are of a model sam2, which takes no text"),
    ):
        with pytest.raises(UserError) as caught:
            check_outside_files(e, STAGES)
        (found,) = str(caught.value).splitlines()
        assert line in found
    for e in (with_sam(sam2), with_sam(sam3, text)):
        check_outside_files(e, STAGES)
    # What does not run reads nothing.
    check_outside_files(with_sam(empty), ["ingest"])
    check_outside_files(experiment(f"segment.sam_weights={empty}"), STAGES)
