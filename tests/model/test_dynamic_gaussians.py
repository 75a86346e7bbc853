"""Schedule and surgery of dynamic Gaussians, against tables and cases worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoosplat.config.training import Dynamic
from zoosplat_model.dynamic.gaussian_set import PARAMETER_NAMES, GaussianSet, rms_neighbour_distance
from zoosplat_model.dynamic.schedule import decay_learning_rate, is_snapshot_iteration, plan_actions
from zoosplat_model.rasterize import ScreenStatistics, rasterize
from zoosplat_model.rotations import rotate_vectors
from zoosplat_model.spherical_harmonics import evaluate_colors

# -- schedule -----------------------------------------------------------------------------------------------------
TABLE = Dynamic(
    densify_from_iter=500,
    densification_interval=100,
    pruning_from_iter=1000,
    opacity_reset_interval=3000,
    add_point=True,
)
FEW, MANY, FULL = 5_000, 200_001, 360_000


@pytest.mark.parametrize(
    ("iteration", "count", "done"),
    [
        (100, FEW, "grow"),
        (500, FEW, "grow"),
        (501, FEW, ""),
        (550, FEW, ""),
        (600, FEW, "densify grow"),
        (600, FULL - 1, "densify grow"),
        (600, FULL, ""),
        (1000, MANY, "densify grow"),
        (1100, 200_000, "densify grow"),
        (1100, MANY, "densify prune grow"),
        (1100, FULL, "prune"),
        (3000, FEW, "densify grow reset"),
        (3000, FULL, "prune reset"),
        (14_900, MANY, "densify prune grow"),
        (15_000, MANY, ""),
        (18_000, FEW, ""),
    ],
)
@pytest.mark.parametrize("phase", ["coarse", "fine"])
def test_what_is_done_when(iteration: int, count: int, done: str, phase: Any) -> None:
    found = plan_actions(iteration, phase, count, TABLE)
    assert " ".join(name for name in ("densify", "prune", "grow", "reset") if getattr(found, name)) == done
    assert found.collect == (iteration < 15_000)
    assert found.size_px == (20 if iteration > 3000 else None)


def test_defaults_are_those_of_the_specification() -> None:
    assert not plan_actions(600, "fine", FEW, Dynamic()).grow
    assert plan_actions(600, "fine", MANY, Dynamic()).prune
    assert not plan_actions(500, "fine", MANY, Dynamic()).prune
    assert plan_actions(8000, "fine", MANY, Dynamic(pruning_interval=8000)).prune
    assert not plan_actions(8100, "fine", MANY, Dynamic(pruning_interval=8000)).prune


def test_thresholds() -> None:
    config = Dynamic(
        densify_grad_threshold_coarse=0.3,
        densify_grad_threshold_fine_init=0.2,
        densify_grad_threshold_after=0.1,
        opacity_threshold_coarse=0.03,
        opacity_threshold_fine_init=0.01,
        opacity_threshold_fine_after=0.05,
    )
    for iteration in (0, 7_500, 15_000):
        found = plan_actions(iteration, "coarse", FEW, config)
        assert (found.gradient, found.opacity) == (0.3, 0.03)
    for iteration, gradient, opacity in ((0, 0.2, 0.01), (7_500, 0.15, 0.03), (15_000, 0.1, 0.05)):
        found = plan_actions(iteration, "fine", FEW, config)
        assert [found.gradient, found.opacity] == pytest.approx([gradient, opacity])
    assert plan_actions(7, "fine", FEW, Dynamic()).gradient == 0.0002
    assert plan_actions(7, "coarse", FEW, Dynamic()).opacity == 0.005


def test_rates_and_pictures() -> None:
    assert decay_learning_rate(1.6e-4, 1.6e-6, 0, 100) == pytest.approx(1.6e-4)
    assert decay_learning_rate(1.6e-4, 1.6e-6, 50, 100) == pytest.approx(1.6e-5)
    assert decay_learning_rate(1.6e-4, 1.6e-6, 500, 100) == pytest.approx(1.6e-6)
    shown = [i for i in range(1, 70_000) if is_snapshot_iteration(i)]
    assert shown[:3] == [10, 20, 30]
    assert [i for i in shown if 980 < i < 1200] == [990, 1000, 1050, 1100, 1150]
    assert [i for i in shown if 2900 <= i < 3300] == [2900, 2950, 3000, 3100, 3200]
    assert shown[-1] == 59_900


# -- a set of five Gaussians, with one step of Adam behind it -----------------------------------------------------
def small() -> tuple[GaussianSet, torch.optim.Adam]:
    torch.manual_seed(0)
    n = 5
    values = {
        "xyz": torch.arange(n * 3.0).view(n, 3) / 10,
        "f_dc": torch.randn(n, 1, 3),
        "f_rest": torch.randn(n, 15, 3),
        "scaling": torch.log(torch.tensor([0.01, 0.5, 0.02, 0.6, 0.03]))[:, None].repeat(1, 3),
        "rotation": torch.randn(n, 4),
        "opacity": torch.logit(torch.tensor([0.9, 0.5, 0.002, 0.3, 0.004]))[:, None],
    }
    g = GaussianSet(values)
    groups: list[dict[str, Any]] = [{"params": [getattr(g, name)], "name": name} for name in PARAMETER_NAMES]
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([*groups, {"params": [other], "name": "grid"}], lr=1e-3)
    loss = torch.stack([(getattr(g, name) ** 2).sum() for name in PARAMETER_NAMES]).sum() + other.sum()
    torch.autograd.backward(loss)
    optimizer.step()
    return g, optimizer


def moments(g: GaussianSet, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name in PARAMETER_NAMES:
        state = optimizer.state[getattr(g, name)]
        found[name] = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    return found


def check(g: GaussianSet, optimizer: torch.optim.Optimizer, before: Any, kept: list[int], added: int) -> None:
    """The optimiser knows the set as it is: kept Gaussians' moments in their order, then zeros."""
    assert len(g) == len(kept) + added
    old_values, old_moments = before
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    assert len(optimizer.state) == len(PARAMETER_NAMES) + 1
    for name in PARAMETER_NAMES:
        parameter = getattr(g, name)
        assert groups[name] == [parameter]
        assert groups[name][0] is parameter
        assert torch.equal(parameter[: len(kept)], old_values[name][kept])
        for found, old in zip(moments(g, optimizer)[name], old_moments[name], strict=True):
            assert torch.equal(found, torch.cat([old[kept], torch.zeros(added, *old.shape[1:])]))
        assert optimizer.state[parameter]["step"] == 1
    statistics = {"max_radii2D": (), "xyz_gradient_accum": (1,), "denom": (1,), "deformation_accum": (3,)}
    for name, shape in statistics.items():
        assert getattr(g, name).shape == (len(g), *shape)
    assert g.deformation_table.tolist() == [True] * len(g)
    # It goes on.
    torch.autograd.backward(torch.stack([(getattr(g, name) ** 2).sum() for name in PARAMETER_NAMES]).sum())
    optimizer.step()


def snapshot(g: GaussianSet, optimizer: torch.optim.Optimizer) -> Any:
    return {name: value.clone() for name, value in g.values().items()}, moments(g, optimizer)


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_densify() -> None:
    g, optimizer = small()
    before = snapshot(g, optimizer)
    # Mean gradients 3, 2, 1.5, 0.5, and never seen.
    g.xyz_gradient_accum[:, 0] = torch.tensor([6.0, 2, 3, 0.5, 0])
    g.denom[:, 0] = torch.tensor([2.0, 1, 2, 1, 0])
    g.max_radii2D += 7
    # 0 and 2 are small: cloned; 1 is large: split; 3 is below the threshold.
    assert g.densify(optimizer, 1.5, 0.1, 100, noise()) == (2, 1)
    values = before[0]
    check(g, optimizer, before, [0, 2, 3, 4], 4)
    g, optimizer = small()
    g.xyz_gradient_accum[:, 0] = torch.tensor([3.0, 2, 1.5, 0.5, 0])
    g.denom += 1
    g.densify(optimizer, 1.5, 0.1, 100, noise())
    for name in PARAMETER_NAMES:
        found = getattr(g, name).detach()
        assert torch.equal(found[4:6], values[name][[0, 2]])
        if name not in ("xyz", "scaling"):
            assert torch.equal(found[6:], values[name][[1, 1]])
    assert torch.allclose(g.scaling[6:].exp(), values["scaling"][[1, 1]].exp() / 1.6)
    # Drawn from the Gaussian that goes, which is round.
    draw = torch.randn(2, 3, generator=noise())
    distance = (g.xyz[6:] - values["xyz"][1]).norm(dim=1)
    assert torch.allclose(distance, draw.norm(dim=1) * values["scaling"][1].exp()[0], rtol=1e-4)
    assert g.max_radii2D.sum() == g.denom.sum() == g.xyz_gradient_accum.sum() == 0


@pytest.mark.parametrize(("most", "size"), [(5, 5), (6, 6), (7, 7), (9, 8), (3, 5)])
def test_never_more_than_allowed(most: int, size: int) -> None:
    g, optimizer = small()
    before = snapshot(g, optimizer)
    g.xyz_gradient_accum[:, 0] = torch.tensor([1.7, 3, 1.5, 0.5, 0])
    g.denom += 1
    cloned, split = g.densify(optimizer, 1.5, 0.1, most, noise())
    assert len(g) == size == 5 + cloned + split
    # The split of 1 has the highest gradient, then comes the clone of 0.
    assert (split, cloned) == {5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (1, 2)}[size]
    check(g, optimizer, before, [0, 2, 3, 4] if split else [0, 1, 2, 3, 4], cloned + 2 * split)


@pytest.mark.parametrize(
    ("size_px", "kept"),
    # Opacity below 0.005: 2 and 4. With a limit also the radius of 0, and the scale of 3 above 0.1 x 5.5.
    [(None, [0, 1, 3]), (20.0, [1])],
)
def test_prune(size_px: float | None, kept: list[int]) -> None:
    g, optimizer = small()
    before = snapshot(g, optimizer)
    g.max_radii2D[:] = torch.tensor([21.0, 20, 1, 1, 1])
    g.denom[:, 0] = torch.arange(5.0)
    assert g.prune(optimizer, 0.005, size_px, 5.5) == 5 - len(kept)
    assert g.denom[:, 0].tolist() == kept
    check(g, optimizer, before, kept, 0)


def test_grow() -> None:
    g, optimizer = small()
    # 0 to 2 lie in one cell, which is crowded; 4 would leave the box.
    places = torch.tensor([[0.011, 0.012, 0.013]] * 3 + [[0.5, -0.5, 0.2], [0.9999, 0.9999, 0.9999]])
    g.xyz.data.copy_(places)
    before = snapshot(g, optimizer)
    g.xyz_gradient_accum += 1
    g.denom += 1
    box = torch.tensor([[1.0, 1, 1], [-1, -1, -1]])
    assert g.grow(optimizer, 2.0, box, 100, noise()) == 0
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    grown = 1 + int((direction[1] < 0).all())
    assert g.grow(optimizer, 1.0, box, 100, generator) == grown
    step = g.xyz.detach()[5] - places[3]
    assert step.norm() == pytest.approx(math.sqrt(3) * 2 / 64, rel=1e-4)
    assert torch.allclose(g.f_rest[5], before[0]["f_rest"][3])
    check(g, optimizer, before, [0, 1, 2, 3, 4], grown)
    assert g.grow(optimizer, 0.0, box, len(g), noise()) == 0


def test_reset() -> None:
    g, optimizer = small()
    values, old = snapshot(g, optimizer)
    g.reset_opacity(optimizer)
    found = g.opacity.detach().sigmoid()[:, 0]
    assert torch.allclose(found, values["opacity"].sigmoid()[:, 0].clamp(max=0.01))
    for name, pair in moments(g, optimizer).items():
        for now, then in zip(pair, old[name], strict=True):
            assert torch.equal(now, torch.zeros_like(then) if name == "opacity" else then)


def test_statistics() -> None:
    g, _ = small()
    gradient = torch.zeros(2, 5, 2)
    gradient[0, 0], gradient[1, 0] = torch.tensor([0.3, 0.4]), torch.tensor([0.0, 0.1])
    gradient[0, 1] = torch.tensor([1.0, 0.0])
    radii = torch.tensor([[3.0, 0, 2, 0, 0], [5.0, 0, 1, 0, 0]])
    # A picture of 20 x 40: a pixel along x counts 10, along y 20; a mean over 2 views counts twice.
    g.accumulate_statistics(gradient, radii, 20, 40)
    assert torch.allclose(g.xyz_gradient_accum[0], torch.tensor(2 * (math.hypot(3, 8) + 2)))
    assert g.xyz_gradient_accum[1:].abs().sum() == 0  # 1 is not drawn
    assert g.denom[:, 0].tolist() == [2, 0, 2, 0, 0]
    assert g.max_radii2D.tolist() == [5, 0, 2, 0, 0]
    assert g.mean_gradient()[0] == pytest.approx(math.hypot(3, 8) + 2)


# -- pieces -------------------------------------------------------------------------------------------------------
def test_neighbours_and_rotation() -> None:
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [50, 0, 0]])
    assert rms_neighbour_distance(points)[0] == pytest.approx(math.sqrt((1 + 4 + 9) / 3))
    half = math.sqrt(0.5)
    turned = rotate_vectors(
        torch.tensor([[2 * half, 0, 0, 2 * half]]), torch.tensor([[1.0, 0, 5]])
    )  # 90 degrees about z
    assert torch.allclose(turned, torch.tensor([[0.0, 1, 5]]), atol=1e-6)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics(degree: int) -> None:
    """Against the definition: associated Legendre polynomials, and the order and signs of 3DGS."""
    from scipy.special import sph_harm_y

    torch.manual_seed(degree)
    harmonics, directions = torch.randn(4, 16, 3).double() / 9, torch.randn(2, 4, 3).double() * 3
    found = evaluate_colors(harmonics, directions, degree)
    unit = torch.nn.functional.normalize(directions, dim=-1)
    polar, azimuth = torch.acos(unit[..., 2]).numpy(), torch.atan2(unit[..., 1], unit[..., 0]).numpy()
    truth = torch.full((2, 4, 3), 0.5).double()
    for order in range(degree + 1):
        for m in range(-order, order + 1):
            value = sph_harm_y(order, abs(m), polar, azimuth)
            part = {-1: value.imag, 0: value.real, 1: value.real}[(m > 0) - (m < 0)] * (math.sqrt(2) if m else 1)
            # SciPy's harmonics hold the phase (-1)^m, which 3DGS's have too.
            truth += torch.from_numpy(part)[..., None] * harmonics[:, order * (order + 1) + m]
    assert torch.allclose(found, truth.clamp_min(0), atol=1e-6)


def test_gradients_and_radii_on_the_screen() -> None:
    """The gradient of the offsets is that of the centres: what moving a Gaussian parallel to the picture does."""
    torch.manual_seed(0)
    n = 6
    means = torch.rand(n, 3, dtype=torch.float64) - 0.5
    quats, scales = torch.randn(n, 4).double(), torch.rand(n, 3).double() * 0.1 + 0.05
    opacities, colors = torch.rand(n).double() * 0.5 + 0.2, torch.rand(n, 3).double()
    pose = torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 1)
    pose[:, 2, 3] = torch.tensor([4.0, 5.0])
    k = torch.tensor([[40.0, 0, 15.5], [0, 50.0, 11.5], [0, 0, 1]]).double().repeat(2, 1, 1)
    weight = torch.randn(2, 24, 32, 3).double()

    def loss(offsets: Tensor) -> Tensor:
        screen = ScreenStatistics(offsets)
        rgb, _ = rasterize(means, quats, scales, opacities, colors, pose, k, 32, 24, screen_statistics=screen)
        assert screen.radii is not None
        return (rgb * weight).sum()

    zero = torch.zeros(2, n, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (zero,), eps=1e-6, atol=1e-5)
    # One splat alone: its radius is that of 3.33 deviations, or of where it becomes too faint.
    screen = ScreenStatistics(torch.zeros(1, 1, 2))
    far = torch.tensor([[0.0, 0, 0]])
    size = torch.full((1, 3), 0.2)
    one = torch.tensor([[1.0, 0, 0, 0]])
    args = (far, one, size, torch.tensor([0.5]), torch.ones(1, 3), pose[:1].float(), k[:1].float(), 32, 24)
    rasterize(*args, screen_statistics=screen)
    assert screen.radii is not None
    deviation = math.sqrt((50 * 0.2 / 4) ** 2 + 0.3)
    assert screen.radii.item() == math.ceil(math.sqrt(2 * math.log(0.5 * 255)) * deviation)
    with pytest.raises(ValueError, match="screen needs"):
        rasterize(*args, mode="2d", screen_statistics=screen)


def test_colours_of_each_view() -> None:
    """Colours [C, N, D] are those of the views, in all backends."""
    torch.manual_seed(0)
    means, quats, scales = torch.rand(5, 3) - 0.5, torch.randn(5, 4), torch.rand(5, 3) * 0.1 + 0.05
    opacities, colors = torch.rand(5), torch.rand(2, 5, 3)
    pose = torch.eye(4)[None].repeat(2, 1, 1)
    pose[:, 2, 3] = 3.0
    k = torch.tensor([[20.0, 0, 7.5], [0, 20, 7.5], [0, 0, 1]]).repeat(2, 1, 1)
    both = rasterize(means, quats, scales, opacities, colors, pose, k, 16, 16).rgb
    slow = rasterize(means, quats, scales, opacities, colors, pose, k, 16, 16, backend="reference").rgb
    assert torch.allclose(both, slow, atol=1e-5)
    for c in range(2):
        alone = rasterize(means, quats, scales, opacities, colors[c], pose[c : c + 1], k[c : c + 1], 16, 16).rgb
        assert torch.allclose(both[c], alone[0], atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_draws_and_watches_as_a_cpu_does() -> None:
    torch.manual_seed(0)
    n = 40
    means, quats, scales = torch.rand(n, 3) - 0.5, torch.randn(n, 4), torch.rand(n, 3) * 0.1 + 0.05
    opacities, harmonics = torch.rand(n) * 0.5 + 0.2, torch.randn(n, 16, 3) * 0.2
    pose = torch.eye(4)[None].repeat(2, 1, 1)
    pose[:, 2, 3] = torch.tensor([4.0, 5.0])
    k = torch.tensor([[40.0, 0, 15.5], [0, 50.0, 11.5], [0, 0, 1]]).repeat(2, 1, 1)
    weight = torch.randn(2, 24, 32, 3)
    found = []
    for device in ("cpu", "cuda"):
        points = means.to(device)
        eyes = torch.tensor([[[0.0, 0, -4]], [[0, 0, -5]]], device=device)
        colors = evaluate_colors(harmonics.to(device), points - eyes, 3)
        screen = ScreenStatistics(torch.zeros(2, n, 2, device=device, requires_grad=True))
        shape = quats.to(device), scales.to(device), opacities.to(device)
        rgb, _ = rasterize(points, *shape, colors, pose.to(device), k.to(device), 32, 24, screen_statistics=screen)
        torch.autograd.backward((rgb * weight.to(device)).sum())
        assert screen.offsets.grad is not None
        assert screen.radii is not None
        found.append([v.detach().cpu() for v in (colors, screen.offsets.grad, screen.radii)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()
