"""Learning from a recording: only from what views agree on, and kept only if they agree better than before."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zoosplat_segment import adaptation
from zoosplat_segment.adaptation import Lesson, adapt, agreed_targets
from zoosplat_segment.network import load_network, package_weights, predict_masks
from zoosplat_segment.scenes import SceneComposer
from zoosplat_segment.sprites import Sprites

CPU = torch.device("cpu")


def no_progress(done: int, total: int, message: str) -> None:
    return None


@pytest.fixture(scope="module")
def lesson(sprites: Sprites) -> Lesson:
    """Two views whose masks are true, and whose priors are the same a little larger."""
    batch = SceneComposer(sprites, CPU, 5).compose(1, 2)
    truth = (batch.target[0] > 0.5).float()
    priors = F.max_pool2d(truth[:, None], 5, 1, 2)[:, 0]
    return Lesson(255 * batch.frame[0], 255 * batch.plate[0], batch.noise[0], priors, truth)


def test_targets_by_hand() -> None:
    #                      agreed   disputed      sure of itself, others unsure   empty by itself   by others   unsure
    masks = torch.tensor([[[0.9, 0.9, 0.9, 0.1, 0.5, 0.5]]])
    priors = torch.tensor([[[0.8, 0.01, 0.5, 0.9, 0.01, 0.5]]])
    targets, sure = agreed_targets(masks, priors)
    assert targets[0, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert sure[0, 0].tolist() == [1, 1, 0, 1, 1, 0]


def entropy(weights: dict[str, torch.Tensor] | None, lesson: Lesson) -> float:
    targets, sure = agreed_targets(lesson.masks, lesson.priors)
    with torch.inference_mode():
        masks = predict_masks(load_network(weights, CPU), lesson.frames, lesson.plates, lesson.noise, lesson.priors)
    return float(F.binary_cross_entropy(masks, targets, weight=sure, reduction="sum") / sure.sum())


def test_steps_lower_the_loss(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "STEPS", 6)
    told: list[int] = []
    weights = adapt([lesson], 5, CPU, lambda weights: 0.5, lambda done, total, message: told.append(done))
    assert told == [1, 2, 3, 4, 5, 6]
    assert weights.keys() == package_weights().keys()
    assert entropy(weights, lesson) < entropy(None, lesson)


@pytest.mark.parametrize(("after", "kept"), [(0.7, True), (0.6, True), (0.59, False)])
def test_weights_are_kept_only_if_views_do_not_agree_less(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch, after: float, kept: bool
) -> None:
    monkeypatch.setattr(adaptation, "STEPS", 1)
    weights = adapt([lesson], 5, CPU, lambda weights: 0.6 if weights is None else after, no_progress)
    assert bool(weights) == kept


def test_nothing_to_learn(lesson: Lesson) -> None:
    assert adapt([], 5, CPU, lambda weights: 1.0, no_progress) == {}
    assert adapt([lesson], 0, CPU, lambda weights: 1.0, no_progress) == {}
