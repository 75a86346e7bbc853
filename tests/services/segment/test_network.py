"""The network that comes with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoosplat_segment
from zoosplat_segment.network import (
    MULTIPLE,
    NO_PRIOR,
    WEIGHTS,
    MaskNetwork,
    build_network,
    load_network,
    package_weights,
    predict_masks,
)

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20


def test_the_weights_are_small_and_fit() -> None:
    assert (Path(zoosplat_segment.__file__).parent / WEIGHTS).stat().st_size <= 10 * MEBIBYTE
    weights = package_weights()
    assert weights.keys() == MaskNetwork().state_dict().keys()
    assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.parametrize("size", [(MULTIPLE, MULTIPLE), (2 * MULTIPLE, 5 * MULTIPLE)])
def test_a_network_for_inference_is_the_same(size: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    frames, plates = (255 * torch.rand(3, 3, *size, generator=random) for _ in range(2))
    noise, priors = torch.tensor([0.01, 0.02, 0.05]), torch.rand(3, *size, generator=random)
    with torch.inference_mode():
        whole = build_network(None, CPU).eval()
        logits = whole(frames / 255, plates / 255, noise, priors[:, None])
        assert logits.shape == (3, 1, *size)
        fused = load_network(None, CPU)
        assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in fused.modules())
        masks = predict_masks(fused, frames, plates, noise, priors)
        torch.testing.assert_close(masks, logits.sigmoid()[:, 0], atol=1e-4, rtol=1e-3)
        none = predict_masks(fused, frames, plates, noise)
        torch.testing.assert_close(
            none, predict_masks(fused, frames, plates, noise, torch.full_like(priors, NO_PRIOR)), atol=0, rtol=0
        )


def test_weights_that_were_learned_are_loaded() -> None:
    weights = package_weights()
    weights["head.bias"] = weights["head.bias"] + 30
    picture = torch.full((1, 3, MULTIPLE, MULTIPLE), 100.0)
    with torch.inference_mode():
        assert float(predict_masks(load_network(weights, CPU), picture, picture, torch.tensor([0.01])).min()) > 0.99
        assert float(predict_masks(load_network(None, CPU), picture, picture, torch.tensor([0.01])).max()) < 0.5
