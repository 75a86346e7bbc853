"""Measure how descriptors of animals differ: how `zoosplat_embedding/animals.npz` was made.

    python -m zoosplat_features.animals OUT.npz WEIGHTS.safetensors [--animals 800]

Random animals (`zoosplat_model.animals`), each in another posture and of another build, are reconstructed by the
network whose weights `zoosplat_train.pretrain` wrote, and described by the encoder `gaussians`. An embedding that is
fitted to few frames knows from it in which directions descriptors move when animals do what those do not show.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import numpy.typing as npt
import safetensors.torch
from rich.progress import track

from zoosplat_features.encoders import GaussiansEncoder
from zoosplat_model.animals import (
    ELL_M,
    PartialRigSplatter,
    RandomAnimalReader,
    build_experiment,
    film_rigs,
    reconstruct,
)
from zoosplat_model.devices import pick_device

DIRECTIONS = 60  # principal directions that are kept; the rest of the variance is noise


def variation(descriptors: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float16], float]:
    """The main directions in which descriptors vary.

    Args:
        descriptors: [N, D].

    Returns:
        [60, D] rows whose Gram matrix is the covariance up to a factor, such that half precision has room; and the
        share of the variance that they have.
    """
    _, lengths, axes = np.linalg.svd(descriptors - descriptors.mean(0), full_matrices=False)
    rows = lengths[:DIRECTIONS, None] * axes[:DIRECTIONS]
    share = (lengths[:DIRECTIONS] ** 2).sum() / (lengths**2).sum()
    return (rows / np.abs(rows).max()).astype(np.float16), float(share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", metavar="OUT.npz")
    parser.add_argument("weights", metavar="WEIGHTS.safetensors")
    parser.add_argument("--animals", type=int, default=800)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    began, filmed = time.monotonic(), film_rigs(args.animals)
    device = pick_device(args.device)
    animals = RandomAnimalReader(filmed, device)
    print(f"{animals.n_frames} animals in {time.monotonic() - began:.0f} s", flush=True)
    model = PartialRigSplatter.from_reader(animals, build_experiment(device=args.device)).move_to(device)
    model.load_state_dict(safetensors.torch.load_file(args.weights), strict=False)
    encode, rng, found = GaussiansEncoder(ELL_M / 2), np.random.default_rng(0), []
    for t in track(range(animals.n_frames), "describing"):
        frame, carved = animals.draw_views(t, rng)
        found.append(encode(reconstruct(model, frame, carved)).cpu().numpy())
    factor, share = variation(np.stack(found).astype(np.float64))
    np.savez_compressed(args.output, factor=factor)
    print(f"{len(factor)} directions, {share:.3f} of the variance")


if __name__ == "__main__":
    main()
