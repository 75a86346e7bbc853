"""The loop round `NetworkTrainer`: epochs, validation, checkpoints, history, pictures and the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from statistics import fmean
from typing import Any, NamedTuple

import torch

from zoosplat.errors import UserError
from zoosplat.stages.contract import Context, Outcome
from zoosplat.storage import objects, urls
from zoosplat_model import checkpoints
from zoosplat_model.checkpoints import TrainingProgress
from zoosplat_model.devices import device_figures
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_train import progress_plots, sampling, start_weights, tensorboard, weight_choice
from zoosplat_train.history import history_csv
from zoosplat_train.ranks import Ranks
from zoosplat_train.trainer import TRAIN_FIGURES, NetworkTrainer

MAX_TIME_SHARE = 0.02  # share of the time that plots may take, and checkpoints; above it they wait for a later epoch
SAVE_SECONDS = 60.0  # most seconds between checkpoints, also within an epoch
REPORT_STEPS = 10  # steps between readings of the loss, each of which waits for the GPU
BLEND_PARTS = 8  # steps from the last weights back to the best ones, in which their blends are tried


class StepTimer:
    """Sums up the time that passes in steps; what is between them is waiting for frames.

    On a GPU it is the GPU's own time, from its start of a step to its end of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.times: list[tuple[Any, Any]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the body of the `with` block."""
        start = self._now()
        yield
        self.times.append((start, self._now()))

    def _now(self) -> Any:
        if not self.gpu:
            return time.monotonic()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def take_seconds(self) -> float:
        """Seconds in all steps since the last call. On a GPU the steps must have ended."""
        times, self.times = self.times, []
        return float(sum(a.elapsed_time(b) / 1000 if self.gpu else b - a for a, b in times))


class PendingFigures(NamedTuple):
    """Figures on their way from the GPU.

    Attributes:
        values: sums of `TRAIN_FIGURES` over the epoch, then the pairs of Gaussians and tiles that a step needed; there
            once the event has happened.
        event: None on the CPU, where the values are there at once.
        step: steps of the training that the values are of.
        position: frames of the epoch that the values are of.
    """

    values: torch.Tensor
    event: Any
    step: int
    position: int


@dataclass
class NetworkTraining:
    """A training of the network that goes on from the latest checkpoint. Its order depends on seed and epoch alone.

    Each of several ranks does the same with its share of the frames. The first rank decides what depends on a clock,
    and it alone writes files.
    """

    ctx: Context
    reader: FrameReader
    device: torch.device
    ranks: Ranks
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    text: str = ""  # line of progress that was reported last

    def __post_init__(self) -> None:
        self.settings = self.ctx.experiment.train
        self.frames, self.valid_frames = sampling.choose_frames(self.reader, self.settings)
        self.trainer = NetworkTrainer(self.reader, self.ctx.experiment, self.device, self.ranks)
        found = checkpoints.load(self.ctx.run.output_url("train"), "latest")
        if found is not None:
            self.progress = found.progress
            self.trainer.model.load_state_dict(found.model)
            self.trainer.averaged.load_state_dict(found.average)
            checkpoints.restore_state(self.trainer.model, self.trainer.optimizer, found.optimizer)
        else:
            start_weights.load_into(self.trainer.model, self.settings.start_from)
            self.trainer.averaged.load_state_dict(self.trainer.model.state_dict())
        if self.ranks.broadcast_scalar(self.progress.step) != self.progress.step:
            raise UserError(
                f"{self.ctx.run.project.url}: the checkpoint changed while it was read; let one run work on it"
            )
        self.ranks.broadcast_tensors(self.trainer.state())
        self.steps_per_epoch = -(-len(self.frames) // self.settings.batch_frames)
        self.sums = torch.zeros(len(TRAIN_FIGURES), dtype=torch.float64, device=self.device)
        self.sums += torch.tensor([self.progress.sums.get(k, 0.0) for k in TRAIN_FIGURES], device=self.device)
        best = None if self.progress.best is None else checkpoints.load(self.ctx.run.output_url("train"), "best")
        self.best, self.best_is_saved = None if best is None else best.average, True
        if self.device.type == "cuda":
            self._warm_up()
        self.spent = {"plot": 0.0, "save": 0.0}
        self.clock = self.saved = time.monotonic()
        self.begun_seconds, self.begun_step = self.progress.seconds, self.progress.step
        self.step_timer, self.loop_seconds, self.step_seconds = StepTimer(self.device), 0.0, 0.0

    def seconds(self) -> float:
        return self.begun_seconds + time.monotonic() - self.clock

    def is_over(self) -> bool:
        """Whether the training is over.

        Sets `done`, the part of the training that is over, 0 to 1: by epochs or by time, whichever is further.
        """
        self.done = (self.progress.epoch + self.progress.position / len(self.frames)) / self.settings.epochs
        if self.settings.max_minutes is not None:
            by_time = self.seconds() / (60 * self.settings.max_minutes)
            self.done = max(self.done, self.ranks.broadcast_scalar(by_time))
        return self.done >= 1

    def run(self) -> Outcome:
        p = self.progress
        url = urls.join(self.ctx.run.output_url("train"), "tensorboard")
        board = tensorboard.open_board(url, p.step) if self.ranks.first else nullcontext()
        # Frames are read ahead of the steps, from one epoch into the next.
        with board as self.board, closing(self.reader.prefetch(self._own_frames())) as self.ahead:
            # The last epoch must be validated before the training may end. So a training that was stopped when its
            # time was up, but within an epoch, ends that epoch first. Time that runs out while a checkpoint is written
            # ends the training in the next epoch.
            over = self.is_over() and p.position == 0 and p.best is not None
            while not over:
                self._epoch()
                over = self._end_epoch()
        steps = p.step - self.begun_step
        figures: dict[str, Any] = {
            "train_loss": p.history[-1]["train_loss"],
            "best_valid_loss": p.best,
            "best_step": p.best_step,
            "steps": p.step,
            "epochs": p.epoch,
            "seconds": round(p.seconds, 3),
            "seconds_per_step": round((self.seconds() - self.begun_seconds) / max(steps, 1), 4),
            "utilisation": round(self.step_seconds / max(self.loop_seconds, 1e-9), 4),
            "processes": self.ranks.size,
            **device_figures(self.device),
        }
        return Outcome(len(self.frames), figures=figures)

    def _steps(self, epoch: int, position: int) -> list[list[int]]:
        """The frames of each step of an epoch, of all ranks, from a position in the epoch on."""
        order = sampling.epoch_order(self.frames, self.settings.seed, epoch)[position:]
        n = self.settings.batch_frames
        return [order[i : i + n] for i in range(0, len(order), n)]

    def _own_frames(self) -> Iterator[int]:
        """Yield this rank's frames from the current position on, epoch after epoch without an end."""
        position = self.progress.position
        for epoch in count(self.progress.epoch):
            for frames in self._steps(epoch, position):
                yield from self.ranks.share(frames)
            position = 0

    def _augment(self, frames: list[Frame]) -> tuple[list[Frame], list[list[int]], list[bool]]:
        """The frames moved as in this epoch, the views that each is carved from, and whether each is mirrored."""
        s, epoch = self.settings, self.progress.epoch
        views = [sampling.carving_views(self._seen(f.t), s, epoch, f.t) for f in frames]
        moved = [sampling.jitter(f, s, epoch, self.reader.voxel_size_m) for f in frames]
        return moved, views, [sampling.is_mirrored(s.seed, epoch, f.t) for f in frames]

    def _seen(self, t: int) -> list[int]:
        """The observed cameras whose views of kept frame t are there."""
        return [c for c in self.reader.observed if self.reader.seen[t, c]]

    def _warm_up(self) -> None:
        """Wait for what the first step on a GPU would wait for, so that no clock counts it. No weight changes."""
        self.ctx.progress(0, 1, "choosing kernels (Triton's are compiled at the first use on a machine)")
        first = self._steps(self.progress.epoch, self.progress.position)[0]
        frames = [self.reader.frame(t) for t in self.ranks.share(first)]
        self.trainer.warm_up(*self._augment(frames))
        self.trainer.compare(self.reader.frame(first[0]))  # the kernels without gradients are others

    def _epoch(self) -> None:
        """Train to the end of the epoch, or until the time is up."""
        p, settings = self.progress, self.settings
        self.begun, pending = time.monotonic(), None
        for of_step in self._steps(p.epoch, p.position):
            batch = list(islice(self.ahead, len(self.ranks.share(of_step))))
            rate = sampling.learning_rate(settings.lr, self.done)
            augmented = self._augment(batch)
            with self.step_timer.step():
                self.sums += self.trainer.step(*augmented, rate, p.step, len(of_step))
            p.position += len(of_step)
            p.step += 1
            ended = p.position == len(self.frames)
            if pending is not None:
                self._report(pending)
            # The figures are reported after the next step has been started, which keeps the GPU busy meanwhile.
            pending = self._request_figures() if p.step % REPORT_STEPS == 0 else None
            if self.ranks.first and not ended and time.monotonic() - self.saved > SAVE_SECONDS:
                self._save()
            if self.is_over():
                return

    def _end_epoch(self) -> bool:
        """Do what is due of validation, plots and checkpoint: all of them at the end of the training.

        Returns:
            Whether the training is over.
        """
        p, settings = self.progress, self.settings
        means = self._wait_for_figures()  # waits for the last step
        loop, steps = time.monotonic() - self.begun, self.step_timer.take_seconds()
        self.loop_seconds, self.step_seconds = self.loop_seconds + loop, self.step_seconds + steps
        row = {"epoch": p.epoch + 1, "step": p.step, "seconds": round(self.seconds(), 3), **means}
        row["utilisation"] = round(steps / loop, 4)
        p.epoch, p.position = p.epoch + 1, 0
        self.sums.zero_()
        over = self.is_over()
        if over or p.epoch % settings.valid_every == 0:
            figures: dict[str, float] = {}
            losses = [row["train_loss"]]
            if self.valid_frames:
                figures, losses = self._validate()
            if not all(math.isfinite(loss) for loss in losses):
                raise self._diverged()
            if not p.least_losses or fmean(losses) < fmean(p.least_losses):
                p.least_losses = losses
                self._keep_as_best(losses)
            elif over and self.valid_frames:
                self._keep_late_blend(losses)
            row |= figures
        p.history.append(row)
        if self.board is None:  # not the first rank
            return over
        self.board.add(row)
        if over or (p.epoch % settings.plot_every == 0 and self._has_time_for("plot")):
            self._plot()
        due = p.epoch % settings.save_every == 0 or not self.best_is_saved
        if over or time.monotonic() - self.saved > SAVE_SECONDS or (due and self._has_time_for("save")):
            self._save()
        return over

    def _validate(self) -> tuple[dict[str, float], list[float]]:
        frames = self.reader.prefetch(self.ranks.share(self.valid_frames))
        return self.trainer.validate(frames, len(self.valid_frames))

    def _keep_as_best(self, losses: list[float]) -> None:
        """Keep the averaged weights as those to use."""
        self.progress.best, self.progress.best_step = fmean(losses), self.progress.step
        self.best, self.best_is_saved = self._averaged_on_cpu(), False

    def _averaged_on_cpu(self) -> dict[str, torch.Tensor]:
        """A copy of the averaged weights that takes no memory of the GPU."""
        return {k: v.to("cpu", copy=True) for k, v in self.trainer.averaged.state_dict().items()}

    def _keep_late_blend(self, losses: list[float]) -> None:
        """Keep the last weights, or as much of them in a blend with the best as is not worse in validation frames.

        The last weights have learned for longer and at a lower rate, so they are better in frames like those that the
        network is trained on.

        Args:
            losses: of the validation frames, under the last weights.
        """
        early, late = self.best, self._averaged_on_cpu()
        assert early is not None
        for parts in range(BLEND_PARTS, 0, -1):
            if parts < BLEND_PARTS:
                self.trainer.averaged.load_state_dict(weight_choice.blend(early, late, parts / BLEND_PARTS))
                _, losses = self._validate()
            if not weight_choice.is_significantly_worse(losses, self.progress.least_losses):
                self._keep_as_best(losses)
                return
        self.trainer.averaged.load_state_dict(late)

    def _has_time_for(self, what: str) -> bool:
        return self.spent[what] <= MAX_TIME_SHARE * (time.monotonic() - self.clock)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        # This raises in a process that was asleep while another finished the training: it must not write any more.
        self._report_progress(self.progress.step)
        yield
        self.spent[what] += time.monotonic() - start

    def _wait_for_figures(self) -> dict[str, float]:
        """Wait for the GPU and report the running epoch's mean figures, which are returned by name."""
        return self._report(self._request_figures())

    def _request_figures(self) -> PendingFigures:
        """Begin to copy the running epoch's figures from the GPU, without waiting for it."""
        values = torch.cat([self.sums, self.trainer.graphs.pair_buffer.required.double()[None]]).to(
            "cpu", non_blocking=True
        )
        event: Any = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return PendingFigures(values, event, self.progress.step, self.progress.position)

    def _report(self, pending: PendingFigures) -> dict[str, float]:
        """Report the running epoch's mean figures, which are returned by name.

        Raises:
            UserError: they are not numbers any more.
        """
        if pending.event is not None:
            pending.event.synchronize()
        p = self.progress
        *sums, pairs = pending.values.tolist()
        self.trainer.graphs.ensure_capacity(int(pairs))
        means = {key: value / max(pending.position, 1) for key, value in zip(TRAIN_FIGURES, sums, strict=True)}
        if not all(math.isfinite(value) for value in sums):
            raise self._diverged()
        if pending.position == 0:  # a new epoch has no figures to report yet
            return means
        self.text = f"epoch {p.epoch + 1} loss {means['train_loss']:.3f}"
        validated = [row for row in p.history if "valid_iou" in row]
        if validated:
            self.text += f" val IoU {validated[-1]['valid_iou']:.3f} PSNR {validated[-1]['valid_psnr']:.1f}"
        self._report_progress(pending.step)
        return means

    def _report_progress(self, step: int) -> None:
        """Report progress, which raises where another process has taken this training over."""
        self.ctx.progress(step, self.settings.epochs * self.steps_per_epoch, self.text)

    def _diverged(self) -> UserError:
        return UserError(
            f"training diverged by step {self.progress.step}: the loss is not a number; lower train.lr (now "
            f"{self.settings.lr}) and run again; the last checkpoint is kept"
        )

    def _save(self) -> None:
        p, trainer = self.progress, self.trainer
        self._wait_for_figures()
        with self._timed("save"):
            p.seconds = self.seconds()
            p.sums = dict(zip(TRAIN_FIGURES, self.sums.tolist(), strict=True))
            average = trainer.averaged.state_dict()
            keep = self.settings.keep_last
            best = None if self.best_is_saved else self.best
            url = self.ctx.run.output_url("train")
            checkpoints.save(url, trainer.model, trainer.optimizer, average, p, keep_last=keep, best=best)
            objects.write_bytes(urls.join(url, "history.csv"), history_csv(p.history))
            if self.board is not None:
                self.board.upload()
        self.best_is_saved, self.saved = True, time.monotonic()

    def _plot(self) -> None:
        with self._timed("plot"):
            url = self.ctx.run.output_url("train")
            objects.write_bytes(urls.join(url, "loss.png"), progress_plots.loss_curves(self.progress.history))
            t = (self.valid_frames or self.frames)[len(self.valid_frames or self.frames) // 2]
            truth, rendered = self.trainer.compare(self.reader.frame(t))
            names = [self.reader.camera_names[c] for c in self._seen(t)]
            objects.write_bytes(urls.join(url, "preview.png"), progress_plots.preview(truth, rendered, names, t))
