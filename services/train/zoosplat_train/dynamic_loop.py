"""The loop round the trainer of dynamic Gaussians: checkpoints, history, pictures and the clock."""

from __future__ import annotations

import csv
import io
import math
import time
from typing import Any

import numpy as np
import torch

from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.stages.contract import Context, Outcome, Plan
from zoosplat.storage import objects, urls
from zoosplat_model.devices import device_figures
from zoosplat_model.dynamic import files
from zoosplat_model.dynamic.hexplane import build_field
from zoosplat_model.dynamic.scene import DynamicScene, initial_points
from zoosplat_model.dynamic.schedule import Phase, is_snapshot_iteration
from zoosplat_model.dynamic.trainer import DynamicTrainer
from zoosplat_model.frames import FrameReader
from zoosplat_train import progress_plots, tensorboard
from zoosplat_train.history import history_csv

REPORT_ITERATIONS = 50  # iterations between readings of loss and PSNR, each of which waits for the GPU
ROW_ITERATIONS = 100  # iterations between rows of the history
SAVE_SECONDS = 60.0  # most seconds between checkpoints


def prepare(reader: FrameReader, url: str) -> Plan:
    """The plan of the stage.

    Raises:
        UserError: there is nothing to train on.
    """
    if not reader.valid.any():
        raise UserError(f"{url}: no frame has a visual hull, so there is nothing to train on")
    return Plan((0, reader.n_frames))


def run(ctx: Context, reader: FrameReader, device: torch.device) -> Outcome:
    """Train coarse and fine from the newest checkpoint on."""
    return DynamicTraining(ctx, reader, device).run()


class DynamicTraining:
    """A training of dynamic Gaussians that goes on from the latest checkpoint."""

    def __init__(self, ctx: Context, reader: FrameReader, device: torch.device) -> None:
        self.ctx, self.reader, self.device = ctx, reader, device
        self.config, self.url = ctx.experiment.dynamic, ctx.run.output_url("train")
        scene = DynamicScene.from_reader(
            reader, lambda done, total: ctx.progress(0, self._total(), f"reading frames {done}/{total}")
        )
        seed = ctx.experiment.train.seed
        torch.manual_seed(seed)
        field = build_field(ctx.experiment.dynamic)
        if self.config.initial_ply is not None:
            points, colors = (v.to(device) for v in files.read_points(urls.normalize(self.config.initial_ply)))
        else:
            points, colors = initial_points(reader, self.config.initial_points, seed)
        self.trainer = DynamicTrainer(scene, points, colors, field, self.config, seed)
        self.history: list[dict[str, float]] = []
        self.text = ""  # line of progress that was reported last
        self._resume()
        # The clock counts the training alone, without logging, saving and changes of the set of Gaussians.
        self.seconds = self.history[-1]["seconds"] if self.history else 0.0
        self.clock = self.saved = time.monotonic()

    def _total(self) -> int:
        return self.config.coarse_iterations + self.config.fine_iterations

    def _length(self, phase: Phase) -> int:
        return self.config.coarse_iterations if phase == "coarse" else self.config.fine_iterations

    def _step(self) -> int:
        """Iterations of both stages that are done."""
        before = self.config.coarse_iterations if self.trainer.phase == "fine" else 0
        return before + self.trainer.iteration

    def _resume(self) -> None:
        own = files.checkpoints_in(self.url)
        where = self.config.start_checkpoint
        if own:
            where = urls.join(self.url, files.checkpoint_name(*own[-1]))
        if where is None:
            return
        where = urls.normalize(where)
        checkpoint, phase, iteration = files.read_checkpoint(where)
        if iteration > self._length(phase):
            raise UserError(f"{where}: beyond the {self._length(phase)} iterations of stage {phase}")
        try:
            self.trainer.restore(checkpoint, phase, iteration)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            first = str(error).splitlines()[-1].strip()
            raise UserError(f"{where}: of another configuration ({first}); use its own, or another one") from None
        url = urls.join(self.url, "history.csv")
        if own and objects.exists(url):
            rows = csv.DictReader(io.StringIO(objects.read_bytes(url).decode()))
            numbers = [{key: float(value) for key, value in row.items()} for row in rows]
            self.history = [row for row in numbers if row["step"] <= self._step()]

    def run(self) -> Outcome:
        trainer = self.trainer
        files.write_settings(self.url, self.ctx.experiment)
        begun, begun_seconds = self._step(), self.seconds
        with tensorboard.open_board(urls.join(self.url, "tensorboard"), begun) as self.board:
            if trainer.phase == "coarse":
                self._train_phase()
                self._stop_clock()
                self._report_progress()
                files.write_result(self.url, "coarse", trainer.iteration, trainer.gaussians, trainer.field)
                trainer.begin("fine")
                self._start_clock()
            self._train_phase()
            self._stop_clock()
            self._report_progress()
            if self.config.fine_iterations:
                files.write_result(self.url, "fine", trainer.iteration, trainer.gaussians, trainer.field)
            self._write_history()
            self._write_preview()
        self._remove_own_checkpoints()
        done = self._step() - begun
        figures: dict[str, Any] = {
            "train_loss": self.history[-1]["train_loss"] if self.history else None,
            "train_psnr": self.history[-1]["train_psnr"] if self.history else None,
            "gaussians": len(trainer.gaussians),
            "steps": self._step(),
            "seconds": round(self.seconds, 3),
            "seconds_per_step": round((self.seconds - begun_seconds) / max(done, 1), 5),
            **device_figures(self.device),
        }
        return Outcome(len(trainer.scene.shown), figures=figures)

    def _train_phase(self) -> None:
        trainer, phase = self.trainer, self.trainer.phase
        length = self._length(phase)
        while trainer.iteration < length:
            trainer.step()
            i = trainer.iteration
            ended = i == length
            if ended or i % REPORT_ITERATIONS == 0:
                self._read_figures(ended or i % ROW_ITERATIONS == 0)
            if self.config.render_process and is_snapshot_iteration(i):
                self._write_process_picture()
            if i in self.config.checkpoint_iterations or time.monotonic() - self.saved > SAVE_SECONDS:
                self._save()

    def _stop_clock(self) -> None:
        """Add the seconds since the clock was started, after waiting for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.monotonic() - self.clock - self.trainer.excluded_seconds
        self.trainer.excluded_seconds = 0.0

    def _start_clock(self) -> None:
        self.clock = time.monotonic()

    def _read_figures(self, add_row: bool) -> None:
        trainer = self.trainer
        trainer.ensure_capacity()
        loss, psnr = trainer.figures.tolist()
        if not math.isfinite(loss):
            raise UserError(
                f"training diverged by iteration {trainer.iteration} of stage {trainer.phase}: the loss is not a "
                "number; lower the learning rates of section dynamic; the last checkpoint is kept"
            )
        count = len(trainer.gaussians)
        self.text = f"{trainer.phase} {trainer.iteration} loss {loss:.4f} PSNR {psnr:.1f}, {count} Gaussians"
        self._report_progress()
        if add_row:
            self._stop_clock()
            figures = {"train_loss": loss, "train_psnr": psnr, "train_gaussians": float(count)}
            self.history.append({"step": self._step(), "seconds": round(self.seconds, 3), **figures})
            self.board.add(self.history[-1])
            self._start_clock()

    def _report_progress(self) -> None:
        """Report progress, before each write too: this raises where another process has taken this training over."""
        self.ctx.progress(self._step(), self._total(), self.text)

    def _save(self) -> None:
        self._stop_clock()
        self._report_progress()
        t = self.trainer
        files.write_checkpoint(
            self.url,
            t.phase,
            t.iteration,
            t.gaussians,
            t.field,
            t.optimizer,
            t.active_sh_degree,
            t.spatial_lr_scale,
        )
        self._remove_own_checkpoints(but=(t.phase, t.iteration))
        self._write_history()
        self.saved = time.monotonic()
        self._start_clock()

    def _remove_own_checkpoints(self, but: tuple[Phase, int] | None = None) -> None:
        """Remove the checkpoints that were written only so that a killed training goes on."""
        for phase, iteration in files.checkpoints_in(self.url):
            if (phase, iteration) != but and iteration not in self.config.checkpoint_iterations:
                objects.delete(urls.join(self.url, files.checkpoint_name(phase, iteration)))

    def _write_history(self) -> None:
        objects.write_bytes(urls.join(self.url, "history.csv"), history_csv(self.history))
        self.board.upload()

    def _write_preview(self) -> None:
        middle = len(self.trainer.scene.shown) // 2
        truth, rendered = (v.cpu().numpy() for v in self.trainer.compare(middle))
        names = [self.reader.camera_names[self.reader.observed[v]] for v in self.trainer.scene.shown[middle]]
        t = int(np.flatnonzero(self.reader.valid)[middle])
        objects.write_bytes(urls.join(self.url, "preview.png"), progress_plots.preview(truth, rendered, names, t))

    def _write_process_picture(self) -> None:
        """Write a picture of truth above rendering, all views side by side."""
        self._stop_clock()
        self._report_progress()
        t = self.trainer
        rows = [media.side_by_side(list(media.to_uint8(v.cpu().numpy()))) for v in t.compare(len(t.scene.shown) // 2)]
        url = urls.join(self.url, "render_process", t.phase, f"{t.iteration:05d}.png")
        objects.write_bytes(url, media.encode_png(np.concatenate(rows)))
        self._start_clock()
