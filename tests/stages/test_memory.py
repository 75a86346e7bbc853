"""Predicted GPU memory: against a real model's sizes, measurements on a GPU, and the profiles that are made for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.config.training import ANIMALS_NETWORK
from zoosplat.stages.memory import (
    GIB,
    GPU_PROFILES,
    TrainingSizes,
    count_parameters,
    peak_gpu_bytes,
    smallest_profile,
    training_memory,
)
from zoosplat.stages.memory_advice import suggest_smaller
from zoosplat_flows.cli.app import app
from zoosplat_flows.profiles import profile_overrides
from zoosplat_model.network.unet import UNetStack
from zoosplat_model.published import PublishedStack

ROOT = Path(__file__).parents[2]
MOUSE = str(ROOT / "configs" / "mouse_6cam.yaml")
FULL = 1152 * 1024


def experiment(**changes: Any) -> Experiment:
    changes = {"ingest__image_downsample": 4, "model__base_filters": 8, "model__poolings": 4} | changes
    changes["train__start_from"] = "random"
    return read_config(MOUSE, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


@pytest.mark.parametrize(
    ("filters", "poolings", "unets", "bottleneck"), [(8, 4, 3, 0), (4, 2, 2, 16), (6, 1, 1, 0), (8, 3, 1, 8)]
)
def test_weights_are_those_of_the_network(filters: int, poolings: int, unets: int, bottleneck: int) -> None:
    with torch.device("meta"):
        stack = UNetStack(unets, filters, poolings, bottleneck, (32, 32, 16))
    changes = {"base_filters": filters, "poolings": poolings, "num_unets": unets, "bottleneck": bottleneck}
    asked = experiment(**{f"model__{key}": value for key, value in changes.items()})
    there = sum(p.numel() for p in stack.parameters())
    assert count_parameters(asked, 32 * 32 * 16) == pytest.approx(there, rel=0.04)


def test_weights_of_the_published_network_are_the_52_million_it_is_known_for() -> None:
    shape = (96, 80, 64)
    with torch.device("meta"):
        stack = PublishedStack(3, 8, 4, 512, shape)
    there = sum(p.numel() for p in stack.parameters())
    assert there == pytest.approx(52e6, rel=0.01)
    assert count_parameters(experiment(model__network="published"), math.prod(shape)) == pytest.approx(there, rel=0.002)


def test_gpus_share_the_frames_of_a_step() -> None:
    alone = peak_gpu_bytes(experiment(train__batch_frames=4))
    shared = peak_gpu_bytes(experiment(train__batch_frames=4, train__gpus=4))
    assert peak_gpu_bytes(experiment()) < shared < alone  # a copy of the gradients is added
    assert "train.batch_frames to 2" in suggest_smaller(experiment(train__batch_frames=4, train__gpus=2), shared + 1e8)


LIKE_ANIMALS = {f"model__{key}": value for key, value in ANIMALS_NETWORK.items()}

# GiB of steps on one H200 by benchmarks/memory.py: crop, pixels of a window, keys; what PyTorch held and CUDA took.
MEASURED: list[tuple[tuple[int, int, int], int, dict[str, Any], float]] = [
    ((96, 80, 64), FULL // 16, {}, 1.34),
    ((96, 80, 64), FULL // 16, {"model__base_filters": 32}, 3.20),
    ((96, 80, 64), FULL // 16, {"model__num_unets": 1, "model__base_filters": 16}, 1.29),
    ((192, 160, 128), FULL // 16, {}, 2.84),
    ((96, 80, 64), FULL, {"model__base_filters": 16}, 2.64),
    ((96, 80, 64), FULL // 4, {"model__max_gaussians": 128000}, 2.00),
    ((96, 80, 64), FULL // 4, {"train__batch_frames": 8, "model__base_filters": 16}, 3.96),
    ((144, 128, 96), FULL // 4, {"model__precision": "fp32", "model__base_filters": 16}, 3.29),
    ((96, 80, 64), FULL // 16, {"model__gaussian_mode": "2d", "model__base_filters": 16}, 1.62),
    ((96, 80, 64), FULL // 16, {"model__network": "published"}, 3.01),
    ((176, 144, 112), FULL // 4, LIKE_ANIMALS | {"model__max_gaussians": 64000}, 2.90),
    ((192, 160, 128), FULL // 4, LIKE_ANIMALS | {"model__max_gaussians": 64000}, 3.47),
    ((224, 192, 160), FULL // 4, LIKE_ANIMALS | {"model__max_gaussians": 96000}, 5.31),
    ((224, 192, 160), FULL, LIKE_ANIMALS | {"model__max_gaussians": 128000}, 5.53),
]


@pytest.mark.parametrize(("grid", "pixels", "changes", "measured"), MEASURED)
def test_prediction_is_within_15_percent_of_an_h200(
    grid: tuple[int, int, int], pixels: int, changes: dict[str, Any], measured: float
) -> None:
    parts = training_memory(experiment(**changes), TrainingSizes(math.prod(grid), pixels, views=4, cameras=6, frames=0))
    steps = sum(parts.values()) - parts["first validation"]
    assert steps / GIB == pytest.approx(measured, rel=0.15)


# GiB of whole trainings of a recording of 300 frames on one H200, by benchmarks/profiles.py.
TRAINED = [
    ("", 0.336e6, 256 * 288, 1.55),
    ("12gb", 1.97e6, 352 * 480, 3.26),
    ("24gb", 2.84e6, 352 * 480, 3.94),
    ("48gb", 4.69e6, 352 * 480, 5.20),
    ("80gb", 4.64e6, 704 * 960, 6.43),
]


@pytest.mark.parametrize(("profile", "voxels", "pixels", "measured"), TRAINED)
def test_whole_trainings_are_predicted_within_15_percent(
    profile: str, voxels: float, pixels: int, measured: float
) -> None:
    asked = read_config(MOUSE, profile_overrides(profile)) if profile else experiment()
    sizes = TrainingSizes(int(voxels), pixels, views=4, cameras=6, frames=300)
    assert peak_gpu_bytes(asked, sizes) / GIB == pytest.approx(measured, rel=0.15)


def test_peak_is_the_sum_of_its_parts_and_grows_with_every_key() -> None:
    small = experiment()
    assert peak_gpu_bytes(small) == int(sum(training_memory(small).values()))
    for key, value in (
        ("crop__grid_size", 224),
        ("train__batch_frames", 4),
        ("model__base_filters", 16),
        ("model__num_unets", 4),
        ("model__bottleneck", 64),
        ("ingest__max_frames", 200),
    ):
        smaller = experiment(ingest__max_frames=20) if key == "ingest__max_frames" else small
        assert peak_gpu_bytes(experiment(**{key: value})) > peak_gpu_bytes(smaller), key


def test_the_smallest_profile_and_advice_that_makes_it_fit() -> None:
    assert smallest_profile(experiment(), GPU_PROFILES) == "12gb"
    large = experiment(crop__grid_size=256, model__bottleneck=512)
    assert 24 * GIB < peak_gpu_bytes(large) < 80 * GIB
    assert smallest_profile(large, GPU_PROFILES) == "80gb"
    assert smallest_profile(large, ["12gb"]) is None
    for asked, room in ((large, 11 * GIB), (experiment(train__batch_frames=32), 8 * GIB), (experiment(), 2.7 * GIB)):
        assert peak_gpu_bytes(followed(asked, text := suggest_smaller(asked, room))) <= room, text
    assert "image_downsample" in suggest_smaller(experiment(), 0.5 * GIB)


def followed(asked: Experiment, text: str) -> Experiment:
    """The experiment with what an advice says set as `--set` does."""
    assert text.startswith("set "), text
    pairs = [words.split(" to ") for words in text.removeprefix("set ").split(" and ")]
    return read_config(MOUSE, [*overrides(asked), *(f"{key}={value}" for key, value in pairs)])


def overrides(asked: Experiment) -> list[str]:
    sections = ("crop", "model", "train", "dynamic", "ingest")
    whole = asked.model_dump(mode="json")
    return [f"{section}={json.dumps(whole[section])}" for section in sections]


def test_advice_is_never_a_configuration_that_is_refused() -> None:
    # Of 8,000 Gaussians at least, a grid of 16 has not the voxels; a range of a grid of 112 is not one of 96.
    asked = experiment(model__min_gaussians=8000, crop__volume_idx="[[0, 112], [16, 112], [0, 96]]")
    for room in (2.5 * GIB, 1.6 * GIB, 1.2 * GIB, 1.05 * GIB):
        if not (text := suggest_smaller(asked, room)).startswith("raise "):
            assert peak_gpu_bytes(followed(asked, text)) <= room, text
    text = suggest_smaller(asked, peak_gpu_bytes(experiment(crop__grid_size=64, model__min_gaussians=8000)) + 1e6)
    assert text == "set crop.grid_size to 64 and crop.volume_idx to null"
    animals = read_config(MOUSE, ["train.start_from=animals", "crop.grid_size=1024"])
    assert "base_filters" not in suggest_smaller(animals, 1 * GIB)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_whatever_is_advised_is_valid_and_fits(data: st.DataObject) -> None:
    draw = data.draw
    grid = draw(st.sampled_from([16, 32, 50, 112, 224, 512]))
    ends = st.integers(1, grid // 16).map(lambda k: [0, 16 * k])
    crop = draw(st.none() | st.lists(ends, min_size=3, max_size=3))
    voxels = math.prod(stop - start for start, stop in crop or [[0, grid]] * 3)
    fewest = draw(st.integers(1, min(voxels, 20_000)))
    frames = draw(st.sampled_from([1, 2, 6, 16, 33]))
    changes = {
        "crop__grid_size": grid,
        "crop__volume_idx": json.dumps(crop),
        "model__min_gaussians": fewest,
        "model__max_gaussians": draw(st.integers(fewest, 200_000)),
        "model__bottleneck": draw(st.sampled_from([0, 1, 48, 512])),
        "model__network": draw(st.sampled_from(["zoosplat", "published"])),
        "model__base_filters": draw(st.integers(1, 64)),
        "train__batch_frames": frames,
        "train__gpus": draw(st.just("auto") | st.integers(1, frames)),
        "train__method": draw(st.sampled_from(["pose_splatter", "pose_splatter", "dynamic"])),
        "dynamic__max_gaussians": draw(st.integers(1, 10**6)),
        "dynamic__views": draw(st.integers(1, 8)),
    }
    asked = experiment(**changes)
    if draw(st.booleans()):
        like = {f"model.{key}": value for key, value in ANIMALS_NETWORK.items()} | {"train.start_from": "animals"}
        asked = read_config(MOUSE, [*overrides(asked), *(f"{key}={value}" for key, value in like.items())])
    room = draw(st.floats(0.05, 1)) * peak_gpu_bytes(asked)
    text = suggest_smaller(asked, room)
    if not text.startswith("raise "):
        assert peak_gpu_bytes(followed(asked, text)) <= room, text
    sizes = TrainingSizes(max(voxels // 3, 1), 352 * 480, views=4, cameras=6, frames=300)
    text = suggest_smaller(asked, draw(st.floats(0.05, 1)) * peak_gpu_bytes(asked, sizes), sizes)
    if not text.startswith("raise "):
        followed(asked, text)


@pytest.mark.parametrize("name", ["cpu", *GPU_PROFILES])
def test_profiles_fit_what_they_are_named_for(name: str) -> None:
    asked = read_config(MOUSE, profile_overrides(name))
    if name != "cpu":
        assert smallest_profile(asked, [name]) == name
        assert asked.model.base_filters & (asked.model.base_filters - 1) == 0
    assert peak_gpu_bytes(asked) >= 1 * GIB


def test_the_chart_sets_what_the_profiles_say() -> None:
    values = yaml.safe_load((ROOT / "helm" / "zoosplat" / "values.yaml").read_text())["profiles"]
    files = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "configs" / "profiles").glob("*gb.yaml")}
    assert {name: profile["config"] for name, profile in values.items()} == files
    assert set(files) == set(GPU_PROFILES)


def test_plan_prints_parts_the_profile_and_the_key() -> None:
    def plan(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["plan", MOUSE, *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    assert "smallest profile that fits: 12gb" in plan()
    assert "peak of training" in plan("--profile", "80gb")
    assert "no profile fits; for 80gb, set " in plan("--set", "crop.grid_size=1024")
    # Its range is one of that grid, and 8,000 Gaussians are more than a grid of 16 has voxels.
    ranged = ("crop.grid_size=1024", "crop.volume_idx=[[0, 1008], [0, 1008], [0, 1008]]", "model.min_gaussians=8000")
    said = plan(*(word for key in ranged for word in ("--set", key)))
    assert "no profile fits; for 80gb, set crop.grid_size to " in said
    assert " and crop.volume_idx to null" in said
    done = CliRunner().invoke(app, ["plan", MOUSE, "--profile", "huge"])
    assert done.exit_code == 2
    assert "choose one of cpu, 12gb" in done.output


# One H200, benchmarks/dynamic.py: GiB of tensors at 100,000 Gaussians, 50 frames of 4 views of 288 x 256 pixels.
@pytest.mark.parametrize(("views", "measured"), [(1, 2.38), (2, 2.41), (4, 3.06)])
def test_prediction_of_the_dynamic_trainer(views: int, measured: float) -> None:
    asked = experiment(train__method="dynamic", dynamic__views=views, dynamic__max_gaussians=100_000)
    parts = training_memory(asked, TrainingSizes(1, 288 * 256, 4, 4, 50))
    assert measured <= (sum(parts.values()) - parts["CUDA"]) / GIB <= 1.3 * measured
    large = TrainingSizes(1, 288 * 256, 4, 6, 300)
    assert smallest_profile(experiment(train__method="dynamic"), GPU_PROFILES, large) == "12gb"
    assert suggest_smaller(asked, 4.2 * GIB, large) == "set dynamic.max_gaussians to 50000"
    assert suggest_smaller(asked, 1 * GIB, large).startswith("raise ingest.image_downsample or ingest.frame_jump")
