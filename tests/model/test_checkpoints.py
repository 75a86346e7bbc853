from __future__ import annotations

import json
import pickletools
from pathlib import Path

import pytest
import torch
from torch import nn

from zoosplat.errors import UserError
from zoosplat.storage import listing, objects, urls
from zoosplat_model import checkpoints
from zoosplat_model.checkpoints import TrainingProgress


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for i in range(steps):
        optimizer.zero_grad()
        (model(torch.full((1, 3), float(i))) ** 2).sum().backward()
        optimizer.step()
    return model, optimizer


def save(model_url: str, step: int, best_step: int | None = None, keep_last: int = 2) -> None:
    model, optimizer = trained(step)
    progress = TrainingProgress(step=step, best_step=best_step, best=None if best_step is None else 1.0)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoints.save(model_url, model, optimizer, average, progress, keep_last=keep_last)


def files(model_url: str) -> list[str]:
    return [n.removesuffix(".safetensors") for n in listing.list_files(urls.join(model_url, "checkpoints"))]


def test_moments_come_back_in_the_layout_of_the_weights() -> None:
    # Fused Adam on a GPU refuses others: weights of convolutions are channels-last there, files are not.
    model = nn.Conv3d(4, 6, 3).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4, 5, 5, 5)).sum().backward()
    optimizer.step()
    there = checkpoints.named_state(model, optimizer)
    saved = {name: {k: v.clone().contiguous() for k, v in state.items()} for name, state in there.items()}
    assert saved["weight"]["exp_avg"].stride() != model.weight.stride()
    other = torch.optim.Adam(model.parameters())
    checkpoints.restore_state(model, other, saved)
    for name, state in checkpoints.named_state(model, other).items():
        for key, value in state.items():
            assert torch.equal(value, there[name][key])
            assert value.stride() == there[name][key].stride()


def test_everything_comes_back(tmp_path: Path) -> None:
    model_url = str(tmp_path)
    model, optimizer = trained(5)
    progress = TrainingProgress(3, 7, 5, 0.1 + 0.2, {"loss": 1 / 3}, [{"epoch": 1, "loss": 2 / 3}], 0.25, 5)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoints.save(model_url, model, optimizer, average, progress, keep_last=1)
    found = checkpoints.load(model_url, "latest")
    assert found is not None
    assert found.progress == progress
    other, other_optimizer = trained(0)
    other.load_state_dict(found.model)
    checkpoints.restore_state(other, other_optimizer, found.optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert {k: v.tolist() for k, v in optimizer.state[p].items()} == {
            k: v.tolist() for k, v in other_optimizer.state[q].items()
        }
    # The next step is the same, so moments and step count are where Adam looks for them.
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        (m(torch.ones(1, 3)) ** 2).sum().backward()
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoints.load(str(tmp_path), "latest") is None
    assert checkpoints.load(str(tmp_path), "best") is None


def test_keeps_the_last_ones_and_the_best(tmp_path: Path) -> None:
    model_url = str(tmp_path)
    save(model_url, 1, best_step=1)
    for step in (2, 3, 4):
        save(model_url, step, best_step=1)
    assert files(model_url) == ["step-00000001", "step-00000003", "step-00000004"]
    best, latest = checkpoints.load(model_url, "best"), checkpoints.load(model_url, "latest")
    assert best is not None
    assert latest is not None
    assert (best.step, latest.step) == (1, 4)
    save(model_url, 5, best_step=5, keep_last=1)
    assert files(model_url) == ["step-00000005"]


@pytest.mark.parametrize("killed_at", ["write_bytes", "write_json", "delete"])
def test_a_kill_during_a_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str) -> None:
    model_url = str(tmp_path)
    save(model_url, 1, best_step=1)
    save(model_url, 2, best_step=1)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(objects, killed_at, kill)
        with pytest.raises(KeyboardInterrupt):
            save(model_url, 3, best_step=3, keep_last=1)
    latest, best = checkpoints.load(model_url, "latest"), checkpoints.load(model_url, "best")
    assert latest is not None
    assert best is not None
    assert (latest.step, best.step) == ((3, 3) if killed_at == "delete" else (2, 1))
    # Going on from there, `best` is what the resumed training says it is, whatever the kill left.
    save(model_url, 4, best_step=latest.progress.best_step, keep_last=1)
    best = checkpoints.load(model_url, "best")
    assert best is not None
    assert best.step == latest.progress.best_step


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage", "pointer"])
def test_damage_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    model_url = str(tmp_path)
    save(model_url, 1, best_step=1)
    path = tmp_path / "checkpoints" / "step-00000001.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "missing":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"\x80\x04garbage")
    else:
        (tmp_path / "latest.json").write_text("{")
    with pytest.raises(UserError, match="damaged checkpoint"):
        checkpoints.load(model_url, "latest")


def test_files_are_safetensors_and_not_pickles(tmp_path: Path) -> None:
    model_url = str(tmp_path)
    save(model_url, 1)
    data = (tmp_path / "checkpoints" / "step-00000001.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["model.0.weight"]["shape"] == [4, 3]
    assert header["optimizer.exp_avg.0.weight"]["dtype"] == "F32"
    with pytest.raises(ValueError, match=r"."):
        list(pickletools.genops(data))
