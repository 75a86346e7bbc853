"""LPIPS with random weights of the networks' shapes, against torchmetrics; and files that are no such weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from torchmetrics.functional.image.lpips import _LPIPS

from zoosplat.errors import UserError
from zoosplat_model.lpips import LEAST_SIDE, read_lpips

CPU = torch.device("cpu")


def random_lpips(net: Literal["alex", "vgg"]) -> Any:
    torch.manual_seed(0)
    network = _LPIPS(pretrained=False, net=net, pnet_rand=True)
    for name, parameter in network.named_parameters():
        if name.startswith("lin"):  # they are not negative in the weights that were learned
            parameter.data.abs_()
    return network


@pytest.mark.parametrize(("net", "ending"), [("alex", "pth"), ("vgg", "safetensors")])
def test_distances_are_those_of_torchmetrics(net: Literal["alex", "vgg"], ending: str, tmp_path: Path) -> None:
    reference = random_lpips(net)
    file = tmp_path / f"weights.{ending}"
    if ending == "pth":
        # As the package lpips saves them: with the colours' scale, and one name more for each linear layer.
        torch.save({"scaling_layer.shift": torch.zeros(3), **reference.state_dict()}, file)
    else:
        state = {name: value for name, value in reference.state_dict().items() if not name.startswith("lins.")}
        safetensors.torch.save_file(state, file)
    pictures, truths = torch.rand(2, 2, 3, LEAST_SIDE, LEAST_SIDE + 9)
    with torch.no_grad():
        found = read_lpips(str(file), CPU)(pictures, truths)
        expected = reference(pictures, truths, normalize=True).flatten()
        assert (expected > 0).all()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        assert read_lpips(str(file), CPU)(truths, truths).tolist() == [0, 0]


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("other.pth", {"net.slice1.0.weight": torch.zeros(64, 3, 11, 11)}, "not the weights of LPIPS"),
        ("list.pth", [1, 2], "not the weights of LPIPS"),
        ("code.pth", {"net": pickle.Pickler}, "cannot be read"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f"evaluate.lpips_weights = .*{name}: {message}"):
            read_lpips(str(tmp_path / name), CPU)
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        read_lpips(str(tmp_path / "text.safetensors"), CPU)
