"""Stage train: images.zarr, tracking.zarr, crop.zarr -> model/."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from statistics import fmean
from typing import Any, NamedTuple, get_args

import torch

from zoosplat.config.training import Train as Settings
from zoosplat.errors import UserError
from zoosplat.machine import usable_cores
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage
from zoosplat.stages.memory import MAX_VALIDATION_FRAMES
from zoosplat.storage import objects, urls
from zoosplat_model import checkpoints
from zoosplat_model.checkpoints import Progress
from zoosplat_model.frames import Frame, FrameReader, Split
from zoosplat_model.gpu_memory import device_figures, out_of_memory
from zoosplat_model.predictor import open_reader, pick_device
from zoosplat_model.rasterize import load_kernels
from zoosplat_train import dynamic, ops, parallel, plots, start
from zoosplat_train.parallel import Ranks

SHARE = 0.02  # of the time, that plots and checkpoints each may take; then they wait for a later epoch
SAVE_SECONDS = 60.0  # between checkpoints at most, also within an epoch
LOOK_STEPS = 10  # steps between readings of the loss


class Train(Stage):
    """Train the network on the first third of the frames or on all, or dynamic Gaussians on all of them."""

    def prepare(self, ctx: Context) -> Plan:
        parallel.number(ctx.experiment)
        reader = open_reader(ctx.run, torch.device("cpu"))
        if ctx.experiment.train.method == "dynamic":
            return dynamic.prepare(reader, ctx.run.project.url)
        if not _frames(reader, ctx.experiment.train)[0]:
            part = "" if ctx.experiment.train.fit_to == "all" else " of the first third"
            raise UserError(
                f"{ctx.run.project.url}: no frame{part} has a visual hull, so there is nothing to train on; "
                "see the warnings of stage center_rotation, or keep more frames"
            )
        warnings: tuple[str, ...] = ()
        if not reader.split("valid"):
            warnings = ("no validation frames: the best checkpoint is that of the lowest training loss",)
        return Plan((0, reader.n_frames), warnings=warnings)

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        if ctx.experiment.train.method == "dynamic":
            return train(ctx, pick_device(ctx.experiment.train.device), Ranks())
        if parallel.by_torchrun():
            return parallel.join(train, ctx)
        size = parallel.number(ctx.experiment)
        if size > 1:
            return parallel.start(train, ctx, size)
        return train(ctx, pick_device(ctx.experiment.train.device), Ranks())


def _frames(reader: FrameReader, settings: Settings) -> tuple[list[int], list[int]]:
    """Those to train on and those to validate with, of which none is in both."""
    valid = ops.spread(reader.split("valid"), MAX_VALIDATION_FRAMES)
    if settings.fit_to == "third":
        return reader.split("train"), valid
    every = {t for split in get_args(Split) for t in reader.split(split)}
    return sorted(every - set(valid)), valid


def train(ctx: Context, device: torch.device, ranks: Ranks) -> Outcome:
    """Train to the end: what each of the ranks does."""
    frames = ctx.experiment.train.batch_frames
    if ranks.size > frames:
        raise UserError(f"{ranks.size} processes share the frames of a step; set train.batch_frames ({frames}) to more")
    if device.type == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores() // ranks.size)))
    else:
        torch.backends.cudnn.benchmark = True
    _load_kernels(ctx, device, ranks)
    reader = open_reader(ctx.run, device)
    with out_of_memory(ctx.run, "train"):
        if ctx.experiment.train.method == "dynamic":
            return dynamic.run(ctx, reader, device)
        return _Training(ctx, reader, device, ranks).run()


def _load_kernels(ctx: Context, device: torch.device, ranks: Ranks) -> None:
    """Before any clock runs. One process compiles them, if need be; two at once spoil each other's files."""
    if device.type == "cuda":
        ctx.progress(0, 1, "loading gsplat's kernels (compiled at the first use on a machine, for some minutes)")
    if ranks.first:
        load_kernels(device)
    ranks.agreed(0.0)  # the others wait for the first
    load_kernels(device)


class _Busy:
    """Time in steps, of a GPU as it passes the beginnings and ends of them; what lies between is waiting for frames."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.times: list[tuple[Any, Any]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        start = self._now()
        yield
        self.times.append((start, self._now()))

    def _now(self) -> Any:
        if not self.gpu:
            return time.monotonic()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> float:
        """Sum of all steps since the last call; those of a GPU are to be over."""
        times, self.times = self.times, []
        return float(sum(a.elapsed_time(b) / 1000 if self.gpu else b - a for a, b in times))


class _Taken(NamedTuple):
    """Sums of the figures of an epoch, and the pairs needed, as of a step; there once the event has happened."""

    figures: torch.Tensor
    event: Any
    step: int
    position: int


@dataclass
class _Training:
    """A training that goes on from the latest checkpoint. Its order depends on seed and epoch alone.

    Of several ranks each does the same, with its part of the frames; what depends on a clock the first one decides, and
    that one alone shows and writes anything.
    """

    ctx: Context
    reader: FrameReader
    device: torch.device
    ranks: Ranks
    progress: Progress = field(default_factory=Progress)
    text: str = ""  # that was reported last

    def __post_init__(self) -> None:
        self.settings = self.ctx.experiment.train
        self.frames, self.valid_frames = _frames(self.reader, self.settings)
        self.trainer = ops.Trainer(self.reader, self.ctx.experiment, self.device, self.ranks)
        found = checkpoints.load(self.ctx.run.output_url("train"), "latest")
        if found is not None:
            self.progress = found.progress
            self.trainer.model.load_state_dict(found.model)
            self.trainer.averaged.load_state_dict(found.average)
            checkpoints.restore_state(self.trainer.model, self.trainer.optimizer, found.optimizer)
        else:
            start.begin(self.trainer.model, self.settings.start_from)
            self.trainer.averaged.load_state_dict(self.trainer.model.state_dict())
        if self.ranks.agreed(self.progress.step) != self.progress.step:
            raise UserError(
                f"{self.ctx.run.project.url}: the checkpoint changed while it was read; let one run work on it"
            )
        self.ranks.copy(self.trainer.state())
        self.steps_per_epoch = -(-len(self.frames) // self.settings.batch_frames)
        self.sums = torch.zeros(len(ops.TRAIN_FIGURES), dtype=torch.float64, device=self.device)
        self.sums += torch.tensor([self.progress.sums.get(k, 0.0) for k in ops.TRAIN_FIGURES], device=self.device)
        best = None if self.progress.best is None else checkpoints.load(self.ctx.run.output_url("train"), "best")
        self.best, self.best_is_saved = None if best is None else best.average, True
        if self.device.type == "cuda":
            self._rehearse()
        self.spent = {"plot": 0.0, "save": 0.0}
        self.clock = self.saved = time.monotonic()
        self.begun_seconds, self.begun_step = self.progress.seconds, self.progress.step
        self.busy, self.looped, self.stepped = _Busy(self.device), 0.0, 0.0

    def seconds(self) -> float:
        return self.begun_seconds + time.monotonic() - self.clock

    def is_over(self) -> bool:
        """Whether the training is; `done` is the part that is, 0 to 1, by epochs or by time, whichever is further."""
        self.done = (self.progress.epoch + self.progress.position / len(self.frames)) / self.settings.epochs
        if self.settings.max_minutes is not None:
            by_time = self.seconds() / (60 * self.settings.max_minutes)
            self.done = max(self.done, self.ranks.agreed(by_time))
        return self.done >= 1

    def run(self) -> Outcome:
        p = self.progress
        url = urls.join(self.ctx.run.output_url("train"), "tensorboard")
        board = plots.tensorboard(url, p.step) if self.ranks.first else nullcontext()
        # Frames are read ahead of the steps, from one epoch into the next.
        with board as self.board, closing(self.reader.prefetch(self._order())) as self.ahead:
            # A run that was stopped when its time was up, but within an epoch, still has that to end. Time that runs
            # out while an epoch's checkpoint is written is noticed in the next one, for the last has to be validated.
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
            "utilisation": round(self.stepped / max(self.looped, 1e-9), 4),
            "processes": self.ranks.size,
            **device_figures(self.device),
        }
        return Outcome(len(self.frames), figures=figures)

    def _steps(self, epoch: int, position: int) -> list[list[int]]:
        """Frames of each step of an epoch, from a position in it on."""
        order = ops.epoch_order(self.frames, self.settings.seed, epoch)[position:]
        n = self.settings.batch_frames
        return [order[i : i + n] for i in range(0, len(order), n)]

    def _order(self) -> Iterator[int]:
        """This rank's frames from here on, without an end."""
        position = self.progress.position
        for epoch in count(self.progress.epoch):
            for frames in self._steps(epoch, position):
                yield from self.ranks.share(frames)
            position = 0

    def _learned_from(self, frames: list[Frame]) -> tuple[list[Frame], list[list[int]], list[bool]]:
        """The frames as this epoch has them: moved, the views that each is carved from, and whether it is mirrored."""
        s, epoch = self.settings, self.progress.epoch
        views = [ops.carving_views(self.reader.observed, s, epoch, f.t) for f in frames]
        moved = [ops.jitter(f, s, epoch, self.reader.voxel_size_m) for f in frames]
        return moved, views, [ops.is_mirrored(s.seed, epoch, f.t) for f in frames]

    def _rehearse(self) -> None:
        """What the first step on a GPU waits for, which is no part of the training. Changes nothing."""
        self.ctx.progress(0, 1, "choosing kernels (Triton's are compiled at the first use on a machine)")
        first = self._steps(self.progress.epoch, self.progress.position)[0]
        frames = [self.reader.frame(t) for t in self.ranks.share(first)]
        self.trainer.rehearse(*self._learned_from(frames))
        self.trainer.compare(self.reader.frame(first[0]))  # without gradients kernels are others

    def _epoch(self) -> None:
        """Steps to the end of the epoch, or of the time."""
        p, settings = self.progress, self.settings
        self.begun, taken = time.monotonic(), None
        for of_step in self._steps(p.epoch, p.position):
            batch = list(islice(self.ahead, len(self.ranks.share(of_step))))
            rate = ops.learning_rate(settings.lr, self.done)
            learned = self._learned_from(batch)
            with self.busy.step():
                self.sums += self.trainer.step(*learned, rate, p.step, len(of_step))
            p.position += len(of_step)
            p.step += 1
            ended = p.position == len(self.frames)
            if taken is not None:
                self._show(taken)
            # Shown after the next step: while that one keeps the GPU busy.
            taken = self._take() if p.step % LOOK_STEPS == 0 else None
            if self.ranks.first and not ended and time.monotonic() - self.saved > SAVE_SECONDS:
                self._save()
            if self.is_over():
                return

    def _end_epoch(self) -> bool:
        """History, validation, plots and checkpoint; at the end of the training all of them. Whether it is the end."""
        p, settings = self.progress, self.settings
        means = self._look()  # waits for the last step
        loop, steps = time.monotonic() - self.begun, self.busy.seconds()
        self.looped, self.stepped = self.looped + loop, self.stepped + steps
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
                self._keep(losses)
            elif over and self.valid_frames:
                self._blend(losses)
            row |= figures
        p.history.append(row)
        if self.board is None:  # not the first rank
            return over
        self.board.add(row)
        if over or (p.epoch % settings.plot_every == 0 and self._affords("plot")):
            self._plot()
        due = p.epoch % settings.save_every == 0 or not self.best_is_saved
        if over or time.monotonic() - self.saved > SAVE_SECONDS or (due and self._affords("save")):
            self._save()
        return over

    def _validate(self) -> tuple[dict[str, float], list[float]]:
        frames = self.reader.prefetch(self.ranks.share(self.valid_frames))
        return self.trainer.validate(frames, len(self.valid_frames))

    def _keep(self, losses: list[float]) -> None:
        """The averaged weights, as those to use."""
        self.progress.best, self.progress.best_step = fmean(losses), self.progress.step
        self.best, self.best_is_saved = self._average(), False

    def _average(self) -> dict[str, torch.Tensor]:
        """A copy of the averaged weights, which takes no memory of the GPU."""
        return {k: v.to("cpu", copy=True) for k, v in self.trainer.averaged.state_dict().items()}

    def _blend(self, losses: list[float]) -> None:
        """Use the last weights, or as much of them in a blend with the best as is not worse in validation frames.

        They have learned for longer, at a lower rate; in frames like those that they learn from they are better.
        """
        early, late = self.best, self._average()
        assert early is not None
        for eighths in range(8, 0, -1):
            if eighths < 8:
                self.trainer.averaged.load_state_dict(ops.blend(early, late, eighths / 8))
                _, losses = self._validate()
            if not ops.significantly_worse(losses, self.progress.least_losses):
                self._keep(losses)
                return
        self.trainer.averaged.load_state_dict(late)

    def _affords(self, what: str) -> bool:
        return self.spent[what] <= SHARE * (time.monotonic() - self.clock)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        self._tell(self.progress.step)  # a process that was asleep must not write into what another has finished
        yield
        self.spent[what] += time.monotonic() - start

    def _look(self) -> dict[str, float]:
        """Mean figures of the running epoch, after waiting for the GPU."""
        return self._show(self._take())

    def _take(self) -> _Taken:
        there = torch.cat([self.sums, self.trainer.recorder.pairs.needed.double()[None]]).to("cpu", non_blocking=True)
        event: Any = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _Taken(there, event, self.progress.step, self.progress.position)

    def _show(self, taken: _Taken) -> dict[str, float]:
        """Mean figures of the running epoch. Raises UserError when they are not numbers any more."""
        if taken.event is not None:
            taken.event.synchronize()
        p = self.progress
        *sums, pairs = taken.figures.tolist()
        self.trainer.recorder.make_room(int(pairs))
        means = {key: value / max(taken.position, 1) for key, value in zip(ops.TRAIN_FIGURES, sums, strict=True)}
        if not all(math.isfinite(value) for value in sums):
            raise self._diverged()
        if taken.position == 0:  # a new epoch has nothing to show yet
            return means
        self.text = f"epoch {p.epoch + 1} loss {means['train_loss']:.3f}"
        validated = [row for row in p.history if "valid_iou" in row]
        if validated:
            self.text += f" val IoU {validated[-1]['valid_iou']:.3f} PSNR {validated[-1]['valid_psnr']:.1f}"
        self._tell(taken.step)
        return means

    def _tell(self, step: int) -> None:
        """Report progress, which raises where another process has taken this training over."""
        self.ctx.progress(step, self.settings.epochs * self.steps_per_epoch, self.text)

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
            best = None if self.best_is_saved else self.best
            url = self.ctx.run.output_url("train")
            checkpoints.save(url, trainer.model, trainer.optimizer, average, p, keep_last=keep, best=best)
            objects.write_bytes(urls.join(url, "history.csv"), plots.history_csv(p.history))
            if self.board is not None:
                self.board.upload()
        self.best_is_saved, self.saved = True, time.monotonic()

    def _plot(self) -> None:
        with self._counted("plot"):
            url = self.ctx.run.output_url("train")
            objects.write_bytes(urls.join(url, "loss.png"), plots.loss_curves(self.progress.history))
            t = (self.valid_frames or self.frames)[len(self.valid_frames or self.frames) // 2]
            truth, rendered = self.trainer.compare(self.reader.frame(t))
            names = [self.reader.camera_names[c] for c in self.reader.observed]
            objects.write_bytes(urls.join(url, "preview.png"), plots.preview(truth, rendered, names, t))


STAGE = Train("train")
