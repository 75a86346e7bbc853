"""The architecture that a file's header tells is that of the network that it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from zoosplat.stages.outside_file_checks import read_architecture, read_shapes
from zoosplat_model.network.unet import UNetStack
from zoosplat_model.published import PublishedStack

SHAPE = (32, 32, 32)


@pytest.mark.parametrize(("num_unets", "base_filters", "poolings"), [(1, 4, 1), (3, 2, 3), (2, 6, 4)])
@pytest.mark.parametrize(("network", "bottleneck"), [("zoosplat", 0), ("zoosplat", 24), ("published", 24)])
def test_architecture_of_a_header(
    network: str, num_unets: int, base_filters: int, poolings: int, bottleneck: int, tmp_path: Path
) -> None:
    kinds: dict[str, Any] = {"zoosplat": UNetStack, "published": PublishedStack}
    stack = kinds[network](num_unets, base_filters, poolings, bottleneck, SHAPE)
    path = tmp_path / "weights.safetensors"
    tensors = {f"refine.{name}": value.contiguous() for name, value in stack.state_dict().items()}
    safetensors.torch.save_file(tensors, path)
    assert dict(read_architecture(read_shapes("train.start_from", str(path)))) == {
        "network": network,
        "num_unets": num_unets,
        "base_filters": base_filters,
        "poolings": poolings,
        "bottleneck": bottleneck,
    }
