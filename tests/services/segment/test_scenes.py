"""Scenes that the network is trained on."""

from __future__ import annotations

import pytest
import torch

from zoosplat_segment.pretrain import mask_loss
from zoosplat_segment.scenes import SIZE, SceneBatch, SceneComposer
from zoosplat_segment.sprites import Sprites

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch(sprites: Sprites) -> SceneBatch:
    return SceneComposer(sprites, CPU, 3).compose(2, 3)


def test_shapes_and_ranges(batch: SceneBatch) -> None:
    assert batch.frame.shape == batch.plate.shape == (2, 3, 3, SIZE, SIZE)
    assert batch.target.shape == (2, 3, SIZE, SIZE)
    assert batch.noise.shape == (2, 3)
    assert batch.intrinsics.shape == (2, 3, 3, 3)
    assert batch.world_to_camera.shape == (2, 3, 4, 4)
    assert batch.center.shape == (2, 3)
    assert batch.reach.shape == (2,)
    for values in (batch.frame, batch.plate, batch.target):
        assert float(values.min()) >= 0
        assert float(values.max()) <= 1 + 1e-6
    assert float(batch.noise.min()) > 0


def test_the_frame_differs_from_the_plate_where_the_animal_is(batch: SceneBatch) -> None:
    change = (batch.frame - batch.plate).abs().amax(2)
    animal = batch.target > 0.9
    assert animal.flatten(2).sum(-1).min() > 50
    inside = torch.stack([change[b, v][animal[b, v]].mean() for b in range(2) for v in range(3)])
    outside = torch.stack([change[b, v][batch.target[b, v] == 0].median() for b in range(2) for v in range(3)])
    assert bool((inside > outside).all())


def test_the_animal_is_where_its_cameras_say(batch: SceneBatch) -> None:
    """Its middle is projected into the box round its mask."""
    for b in range(2):
        for v in range(3):
            pose, k = batch.world_to_camera[b, v], batch.intrinsics[b, v]
            seen = k @ (pose[:3, :3] @ batch.center[b] + pose[:3, 3])
            x, y = (seen[:2] / seen[2]).tolist()
            rows, columns = torch.nonzero(batch.target[b, v] > 0.5, as_tuple=True)
            assert columns.min() - 3 <= x <= columns.max() + 3
            assert rows.min() - 3 <= y <= rows.max() + 3


def test_a_seed_gives_the_same_scenes(sprites: Sprites, batch: SceneBatch) -> None:
    again, other = (SceneComposer(sprites, CPU, seed).compose(2, 3) for seed in (3, 4))
    for key, values in vars(batch).items():
        torch.testing.assert_close(getattr(again, key), values, atol=0, rtol=0)
    assert not torch.equal(other.frame, batch.frame)


def test_the_loss_is_lowest_at_the_truth(batch: SceneBatch) -> None:
    target = (batch.target > 0.5).float()
    right, empty = 20 * target - 10, torch.full_like(target, -10)
    shrunk = torch.where(torch.rand_like(target) < 0.5, right, empty)
    losses = [float(mask_loss(logits, target)) for logits in (right, shrunk, empty)]
    assert losses == sorted(losses)
    assert losses[0] < 0.01
