"""Weights that a training begins with, and how those of random animals are made."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoosplat.config.experiment import Experiment
from zoosplat.config.training import ANIMALS_NETWORK
from zoosplat.errors import UserError
from zoosplat.stages.begin import begin_run
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import objects
from zoosplat.synthetic import random_animals
from zoosplat_model import animals as of_animals
from zoosplat_model import checkpoints
from zoosplat_model.animals import VIEWS_PER_FRAME, PartialRigSplatter, RandomAnimalReader
from zoosplat_model.checkpoints import Checkpoint
from zoosplat_model.frames import open_reader
from zoosplat_model.network.splatter import PoseSplatter
from zoosplat_model.registry import build_splatter
from zoosplat_train import network_loop, pretrain, start_weights
from zoosplat_train.ranks import Ranks
from zoosplat_train.stage import STAGE
from zoosplat_train.trainer import NetworkTrainer

CPU = torch.device("cpu")


def configure(project: Project, model: dict[str, Any] | None = None, force: bool = False, **train: Any) -> Run:
    """A run with other settings of network and training; with `force` one that trains again."""
    old = open_run(project).experiment
    new = {"train": old.train.model_copy(update=train), "model": old.model.model_copy(update=model or {})}
    draft = draft_run(project, old.model_copy(update=new), ["train"] if force else [])
    draft.require(["train"])
    return record_run(draft, ["train"])


def untrained(project: Project) -> PoseSplatter:
    experiment = open_run(project).experiment
    return build_splatter(open_reader(open_run(project), CPU), experiment)


def of(project: Project, pointer: checkpoints.Pointer) -> Checkpoint:
    found = checkpoints.load(open_run(project).output_url("train"), pointer)
    assert found is not None
    return found


@pytest.fixture
def trained(tiny: Project) -> Project:
    """Without a perceptron at the bottom, which would tie the weights to the volume."""
    configure(tiny, {"bottleneck": 0}, epochs=6, valid_every=6)
    run_stage(STAGE, open_run(tiny))
    return tiny


def stop_in_the_second_epoch(done: int, total: int, message: str) -> None:
    if "epoch 2" in message:
        raise KeyboardInterrupt


def without_lengths(name: str, value: torch.Tensor) -> torch.Tensor:
    """Filters of length 1: only what they look for is handed on."""
    if "refine" in name and name.endswith(("first.weight", "second.weight")):
        value = value / torch.linalg.vector_norm(value.flatten(1), dim=1).view(-1, 1, 1, 1, 1)
    return value


# -- train.start_from ---------------------------------------------------------------------------------------------
def test_a_training_goes_on_from_what_another_one_learned(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_loop, "REPORT_STEPS", 1)
    monkeypatch.setattr(network_loop, "MAX_TIME_SHARE", math.inf)  # every epoch is saved
    learned = of(trained, "best").average
    other = Project.at(str(shutil.copytree(trained.url, tmp_path / "other")))
    configure(other, epochs=2, lr=1e-9, valid_every=1, start_from=trained.url)
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, open_run(other), progress=stop_in_the_second_epoch)
    for name, value in of(other, "best").average.items():
        if name != "camera_color":
            found, expected = (without_lengths(name, v) for v in (value, learned[name]))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert of(other, "best").average["camera_color"].abs().max() < 1e-6  # those of the other rig say nothing
    assert learned["camera_color"].abs().max() > 1e-4

    shutil.rmtree(open_run(trained).result("train").folder)  # what a training has begun it ends without
    run_stage(STAGE, open_run(other))
    assert of(other, "latest").progress.epoch == 2


def test_weights_of_a_file_are_those_that_were_written(trained: Project, tmp_path: Path) -> None:
    model = untrained(trained)
    model.load_state_dict(of(trained, "best").average)
    file = str(tmp_path / "weights.safetensors")
    start_weights.write(file, model)
    again = untrained(trained)
    start_weights.load_into(again, file)
    for name, value in again.state_dict().items():
        if name != "camera_color":
            found, expected = (without_lengths(name, v) for v in (value, model.state_dict()[name]))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
            assert value.dtype == torch.float32


def test_the_animals_that_come_with_the_package_fit_their_network(tiny: Project) -> None:
    configure(tiny, {**ANIMALS_NETWORK, "network": "zoosplat"})
    model = untrained(tiny)
    start_weights.load_into(model, "animals")
    last = [value for name, value in model.refine.named_parameters() if ".last." in name]
    assert len(last) == 6
    assert all(value.abs().max() > 1e-3 for value in last)  # all zero before
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_weights_that_cannot_be_used_are_a_line(trained: Project, tmp_path: Path) -> None:
    model = untrained(trained)
    with pytest.raises(UserError, match=r"nothing: holds no finished training; check train\.start_from"):
        start_weights.load_into(model, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"nothing\.safetensors: no such file; check train\.start_from"):
        start_weights.load_into(model, str(tmp_path / "nothing.safetensors"))
    (tmp_path / "text.safetensors").write_text("not weights at all")
    with pytest.raises(UserError, match=r"text\.safetensors: not a file of weights"):
        start_weights.load_into(model, str(tmp_path / "text.safetensors"))
    with pytest.raises(UserError, match=r"weights of another network .*set model\.network, num_unets, base_filters"):
        start_weights.load_into(model, "animals")
    configure(trained, {"base_filters": 8})
    with pytest.raises(UserError, match="weights of another network"):
        start_weights.load_into(
            untrained(trained), trained.url
        )  # those of the run before: this one has trained nothing yet


def test_a_file_to_begin_with_counts_by_its_content(trained: Project, tmp_path: Path) -> None:
    model = untrained(trained)
    file, copy = tmp_path / "weights.safetensors", tmp_path / "elsewhere" / "copy.safetensors"
    start_weights.write(str(file), model)
    first = configure(trained, start_from=str(file)).result("train")
    assert configure(trained, start_from="random").result("train") != first
    copy.parent.mkdir()
    shutil.copy(file, copy)
    assert configure(trained, start_from=str(copy)).result("train") == first
    old = file.stat()
    with torch.no_grad():
        next(model.refine.parameters()).add_(0.5)
    start_weights.write(str(file), model)
    assert file.stat().st_size == old.st_size
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert configure(trained, start_from=str(file)).result("train") != first
    file.unlink()
    with pytest.raises(UserError, match=r"^train\.start_from: \S+none\.safetensors: no such file; check") as refused:
        configure(trained, start_from=str(tmp_path / "none.safetensors"))
    assert len(str(refused.value).splitlines()) == 1


def test_a_project_to_begin_with_is_the_training_that_is_finished_there(trained: Project, tmp_path: Path) -> None:
    finished = open_run(trained).result("train")
    other = Project.at(str(shutil.copytree(trained.url, tmp_path / "other")))
    shutil.rmtree(other.path("results", "train"))
    with pytest.raises(
        UserError, match=r"^train\.start_from: \S+other: no project with a finished training"
    ) as refused:
        configure(trained, start_from=other.url)
    assert len(str(refused.value).splitlines()) == 1
    configure(trained, seed=7)  # a run that has trained nothing yet
    run = configure(other, start_from=trained.url)
    assert run.experiment.train.start_from == finished.folder
    assert f"start_from: {finished.folder}\n" in objects.read_bytes(run.path("config.yaml")).decode()
    assert configure(other, start_from=finished.folder).result("train") == run.result("train")


def test_what_is_trained_there_later_does_not_change_what_a_stopped_training_began_with(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_loop, "REPORT_STEPS", 1)
    other = Project.at(str(shutil.copytree(trained.url, tmp_path / "other")))
    old = open_run(other).experiment
    train = old.train.model_copy(update={"epochs": 2, "valid_every": 1, "start_from": trained.url})
    chosen = old.model_copy(update={"train": train})
    with begin_run(other, chosen, ["train"], []) as first, pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, first, progress=stop_in_the_second_epoch)
    assert run_stage(STAGE, configure(trained, seed=7))
    with begin_run(other, chosen, ["train"], []) as again:
        assert (again.id, again.result("train")) == (first.id, first.result("train"))
        assert run_stage(STAGE, again)
    # Once it has ended, the same command means what is there now.
    with begin_run(other, chosen, ["train"], []) as later:
        assert later.experiment.train.start_from == open_run(trained).result("train").folder
        assert later.result("train") != first.result("train")


# -- random animals -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def animals() -> RandomAnimalReader:
    return RandomAnimalReader([random_animals.film(rig, 10) for rig in range(2)], CPU)


@pytest.fixture(scope="module")
def small() -> Experiment:
    names = [f"{c}.mp4" for c in range(VIEWS_PER_FRAME)]
    return Experiment.model_validate(
        {
            "data": {"directory": "/none", "videos": names, "masks": names, "calibration": "none.h5"},
            "center_rotation": {"ell": of_animals.ELL_M},
            "crop": {"ell": of_animals.ELL_M},
            "model": {"base_filters": 2, "num_unets": 1, "poolings": 2},
            "train": {"lr": 3e-3, "device": "cpu"},
        }
    )


def test_what_is_carved_is_what_a_rig_of_these_views_alone_would_carve(
    animals: RandomAnimalReader, small: Experiment
) -> None:
    rng = np.random.default_rng(2)
    while True:
        frame, carved = animals.draw_views(3, rng)
        if len(carved) == 4:
            break
    used = torch.tensor([c in carved for c in range(VIEWS_PER_FRAME)])
    model = PartialRigSplatter.from_reader(animals, small)
    volume = model.carve(model.observe(frame), used)
    alone = build_splatter(animals, small)
    alone.observed_index = torch.tensor(carved)
    torch.testing.assert_close(volume, alone.carve(alone.observe(frame)), rtol=1e-5, atol=1e-5)
    assert volume[0].max() > 0.9


def test_animals_of_all_scales_lie_in_the_volume_and_in_their_pictures(
    animals: RandomAnimalReader, small: Experiment
) -> None:
    model, rng, distances = build_splatter(animals, small), np.random.default_rng(4), []
    for t in range(6):
        frame, carved = animals.draw_views(t, rng)
        assert 3 <= len(carved) <= 5
        used = torch.tensor([[c in carved for c in range(VIEWS_PER_FRAME)]])
        with torch.no_grad():  # the hull, for an untrained network changes nothing
            gaussians = model([frame], used)[0].to_world(frame.center, frame.angle)
            alpha = model.render(gaussians, frame.world_to_camera, frame.intrinsics, 288, 256).alpha
        drawn, truth = alpha > 0.5, frame.mask > 0.5
        iou = (drawn & truth).sum((1, 2)) / (drawn | truth).sum((1, 2))
        assert iou[: len(carved)].min() > 0.7
        distances.append(float(frame.world_to_camera[0, :3, 3].norm()))
    assert max(distances) > 1.3 * min(distances)


def test_pretraining_learns_and_its_file_begins_a_training(
    animals: RandomAnimalReader, small: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untouched = pretrain.evaluate(NetworkTrainer(animals, small, CPU), animals)
    model = pretrain.pretrain(animals, small, 15.0, Ranks())
    file = str(tmp_path / "small.safetensors")
    start_weights.write(file, model)
    trainer = pretrain.RandomAnimalTrainer(animals, small, CPU)
    start_weights.load_into(trainer.averaged, file)
    carved, other = pretrain.evaluate(trainer, animals)
    assert other > untouched[1]
    assert carved > 0.8
    assert '"other_iou"' in capsys.readouterr().out
