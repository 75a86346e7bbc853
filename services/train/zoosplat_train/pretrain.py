"""Pretrain the network on random animals: how `animals.safetensors` was made, and how to make another such file.

    python -m zoosplat_train.pretrain OUT.safetensors [--animals 6400] [--minutes 7.2] [--start-from animals]
    torchrun --standalone --nproc_per_node 4 -m zoosplat_train.pretrain OUT.safetensors ...

The network is the one that recordings are trained with, and so is a step of its training. Every step shows another
animal in six views of a random rig. The animal is carved from three to five of them, and all six count in the loss: so
the network learns what hulls of few views have too much of, on any side. `train.start_from` names the file that is
written. Under torchrun each GPU has `--animals` animals of its own, and shows one of them in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import numpy as np
import torch
from rich.progress import Progress

from zoosplat.config.experiment import Experiment
from zoosplat.config.training import RANDOM
from zoosplat.synthetic.random_animals import HEIGHT, WIDTH
from zoosplat_model.animals import (
    RIGS,
    PartialRigSplatter,
    RandomAnimalReader,
    build_experiment,
    film_rigs,
    reconstruct,
)
from zoosplat_model.losses import soft_iou
from zoosplat_model.network.splatter import PoseSplatter
from zoosplat_train import sampling, start_weights, torchrun
from zoosplat_train.ranks import Ranks
from zoosplat_train.trainer import TRAIN_FIGURES, NetworkTrainer

JITTER_VOXELS = 4.0  # takes the place of `train.jitter_voxels`
JITTER_RADIANS = 0.6  # takes the place of `train.jitter_radians`
REPORT_STEPS = 500  # steps between readings of the loss, each of which waits for the GPU
CLOCK_STEPS = 20  # steps between readings of the clock, which the ranks have to agree on


class RandomAnimalTrainer(NetworkTrainer):
    """Trains a network that takes the views it is carved from for the whole rig."""

    network = PartialRigSplatter


@torch.no_grad()
def evaluate(trainer: NetworkTrainer, animals: RandomAnimalReader) -> tuple[float, float]:
    """Mean IoU of animals that were not trained on: in the views that they are carved from, and in other views."""
    rng, figures = np.random.default_rng(1), []
    for t in range(animals.tested):
        frame, carved = animals.draw_views(t, rng)
        gaussians = reconstruct(trainer.averaged, frame, carved).to_world(frame.center, frame.angle)
        alpha = trainer.averaged.render(gaussians, frame.world_to_camera, frame.intrinsics, WIDTH, HEIGHT).alpha
        iou = soft_iou((alpha > 0.5).to(frame.mask.dtype), frame.mask)
        figures.append((iou[: len(carved)].mean(), iou[len(carved) :].mean()))
    first, second = torch.tensor(figures).mean(0).tolist()
    return first, second


def pretrain(animals: RandomAnimalReader, chosen: Experiment, seconds: float, ranks: Ranks) -> PoseSplatter:
    """Train for some seconds; returns the network with averaged weights."""
    trainer, rng = RandomAnimalTrainer(animals, chosen, animals.device, ranks), np.random.default_rng(ranks.rank)
    start_weights.load_into(trainer.model, chosen.train.start_from)
    trainer.averaged.load_state_dict(trainer.model.state_dict())
    settings = chosen.train.model_copy(update={"jitter_voxels": JITTER_VOXELS, "jitter_radians": JITTER_RADIANS})
    sums = torch.zeros(len(TRAIN_FIGURES), dtype=torch.float64, device=animals.device)
    step, spent, began = 0, 0.0, time.monotonic()
    with Progress(disable=not ranks.first) as progress:
        bar = progress.add_task("pretraining", total=seconds)
        while spent < seconds:
            frame, carved = animals.draw_views(int(rng.integers(animals.tested, animals.n_frames)), rng)
            frame = sampling.jitter(frame, settings, step, animals.voxel_size_m)
            rate = sampling.learning_rate(settings.lr, spent / seconds)
            mirrored = bool(rng.random() < sampling.MIRRORED_SHARE)
            sums += trainer.step([frame], [carved], [mirrored], rate, step, ranks.size)
            step += 1
            if step % CLOCK_STEPS == 0:
                spent = ranks.broadcast_scalar(time.monotonic() - began)
            if step % REPORT_STEPS == 0:
                trainer.graphs.ensure_capacity(int(trainer.graphs.pair_buffer.required))
                loss = sums[0] / (REPORT_STEPS * ranks.size)
                progress.update(bar, completed=spent, description=f"step {step} loss {loss:.3f}")
                sums.zero_()
    carved_iou, other_iou = evaluate(trainer, animals)
    figures = {"animals": animals.n_frames, "steps": step, "seconds": round(time.monotonic() - began, 1)}
    if ranks.first:
        print(json.dumps({**figures, "carved_iou": round(carved_iou, 4), "other_iou": round(other_iou, 4)}))
    return trainer.averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", metavar="OUT.safetensors")
    parser.add_argument("--animals", type=int, default=6400)
    parser.add_argument("--minutes", type=float, default=7.2)
    parser.add_argument("--filters", type=int, default=16, help="model.base_filters")
    parser.add_argument("--start-from", default=RANDOM, help="weights to go on from, as train.start_from")
    parser.add_argument("--first-rig", type=int, default=0, help="rigs from this number on: others, other animals")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    chosen = build_experiment(filters=args.filters, start_from=args.start_from, device=args.device)
    began, rank = time.monotonic(), int(os.environ.get("RANK", 0))
    filmed = film_rigs(args.animals, args.first_rig + rank * RIGS)
    with torchrun.own_rank(chosen) as (device, ranks):
        animals = RandomAnimalReader(filmed, device)
        print(f"{animals.n_frames} animals in {time.monotonic() - began:.0f} s", flush=True)
        trained = pretrain(animals, chosen, 60 * args.minutes, ranks)
        if ranks.first:
            start_weights.write(args.output, trained)


if __name__ == "__main__":
    main()
