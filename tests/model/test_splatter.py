from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat.errors import UserError
from zoosplat.geometry.rotations import matrix_from_quaternion
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.storage import groups, schema
from zoosplat_model.carving import grid_points
from zoosplat_model.devices import pick_device
from zoosplat_model.frames import FrameReader, open_reader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.losses import frame_losses, soft_iou
from zoosplat_model.metrics import ssim_map
from zoosplat_model.network.selection import select_voxels, suppress_interior
from zoosplat_model.network.splatter import PoseSplatter, deep_supervision_loss
from zoosplat_model.network.unet import UNetStack, convolve, depth_to_space, space_to_depth
from zoosplat_model.registry import build_splatter
from zoosplat_model.rotations import animal_to_world, quaternion_product

CPU = torch.device("cpu")


def rotation_of(quats: Tensor) -> Tensor:
    return torch.from_numpy(matrix_from_quaternion(quats.detach().double().numpy()))


def covariances(gaussians: Gaussians) -> Tensor:
    spread = rotation_of(gaussians.quats) * gaussians.scales.detach().double()[:, None]
    return spread @ spread.mT


@pytest.fixture
def reader(tiny: Project) -> FrameReader:
    return open_reader(open_run(tiny), CPU)


# -- U-Nets -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("num_unets", "poolings"), [(1, 1), (1, 4), (3, 2)])
def test_the_stack_starts_as_the_identity(num_unets: int, poolings: int) -> None:
    torch.manual_seed(0)
    stack = UNetStack(num_unets, 4, poolings, 8, (16, 32, 16))
    volume = torch.randn(2, 8, 16, 32, 16)
    asked: list[torch.Tensor] = []

    def needed(occupancies: torch.Tensor) -> torch.Tensor:
        asked.append(occupancies)
        return torch.rand_like(occupancies)

    features, earlier = stack(volume, needed)
    assert features.shape == (2, 8, 16, 32, 16)
    assert len(earlier) == num_unets - 1
    assert all(torch.equal(occupancies, volume[:, 0]) for occupancies in earlier)
    assert len(asked) == num_unets  # of the occupancy that each is given
    assert all(torch.equal(occupancies, volume[:, 0]) for occupancies in asked)
    assert torch.equal(features[:, :4], volume[:, :4])
    assert torch.equal(features[:, 4:], torch.zeros(2, 4, 16, 32, 16))
    # Every U-Net can leave the identity: its last layer has a gradient.
    (features * torch.randn_like(features)).sum().backward()
    gradients = {name: p.grad for name, p in stack.named_parameters() if name.endswith("last.weight")}
    assert len(gradients) == num_unets
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_what_earlier_u_nets_leave_is_what_later_ones_are_given() -> None:
    torch.manual_seed(0)
    stack = UNetStack(3, 4, 2, 0, (8, 16, 8))
    for name, parameter in stack.named_parameters():
        if name.endswith("last.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    asked: list[torch.Tensor] = []

    def needed(occupancies: torch.Tensor) -> torch.Tensor:
        asked.append(occupancies)
        return torch.zeros_like(occupancies)

    volume = torch.randn(2, 8, 8, 16, 8)
    features, earlier = stack(volume, needed)
    assert all(torch.equal(a, b) for a, b in zip(asked[1:], earlier, strict=True))
    assert not torch.equal(earlier[0], volume[:, 0])
    assert not torch.equal(earlier[1], features[:, 0])
    total = deep_supervision_loss(earlier, features[:, 0], volume[:, 0] > 0)
    torch.autograd.backward(total)
    gradients = [p.grad for name, p in stack.named_parameters() if name.endswith("last.weight")]
    assert [g is not None for g in gradients] == [True, True, False]  # the last one is not to follow them


def test_indecision_is_a_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, last = torch.rand(3, 2, 4, 3, 5, dtype=torch.float64, generator=generator) + 0.3
    hull = torch.rand(2, 4, 3, 5, generator=generator) > 0.4
    expected = 0.0
    for earlier in (first, second):
        p, q = (1 / (1 + np.exp(-16 * (x.numpy()[hull.numpy()] - 0.75))) for x in (last, earlier))
        expected += float(-(p * np.log(q) + (1 - p) * np.log(1 - q)).mean())
    assert float(deep_supervision_loss([first, second], last, hull)) == pytest.approx(expected)
    assert float(deep_supervision_loss([], last, hull)) == 0
    assert float(deep_supervision_loss([first], last, hull & False)) == 0


def test_shorter_filters_find_the_same() -> None:
    torch.manual_seed(0)
    new = UNetStack(2, 4, 3, 0, (16, 32, 16))
    lengths = {name: p.flatten(1).norm(dim=1) for name, p in new.named_parameters() if p.ndim == 5}
    for parameter in new.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    volume = torch.rand(1, 8, 16, 32, 16)
    expected, _ = new(volume, torch.zeros_like)
    last = {name: p.detach().clone() for name, p in new.named_parameters() if "last" in name}
    new.shorten_filters()
    found, _ = new(volume, torch.zeros_like)
    assert (found - expected).abs().max() < 0.01 * expected.std()  # variances have an epsilon
    for name, parameter in new.named_parameters():
        if name in last:
            assert torch.equal(parameter, last[name])
        elif parameter.ndim == 5:  # those of a new network differ a little: they are drawn
            length = parameter.flatten(1).norm(dim=1)
            torch.testing.assert_close(length, lengths[name].mean().expand_as(length), rtol=0.05, atol=0)


def test_folding_moves_blocks_to_channels_and_back() -> None:
    x = torch.arange(2 * 3 * 4 * 2 * 6.0).reshape(2, 3, 4, 2, 6)
    folded = space_to_depth(x)
    assert folded.shape == (2, 24, 2, 1, 3)
    assert folded[1, 2 * 8 :, 1, 0, 2].tolist() == x[1, 2, 2:4, 0:2, 4:6].flatten().tolist()
    assert torch.equal(depth_to_space(folded), x)


@pytest.mark.parametrize("length", [2, 7, 12])
def test_convolution_in_halves_is_the_convolution(length: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, length, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    found, expected = convolve(x, weight), F.conv3d(x, weight, padding=1)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, weight), direction), torch.autograd.grad(expected, (x, weight), direction)
    )


# -- selection ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("above", "count"), [(5, 10), (30, 30), (80, 50), (0, 10)])
def test_selection_keeps_its_limits_and_takes_the_highest(above: int, count: int) -> None:
    rng = np.random.default_rng(above)
    values = np.concatenate([rng.uniform(0.26, 1, above), rng.uniform(-1, 0.24, 100 - above)])
    rng.shuffle(values)
    chosen = select_voxels(torch.from_numpy(values), 10, 50)[0].numpy()
    assert sorted(chosen) == sorted(np.argsort(-values)[:count])


def test_a_volume_smaller_than_the_least_number_gives_all() -> None:
    assert sorted(select_voxels(torch.zeros(6), 1024, 16000)[0].tolist()) == list(range(6))


def test_what_lies_deep_inside_is_the_last_to_be_selected() -> None:
    occupancy = torch.zeros(15, 14, 13)
    occupancy[3:12, 3:12, 3:12] = 1
    ordered = suppress_interior(occupancy).view(occupancy.shape)
    deep = torch.zeros(occupancy.shape, dtype=torch.bool)
    deep[5:10, 5:10, 5:10] = True
    assert torch.equal(ordered[~deep], occupancy[~deep])
    chosen, drawn = select_voxels(ordered.flatten(), 1, 9**3)
    assert drawn.all()  # where there are enough, they all are
    assert set(chosen[-125:].tolist()) == set(deep.flatten().nonzero()[:, 0].tolist())


# -- Gaussians ----------------------------------------------------------------------------------------------------
def test_quaternion_product_is_that_of_rotations() -> None:
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1)
    torch.testing.assert_close(rotation_of(quaternion_product(a, b)), rotation_of(a) @ rotation_of(b))


def test_to_world_turns_means_and_covariances() -> None:
    torch.manual_seed(0)
    n = 6
    gaussians = Gaussians(
        torch.randn(n, 3).double(),
        F.normalize(torch.randn(n, 4), dim=1).double(),
        torch.rand(n, 3).double() + 0.1,
        torch.rand(n).double(),
        torch.rand(n, 3).double(),
    )
    center, angle = torch.tensor([0.3, -1, 2.0]).double(), torch.tensor(0.7).double()
    turn = torch.tensor(
        [[math.cos(0.7), -math.sin(0.7), 0], [math.sin(0.7), math.cos(0.7), 0], [0, 0, 1]], dtype=torch.float64
    )
    placed = gaussians.to_world(center, angle)
    torch.testing.assert_close(placed.means, gaussians.means @ turn.T + center)
    torch.testing.assert_close(covariances(placed), turn @ covariances(gaussians) @ turn.T)
    assert torch.equal(placed.colors, gaussians.colors)
    for vector in ([0.4, -0.7, 0.0], [1.2, 0.5, -2.0], [1e-9, 0.0, 0.0], [0.0, 0.0, 0.0]):
        half = np.linalg.norm(vector) / 2
        tilt = torch.tensor([math.cos(half), *(np.array(vector) / 2 * np.sinc(half / np.pi))], dtype=torch.float64)
        whole = turn @ torch.from_numpy(cv2.Rodrigues(np.array(vector))[0])
        torch.testing.assert_close(animal_to_world(angle, tilt), whole)
        placed = gaussians.to_world(center, angle, tilt)
        torch.testing.assert_close(placed.means, gaussians.means @ whole.T + center)
        torch.testing.assert_close(covariances(placed), whole @ covariances(gaussians) @ whole.T)


def excited(reader: FrameReader, project: Project) -> PoseSplatter:
    """An untrained network whose head gives every Gaussian a shape and an orientation of its own."""
    model = build_splatter(reader, open_run(project).experiment)
    torch.manual_seed(0)  # whatever was drawn for the U-Nets
    for layer in (model.head[0], model.head[2]):
        layer.reset_parameters()  # type: ignore[operator]
    torch.nn.init.normal_(model.head[2].weight, std=0.5)  # type: ignore[arg-type]
    return model


@torch.no_grad()
def test_turning_the_whole_scene_turns_the_gaussians(reader: FrameReader, tiny: Project) -> None:
    # In float64, so that no voxel's nearest pixel is another one by rounding.
    model = excited(reader, tiny).double()
    frame = reader.frame(4)
    tensors = {key: value.double() for key, value in vars(frame).items() if isinstance(value, Tensor)}
    frame = replace(frame, **tensors)  # type: ignore[arg-type]
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(2.1), -math.sin(2.1)], [math.sin(2.1), math.cos(2.1)]])
    turn[:3, 3] = torch.tensor([0.1, 0.2, -0.1])
    moved = replace(
        frame,
        world_to_camera=frame.world_to_camera @ torch.linalg.inv(turn),
        center=turn[:3, :3] @ frame.center + turn[:3, 3],
        angle=frame.angle + 2.1,
    )
    (before,), (after,) = model([frame]), model([moved])
    i, j = (torch.argsort(g.means @ g.means.new_tensor([1.0, 1.7, 3.1])) for g in (before, after))
    before, after = before.to_world(frame.center, frame.angle), after.to_world(moved.center, moved.angle)
    torch.testing.assert_close(after.means[j], before.means[i] @ turn[:3, :3].T + turn[:3, 3], atol=1e-9, rtol=0)
    expected = turn[:3, :3] @ covariances(before)[i] @ turn[:3, :3].T
    torch.testing.assert_close(covariances(after)[j], expected, atol=1e-12, rtol=1e-6)
    # It would be noticed if the orientations stayed: these Gaussians are not round.
    assert (covariances(before)[i] - expected).abs().max() > 0.1 * covariances(before).abs().max()


@torch.no_grad()
def test_it_starts_as_the_coloured_hull(reader: FrameReader, tiny: Project) -> None:
    model = build_splatter(reader, open_run(tiny).experiment)
    frame = reader.frame(4)
    placed = model([frame])[0].to_world(frame.center, frame.angle)
    rgb, alpha = model.render(placed, frame.world_to_camera, frame.intrinsics, reader.width, reader.height, range(5))
    iou = soft_iou((alpha > 0.5).float(), frame.mask)
    assert iou[reader.observed].min() > 0.75  # voxels are 1.8 pixels wide here
    assert iou[reader.held_out].min() > 0.7
    both = (frame.mask > 0) & (alpha > 0.9)
    error = (rgb - frame.composite_on_white()).abs().mean(-1)[both]
    assert error.median() < 0.1  # red in front and blue behind are 0.5 apart


@torch.no_grad()
def test_what_floats_beside_the_animal_is_drawn_in_training_only(reader: FrameReader, tiny: Project) -> None:
    model, frame = build_splatter(reader, open_run(tiny).experiment), reader.frame(4)
    observed = model.observe(frame)
    volume = model.carve(observed)
    volume[0] = 0
    volume[0, :5, :5, :5] = 1
    volume[0, -4, -4, -4] = 1
    in_training = model.reconstruct(volume[None], [observed])[0].opacities
    after = model.eval().reconstruct(volume[None], [observed])[0].opacities
    assert (in_training > 0.5).sum() == 5**3 + 1
    assert (after > 0.5).sum() == 5**3
    volume[0, -4:] = 1  # not a speck, but half of an animal
    assert torch.equal(
        model.reconstruct(volume[None], [observed])[0].opacities > 0.5,
        (model.train().reconstruct(volume[None], [observed])[0].opacities > 0.5),
    )


@torch.no_grad()
def test_pictures_do_not_depend_on_the_unit_of_length(reader: FrameReader, tiny: Project) -> None:
    model, frame = excited(reader, tiny), reader.frame(2)
    points = grid_points(1000 * reader.ell_m, reader.grid_size, reader.volume_idx)
    in_mm = PoseSplatter(
        points, 1000 * reader.voxel_size_m, reader.footprint_px(), 5, reader.observed,
        num_unets=2, base_filters=4, poolings=2, bottleneck=16, min_gaussians=64,
    )  # fmt: skip
    in_mm.load_state_dict(model.state_dict())
    pose = frame.world_to_camera.clone()
    pose[:, :3, 3] *= 1000
    scaled = replace(frame, world_to_camera=pose, center=1000 * frame.center)
    alphas = []
    for m, f in ((model, frame), (in_mm, scaled)):
        placed = m([f])[0].to_world(f.center, f.angle)
        alphas.append(m.render(placed, f.world_to_camera, f.intrinsics, 32, 32).alpha)
    assert alphas[0].max() > 0.9
    assert (alphas[0] - alphas[1]).abs().mean() < 1e-3


def test_camera_colours(reader: FrameReader, tiny: Project) -> None:
    model, frame = build_splatter(reader, open_run(tiny).experiment), reader.frame(0)
    one = Gaussians(
        frame.center[None], torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 0.05), torch.tensor([0.9]),
        torch.tensor([[0.2, 0.4, 0.6]]),
    )  # fmt: skip
    with torch.no_grad():
        model.camera_color[0] = torch.tensor([[0.4, 0, 0, 0.04], [0, 0, 0, 0], [0, 0, 0, 0]])
        views = (frame.world_to_camera[[0, 1, 4]], frame.intrinsics[[0, 1, 4]], 32, 32)
        plain, alpha = model.render(one, *views)
        rgb, _ = model.render(one, *views, cameras=[0, 1, 4])
    change = (rgb - plain)[:, 16, 16]
    # The mean of the observed cameras stays: 3/4 of the change in camera 0, -1/4 in the other three; none if held out.
    expected = alpha[:, 16, 16, None] * torch.tensor([[0.75 * 0.12, 0, 0], [-0.25 * 0.12, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(change, expected, atol=1e-6, rtol=0)
    assert torch.equal(rgb[0, 0, 0], torch.ones(3)) == (alpha[0, 0, 0] == 0)


# -- frames -------------------------------------------------------------------------------------------------------
def test_reader_gives_what_was_written(reader: FrameReader) -> None:
    assert reader.split("train") == [0, 2]  # frame 1 is not valid
    assert reader.split("valid") == [3, 4, 5]
    assert reader.split("test") == [6, 7, 8]
    assert (reader.observed, reader.held_out) == ([0, 1, 2, 3], [4])
    assert [f.t for f in reader.prefetch([5, 0, 5, 7, 2, 8])] == [5, 0, 5, 7, 2, 8]
    frame = reader.frame(3)
    assert torch.equal(frame.composite_on_white()[frame.mask == 0], torch.ones(int((frame.mask == 0).sum()), 3))
    colors = {tuple((c * 255).round().int().tolist()) for c in frame.rgb[frame.mask > 0]}
    assert colors == {(200, 40, 30), (30, 60, 210)}


def test_a_window_moves_the_principal_point(tiny: Project) -> None:
    whole = open_reader(open_run(tiny), CPU).frame(0).intrinsics
    for stage, name, value in (("pack", "origin", [5, 7]), ("center_rotation", "principal_shift", [0.25, -0.5])):
        array = schema.array(groups.open_group(open_run(tiny).output_url(stage), write=True), name)
        changed = schema.read(groups.open_group(open_run(tiny).output_url(stage)), name)
        changed[0, 2] = value
        array[...] = changed
    moved = open_reader(open_run(tiny), CPU).frame(0).intrinsics
    expected = torch.zeros(5, 3, 3)
    expected[2, :2, 2] = torch.tensor([0.25 - 5, -0.5 - 7])
    torch.testing.assert_close(moved - whole, expected)


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(UserError, match="cuda:99"):
        pick_device("cuda:99")
    with pytest.raises(UserError, match="use auto"):
        pick_device("abacus")


# -- losses -------------------------------------------------------------------------------------------------------
def test_losses_by_hand() -> None:
    alpha = torch.tensor([[[1, 0.5], [0, 0]]])
    mask = torch.tensor([[[1.0, 0], [0, 1]]])
    truth = torch.ones(1, 2, 2, 3)
    rgb = truth.clone()
    rgb[0, 0, 0] = torch.tensor([0.5, 0.75, 1])
    rgb[0, 1, 0, 2] = 0.25
    found = frame_losses(rgb, alpha, truth, mask, 0.5, 0.0)
    # overlap 1, union 1 + 0.5 + 1; |error| 0.5 + 0.25 + 0.75 over 2 pixels of mask
    assert [round(float(x), 5) for x in found] == [round(0.6 + 0.5 * 0.75, 5), 0.6, 0.75, 0, 0, 0]
    found = frame_losses(rgb, alpha, truth, mask, 0.5, 0.0, square_lambda=2.0)
    # errors squared: 0.25 + 0.0625 + 0.5625 over 2 pixels
    assert [round(float(x), 5) for x in found] == [round(0.6 + 0.5 * 0.75 + 2 * 0.4375, 5), 0.6, 0.75, 0.4375, 0, 0]


def test_views_that_do_not_see_the_animal_are_left_out() -> None:
    torch.manual_seed(0)
    rgb, truth = torch.rand(2, 2, 16, 16, 3)
    alpha, mask = torch.rand(2, 16, 16), torch.ones(2, 16, 16)
    mask[1] = 0
    both = frame_losses(rgb, alpha, truth, mask, 0.5, 0.3, square_lambda=0.2)
    one = frame_losses(rgb[:1], alpha[:1], truth[:1], mask[:1], 0.5, 0.3, square_lambda=0.2)
    torch.testing.assert_close(torch.stack(both), torch.stack(one))
    chosen = frame_losses(rgb, alpha, truth, torch.ones_like(mask), 0.5, 0.3, torch.tensor([True, False]), 0.2)
    torch.testing.assert_close(torch.stack(chosen), torch.stack(one))
    similarity = float(ssim_map(rgb[:1].permute(0, 3, 1, 2), truth[:1].permute(0, 3, 1, 2)).mean())
    assert float(one.dissimilarity) == pytest.approx(1 - similarity, abs=1e-6)
    weighted = one.soft_iou + 0.5 * one.color + 0.2 * one.square + 0.3 * one.dissimilarity
    assert float(one.total) == pytest.approx(float(weighted), abs=1e-5)
    empty = frame_losses(rgb, alpha, truth, torch.zeros(2, 16, 16), 0.5, 0.3)
    assert float(empty.total) == 0


def test_a_mirrored_network_gives_mirrored_gaussians(
    reader: FrameReader, tiny: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build_splatter(reader, open_run(tiny).experiment)
    last = [p for name, p in model.refine.named_parameters() if "last" in name]
    for parameter in (*model.head.parameters(), *last):
        torch.nn.init.normal_(parameter, std=0.02)
    frame = reader.frame(1)
    observed = [model.observe(frame)]
    volumes = model.carve(observed[0])[None]
    with torch.no_grad():
        turned = model.reconstruct(volumes, observed, mirrored=torch.tensor([True]))[0]
        prepare = model._prepare_evidence  # the cameras are not mirrored, so the evidence is that of what they see
        monkeypatch.setattr(
            model, "_prepare_evidence", lambda hull, *of: lambda o: prepare(hull.flip(1), *of)(o.flip(1)).flip(1)
        )
        plain = model.reconstruct(volumes.flip(3), observed)[0]
    assert len(plain.means) > 50
    ends = model.points[0, 0, 0, 1] + model.points[0, -1, 0, 1]
    # Not in the order of Gaussians: equal occupancies come in any.
    found, expected = turned.means.clone(), plain.means * torch.tensor([1, -1, 1]) + torch.tensor([0, ends, 0])
    nearest = torch.cdist(expected.double(), found.double()).min(1)
    assert nearest.values.max() < 1e-6
    torch.testing.assert_close(turned.scales[nearest.indices], plain.scales, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(turned.opacities[nearest.indices], plain.opacities, rtol=1e-3, atol=1e-5)
    mirrored = plain.quats * torch.tensor([1, -1, 1, -1])
    torch.testing.assert_close(turned.quats[nearest.indices], mirrored, rtol=1e-4, atol=1e-5)
