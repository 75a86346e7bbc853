"""Descriptors: what a turn leaves as it is, what a mirror does not, and the stage."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.command import main
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.storage import fingerprints, objects, schema
from zoosplat_embedding.stage import _variation
from zoosplat_features import animals, encoders, ops
from zoosplat_features.stage import STAGE
from zoosplat_model import checkpoints
from zoosplat_model.frames import open_reader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize import Rendering, rasterize
from zoosplat_model.registry import build_splatter, open_predictor

RADIUS_M = 0.1


def animal(seed: int = 0, n: int = 800, bend: float = 0.5) -> Gaussians:
    """A body with a head, a bent tail and a coloured left flank: Gaussians on it, flat along its surface."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(n, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    means = normal * [0.035, 0.018, 0.015]
    tail = np.arange(n) < n // 6
    s = rng.uniform(0, 1, tail.sum())
    means[tail] = np.stack([-0.03 - 0.05 * s, 0.05 * bend * s**2, -0.01 + 0 * s], 1) + rng.normal(
        size=(tail.sum(), 3), scale=1e-3
    )
    colors = rng.uniform(0.2, 0.3, (n, 3)) + 0.5 * (normal[:, 1:2] > 0.3) * [1, 0, 0]
    quats = rng.normal(size=(n, 4), scale=0.3) + np.array([1, 0, 0, 0])
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    scales = rng.uniform(1e-3, 2e-3, (n, 3)) * [1, 1, 0.3]
    opacities = rng.uniform(0.3, 1, n)
    return Gaussians(*(torch.from_numpy(v).float() for v in (means, quats, scales, opacities, colors)))


def mirrored(gaussians: Gaussians) -> Gaussians:
    """In the plane y = 0."""
    sign = torch.tensor([1.0, -1.0, 1.0])
    return gaussians._replace(means=gaussians.means * sign, quats=gaussians.quats * torch.tensor([1.0, -1, 1, -1]))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def angles(count: int) -> list[Tensor]:
    return [torch.tensor(float(a)) for a in np.random.default_rng(1).uniform(-math.pi, math.pi, count)]


# -- gaussians ------------------------------------------------------------------------------------------------------
def test_a_turn_changes_nothing_and_a_mirror_does() -> None:
    for seed in range(3):
        still = animal(seed, bend=seed - 1.0)
        expected = ops.cylinder_descriptor(still, RADIUS_M)
        assert expected.shape == (ops.cylinder_size(),)
        for angle in angles(100):
            assert difference(ops.cylinder_descriptor(ops.turned(still, angle), RADIUS_M), expected) < 1e-4
        assert difference(ops.cylinder_descriptor(mirrored(still), RADIUS_M), expected) > 1e-3
        # Only the means, or only the orientations: what the published test of invariance did not tell apart.
        turned = ops.turned(still, torch.tensor(0.7))
        assert difference(ops.cylinder_descriptor(still._replace(means=turned.means), RADIUS_M), expected) > 1e-3
        assert difference(ops.cylinder_descriptor(still._replace(quats=turned.quats), RADIUS_M), expected) > 1e-3


def test_neither_place_nor_order_nor_the_sign_of_a_quaternion_counts() -> None:
    still = animal()
    expected = ops.cylinder_descriptor(still, RADIUS_M)
    moved = still._replace(means=still.means + torch.tensor([0.02, -0.03, 0.0]))
    assert difference(ops.cylinder_descriptor(moved, RADIUS_M), expected) < 1e-4
    assert difference(ops.cylinder_descriptor(still._replace(quats=-still.quats), RADIUS_M), expected) < 1e-6
    order = torch.randperm(len(still.means))
    assert difference(ops.cylinder_descriptor(Gaussians(*(v[order] for v in still)), RADIUS_M), expected) < 1e-4


def test_coefficients_are_the_sums_that_are_meant() -> None:
    """Against a plain loop in float64: ring by ring, Gaussian by Gaussian."""
    still = Gaussians(*(v.double() for v in animal(n=60)))
    found = ops.cylinder_descriptor(still, RADIUS_M)
    x, y, z = (still.means / RADIUS_M).unbind(1)
    w = still.opacities / still.opacities.sum()
    x, y = x - (w * x).sum(), y - (w * y).sum()
    r, phi = (x**2 + y**2).sqrt(), torch.atan2(y, x)
    damped = r / (r**2 + (0.5 / (ops.RADII - 1)) ** 2).sqrt()
    magnitudes = found[-ops.RADII * ops.HEIGHTS * ops.ORDERS :].view(-1, ops.ORDERS)
    for k in range(ops.RADII):
        for level in range(ops.HEIGHTS):
            near = (1 - (r.clamp(max=1) * (ops.RADII - 1) - k).abs()).clamp(min=0)
            near = near * (1 - ((z.clamp(-0.5, 0.5) + 0.5) * (ops.HEIGHTS - 1) - level).abs()).clamp(min=0)
            for n in range(1, ops.ORDERS + 1):
                wave = damped**n * torch.exp(-1j * n * phi)
                expected = (w * near * wave).sum().abs()
                assert float(magnitudes[k * ops.HEIGHTS + level, n - 1]) == pytest.approx(float(expected), abs=1e-12)


def test_small_changes_stay_small() -> None:
    """No bins: a change of a Gaussian by a hundredth of a ring changes the descriptor in proportion."""
    still = animal()
    expected = ops.cylinder_descriptor(still, RADIUS_M)
    noise = torch.from_numpy(np.random.default_rng(2).normal(size=still.means.shape)).float()
    steps = [
        difference(ops.cylinder_descriptor(still._replace(means=still.means + s * noise), RADIUS_M), expected)
        for s in (1e-6, 1e-5, 1e-4)
    ]
    assert steps[0] < 1e-4
    assert 5 < steps[1] / steps[0] < 20
    assert 5 < steps[2] / steps[1] < 20


def test_the_animals_own_direction_points_along_the_tail() -> None:
    still = animal(bend=0.0)
    assert abs(float(ops.own_direction(still))) == pytest.approx(math.pi, abs=0.02)
    turned = ops.turned(still, torch.tensor(0.8))
    assert float(ops.own_direction(turned)) == pytest.approx(0.8 - math.pi, abs=0.02)
    a, b = ops.upright(still), ops.upright(turned)
    torch.testing.assert_close(a.means, b.means, atol=1e-6, rtol=0)


# -- images ---------------------------------------------------------------------------------------------------------
def test_harmonics_are_orthonormal_and_agree_with_scipy() -> None:
    from scipy.special import sph_harm_y

    heights, areas = np.polynomial.legendre.leggauss(ops.POLAR)
    polar, azimuth = np.meshgrid(np.arccos(heights), 2 * np.pi * np.arange(8) / 8, indexing="ij")
    area = np.repeat(areas * 2 * np.pi / 8, 8)
    row = 0
    for degree in range(4):
        for order in range(degree + 1):
            # Without scipy's sign of odd orders, which a magnitude does not see.
            expected = (-1) ** order * sph_harm_y(degree, order, polar, azimuth).ravel()
            np.testing.assert_allclose(ops.harmonics()[row], area * expected.conj(), atol=1e-6)
            others = ops.harmonics() @ expected
            np.testing.assert_allclose(others, np.eye(10)[row], atol=1e-6)
            row += 1


def test_cameras_look_at_the_middle_from_all_round() -> None:
    poses, intrinsics = ops.sphere_cameras(RADIUS_M)
    eyes = -np.einsum("cij,ci->cj", poses[:, :3, :3], poses[:, :3, 3])
    np.testing.assert_allclose(np.linalg.norm(eyes, axis=1), 0.4, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.det(poses[:, :3, :3]), 1, rtol=1e-5)
    assert (poses[:, 1, 2] < 0).all()  # what is up in space is up in the picture
    heights, _ = np.polynomial.legendre.leggauss(4)
    np.testing.assert_allclose(eyes[::8, 2] / 0.4, heights, atol=1e-6)
    np.testing.assert_allclose(eyes[1, :2] / np.linalg.norm(eyes[1, :2]), [math.sqrt(0.5)] * 2, atol=1e-6)
    # A ball of that radius touches the edges of the picture.
    edge = np.array([0, RADIUS_M * math.sqrt(1 - 1 / 16), 0.4 - RADIUS_M / 4])
    pixel = intrinsics[0] @ edge
    assert pixel[1] / pixel[2] == pytest.approx(223.5, abs=0.01)


def render(gaussians: Gaussians, world_to_camera: Tensor, intrinsics: Tensor, width: int, height: int) -> Rendering:
    return rasterize(*gaussians, world_to_camera, intrinsics, width, height, background=torch.ones(3))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with random weights."""
    import torchvision.models as models

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.resnet18(weights=None).state_dict(), file)
    return str(file)


def test_pictures_of_a_turned_animal_are_the_same(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "PIXELS", 64)
    encode = encoders.ImagesEncoder(render, RADIUS_M, encoders.resnet18(weights), torch.device("cpu"))
    with torch.no_grad():
        still = animal()
        expected = encode(still)
        assert expected.shape == (5120,)
        # The part that every picture shares is far larger than the rest: without it.
        worst = max(difference(encode(ops.turned(still, a))[512:], expected[512:]) for a in angles(6))
        assert worst < 0.03
        assert difference(encode(mirrored(still))[512:], expected[512:]) > 10 * worst


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.models as models

    with pytest.raises(UserError, match=r"neither a \.safetensors or \.pth or \.pt file nor one of IMAGENET1K_V1"):
        encoders.resnet18("IMAGENET")
    wrong = tmp_path / "wrong.pth"
    torch.save({"a": torch.zeros(2)}, wrong)
    with pytest.raises(UserError, match=r"not the weights of torchvision's ResNet-18"):
        encoders.resnet18(str(wrong))
    wrong.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"wrong\.pth: cannot be read"):
        encoders.resnet18(str(wrong))

    def offline(*args: Any, **keywords: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no network\); fetch https://.* and name the file"):
        encoders.resnet18("IMAGENET1K_V1")


def test_weights_of_safetensors(weights: str, tmp_path: Path) -> None:
    import safetensors.torch

    file = tmp_path / "resnet18.safetensors"
    safetensors.torch.save_file(torch.load(weights, weights_only=True), file)
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            encoders.resnet18(weights).eval()(picture), encoders.resnet18(str(file)).eval()(picture)
        )


# -- the stage ------------------------------------------------------------------------------------------------------
@pytest.fixture
def trained(tiny: Project, finish: Callable[..., Any]) -> Callable[..., Project]:
    """The tiny project with an untrained model as the result of its training, and other settings."""

    def made(**sections: Any) -> Project:
        raw = open_run(tiny).experiment.model_dump(mode="json")
        for name, values in sections.items():
            raw[name].update(values)
        chosen = Experiment.model_validate(raw)
        reader = open_reader(open_run(tiny), torch.device("cpu"))

        def write(url: str) -> None:
            torch.manual_seed(0)
            model = build_splatter(reader, chosen)
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            progress = checkpoints.TrainingProgress(step=1, best=0.5, best_step=1)
            checkpoints.save(url, model, torch.optim.Adam(model.parameters()), weights, progress, keep_last=1)

        finish(tiny, chosen, {"train": write})
        return tiny

    return made


def features(project: Project) -> Any:
    return schema.read(open_run(project).open_input("features"), "features")


def test_the_stage_describes_every_frame_with_a_hull(trained: Callable[..., Project]) -> None:
    project = trained()
    assert run_stage(STAGE, open_run(project))
    found = features(project)
    assert found.shape == (9, ops.cylinder_size())
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, 0)).all()
    predictor = open_predictor(open_run(project), "cpu")
    frame = predictor.reader.frame(5)
    with torch.no_grad():
        expected = ops.cylinder_descriptor(predictor.animal_gaussians(frame), 0.08)
    np.testing.assert_allclose(found[5], expected, rtol=1e-5, atol=1e-7)
    # The same from the Gaussians in the world, brought back.
    world = predictor.gaussians(5)
    back = ops.turned(world._replace(means=world.means - frame.center), -frame.angle)
    assert difference(ops.cylinder_descriptor(back, 0.08), expected) < 1e-4
    assert not run_stage(STAGE, open_run(project))


def test_shards_and_what_is_left_of_them_after_a_stop(
    trained: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    project = trained(scheduling={"frames_per_shard": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SMALL_BLOCK", 4)
        arguments = ["--project", project.url]
        assert main(STAGE, [*arguments, "--prepare"]) == 0
        assert '"shards": 3' in capsys.readouterr().out
        assert main(STAGE, [*arguments, "--shard", "1/3"]) == 0
        assert main(STAGE, [*arguments, "--finish"]) == 2
        assert "shards [0, 2] of stage features are not done" in capsys.readouterr().err
        assert main(STAGE, arguments) == 0
        assert np.isfinite(np.delete(features(project), 1, 0)).all()
        assert (open_run(project).read_mark("features") or {})["frames"] == 8


def test_images_from_a_file_and_bad_input(
    trained: Callable[..., Project],
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ops, "PIXELS", 32)
    images = {"encoder": "images", "weights": weights, "radius": 0.05}
    project = trained(features=images)
    assert main(STAGE, ["--project", project.url]) == 0
    assert features(project).shape == (9, 5120)
    attributes = dict(open_run(project).open_input("features").attrs)
    assert attributes["encoder"] == "images"
    assert attributes["radius_m"] == 0.05
    assert attributes["weights"] == fingerprints.content_fingerprint(weights)  # and not where it lies
    config = tmp_path / "config.yaml"
    config.write_text(open_run(project).experiment.to_yaml().replace(weights, f"{weights}.pth"))
    assert main(STAGE, ["--project", project.url, "--config", str(config)]) == 2
    assert re.search(r"resnet18\.pth\.pth: no such file", capsys.readouterr().err)
    project = trained(features=images | {"radius": 0.06})
    objects.delete(open_run(project).result("train").file("done.json"))
    assert main(STAGE, ["--project", project.url]) == 2
    assert "run stage train first" in capsys.readouterr().err


def test_variation_among_animals_is_their_covariance_and_what_embeddings_know_fits() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 90)) * 1e-4 + 0.3
    factor, share = animals.variation(values)
    found, truth = factor.astype(float).T @ factor.astype(float), np.cov(values.T)
    assert share == pytest.approx(1)
    np.testing.assert_allclose(found / np.trace(found), truth / np.trace(truth), atol=1e-4)
    known = _variation("gaussians", ops.cylinder_size())
    assert known is not None
    assert known.shape == (animals.DIRECTIONS, ops.cylinder_size())
    assert _variation("images", 5120) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recorded_frames_in_lanes_are_those_of_one_after_the_other(trained: Callable[..., Project]) -> None:
    project = trained()
    predictor = open_predictor(open_run(project), "cuda")
    frames = [0, *range(2, 9)] * 6 + [5, 3]  # the last group is not full

    def describe(gaussians: Gaussians) -> Tensor:
        return ops.cylinder_descriptor(gaussians, RADIUS_M)

    found = list(predictor.map_frames(frames, describe))
    assert [t for t, _ in found] == frames
    with torch.no_grad():
        for t, result in found:
            assert difference(result, describe(predictor.animal_gaussians(predictor.reader.frame(t)))) < 1e-3
