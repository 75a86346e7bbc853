"""What happens at which iteration of a dynamic training (4D Gaussian Splatting, arXiv 2310.08528); pure functions."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from zoosplat.config.training import Dynamic

Phase = Literal["coarse", "fine"]
PHASES: tuple[Phase, ...] = ("coarse", "fine")
MAX_RADIUS_PX = 20.0  # pixels; radius on the screen above which a Gaussian is pruned (3DGS)
SH_DEGREE_INTERVAL = 1000  # iterations of a phase after which the degree of the harmonics rises by one (3DGS)
# Below the first number of iterations of a phase, a picture is kept after each second number of iterations.
SNAPSHOT_INTERVALS = ((1_000, 10), (3_000, 50), (60_000, 100))


class Actions(NamedTuple):
    """What changes the set of Gaussians after an iteration, in this order.

    Attributes:
        collect: whether the statistics of this iteration are accumulated.
        densify: whether Gaussians whose gradient reaches `gradient` are cloned or split.
        prune: whether Gaussians fainter than `opacity` or larger than `size_px` are removed.
        grow: whether Gaussians are added beside lonely ones whose gradient reaches `gradient`.
        reset: whether all opacities are lowered to 0.01.
        gradient: threshold on the mean norm of the screen-space gradient, by half the picture's size.
        opacity: threshold of pruning.
        size_px: radius on the screen above which a Gaussian is pruned, pixels; None: there is no limit on sizes.
    """

    collect: bool
    densify: bool
    prune: bool
    grow: bool
    reset: bool
    gradient: float
    opacity: float
    size_px: float | None


def plan_actions(iteration: int, phase: Phase, count: int, config: Dynamic) -> Actions:
    """The actions after an iteration in which there are `count` Gaussians; each phase counts iterations from 1."""
    c, on = config, iteration < config.densify_until_iter
    gradient, opacity = c.densify_grad_threshold_coarse, c.opacity_threshold_coarse
    if phase == "fine":
        done = iteration / c.densify_until_iter
        first, last = c.densify_grad_threshold_fine_init, c.densify_grad_threshold_after
        gradient = first - (first - last) * done
        first, last = c.opacity_threshold_fine_init, c.opacity_threshold_fine_after
        opacity = first - (first - last) * done
    room = count < c.max_gaussians
    due = on and iteration % c.densification_interval == 0
    return Actions(
        collect=on,
        densify=due and iteration > c.densify_from_iter and room,
        prune=on
        and iteration > c.pruning_from_iter
        and iteration % c.pruning_interval == 0
        and count > c.min_gaussians_to_prune,
        grow=due and room and c.add_point,
        reset=on and iteration % c.opacity_reset_interval == 0,
        gradient=gradient,
        opacity=opacity,
        size_px=MAX_RADIUS_PX if iteration > c.opacity_reset_interval else None,
    )


def decay_learning_rate(first: float, last: float, iteration: int, steps: int) -> float:
    """The learning rate that falls exponentially from `first` to `last` within `steps` iterations, and then stays."""
    done = min(max(iteration / steps, 0.0), 1.0)
    return math.exp((1 - done) * math.log(first) + done * math.log(last))


def is_snapshot_iteration(iteration: int) -> bool:
    """Whether a picture of this iteration of a phase is kept where `render_process` is on."""
    for below, every in SNAPSHOT_INTERVALS:
        if iteration < below:
            return iteration % every == 0
    return False
