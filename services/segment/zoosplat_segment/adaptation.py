"""The recording teaches the network: a short training on what all views of some instants agree on.

The masks of the stage itself are the targets, but only where the view and what the others tell of it say the same.
Held-out cameras take no part, and what they see is never told to the network. Whether the network has become better is
asked of instants that it was not trained on: if views agree less than before, the old weights stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat_segment.network import MaskNetwork, build_network

STEPS = 300  # steps of the training at most
LEARNING_RATE = 1e-4  # of Adam
ANIMAL, EMPTY = 0.85, 0.15  # probability from which, and below which, a view's mask counts as sure
TOLD, UNTOLD = 0.6, 0.05  # the same of what the other views tell
TETHER = 1e-3  # weight of the squared distance from the weights of the package
NO_PRIOR_SHARE = 0.2  # share of the steps without a prior
VIEWS_AT_ONCE = 2  # views of an instant in a step
TESTED = 4  # every so many instants one is not trained on


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the observed views of an instant have shown, n views.

    Attributes:
        frames, plates: [n, 3, h, w] 0 to 255.
        noise: [n] 0 to 1.
        priors: [n, h, w] what the other views tell.
        masks: [n, h, w] the masks of the stage.
    """

    frames: Tensor
    plates: Tensor
    noise: Tensor
    priors: Tensor
    masks: Tensor


def agreed_targets(masks: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """Targets [n, h, w], and their weights: 1 where a view and the others agree, 0 elsewhere."""
    animal = (masks > ANIMAL) & (priors > TOLD)
    empty = (masks < EMPTY) | (priors < UNTOLD)
    return animal.float(), (animal | empty).float()


def adapt(
    lessons: Sequence[Lesson],
    minutes: float,
    device: torch.device,
    agreement: Callable[[dict[str, Tensor] | None], float],
    progress: Callable[[int, int, str], None],
) -> dict[str, Tensor]:
    """Weights of a network that has learned from a recording; empty if it has not become better.

    Args:
        lessons: of instants spread over the recording.
        minutes: longest time.
        device: where to compute.
        agreement: measures how well the views agree in instants that are not among the lessons, with such weights; None
            stands for the weights of the package.
        progress: told what is done.
    """
    if minutes <= 0 or not lessons:
        return {}
    before = agreement(None)
    # Tensors of inference take no part in gradients, their copies do.
    lessons = [Lesson(*(value.clone() for value in vars(lesson).values())) for lesson in lessons]
    network = build_network(None, device).eval()  # The normalisations keep their statistics.
    first = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    random = torch.Generator().manual_seed(0)
    began = time.monotonic()
    for step in range(STEPS):
        lesson = lessons[int(torch.randint(len(lessons), (1,), generator=random))]
        loss = _loss(network, lesson, random)
        tether = sum((((p - q) ** 2).sum() for p, q in zip(network.parameters(), first, strict=True)), torch.zeros(()))
        optimizer.zero_grad(set_to_none=True)
        (loss + TETHER * tether).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress(step + 1, STEPS, "learning from the recording")
        if time.monotonic() - began > 60 * minutes:
            break
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return weights if agreement(weights) >= before else {}


def _loss(network: MaskNetwork, lesson: Lesson, random: torch.Generator) -> Tensor:
    # A few views at a time need less memory, and more steps fit into the time.
    rows = torch.randperm(len(lesson.masks), generator=random)[:VIEWS_AT_ONCE].to(lesson.masks.device)
    lesson = Lesson(*(value[rows] for value in vars(lesson).values()))
    targets, sure = agreed_targets(lesson.masks, lesson.priors)
    priors = lesson.priors[:, None]
    if float(torch.rand((), generator=random)) < NO_PRIOR_SHARE:
        priors = torch.full_like(priors, 0.5)
    frames, plates = lesson.frames / 255, lesson.plates / 255
    if float(torch.rand((), generator=random)) < 0.5:
        frames, plates, priors, targets, sure = (t.flip(-1) for t in (frames, plates, priors, targets, sure))
    gain = 1 + 0.1 * float(torch.randn((), generator=random))
    logits = network((frames * gain).clamp(0, 1), (plates * gain).clamp(0, 1), lesson.noise, priors)[:, 0]
    entropy = F.binary_cross_entropy_with_logits(logits, targets, weight=sure, reduction="sum")
    return entropy / sure.sum().clamp_min(1)
