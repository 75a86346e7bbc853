"""Stage train: images.zarr, tracking.zarr, crop.zarr -> model/."""

from __future__ import annotations

import torch

from zoosplat.errors import UserError
from zoosplat.machine import usable_cores
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage
from zoosplat_model.devices import pick_device
from zoosplat_model.frames import open_reader
from zoosplat_model.gpu_memory import out_of_memory
from zoosplat_model.rasterize import load_kernels
from zoosplat_train import dynamic_loop, local_ranks, sampling, torchrun
from zoosplat_train.network_loop import NetworkTraining
from zoosplat_train.ranks import Ranks, count_ranks


class TrainStage(Stage):
    """Train the network on the first third of the frames or on all, or dynamic Gaussians on all of them."""

    def prepare(self, ctx: Context) -> Plan:
        count_ranks(ctx.experiment)
        reader = open_reader(ctx.run, torch.device("cpu"))
        if ctx.experiment.train.method == "dynamic":
            return dynamic_loop.prepare(reader, ctx.run.project.url)
        if not sampling.choose_frames(reader, ctx.experiment.train)[0]:
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
        if torchrun.is_torchrun():
            return torchrun.train_as_first_rank(train, ctx)
        size = count_ranks(ctx.experiment)
        if size > 1:
            return local_ranks.train_in_processes(train, ctx, size)
        return train(ctx, pick_device(ctx.experiment.train.device), Ranks())


def train(ctx: Context, device: torch.device, ranks: Ranks) -> Outcome:
    """Train to the end. Each of the ranks runs this function."""
    frames = ctx.experiment.train.batch_frames
    if ranks.size > frames:
        raise UserError(f"{ranks.size} processes share the frames of a step; set train.batch_frames ({frames}) to more")
    if device.type == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores() // ranks.size)))
    else:
        torch.backends.cudnn.benchmark = True
    load_kernels_in_turn(ctx, device, ranks)
    reader = open_reader(ctx.run, device)
    with out_of_memory(ctx.run, "train"):
        if ctx.experiment.train.method == "dynamic":
            return dynamic_loop.run(ctx, reader, device)
        return NetworkTraining(ctx, reader, device, ranks).run()


def load_kernels_in_turn(ctx: Context, device: torch.device, ranks: Ranks) -> None:
    """Load gsplat's kernels before any clock runs: the first rank before the others.

    The first rank compiles them if need be. Two processes that compile at once would spoil each other's files.
    """
    if device.type == "cuda":
        ctx.progress(0, 1, "loading gsplat's kernels (compiled at the first use on a machine, for some minutes)")
    if ranks.first:
        load_kernels(device)
    ranks.broadcast_scalar(0.0)  # the other ranks wait here for the first
    load_kernels(device)


STAGE = TrainStage("train")
