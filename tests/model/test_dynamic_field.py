"""The deformation field: names and shapes of its state, its numbers against a slow twin, its kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoosplat_model.dynamic import hexplane_triton
from zoosplat_model.dynamic.hexplane import AXES, TIME, DeformationField, Deformed, HexPlane, Roughness

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
HEADS = {"pos": 3, "scales": 3, "rotations": 4, "opacity": 1, "shs": 48}


def expected_state(multires: tuple[int, ...], resolution: int, times: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the order of the published tool's files."""
    shapes: dict[str, tuple[int, ...]] = {"time_poc": (4,), "pos_poc": (10,)}
    shapes |= {"rotation_scaling_poc": (2,), "opacity_poc": (2,)}
    shapes |= {"timenet.0.weight": (64, 9), "timenet.0.bias": (64,)}
    shapes |= {"timenet.2.weight": (32, 64), "timenet.2.bias": (32,), "deformation_net.grid.aabb": (2, 3)}
    for level, m in enumerate(multires):
        r = m * resolution
        planes = [(r, r), (r, r), (times, r), (r, r), (times, r), (times, r)]  # xy, xz, xt, yz, yt, zt
        for i, size in enumerate(planes):
            shapes[f"deformation_net.grid.grids.{level}.{i}"] = (1, 32, *size)
    for i in range(depth):
        width = 32 * len(multires) if i == 0 else 64
        shapes[f"deformation_net.feature_out.{2 * i}.weight"] = (64, width)
        shapes[f"deformation_net.feature_out.{2 * i}.bias"] = (64,)
    for head, outputs in HEADS.items():
        for i, n in ((1, 64), (3, outputs)):
            shapes[f"deformation_net.{head}_deform.{i}.weight"] = (n, 64)
            shapes[f"deformation_net.{head}_deform.{i}.bias"] = (n,)
    return shapes


@pytest.mark.parametrize(("multires", "depth"), [((1, 2, 4, 8), 1), ((1, 2), 3)])
def test_state_has_the_published_names_shapes_and_order(multires: tuple[int, ...], depth: int) -> None:
    with torch.device("meta"):
        field = DeformationField(HexPlane(multires), depth)
    found = {name: tuple(value.shape) for name, value in field.state_dict().items()}
    expected = expected_state(multires, 64, 25, depth)
    assert found == expected
    assert list(found) == list(expected)
    if len(multires) == 4:
        assert sum(plane.numel() for plane in field.grids()) == 35_727_360


def test_first_state() -> None:
    field = DeformationField(HexPlane((1, 2), 6, 5))
    state = field.state_dict()
    assert state["time_poc"].tolist() == [1, 2, 4, 8]
    assert state["pos_poc"].tolist() == [2.0**i for i in range(10)]
    assert state["rotation_scaling_poc"].tolist() == state["opacity_poc"].tolist() == [1, 2]
    assert torch.equal(state["deformation_net.grid.aabb"], torch.tensor([[1.6] * 3, [-1.6] * 3]))
    for level in (0, 1):
        for i in range(6):
            plane = state[f"deformation_net.grid.grids.{level}.{i}"]
            if i in (2, 4, 5):
                assert (plane == 1).all()
            else:
                assert 0.1 <= plane.min() < 0.2
                assert 0.4 < plane.max() <= 0.5
    # The fine stage starts where the coarse one ended.
    canonical = gaussians(9)
    for before, after in zip(canonical, field(canonical, torch.tensor(0.3)), strict=True):
        assert torch.equal(before, after)


def gaussians(n: int, dtype: torch.dtype = torch.float32, reach: float = 1.9) -> Deformed:
    torch.manual_seed(n)
    shapes: tuple[tuple[int, ...], ...] = ((n, 3), (n, 3), (n, 4), (n, 1), (n, 16, 3))
    means, *others = (torch.rand(shape, dtype=dtype) * 2 - 1 for shape in shapes)
    return Deformed(means * reach, *others)


def random_state(field: DeformationField) -> dict[str, Tensor]:
    """A state with those names, all values drawn anew; the box is not symmetric."""
    torch.manual_seed(7)
    state = {name: torch.rand(value.shape, dtype=torch.float64) - 0.3 for name, value in field.state_dict().items()}
    state["deformation_net.grid.aabb"] = torch.tensor([[1.5, 1.2, 1.7], [-1.1, -1.6, -1.3]], dtype=torch.float64)
    return state


def twin(state: dict[str, Any], point: list[float], time: float, levels: int, depth: int) -> dict[str, list[float]]:
    """The outputs of all heads at a point, from the state alone, number by number."""
    high, low = (row.tolist() for row in state["deformation_net.grid.aabb"])
    # The maximum of the box maps to -1, its minimum to +1.
    place = [1 - 2 * (p - b) / (a - b) for p, a, b in zip(point, high, low, strict=True)] + [time]
    features = []
    for level in range(levels):
        product = [1.0] * 32
        for i, (first, second) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
            plane = state[f"deformation_net.grid.grids.{level}.{i}"][0]
            spots: list[tuple[tuple[int, float], tuple[int, float]]] = []
            for axis, size in ((second, plane.shape[1]), (first, plane.shape[2])):
                at = min(max((place[axis] + 1) / 2 * (size - 1), 0.0), size - 1.0)
                lower = min(math.floor(at), size - 2)
                spots.append(((lower, 1 - (at - lower)), (lower + 1, at - lower)))
            for c in range(32):
                product[c] *= sum(u * v * float(plane[c, y, x]) for y, u in spots[0] for x, v in spots[1])
        features += product

    def linear(name: str, values: list[float]) -> list[float]:
        weight, bias = state[f"deformation_net.{name}.weight"].tolist(), state[f"deformation_net.{name}.bias"].tolist()
        return [sum(w * v for w, v in zip(row, values, strict=True)) + b for row, b in zip(weight, bias, strict=True)]

    hidden = linear("feature_out.0", features)
    for i in range(1, depth):
        hidden = linear(f"feature_out.{2 * i}", [max(v, 0.0) for v in hidden])
    found = {}
    for head in HEADS:
        inner = linear(f"{head}_deform.1", [max(v, 0.0) for v in hidden])
        found[head] = linear(f"{head}_deform.3", [max(v, 0.0) for v in inner])
    return found


@pytest.mark.parametrize(("time_range", "entered"), [("half", 0.7), ("full", 0.4)])
def test_outputs_are_those_of_a_slow_twin(time_range: Any, entered: float) -> None:
    levels, depth = 2, 2
    field = DeformationField(HexPlane((1, 2), 5, 4, time_range=time_range), depth, True, True).double()
    state = random_state(field)
    field.load_state_dict(state)
    canonical = gaussians(12, torch.float64)  # some outside of the box
    deformed = field(canonical, torch.tensor(0.7, dtype=torch.float64))
    for i in range(12):
        truth = twin(state, canonical.means[i].tolist(), entered, levels, depth)
        for before, after, head in zip(canonical, deformed, HEADS, strict=True):
            change = torch.tensor(truth[head], dtype=torch.float64)
            assert (after[i] - before[i] - change.view_as(after[i])).abs().max() < 1e-9 * (
                1 + float(change.abs().max())
            )


def test_opacity_and_harmonics_stay_unless_asked_for() -> None:
    field = DeformationField(HexPlane((1,), 5, 4)).double()
    field.load_state_dict(random_state(field))
    canonical = gaussians(5, torch.float64)
    deformed = field(canonical, torch.tensor(0.2, dtype=torch.float64))
    assert torch.equal(deformed.logits, canonical.logits)
    assert torch.equal(deformed.harmonics, canonical.harmonics)
    assert not torch.equal(deformed.means, canonical.means)


def test_gradients() -> None:
    field = DeformationField(HexPlane((1, 2), 3, 4), deform_opacity=True, deform_harmonics=True).double()
    field.load_state_dict(random_state(field))
    others = gaussians(3, torch.float64, reach=0.9)[1:]
    names = [name for name, p in field.named_parameters() if p.requires_grad]
    weights = [torch.randn_like(v) for v in gaussians(3, torch.float64)]

    def outputs(means: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        deformed = torch.func.functional_call(
            field, given, (Deformed(means, *others), torch.tensor(0.35, dtype=torch.float64))
        )
        return torch.stack([(value * w).sum() for value, w in zip(deformed, weights, strict=True)])

    means = gaussians(3, torch.float64, reach=0.9).means.requires_grad_()
    parameters = [p for p in field.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(outputs, (means, *parameters), fast_mode=True)


def test_roughness() -> None:
    grid = HexPlane((1,), 4, 5)
    for plane in grid.planes()[0]:
        plane.data.zero_()
    found = grid.roughness()
    assert torch.stack(list(found)).tolist() == [0, 0, 3]
    # A bump in the middle of an axis of five cells: second differences 1, -2, 1 in one column of one channel.
    time, space = grid.planes()[0][2], grid.planes()[0][0]
    time.data[0, 3, 2, 1] = 1
    space.data[0, 0, 1, 0] = 2  # at the second of four cells: second differences -4 and 2
    found = Roughness(*(value.detach() for value in grid.roughness()))
    assert found.time == pytest.approx(6 / (32 * 3 * 4))
    assert found.space == pytest.approx((16 + 4) / (32 * 2 * 4))
    assert found.ones == pytest.approx(3 - 1 / (32 * 5 * 4))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("time_range", ["half", "full"])
def test_kernels_agree_with_plain_functions(time_range: Any) -> None:
    plain = HexPlane((1, 2, 4), 16, 9, time_range=time_range).double()
    for parameter in plain.grids.parameters():
        torch.nn.init.uniform_(parameter, 0.2, 1.2)
    fast = HexPlane((1, 2, 4), 16, 9, time_range=time_range).cuda()
    fast.load_state_dict(plain.state_dict())
    assert hexplane_triton.is_available(0)
    means = gaussians(5000, torch.float64).means
    weight = torch.randn(5000, plain.width, dtype=torch.float64)
    exact, found = means.clone().requires_grad_(), means.float().cuda().requires_grad_()
    truth, ours = plain(exact, torch.tensor(0.37).double()), fast(found, torch.tensor(0.37).cuda())
    # Products of six float32 interpolations, up to 3; a position among 64 cells is known to 4e-6 of a cell.
    assert (ours.cpu() - truth).abs().max() < 5e-5
    torch.autograd.backward((truth * weight).sum())
    torch.autograd.backward((ours * weight.float().cuda()).sum())
    weights = (0.3, 0.2, 0.1)
    parts = zip(weights, plain.roughness(), strict=True)
    torch.autograd.backward(torch.stack([w * part for w, part in parts]).sum())
    kinds = [i in TIME for _ in range(3) for i in range(len(AXES))]
    planes = [plane for level in fast.planes() for plane in level]
    hexplane_triton.add_roughness(planes, kinds, weights)
    pairs = [(exact, found), *zip([p for level in plain.planes() for p in level], planes, strict=True)]
    for a, b in pairs:
        assert a.grad is not None
        assert b.grad is not None
        off = (b.grad.cpu() - a.grad).abs()
        # Rounding moves a few of the points over the border of a cell, where their gradient jumps.
        assert (off > 1e-4 * a.grad.abs().max()).double().mean() < 1e-3
