"""What happens at which iteration, as pure functions (4D Gaussian Splatting, arXiv 2310.08528)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from zoosplat.config.training import Dynamic

Stage = Literal["coarse", "fine"]
STAGES: tuple[Stage, ...] = ("coarse", "fine")
SIZE_LIMIT_PX = 20.0
SH_EVERY = 1000  # iterations of a stage between raises of the degree of the harmonics
SHOWN = ((1_000, 10), (3_000, 50), (60_000, 100))  # below this iteration of a stage: each how many a picture is kept


class Actions(NamedTuple):
    """What changes the set of Gaussians after an iteration, in this order.

    Attributes:
        collect: gather the statistics of this iteration.
        densify: clone and split where the gradient reaches `gradient`.
        prune: remove those below `opacity`, and those too large where there is a `size_px`.
        grow: add points beside lonely ones whose gradient reaches `gradient`.
        reset: lower all opacities to 0.01.
        gradient: threshold on the mean norm of the screen-space gradient, per half the picture's size.
        opacity: threshold of pruning.
        size_px: radius on the screen above which a Gaussian is pruned; None: no limit on sizes.
    """

    collect: bool
    densify: bool
    prune: bool
    grow: bool
    reset: bool
    gradient: float
    opacity: float
    size_px: float | None


def actions(iteration: int, stage: Stage, count: int, config: Dynamic) -> Actions:
    """The actions after an iteration (from 1, in each stage anew) that `count` Gaussians took part in."""
    c, on = config, iteration < config.densify_until_iter
    gradient, opacity = c.densify_grad_threshold_coarse, c.opacity_threshold_coarse
    if stage == "fine":
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
        size_px=SIZE_LIMIT_PX if iteration > c.opacity_reset_interval else None,
    )


def decayed(first: float, last: float, iteration: int, steps: int) -> float:
    """Learning rate that falls exponentially from `first` to `last` within `steps` iterations, then stays."""
    done = min(max(iteration / steps, 0.0), 1.0)
    return math.exp((1 - done) * math.log(first) + done * math.log(last))


def is_shown(iteration: int) -> bool:
    """Whether a picture of this iteration is kept where `render_process` is on."""
    for below, every in SHOWN:
        if iteration < below:
            return iteration % every == 0
    return False
