"""Stage train: images.zarr, tracking.zarr, crop.zarr -> model/."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from zoosplat import stores
from zoosplat.errors import UserError
from zoosplat.memory import VALID_FRAMES
from zoosplat.stage import Context, Plan, Result, Shard, Stage
from zoosplat_model import checkpoints
from zoosplat_model.checkpoints import Progress
from zoosplat_model.frames import FrameReader
from zoosplat_model.gpu_memory import out_of_memory
from zoosplat_model.predictor import open_reader, pick_device
from zoosplat_train import dynamic, ops, plots

SHARE = 0.02  # of the time, that plots and checkpoints each may take; then they wait for a later epoch
SAVE_SECONDS = 60.0  # between checkpoints at most, also within an epoch
LOOK_STEPS = 10  # steps between readings of the loss: each waits for the GPU


class Train(Stage):
    """Train the network on the first third of the frames, or dynamic Gaussians on all of them."""

    def prepare(self, ctx: Context) -> Plan:
        pick_device(ctx.experiment.train.device)
        reader = open_reader(ctx.project, ctx.experiment, torch.device("cpu"))
        if ctx.experiment.train.method == "dynamic":
            return dynamic.prepare(reader, ctx.project.url)
        if not reader.split("train"):
            raise UserError(
                f"{ctx.project.url}: no frame of the first third has a visual hull, so there is nothing to train on; "
                "see the warnings of stage center_rotation, or keep more frames"
            )
        warnings: tuple[str, ...] = ()
        if not reader.split("valid"):
            warnings = ("no validation frames: the best checkpoint is that of the lowest training loss",)
        return Plan((0, reader.n_frames), warnings=warnings)

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Result:
        device = pick_device(ctx.experiment.train.device)
        if device.type == "cpu":
            torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
        else:
            torch.backends.cudnn.benchmark = True
        reader = open_reader(ctx.project, ctx.experiment, device)
        with out_of_memory(ctx.project, ctx.experiment, self.name):
            if ctx.experiment.train.method == "dynamic":
                return dynamic.run(ctx, reader, device)
            return _Training(ctx, reader, device).run()


@dataclass
class _Training:
    """A training that goes on from the latest checkpoint. Its order depends on seed and epoch alone."""

    ctx: Context
    reader: FrameReader
    device: torch.device
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.settings = self.ctx.experiment.train
        self.frames = self.reader.split("train")
        self.valid_frames = ops.spread(self.reader.split("valid"), VALID_FRAMES)
        self.trainer = ops.Trainer(self.reader, self.ctx.experiment, self.device)
        found = checkpoints.load(self.ctx.project, "latest")
        if found is not None:
            self.progress = found.progress
            self.trainer.model.load_state_dict(found.model)
            self.trainer.averaged.load_state_dict(found.average)
            checkpoints.restore_state(self.trainer.model, self.trainer.optimizer, found.optimizer)
        self.steps_per_epoch = -(-len(self.frames) // self.settings.batch_frames)
        self.sums = torch.zeros(len(ops.TRAIN_FIGURES), dtype=torch.float64, device=self.device)
        self.sums += torch.tensor([self.progress.sums.get(k, 0.0) for k in ops.TRAIN_FIGURES], device=self.device)
        self.best: dict[str, torch.Tensor] | None = None  # until it is saved
        self.spent = {"plot": 0.0, "save": 0.0}
        self.clock = self.saved = time.monotonic()
        self.begun_seconds, self.begun_step = self.progress.seconds, self.progress.step

    def seconds(self) -> float:
        return self.begun_seconds + time.monotonic() - self.clock

    def done(self) -> float:
        """The part of the training that is over, 0 to 1, by epochs or by time, whichever is further."""
        by_epochs = (self.progress.epoch + self.progress.position / len(self.frames)) / self.settings.epochs
        limit = self.settings.max_minutes
        return by_epochs if limit is None else max(by_epochs, self.seconds() / (60 * limit))

    def run(self) -> Result:
        p = self.progress
        url = stores.join(self.ctx.project.output_url("train"), "tensorboard")
        with plots.tensorboard(url, p.step) as self.board:
            # A run that was stopped when its time was up, but within an epoch, still has that to end.
            while self.done() < 1 or p.position > 0:
                self._epoch()
                self._end_epoch()
        steps = p.step - self.begun_step
        figures: dict[str, Any] = {
            "train_loss": p.history[-1]["train_loss"],
            "best_valid_loss": p.best,
            "best_step": p.best_step,
            "steps": p.step,
            "epochs": p.epoch,
            "seconds": round(p.seconds, 3),
            "seconds_per_step": round((self.seconds() - self.begun_seconds) / max(steps, 1), 4),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
        if self.device.type == "cuda":
            figures["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return Result(len(self.frames), figures=figures)

    def _epoch(self) -> None:
        """Steps to the end of the epoch, or of the time."""
        p, settings = self.progress, self.settings
        order = ops.epoch_order(self.frames, settings.seed, p.epoch)[p.position :]
        frames = self.reader.prefetch(order)
        while batch := list(islice(frames, settings.batch_frames)):
            views = [ops.carving_views(self.reader.observed, settings.seed, p.epoch, f.t) for f in batch]
            rate = ops.learning_rate(settings.lr, self.done())
            moved = [ops.jitter(f, settings.seed, p.epoch, self.reader.voxel_size_m) for f in batch]
            mirrored = [ops.is_mirrored(settings.seed, p.epoch, f.t) for f in batch]
            self.sums += self.trainer.step(moved, views, mirrored, rate, p.step)
            p.position += len(batch)
            p.step += 1
            ended = p.position == len(self.frames)
            if p.step % LOOK_STEPS == 0 or ended:
                self._look()
                self.trainer.check_room()
            if not ended and time.monotonic() - self.saved > SAVE_SECONDS:
                self._save()
            if self.done() >= 1:
                return

    def _end_epoch(self) -> None:
        """History, validation, plots and checkpoint; at the end of the training all of them."""
        p, settings = self.progress, self.settings
        row = {"epoch": p.epoch + 1, "step": p.step, "seconds": round(self.seconds(), 3), **self._look()}
        p.epoch, p.position = p.epoch + 1, 0
        self.sums.zero_()
        over = self.done() >= 1
        if over or p.epoch % settings.valid_every == 0:
            figures: dict[str, float] = {}
            if self.valid_frames:
                figures = self.trainer.validate(self.reader.prefetch(self.valid_frames))
            loss = figures.get("valid_loss", row["train_loss"])
            if not math.isfinite(loss):
                raise self._diverged()
            if p.best is None or loss < p.best:
                p.best, p.best_step = loss, p.step
                self.best = {k: v.clone() for k, v in self.trainer.averaged.state_dict().items()}
            row |= figures
        p.history.append(row)
        self.board.add(row)
        if over or (p.epoch % settings.plot_every == 0 and self._affords("plot")):
            self._plot()
        due = p.epoch % settings.save_every == 0 or self.best is not None
        if over or time.monotonic() - self.saved > SAVE_SECONDS or (due and self._affords("save")):
            self._save()

    def _affords(self, what: str) -> bool:
        return self.spent[what] <= SHARE * (time.monotonic() - self.clock)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.spent[what] += time.monotonic() - start

    def _look(self) -> dict[str, float]:
        """Mean figures of the running epoch. Raises UserError when they are not numbers any more."""
        p = self.progress
        sums = self.sums.tolist()
        means = {key: value / max(p.position, 1) for key, value in zip(ops.TRAIN_FIGURES, sums, strict=True)}
        if not all(math.isfinite(value) for value in sums):
            raise self._diverged()
        if p.position == 0:  # a new epoch has nothing to show yet
            return means
        text = f"epoch {p.epoch + 1} loss {means['train_loss']:.3f}"
        validated = [row for row in p.history if "valid_iou" in row]
        if validated:
            text += f" val IoU {validated[-1]['valid_iou']:.3f} PSNR {validated[-1]['valid_psnr']:.1f}"
        self.ctx.progress(p.step, self.settings.epochs * self.steps_per_epoch, text)
        return means

    def _diverged(self) -> UserError:
        return UserError(
            f"training diverged by step {self.progress.step}: the loss is not a number; lower train.lr (now "
            f"{self.settings.lr}) and run again; the last checkpoint is kept"
        )

    def _save(self) -> None:
        p, trainer = self.progress, self.trainer
        self._look()
        with self._counted("save"):
            p.seconds = self.seconds()
            p.sums = dict(zip(ops.TRAIN_FIGURES, self.sums.tolist(), strict=True))
            average = trainer.averaged.state_dict()
            keep = self.settings.keep_last
            checkpoints.save(
                self.ctx.project, trainer.model, trainer.optimizer, average, p, keep_last=keep, best=self.best
            )
            url = self.ctx.project.output_url("train")
            stores.write_bytes(stores.join(url, "history.csv"), plots.history_csv(p.history))
            self.board.upload()
        self.best, self.saved = None, time.monotonic()

    def _plot(self) -> None:
        with self._counted("plot"):
            url = self.ctx.project.output_url("train")
            stores.write_bytes(stores.join(url, "loss.png"), plots.loss_curves(self.progress.history))
            t = (self.valid_frames or self.frames)[len(self.valid_frames or self.frames) // 2]
            truth, rendered = self.trainer.compare(self.reader.frame(t))
            names = [self.reader.camera_names[c] for c in self.reader.observed]
            stores.write_bytes(stores.join(url, "preview.png"), plots.preview(truth, rendered, names, t))


STAGE = Train("train")
