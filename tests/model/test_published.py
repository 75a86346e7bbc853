"""The published network against its formulas, written out slowly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat_model import checkpoints
from zoosplat_model.frames import FrameReader, open_reader
from zoosplat_model.network.predictor import SplatterPredictor
from zoosplat_model.published import PublishedSplatter, PublishedStack, PublishedUNet, find_threshold
from zoosplat_model.registry import build_splatter, open_predictor
from zoosplat_train.stage import STAGE


def published(project: Project) -> Experiment:
    """The project's experiment, with the published network from now on."""
    raw = open_run(project).experiment.model_dump(mode="json")
    raw["model"] |= {"network": "published", "max_gaussians": 2000}
    raw["train"] |= {"epochs": 2, "lr": 1e-3}
    experiment = Experiment.model_validate(raw)
    record_run(draft_run(project, experiment), ["train"])
    return experiment


def slow_unet(unet: PublishedUNet, x: Tensor) -> Tensor:
    """The U-Net in plain functions, with BatchNorm3d as in training at batch size 1."""
    values = dict(unet.named_parameters())

    def block(x: Tensor, name: str) -> Tensor:
        for i in (0, 3):
            x = F.conv3d(x, values[f"{name}.{i}.weight"], values[f"{name}.{i}.bias"], padding=1)
            gain, shift = values[f"{name}.{i + 1}.weight"], values[f"{name}.{i + 1}.bias"]
            x = F.batch_norm(x, None, None, gain, shift, training=True)
            x = torch.where(x > 0, x, 0.1 * x)
        return x

    depth = len(unet.doubling)
    seen = [block(x, "down.0")]
    for level in range(1, depth + 1):
        seen.append(block(F.max_pool3d(seen[-1], 2), f"down.{level}"))
    z = seen[-1].flatten(1)
    for i, after in ((0, F.relu), (2, lambda v: v), (3, lambda v: v)):
        z = after(F.linear(z, values[f"bottom.{i}.weight"], values[f"bottom.{i}.bias"]))
    x = z.view(seen[-1].shape)
    for level in reversed(range(depth)):
        x = F.conv_transpose3d(x, values[f"doubling.{level}.weight"], values[f"doubling.{level}.bias"], stride=2)
        x = block(torch.cat([seen[level], x], 1), f"up.{level}")
    return F.conv3d(x, values["last.weight"], values["last.bias"])


def excited(stack: PublishedStack) -> PublishedStack:
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return stack.double()


@torch.no_grad()
def test_the_stack_is_its_formulas_and_each_volume_has_its_own_statistics() -> None:
    torch.manual_seed(0)
    stack = excited(PublishedStack(3, 2, 2, 5, (8, 4, 12)))
    volumes = torch.randn(2, 8, 8, 4, 12, dtype=torch.float64)
    found, _ = stack(volumes)
    for i in range(2):
        x = volumes[i : i + 1, :4]
        for unet in stack.unets[:-1]:
            x = x + slow_unet(unet, x)  # type: ignore[arg-type]
        expected = torch.cat([x, slow_unet(stack.unets[-1], x)], 1)  # type: ignore[arg-type]
        torch.testing.assert_close(found[i : i + 1], expected)


def test_the_stack_starts_as_the_identity() -> None:
    volumes = torch.randn(1, 8, 16, 16, 16)
    features, _ = PublishedStack(2, 2, 3, 8, (16, 16, 16))(volumes)
    assert torch.equal(features[:, :4], volumes[:, :4])
    assert not features[:, 4:].any()


def slow_threshold(occupancy: Sequence[float], fewest: int, most: int) -> float:
    """The published loops."""

    def count(threshold: float) -> int:
        return sum(1 / (1 + math.exp(threshold - v)) > 0.25 for v in occupancy)

    threshold = 0.25
    while count(threshold) > most:
        threshold += 0.05
    while count(threshold) < fewest:
        threshold -= 0.05
    return threshold


@pytest.mark.parametrize(("fewest", "most"), [(10, 50), (100, 150), (1, 400), (390, 395), (5, 6)])
@pytest.mark.parametrize("shift", [-5.0, -0.5, 0.0, 3.0])
def test_the_threshold_is_where_the_published_loops_end(fewest: int, most: int, shift: float) -> None:
    occupancy = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + shift
    indices, threshold = find_threshold(occupancy, fewest, most)
    assert float(threshold) == pytest.approx(slow_threshold(occupancy.tolist(), fewest, most), abs=1e-9)
    assert len(set(indices.tolist())) == most
    kept = torch.sigmoid(occupancy[indices] - threshold) > 0.25
    assert fewest <= int(kept.sum()) <= most
    assert float(occupancy[indices].min()) >= float(occupancy.sort(descending=True).values[most - 1])


def test_a_volume_of_equal_voxels_gives_no_more_than_allowed() -> None:
    indices, threshold = find_threshold(torch.zeros(100), 10, 20)
    assert len(indices) == 20
    assert float(torch.sigmoid(-threshold)) > 0.25


@torch.no_grad()
def test_gaussians_by_hand(tiny: Project) -> None:
    experiment = published(tiny)
    reader = open_reader(open_run(tiny), torch.device("cpu"))
    model = build_splatter(reader, experiment)
    assert isinstance(model, PublishedSplatter)
    frame = reader.frame(0)
    for layer in (model.head[0], model.head[2]):
        torch.nn.init.normal_(layer.weight, std=0.5)  # type: ignore[arg-type]
    features = torch.rand(8, 16, 16, 16) * 2
    plain = model.decode_gaussians(features, torch.tensor(False), model.observe(frame), None)
    indices, threshold = find_threshold(features[0].flatten(), 64, 2000)
    # The cameras are 0.4 m round the centre and 0.2 m up: their own centre is as high, 0.4 m away.
    assert float(model.log_scale) == pytest.approx(math.log(0.4) - 5.5, abs=1e-5)
    for n in (0, 700):
        f = features.flatten(1)[:, indices[n]]
        out = model.head(f).tolist()
        p = 1 / (1 + math.exp(float(threshold) - float(f[0])))
        opacity = 1 / (1 + math.exp(-max(0, min(1, (p - 0.25) / 0.75))))
        assert float(plain.opacities[n]) == pytest.approx(opacity if p > 0.25 else 0, abs=1e-6)
        norm = math.sqrt(sum(q * q for q in out[:4]))
        assert plain.quats[n].tolist() == pytest.approx([q / norm for q in out[:4]], abs=1e-5)
        assert plain.scales[n].tolist() == pytest.approx([0.4 * math.exp(s - 5.5) for s in out[4:7]], rel=1e-4)
        assert plain.colors[n].tolist() == pytest.approx([1 / (1 + math.exp(-c)) for c in out[8:11]], abs=1e-5)
        voxel = model.points.reshape(-1, 3)[indices[n]].tolist()
        moved = [v + 2 * reader.voxel_size_m * math.tanh(o) for v, o in zip(voxel, out[11:], strict=True)]
        assert plain.means[n].tolist() == pytest.approx(moved, abs=1e-6)


def test_it_trains_and_is_found_again(tiny: Project) -> None:
    published(tiny)
    run_stage(STAGE, open_run(tiny))
    found = checkpoints.load(open_run(tiny).output_url("train"), "best")
    assert found is not None
    assert found.network == "published"
    history = checkpoints.load(open_run(tiny).output_url("train"), "latest").progress.history  # type: ignore[union-attr]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    predictor = open_predictor(open_run(tiny), "cpu")
    assert isinstance(predictor, SplatterPredictor)
    assert isinstance(predictor.model, PublishedSplatter)
    gaussians = predictor.gaussians(0)
    reader: FrameReader = predictor.reader
    size = reader.width, reader.height
    rendering = predictor.render(gaussians, reader.world_to_camera, reader.full_intrinsics, *size, cameras=[0] * 5)
    assert (rendering.alpha > 0.5).any()
    assert torch.equal(
        rendering.rgb, predictor.render(gaussians, reader.world_to_camera, reader.full_intrinsics, *size).rgb
    )


def test_the_two_networks_are_told_apart(tiny: Project) -> None:
    reader = open_reader(open_run(tiny), torch.device("cpu"))
    assert build_splatter(reader, open_run(tiny).experiment).network == "zoosplat"
    assert build_splatter(reader, published(tiny)).network == "published"
