from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainings import configure, latest

from zoosplat.config.training import Train
from zoosplat.errors import LockLost, UserError
from zoosplat.stages.command import main
from zoosplat.stages.contract import Context, Stage
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.storage import groups, listing, objects, schema, urls
from zoosplat_evaluate.stage import STAGE as EVALUATE
from zoosplat_model import checkpoints
from zoosplat_model.frames import FrameReader, open_reader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.losses import frame_losses, soft_iou
from zoosplat_model.network import unet
from zoosplat_model.predictor import Predictor
from zoosplat_model.registry import build_splatter, open_predictor
from zoosplat_render.stage import STAGE as RENDER
from zoosplat_train import network_loop, progress_plots, sampling, stage, start_weights, weight_choice
from zoosplat_train.network_loop import NetworkTraining
from zoosplat_train.ranks import Ranks
from zoosplat_train.stage import STAGE
from zoosplat_train.trainer import NetworkTrainer


@pytest.fixture(autouse=True)
def _as_often_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_loop, "MAX_TIME_SHARE", math.inf)  # these epochs are shorter than a plot takes


class Stopper:
    """Progress that pulls the plug at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, done: int, total: int, message: str) -> None:
        if done >= self.at:
            raise KeyboardInterrupt


# -- order --------------------------------------------------------------------------------------------------------
def test_order_is_a_permutation_that_repeats() -> None:
    frames = [3, 5, 8, 13, 21, 34]
    orders = [sampling.epoch_order(frames, 7, epoch) for epoch in range(5)]
    assert all(sorted(order) == frames for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders == [sampling.epoch_order(frames, 7, epoch) for epoch in range(5)]
    assert orders != [sampling.epoch_order(frames, 8, epoch) for epoch in range(5)]


def test_carving_leaves_out_one_view_at_times() -> None:
    chosen = [tuple(sampling.carving_views([0, 2, 3, 4], Train(leave_out=0.5), epoch, 9)) for epoch in range(200)]
    whole = sum(len(views) == 4 for views in chosen)
    assert 60 < whole < 140
    assert sampling.carving_views([0, 2, 3, 4], Train(leave_out=0), 0, 9) == [0, 2, 3, 4]
    assert set(chosen) == {(0, 2, 3, 4), (2, 3, 4), (0, 3, 4), (0, 2, 4), (0, 2, 3)}
    assert all(sampling.carving_views([0, 1, 2], Train(leave_out=1), epoch, 9) == [0, 1, 2] for epoch in range(50))


def test_learning_rate_and_spread() -> None:
    assert sampling.learning_rate(2.0, 0) == 2
    assert sampling.learning_rate(2.0, 0.5) == pytest.approx(0.05 * 2 + 0.95)
    assert sampling.learning_rate(2.0, 1.3) == pytest.approx(0.1)
    assert sampling.spread(list(range(10)), 3) == [1, 5, 8]
    assert sampling.spread([4, 6], 24) == [4, 6]


def test_jitter_keeps_the_picture_and_moves_the_grid(tiny: Project) -> None:
    frame = open_reader(open_run(tiny), torch.device("cpu")).frame(2)
    moved = [sampling.jitter(frame, Train(), epoch, 0.01) for epoch in range(30)]
    shifts = torch.stack([m.center - frame.center for m in moved])
    assert 0.015 < shifts.abs().max() < 0.02 + 1e-6
    assert 0.2 < max(abs(float(m.angle - frame.angle)) for m in moved) < 0.3 + 1e-6
    assert all(m.rgb is frame.rgb for m in moved)
    assert torch.equal(sampling.jitter(frame, Train(), 3, 0.01).center, moved[3].center)
    assert all(m.tilt is None for m in moved)
    tilts = [sampling.jitter(frame, Train(jitter_tilt=0.5), epoch, 0.01).tilt for epoch in range(200)]
    quaternions = torch.stack([tilt for tilt in tilts if tilt is not None])
    assert len(quaternions) == 200
    torch.testing.assert_close(quaternions.norm(dim=1), torch.ones(200))
    angles = 2 * torch.atan2(quaternions[:, 1:].norm(dim=1), quaternions[:, 0])
    directions = angles[:, None] * torch.nn.functional.normalize(quaternions[:, 1:])
    assert (directions[:, 2] == 0).all()
    assert 0.47 < directions.norm(dim=1).max() < 0.5
    assert directions.norm(dim=1).min() < 0.03
    assert all((directions[:, i] * sign).max() > 0.4 for i in (0, 1) for sign in (1, -1))


@torch.no_grad()
def test_what_the_network_sees_tilted_stands_where_it_stood(tiny: Project) -> None:
    """The masks are met as well with a tilt that is undone, and not with one that is forgotten."""
    chosen, cpu = open_run(tiny).experiment, torch.device("cpu")
    reader = open_reader(open_run(tiny), cpu)
    trainer = NetworkTrainer(reader, chosen, cpu)
    frame = reader.frame(0)
    mask = frame.mask[trainer.model.observed_index]

    def iou(tilt: torch.Tensor | None, undone: torch.Tensor | None) -> float:
        gaussians = trainer.model([replace(frame, tilt=tilt)])[0]
        alpha = trainer._render(replace(frame, tilt=undone), gaussians).alpha
        return float(soft_iou((alpha > 0.5).float(), mask).mean())

    sine, cosine = math.sin(0.25), math.cos(0.25)  # of half the angle
    for axis in ([1.0, 0, 0], [0, -1.0, 0], [0.6, 0.8, 0]):
        tilt = torch.tensor([cosine, *(sine * part for part in axis)])
        assert iou(tilt, tilt) > iou(None, None) - 0.02
        assert iou(tilt, None) < iou(None, None) - 0.03  # least about the long axis, to which it is almost round


def test_worse_is_what_cannot_be_chance() -> None:
    least = [0.2, 0.4, 0.3, 0.5]
    assert not weight_choice.is_significantly_worse(least, least)
    assert not weight_choice.is_significantly_worse([0.1, 0.3, 0.2, 0.4], least)
    assert weight_choice.is_significantly_worse([loss + 0.001 for loss in least], least)  # each of them
    # Differences 0.3, -0.1, 0, 0: their mean 0.05, their standard error sqrt(0.09 / 3) / 2 = 0.0866.
    assert not weight_choice.is_significantly_worse([0.5, 0.3, 0.3, 0.5], least)
    assert weight_choice.is_significantly_worse([0.5, 0.4, 0.5, 0.5], least)  # 0.3, 0, 0.2, 0: 0.125, 0.075
    assert weight_choice.is_significantly_worse([0.3], [0.2])
    assert not weight_choice.is_significantly_worse([0.2], [0.2])


def test_blended_weights_lie_between() -> None:
    early = {"weight": torch.tensor([1.0, 2.0]), "batches": torch.tensor(3)}
    late = {"weight": torch.tensor([2.0, 0.0]), "batches": torch.tensor(7)}
    found = weight_choice.blend(early, late, 0.25)
    assert found["weight"].tolist() == [1.25, 1.5]
    assert found["batches"] == 7
    assert (early["weight"].tolist(), late["weight"].tolist()) == ([1, 2], [2, 0])


LEAST = [0.2, 0.4, 0.3]
WORSE, AS_GOOD = [0.21, 0.41, 0.31], [0.2, 0.6, 0.2]  # 0, 0.2, -0.1 more: the mean is below its standard error


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(
    ("told", "share"),
    [
        ([AS_GOOD], 1.0),
        ([WORSE, WORSE, AS_GOOD], 0.75),
        ([WORSE] * 8, 0.0),
        ([[0.1, 0.1, 0.1]], 1.0),
    ],
)
def test_as_much_of_the_last_weights_is_used_as_is_not_worse(
    tiny: Project, monkeypatch: pytest.MonkeyPatch, told: list[list[float]], share: float, interrupted: bool
) -> None:
    """Validation is told: the second epoch's weights are the best; then come the fourth's, the last, and blends."""
    told, validated = [[0.5, 0.5, 0.5], LEAST, [0.3, 0.5, 0.4], *told], []

    def validate(trainer: NetworkTrainer, _frames: Any, _total: int) -> tuple[dict[str, float], list[float]]:
        validated.append({k: v.clone() for k, v in trainer.averaged.state_dict().items()})
        losses = told[len(validated) - 1]
        return {"valid_loss": sum(losses) / 3}, losses

    monkeypatch.setattr(NetworkTrainer, "validate", validate)
    configure(tiny, epochs=4)
    if interrupted:
        monkeypatch.setattr(network_loop, "MAX_TIME_SHARE", 1.0)
        monkeypatch.setattr(network_loop, "REPORT_STEPS", 1)
        with pytest.raises(KeyboardInterrupt):
            run_stage(STAGE, open_run(tiny), progress=Stopper(5))
        assert len(validated) == latest(tiny).progress.epoch == 2
    assert run_stage(STAGE, open_run(tiny))
    assert len(validated) == len(told)
    early, late = validated[1], validated[3]
    for i, weights in enumerate(validated[3:]):
        for name, value in weights.items():
            torch.testing.assert_close(value, i / 8 * early[name] + (1 - i / 8) * late[name])
    progress, best = latest(tiny).progress, checkpoints.load(open_run(tiny).output_url("train"), "best")
    assert best is not None
    steps = [int(row["step"]) for row in progress.history]
    assert best.step == progress.best_step == steps[3 if share else 1]
    assert progress.best == pytest.approx(sum(told[-1] if share else LEAST) / 3)
    for name, value in best.average.items():
        torch.testing.assert_close(value, (1 - share) * early[name] + share * late[name])
    for name, value in latest(tiny).average.items():
        torch.testing.assert_close(value, (best.average if share else late)[name], rtol=0, atol=0)
    assert progress.history[3]["valid_loss"] == pytest.approx(sum(told[3]) / 3)


@pytest.mark.parametrize("deep_lambda", [0.0, 0.5])
def test_earlier_u_nets_learn_what_the_last_one_makes_of_it(tiny: Project, deep_lambda: float) -> None:
    chosen, cpu = open_run(tiny).experiment, torch.device("cpu")
    chosen = chosen.model_copy(update={"train": chosen.train.model_copy(update={"deep_lambda": deep_lambda})})
    reader = open_reader(open_run(tiny), cpu)
    trainer, frame = NetworkTrainer(reader, chosen, cpu), reader.frame(0)
    start_weights.load_into(trainer.model, "random")
    used, mirrored = torch.ones(1, len(reader.observed), dtype=torch.bool), torch.tensor([False])
    supervision = []
    for i in range(60):
        if i % 10 == 0:
            supervision.append(trainer.model.forward_deep_supervision([frame], used, mirrored)[1].item())
        trainer.step([frame], [reader.observed], [False], 3e-3, i)
    assert (supervision[-1] < 0.75 * supervision[0]) == (deep_lambda > 0)


@torch.no_grad()
def test_validation_leaves_out_a_view_as_if_it_were_held_out(tiny: Project) -> None:
    chosen, cpu = open_run(tiny).experiment, torch.device("cpu")
    reader = open_reader(open_run(tiny), cpu)
    t = reader.split("valid")[0]
    left_out = reader.observed[sampling.view_to_predict(t, len(reader.observed))]
    trainer = NetworkTrainer(reader, chosen, cpu)
    figures, losses = trainer.validate([reader.frame(t)], 1)
    assert losses == [figures["valid_loss"]]

    held_out = chosen.model_copy(update={"holdout_views": (left_out, *chosen.holdout_views)})
    images, tracking, crop = (open_run(tiny).open_input(name) for name in ("pack", "center_rotation", "crop"))
    model = build_splatter(FrameReader(images, tracking, crop, held_out), held_out)
    model.eval().load_state_dict(trainer.averaged.state_dict())
    frame = reader.frame(t)
    size = reader.width, reader.height
    losses = []
    for network, cameras in ((trainer.averaged, reader.observed), (model, [left_out])):
        placed = network([frame])[0].to_world(frame.center, frame.angle)
        rendering = network.render(placed, frame.world_to_camera[cameras], frame.intrinsics[cameras], *size, cameras)
        truth, mask = frame.composite_on_white()[cameras], frame.mask[cameras]
        losses.append(float(frame_losses(*rendering, truth, mask, chosen.train.img_lambda, 0.0).total))
        drawn = rendering.alpha > 0.5
        iou = float(((drawn & (mask > 0)).sum((1, 2)) / (drawn | (mask > 0)).sum((1, 2))).mean())
        assert figures["valid_left_out_iou" if network is model else "valid_iou"] == pytest.approx(iou, abs=1e-5)
    assert figures["valid_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert losses[0] < losses[1]
    assert {sampling.view_to_predict(t, 4) for t in range(0, 96, 4)} == {0, 1, 2, 3}


def test_all_frames_but_those_that_validate_can_be_trained_on(tiny: Project) -> None:
    configure(tiny, fit_to="all", epochs=2)
    reader = open_reader(open_run(tiny), torch.device("cpu"))
    validate = reader.split("valid")
    rest = [t for t in range(reader.n_frames) if reader.valid[t] and t not in validate]
    assert sampling.choose_frames(reader, open_run(tiny).experiment.train) == (rest, validate)
    assert sampling.choose_frames(reader, Train()) == (reader.split("train"), validate)
    assert len(rest) > len(reader.split("train"))
    assert run_stage(STAGE, open_run(tiny))
    assert latest(tiny).progress.step == 2 * len(rest)


# -- the stage ----------------------------------------------------------------------------------------------------
def test_training_learns_and_writes_what_it_promises(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(tiny, epochs=14, valid_every=4, plot_every=7, save_every=14)
    reader = open_reader(open_run(tiny), torch.device("cpu"))
    untrained = NetworkTrainer(reader, open_run(tiny).experiment, torch.device("cpu"))
    frames = reader.split("valid")
    first, _ = untrained.validate(reader.prefetch(frames), len(frames))
    plotted, preview = [], progress_plots.preview

    def counted(*args: Any) -> bytes:
        plotted.append(args)
        return preview(*args)

    monkeypatch.setattr(progress_plots, "preview", counted)
    assert run_stage(STAGE, open_run(tiny))
    assert not run_stage(STAGE, open_run(tiny))
    rows = list(
        csv.DictReader(
            io.StringIO(objects.read_bytes(urls.join(open_run(tiny).output_url("train"), "history.csv")).decode())
        )
    )
    assert [int(r["epoch"]) for r in rows] == list(range(1, 15))
    assert [int(r["epoch"]) for r in rows if r["valid_loss"]] == [4, 8, 12, 14]
    assert [int(r["step"]) for r in rows] == list(range(2, 29, 2))
    assert len(plotted) == 2
    valid = {int(r["step"]): float(r["valid_loss"]) for r in rows if r["valid_loss"]}
    best = min(valid, key=lambda step: valid[step])
    assert best == 28  # or blends would be tried
    assert valid[best] < 0.9 * first["valid_loss"]
    assert (objects.read_json(urls.join(open_run(tiny).output_url("train"), "best.json")) or {})["step"] == best

    figures = (open_run(tiny).read_mark("train") or {})["figures"]
    assert figures["steps"] == 28
    assert figures["best_valid_loss"] == pytest.approx(valid[best])
    written = list(listing.list_files(open_run(tiny).output_url("train")))
    assert {"loss.png", "preview.png", "latest.json", "best.json"} <= set(written)
    assert any(name.startswith("tensorboard/events") for name in written)
    assert objects.read_bytes(urls.join(open_run(tiny).output_url("train"), "preview.png")).startswith(b"\x89PNG")

    predictor = open_predictor(open_run(tiny), "cpu")
    frame = predictor.reader.frame(7)
    rendering = predictor.render(
        predictor.gaussians(7), frame.world_to_camera, frame.intrinsics, 32, 32, cameras=range(5)
    )
    inside, mask = rendering.alpha > 0.5, frame.mask > 0
    iou = (inside & mask).sum((1, 2)) / (inside | mask).sum((1, 2))
    assert iou.min() > 0.8  # the held-out view of a test frame too

    with monkeypatch.context() as patch:  # as if networks had had other inputs when this one was trained
        patch.setattr(unet, "INPUT_CHANNELS", unet.INPUT_CHANNELS + 1)
        with pytest.raises(UserError, match=r"model: the checkpoint does not fit .*; run stage train again"):
            open_predictor(open_run(tiny), "cpu")


def test_a_rehearsal_changes_nothing(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # sums in one order
    configure(tiny, epochs=2, batch_frames=2, deep_lambda=0.1, jitter_tilt=0.3)
    run_stage(STAGE, open_run(tiny))
    alone = latest(tiny)
    begin, rehearse, rehearsals = NetworkTraining.__post_init__, NetworkTraining._warm_up, []

    def begun(training: NetworkTraining) -> None:
        begin(training)
        before = [value.clone() for value in training.trainer.state()]
        rehearse(training)
        rehearsals.append(all(map(torch.equal, before, training.trainer.state())))

    monkeypatch.setattr(NetworkTraining, "__post_init__", begun)
    run_stage(STAGE, configure(tiny, force=True))
    assert rehearsals == [True]
    for name, tensor in alone.model.items():
        torch.testing.assert_close(latest(tiny).model[name], tensor, rtol=0, atol=0)


def test_a_stopped_training_goes_on_under_settings_that_make_no_other_result(
    tiny: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(network_loop, "REPORT_STEPS", 1)
    first = configure(tiny, epochs=3, keep_last=1)
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, first, progress=Stopper(4))
    kept = latest(tiny).step
    assert kept == 3
    second = configure(tiny, keep_last=3, plot_every=7, save_every=2)
    assert second.id != first.id
    assert second.result("train") == first.result("train")
    steps: list[int] = []
    run_stage(STAGE, second, progress=lambda done, total, text: steps.append(done))
    assert min(steps) > kept
    assert len(list(listing.list_files(urls.join(second.output_url("train"), "checkpoints")))) >= 3


def test_a_finished_training_is_never_written_again(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a process that slept over another one's finishing it: it is told before it writes a checkpoint."""
    monkeypatch.setattr(network_loop, "REPORT_STEPS", 10**6)
    run = configure(tiny, epochs=2)
    url, save = run.output_url("train"), NetworkTraining._save
    saves: list[dict[str, Any]] = []

    def files() -> dict[str, tuple[int, bytes]]:
        folder = Path(url)
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}

    def sleepy(training: NetworkTraining) -> None:
        monkeypatch.setattr(NetworkTraining, "_save", save)
        for lease in Path(run.result("train").folder).rglob("*lease"):
            lease.unlink()  # as who takes it over does
        # In a process of its own: of this one no file is written once its lease is gone.
        command = [sys.executable, "-m", "zoosplat_train", "--project", tiny.url, "--run", run.id]
        assert subprocess.run(command, capture_output=True).returncode == 0
        saves.append(files())
        save(training)

    monkeypatch.setattr(NetworkTraining, "_save", sleepy)
    with pytest.raises(LockLost):
        run_stage(STAGE, run)
    (finished,) = saves
    assert files() == finished
    assert not run_stage(STAGE, configure(tiny, keep_last=5))
    assert files() == finished


@pytest.mark.parametrize("batch_frames", [1, 2])
def test_an_interrupted_training_ends_as_an_undisturbed_one(
    tiny: Project, monkeypatch: pytest.MonkeyPatch, batch_frames: int
) -> None:
    torch.set_num_threads(1)  # sums in one order
    monkeypatch.setattr(network_loop, "REPORT_STEPS", 1)
    configure(tiny, epochs=3, batch_frames=batch_frames, plot_every=3)
    run_stage(STAGE, open_run(tiny))
    undisturbed = latest(tiny)

    monkeypatch.setattr(network_loop, "SAVE_SECONDS", 0.0)  # after every step, also within an epoch
    configure(tiny, force=True)
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, open_run(tiny), progress=Stopper(2))
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, open_run(tiny), progress=Stopper(4 if batch_frames == 1 else 3))
    assert (latest(tiny).step, latest(tiny).progress.position) == ((3, 1) if batch_frames == 1 else (2, 0))
    run_stage(STAGE, open_run(tiny))
    resumed = latest(tiny)
    assert resumed.step == undisturbed.step
    for name, tensor in undisturbed.model.items():
        torch.testing.assert_close(resumed.model[name], tensor, rtol=1e-5, atol=1e-6)
    for a, b in zip(resumed.progress.history, undisturbed.progress.history, strict=True):
        for key in ("epoch", "step", "train_loss", "valid_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    assert resumed.progress.best_step == undisturbed.progress.best_step


def test_a_loss_that_is_not_a_number_keeps_the_last_checkpoint(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(tiny, epochs=6)
    original = NetworkTrainer.step
    calls = []

    def step(self: NetworkTrainer, *args: Any) -> torch.Tensor:
        calls.append(1)
        return original(self, *args) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(NetworkTrainer, "step", step)
    with pytest.raises(UserError, match=r"diverged by step 6.*train\.lr"):
        run_stage(STAGE, open_run(tiny))
    kept = latest(tiny)
    assert kept.step == 4
    assert all(torch.isfinite(t).all() for t in kept.model.values())
    assert open_run(tiny).read_mark("train") is None


def test_out_of_gpu_memory_is_a_line_and_keeps_the_last_checkpoint(
    tiny: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(tiny, epochs=6)
    original = NetworkTrainer.step
    calls = []

    def step(self: NetworkTrainer, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            # As when a CUDA graph is recorded: a second error hides the first.
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            except torch.OutOfMemoryError:
                raise RuntimeError("capture failed")  # noqa: B904
        return original(self, *args)

    monkeypatch.setattr(NetworkTrainer, "step", step)
    assert main(STAGE, ["--project", tiny.url, "--workers", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"zoosplat train: out of GPU memory: training is predicted to need 1\.\d GiB \(CUDA 1\.0, ", line)
    assert re.search(
        r"; (set \S+ to \d+|raise ingest\.image_downsample.*) or use a larger GPU; checkpoints are kept$", line
    )
    assert latest(tiny).step == 4
    monkeypatch.setattr(NetworkTrainer, "step", original)
    run_stage(STAGE, open_run(tiny))
    assert latest(tiny).progress.epoch == 6


@pytest.mark.parametrize(("other", "key"), [(EVALUATE, "evaluate.device"), (RENDER, "render.width")])
def test_out_of_gpu_memory_after_training(
    tiny: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: Stage, key: str
) -> None:
    configure(tiny, epochs=1)
    run_stage(STAGE, open_run(tiny))

    def gaussians(self: Predictor, t: int) -> Gaussians:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Predictor, "gaussians", gaussians)
    assert main(other, ["--project", tiny.url, "--workers", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"zoosplat {other.name}: out of GPU memory: ")
    assert key in line


def test_time_limit_counts_what_earlier_runs_spent(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(tiny, epochs=100000, max_minutes=0.5)
    monkeypatch.setattr(network_loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(network_loop, "REPORT_STEPS", 1)
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, open_run(tiny), progress=Stopper(3))
    url = urls.join(open_run(tiny).output_url("train"), "checkpoints", f"step-{latest(tiny).step:08d}.safetensors")
    before = latest(tiny)
    spent = json.dumps({**vars(before.progress), "seconds": 31.0})
    data = objects.read_bytes(url)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["progress"] = spent
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    objects.write_bytes(url, len(text).to_bytes(8, "little") + text + data[8 + length :])
    run_stage(STAGE, open_run(tiny))
    assert latest(tiny).step <= before.step + 1  # the limit of 30 s was over; the epoch is ended, and no other begun
    assert (open_run(tiny).read_mark("train") or {})["figures"]["best_step"] == latest(tiny).progress.best_step


def test_kernels_are_loaded_before_the_clock_runs_by_one_process_first(
    tiny: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(stage, "load_kernels", lambda device: events.append("load"))
    monkeypatch.setattr(Ranks, "broadcast_scalar", lambda ranks, value: events.append("broadcast_scalar") or value)  # type: ignore[func-returns-value]
    begin = NetworkTraining.__post_init__

    def begun(training: NetworkTraining) -> None:
        events.append("clock")
        begin(training)

    monkeypatch.setattr(NetworkTraining, "__post_init__", begun)
    run_stage(STAGE, open_run(tiny))
    assert events[:4] == ["load", "broadcast_scalar", "load", "clock"]
    events.clear()
    stage.load_kernels_in_turn(Context(open_run(tiny), lambda *of: None), torch.device("cpu"), Ranks(1, 2))
    assert events == ["broadcast_scalar", "load"]


def test_time_that_runs_out_between_epochs_leaves_a_validated_model(
    tiny: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tiny, epochs=100000, max_minutes=60, valid_every=1000, save_every=1)
    late = SimpleNamespace(seconds=0.0)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late.seconds)
    monkeypatch.setattr(network_loop, "time", clock)
    saved = NetworkTraining._save

    def save(training: NetworkTraining) -> None:
        saved(training)
        late.seconds = 3600.0  # of a checkpoint that takes long to write

    monkeypatch.setattr(NetworkTraining, "_save", save)
    run_stage(STAGE, open_run(tiny))
    best = checkpoints.load(open_run(tiny).output_url("train"), "best")
    assert best is not None
    assert best.step == latest(tiny).step
    assert "valid_iou" in latest(tiny).progress.history[-1]


def test_no_frame_to_train_on_is_said_before_training(tiny: Project) -> None:
    group = groups.open_group(open_run(tiny).output_url("center_rotation"), write=True)
    valid = schema.read(group, "valid")
    valid[:3] = False
    schema.array(group, "valid")[...] = valid
    with pytest.raises(UserError, match="nothing to train on"):
        run_stage(STAGE, open_run(tiny))
    assert not objects.exists(open_run(tiny).output_url("train"))
