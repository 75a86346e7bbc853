"""Views that are absent from some frames: whatever lies in their windows, nothing is carved or learned from it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trainings import configure

from zoosplat.stages.contract import Context
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.storage import groups, schema
from zoosplat_model.carving import ObservedViews
from zoosplat_model.dynamic.hexplane import build_field
from zoosplat_model.dynamic.scene import DynamicScene, initial_points
from zoosplat_model.dynamic.trainer import DynamicTrainer
from zoosplat_model.frames import FrameReader, open_reader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.losses import frame_losses
from zoosplat_model.network.predictor import SplatterPredictor
from zoosplat_model.registry import build_splatter
from zoosplat_train.network_loop import NetworkTraining
from zoosplat_train.ranks import Ranks
from zoosplat_train.trainer import NetworkTrainer

CPU = torch.device("cpu")
FRAMES, CAMERAS, HELD_OUT = 9, 5, 4
# A frame of the training third with three observed views, one of the second third with four and one with two of them,
# one without its held-out view, and one of the last third.
ABSENT = ((2, 1), (4, 0), (4, 3), (7, HELD_OUT), (8, 2))


def seen_views() -> Any:
    seen = np.ones((FRAMES, CAMERAS), bool)
    seen[tuple(zip(*ABSENT, strict=True))] = False
    return seen


def spoil(project: Project, seed: int) -> FrameReader:
    """Put noise into the windows of the absent views, say that they are absent, and read the frames."""
    rng = np.random.default_rng(seed)
    images = groups.open_group(open_run(project).output_url("pack"), write=True)
    if not schema.has_seen(images):
        schema.add_seen(images, seen_views())
    rgb, mask = schema.read(images, "rgb"), schema.read(images, "mask")
    for t, c in ABSENT:
        rgb[t, c] = rng.integers(0, 256, rgb[t, c].shape)
        mask[t, c] = rng.random(mask[t, c].shape) > 0.5
    schema.write_block(images, "rgb", 0, rgb)
    schema.write_block(images, "mask", 0, mask)
    return open_reader(open_run(project), CPU)


def equal(one: Gaussians, other: Gaussians) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- frames and carving ---------------------------------------------------------------------------------------------
def test_frames_say_which_views_are_there(tiny: Project) -> None:
    whole = open_reader(open_run(tiny), CPU)
    assert whole.seen.all()
    assert whole.frame(2).seen is None
    reader = spoil(tiny, 0)
    np.testing.assert_array_equal(reader.seen, seen_views())
    assert (found := reader.frame(2).seen) is not None
    assert found.tolist() == [True, False, True, True, True]
    assert (found := reader.frame(3).seen) is not None
    assert found.all()
    assert reader.split("train") == [0, 2]


@torch.no_grad()
def test_gaussians_are_those_of_the_views_that_are_there(tiny: Project) -> None:
    model = build_splatter(open_reader(open_run(tiny), CPU), open_run(tiny).experiment).eval()
    for t, used in ((2, [True, False, True, True]), (4, [False, True, True, False]), (3, [True] * 4)):
        frame = spoil(tiny, 1).frame(t)
        expected = model([replace(frame, seen=None)], torch.tensor([used]))[0]
        assert equal(model([frame])[0], expected)
        assert equal(model([spoil(tiny, 2).frame(t)])[0], expected)
        # A view that is not used in a step of training is left out besides.
        less = torch.tensor([[True, True, True, False]])
        both = torch.tensor([used]) & less
        assert equal(model([frame], less)[0], model([replace(frame, seen=None)], both)[0])
        supervised, loss = model.forward_deep_supervision([frame], less, torch.tensor([False]))
        again, same = model.forward_deep_supervision([replace(frame, seen=None)], both, torch.tensor([False]))
        assert equal(supervised[0], again[0])
        assert torch.equal(loss, same)
    mixed = model([whole := replace(spoil(tiny, 1).frame(0), seen=None), frame := spoil(tiny, 1).frame(2)])
    assert all(equal(found, model([one])[0]) for found, one in zip(mixed, (whole, frame), strict=True))


@torch.no_grad()
def test_predictors_leave_absent_views_out(tiny: Project) -> None:
    model = build_splatter(open_reader(open_run(tiny), CPU), open_run(tiny).experiment)
    found = []
    for seed in (1, 2):
        predictor = SplatterPredictor(spoil(tiny, seed), model, 0)
        found.append(dict(predictor.map_frames([0, 2, 4, 8], lambda gaussians: gaussians.means)))
    assert all(torch.equal(found[0][t], found[1][t]) for t in (0, 2, 4, 8))


# -- training -------------------------------------------------------------------------------------------------------
def test_the_loss_is_a_mean_over_the_views_that_are_there(tiny: Project) -> None:
    reader, chosen = spoil(tiny, 3), open_run(tiny).experiment
    trainer, frame = NetworkTrainer(reader, chosen, CPU), spoil(tiny, 3).frame(2)
    views = [0, 2, 3]
    gaussians = trainer.model([replace(frame, seen=None)], torch.tensor([[True, False, True, True]]))[0]
    placed = gaussians.to_world(frame.center, frame.angle)
    size = reader.width, reader.height
    rendering = trainer.model.render(placed, frame.world_to_camera[views], frame.intrinsics[views], *size, views)
    s = chosen.train
    truth, mask = frame.composite_on_white()[views], frame.mask[views]
    expected = frame_losses(*rendering, truth, mask, s.img_lambda, s.ssim_lambda, None, s.square_lambda)
    figures = trainer.step([frame], [views], [False], 1e-3, 0)
    np.testing.assert_allclose(figures[: len(expected)], torch.stack(expected).detach(), rtol=1e-5)


@pytest.mark.parametrize("deep_lambda", [0.0, 0.2])
def test_training_is_the_same_whatever_lies_in_absent_views(tiny: Project, deep_lambda: float) -> None:
    """Bit by bit: losses, validation, and all weights; four of six frames have absent views."""
    ends = []
    for seed in (1, 2):
        settings = {"leave_out": 0.5, "epochs": 3, "batch_frames": 2, "ssim_lambda": 0.2, "fit_to": "all"}
        run = configure(tiny, force=True, deep_lambda=deep_lambda, **settings)
        training = NetworkTraining(Context(run, lambda *_: None), spoil(tiny, seed), CPU, Ranks())
        training.run()
        history = [
            {k: v for k, v in row.items() if k.startswith(("train_", "valid_"))} for row in training.progress.history
        ]
        assert all(math.isfinite(value) for row in history for value in row.values())
        ends.append((history, [value.clone() for value in training.trainer.state()]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


@torch.no_grad()
def test_validation_leaves_out_a_view_where_three_remain(tiny: Project) -> None:
    trainer = NetworkTrainer(spoil(tiny, 1), open_run(tiny).experiment, CPU)
    reader = trainer.reader
    both, losses = trainer.validate([reader.frame(3), reader.frame(4)], 2)
    four, (of_four,) = trainer.validate([reader.frame(3)], 1)
    two, (of_two,) = trainer.validate([reader.frame(4)], 1)
    assert losses == [of_four, of_two]
    assert "valid_left_out_iou" not in two
    assert both["valid_left_out_iou"] == four["valid_left_out_iou"]
    for name in ("valid_loss", "valid_iou", "valid_psnr"):
        assert both[name] == pytest.approx((four[name] + two[name]) / 2)
    # Of two views, validation is the loss of these two.
    frame, views = reader.frame(4), [1, 2]
    placed = trainer.averaged([frame])[0].to_world(frame.center, frame.angle)
    size = reader.width, reader.height
    rendering = trainer.averaged.render(placed, frame.world_to_camera[views], frame.intrinsics[views], *size, views)
    truth, mask = frame.composite_on_white()[views], frame.mask[views]
    s = trainer.settings
    expected = frame_losses(*rendering, truth, mask, s.img_lambda, s.ssim_lambda, None, s.square_lambda)
    assert of_two == pytest.approx(float(expected.total), rel=1e-5)
    psnr = -10 * (rendering.rgb - truth).square().mean((1, 2, 3)).log10().mean()
    assert two["valid_psnr"] == pytest.approx(float(psnr), rel=1e-5)
    shown, _ = trainer.compare(frame)
    np.testing.assert_array_equal(shown, truth.numpy())


# -- dynamic Gaussians ----------------------------------------------------------------------------------------------
def test_dynamic_gaussians_are_trained_on_the_views_that_are_there(tiny: Project) -> None:
    run = open_run(tiny)
    states: list[list[Tensor]] = []
    for seed in (1, 2):
        reader = spoil(tiny, seed)
        scene = DynamicScene.from_reader(reader)
        frames = np.flatnonzero(reader.valid)
        assert scene.shown == [[c for c in range(4) if seen_views()[t, c]] for t in frames]
        points, colors = initial_points(reader, 300, 0)
        torch.manual_seed(0)
        trainer = DynamicTrainer(scene, points, colors, build_field(run.experiment.dynamic), run.experiment.dynamic, 0)
        for _ in range(24):  # three epochs
            trainer.step()
        states.append([points, colors, trainer.figures, *trainer.gaussians.values().values()])
        truth, rendered = trainer.compare(1)  # frame 2
        assert truth.shape == rendered.shape == (3, reader.height, reader.width, 3)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_evidence_is_that_of_the_views_that_are_there(tiny: Project) -> None:
    model = build_splatter(open_reader(open_run(tiny), CPU), open_run(tiny).experiment)
    found = []
    for seed in (1, 2):
        frame = spoil(tiny, seed).frame(2)
        views = model.observe(frame)
        kept = ObservedViews(*(value[[0, 2, 3]] for value in views))
        seen = model.find_seen(frame)
        hull = model.carve(views, seen)[0]
        found.append(model._prepare_evidence(hull, views, seen)(hull))
        torch.testing.assert_close(found[-1], model._prepare_evidence(hull, kept, None)(hull))
    assert torch.equal(*found)
