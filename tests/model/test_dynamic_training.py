"""Dynamic training on a moving scene of known truth: quality, resumption, files, also on S3."""

from __future__ import annotations

import ast
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.config.training import Dynamic
from zoosplat.errors import UserError
from zoosplat.formats import ply
from zoosplat.geometry.spherical_harmonics import SH_C0
from zoosplat.storage import listing, objects, urls
from zoosplat_model.dynamic import files
from zoosplat_model.dynamic.gaussian_set import PARAMETER_NAMES, GaussianSet
from zoosplat_model.dynamic.hexplane import DeformationField, Deformed, HexPlane
from zoosplat_model.dynamic.scene import DynamicScene
from zoosplat_model.dynamic.schedule import Phase
from zoosplat_model.dynamic.trainer import DynamicTrainer, draw

FRAMES, VIEWS, SIDE = 8, 5, 40
SMALL = Dynamic(
    coarse_iterations=100,
    fine_iterations=300,
    multires=(1, 2),
    resolution=12,
    time_resolution=8,
    time_range="full",
    grid_lr_init=1e-2,
    grid_lr_final=1e-3,
    deformation_lr_init=2e-3,
    deformation_lr_final=2e-4,
    densify_from_iter=50,
    densification_interval=50,
    densify_until_iter=250,
    opacity_reset_interval=10_000,
    max_gaussians=600,
)


class Swing:
    """A red body and a blue limb that swings by a third of the picture, of 60 Gaussians each.

    Attributes:
        scene: the training views.
        test_truth: [F, h, w, 3] what the camera sees that is kept from training.
        points, colors: of the first frame, a little off.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        body = rng.normal(size=(60, 3)) * [0.35, 0.2, 0.2] - [0.2, 0, 0]
        limb = rng.normal(size=(60, 3)) * [0.1, 0.1, 0.3] + [0.5, 0, -0.4]
        red, blue = np.array([0.8, 0.1, 0.1]), np.array([0.1, 0.2, 0.9])
        colors = np.concatenate([red + rng.normal(size=(60, 3)) * 0.08, blue + rng.normal(size=(60, 3)) * 0.08])
        self.times = torch.linspace(0, 1, FRAMES)
        cameras = [self._camera(2 * math.pi * c / (VIEWS + 1) + 0.2) for c in range(VIEWS + 1)]
        poses = torch.stack(cameras)
        k = torch.tensor([[50.0, 0, (SIDE - 1) / 2], [0, 50.0, (SIDE - 1) / 2], [0, 0, 1]]).repeat(VIEWS + 1, 1, 1)
        pictures, masks = [], []
        for t in self.times.tolist():
            angle = 0.8 * math.sin(2 * math.pi * t)
            turn = np.array([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
            means = torch.tensor(np.concatenate([body, limb @ turn.T]), dtype=torch.float32)
            deformed = _round(means, torch.tensor(colors, dtype=torch.float32).clamp(0, 1), 0.07, 0.9)
            rgb, alpha = draw(deformed, poses, k, SIDE, SIDE, 0)
            pictures.append((rgb.clamp(0, 1) * 255).round().to(torch.uint8))
            masks.append(alpha > 0.5)
            if t == 0:
                shift = torch.tensor(rng.normal(size=(120, 3)) * 0.03, dtype=torch.float32)
                self.points, self.colors = means + shift, torch.full((120, 3), 0.5)
        seen = torch.stack(pictures), torch.stack(masks)
        self.test_truth = seen[0][:, VIEWS].float() / 255
        self.test_pose, self.test_k = poses[VIEWS:], k[VIEWS:]
        self.scene = self._scene(seen[0][:, :VIEWS], seen[1][:, :VIEWS], poses[:VIEWS], k[:VIEWS])

    def _scene(self, pictures: Tensor, masks: Tensor, poses: Tensor, k: Tensor) -> DynamicScene:
        n = len(pictures)
        shown = [list(range(VIEWS))] * n
        return DynamicScene(pictures, masks, poses.repeat(n, 1, 1, 1), k.repeat(n, 1, 1, 1), self.times[:n], shown)

    @staticmethod
    def _camera(azimuth: float) -> Tensor:
        eye = torch.tensor([3 * math.cos(azimuth), 3 * math.sin(azimuth), 1.5])
        forward = -eye / eye.norm()
        right = torch.linalg.cross(forward, torch.tensor([0.0, 0, 1]))
        right = right / right.norm()
        pose = torch.eye(4)
        pose[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
        pose[:3, 3] = -pose[:3, :3] @ eye
        return pose

    def first_frame(self) -> DynamicScene:
        """The training views of the first frame alone."""
        s = self.scene
        return self._scene(s.pictures[:1], s.masks[:1], s.poses[0], s.intrinsics[0])

    def trainer(self, config: Dynamic, scene: DynamicScene | None = None) -> DynamicTrainer:
        torch.manual_seed(1)
        grid = HexPlane(config.multires, config.resolution, config.time_resolution, time_range=config.time_range)
        field = DeformationField(grid, config.decoder_depth)
        return DynamicTrainer(scene or self.scene, self.points.clone(), self.colors, field, config, 3)

    @torch.no_grad()
    def test_psnr(self, trainer: DynamicTrainer) -> float:
        """Mean over all frames, dB, of the view that is kept from training."""
        values = []
        for t, truth in zip(self.times, self.test_truth, strict=True):
            deformed = trainer.gaussians.canonical()
            if trainer.phase == "fine":
                deformed = trainer.field(deformed, t)
            rgb = draw(deformed, self.test_pose, self.test_k, SIDE, SIDE, trainer.active_sh_degree).rgb[0].clamp(0, 1)
            values.append(-10 * math.log10(float((rgb - truth).square().mean())))
        return float(np.mean(values))


def _round(means: Tensor, colors: Tensor, scale: float, opacity: float) -> Deformed:
    n = len(means)
    harmonics = torch.zeros(n, 16, 3)
    harmonics[:, 0] = (colors - 0.5) / SH_C0
    log_scales = torch.full((n, 3), math.log(scale))
    logits = torch.full((n, 1), math.log(opacity / (1 - opacity)))
    return Deformed(means, log_scales, torch.tensor([1.0, 0, 0, 0]).repeat(n, 1), logits, harmonics)


@pytest.fixture(scope="module")
def swing() -> Swing:
    return Swing()


def run(trainer: DynamicTrainer, phase: Phase, iterations: int) -> None:
    while trainer.phase != phase or trainer.iteration < iterations:
        if trainer.phase == "coarse" and phase == "fine" and trainer.iteration == trainer.config.coarse_iterations:
            trainer.begin("fine")
            continue
        trainer.step()


def test_motion_is_learned(swing: Swing) -> None:
    """Views that training has not seen gain 5 dB over the static model of the first frame."""
    static = swing.trainer(SMALL, swing.first_frame())
    run(static, "coarse", 200)
    moving = swing.trainer(SMALL)
    run(moving, "fine", SMALL.fine_iterations)
    assert len(moving.gaussians) > 120
    found, baseline = swing.test_psnr(moving), swing.test_psnr(static)
    assert found >= baseline + 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_recorded_iterations_are_those_that_run_one_by_one(swing: Swing) -> None:
    """Over densifications and the start of the phases; planes have the 32 channels that the GPU's kernels take."""
    seen = swing.scene
    views = seen.pictures.cuda(), seen.masks.cuda(), seen.poses.cuda(), seen.intrinsics.cuda()
    scene = DynamicScene(*views, seen.times.cuda(), seen.shown)
    found = []
    for record in (True, False):
        torch.manual_seed(1)
        field = DeformationField(HexPlane(SMALL.multires, SMALL.resolution, SMALL.time_resolution, time_range="full"))
        config = SMALL.model_copy(update={"densify_from_iter": 20})
        trainer = DynamicTrainer(scene, swing.points.cuda(), swing.colors.cuda(), field, config, 3)
        trainer.graphs.capture = record
        run(trainer, "coarse", 40)
        early = trainer.figures.tolist()
        run(trainer, "fine", 160)
        assert bool(trainer.graphs._graphs) == record
        found.append((early, len(trainer.gaussians), trainer.figures.tolist()))
    (early, n, figures), (others_early, m, others) = found
    # Sums of atomic additions differ in their rounding, and training makes more of it.
    assert early == pytest.approx(others_early, rel=1e-2)
    assert n == pytest.approx(m, rel=0.1)
    assert figures == pytest.approx(others, rel=0.1)


# -- files --------------------------------------------------------------------------------------------------------
BRIEF = SMALL.model_copy(
    update={"coarse_iterations": 24, "fine_iterations": 24, "densify_from_iter": 5, "densification_interval": 10}
)


def save(trainer: DynamicTrainer, url: str) -> None:
    t = trainer
    state = (t.gaussians, t.field, t.optimizer, t.active_sh_degree, t.spatial_lr_scale)
    files.write_checkpoint(url, t.phase, t.iteration, *state)


def figures(trainer: DynamicTrainer) -> tuple[int, list[float]]:
    return len(trainer.gaussians), trainer.figures.tolist()


@pytest.mark.parametrize(("phase", "iteration"), [("coarse", 15), ("coarse", 24), ("fine", 15)])
def test_resumed_is_uninterrupted(swing: Swing, tmp_path: Path, phase: Phase, iteration: int) -> None:
    whole = swing.trainer(BRIEF)
    run(whole, phase, iteration)
    save(whole, str(tmp_path))
    again = swing.trainer(BRIEF)
    checkpoint, found_phase, found = files.read_checkpoint(str(tmp_path / f"chkpnt_{phase}_{iteration}.pth"))
    assert (found_phase, found) == (phase, iteration)
    again.restore(checkpoint, found_phase, found)
    for trainer in (whole, again):
        trainer.figures.fill_(math.nan)
        run(trainer, "fine", 24)
    (n, losses), (m, others) = figures(whole), figures(again)
    assert n == m > 120
    assert losses == pytest.approx(others, rel=1e-5)
    for name in PARAMETER_NAMES:
        assert torch.allclose(getattr(whole.gaussians, name), getattr(again.gaussians, name), atol=1e-5)


def check_files(url: str, swing: Swing) -> None:
    """Write all files of a model below a URL, and read them as others would: `torch.load(weights_only=True)`."""

    def load(name: str) -> Any:
        return torch.load(io.BytesIO(objects.read_bytes(urls.join(url, name))), weights_only=True)

    config = BRIEF
    trainer = swing.trainer(config)
    run(trainer, "coarse", 12)
    save(trainer, url)
    files.write_result(url, "coarse", 12, trainer.gaussians, trainer.field)
    trainer.begin("fine")
    run(trainer, "fine", 8)
    save(trainer, url)
    files.write_result(url, "fine", 8, trainer.gaussians, trainer.field)
    names = ["deformation.pth", "deformation_accum.pth", "deformation_table.pth", "point_cloud.ply"]
    folders = ["point_cloud/coarse_iteration_12", "point_cloud/iteration_8"]
    expected = ["chkpnt_coarse_12.pth", "chkpnt_fine_8.pth", *(f"{f}/{n}" for f in folders for n in names)]
    assert list(listing.list_files(url)) == expected
    assert files.checkpoints_in(url) == [("coarse", 12), ("fine", 8)]

    values, iteration = load("chkpnt_fine_8.pth")
    assert iteration == 8
    g, n = trainer.gaussians, len(trainer.gaussians)
    assert type(values) is tuple
    assert len(values) == 14
    assert values[0] == trainer.active_sh_degree
    order = {1: "xyz", 3: "deformation_table", 4: "f_dc", 5: "f_rest", 6: "scaling", 7: "rotation", 8: "opacity"}
    order |= {9: "max_radii2D", 10: "xyz_gradient_accum", 11: "denom"}
    for i, name in order.items():
        assert torch.equal(values[i], getattr(g, name)), name
    assert list(values[2]) == list(trainer.field.state_dict())
    names_of_groups = [group["name"] for group in values[12]["param_groups"]]
    assert names_of_groups == [*PARAMETER_NAMES, "deformation", "grid"]
    assert values[12]["state"][0]["exp_avg"].shape == (n, 3)
    assert values[13] == trainer.spatial_lr_scale

    state = load("point_cloud/iteration_8/deformation.pth")
    again = swing.trainer(config).field
    again.load_state_dict(state)
    here = trainer.gaussians.canonical()
    time = torch.tensor(0.4)
    for ours, theirs in zip(trainer.field(here, time), again(here, time), strict=True):
        assert torch.equal(ours, theirs)
    assert load("point_cloud/iteration_8/deformation_table.pth").tolist() == [True] * n
    assert load("point_cloud/iteration_8/deformation_accum.pth").shape == (n, 3)
    read = files.read_result(url, "fine", 8, again)
    assert set(read) == set(PARAMETER_NAMES)
    for name, value in read.items():
        assert torch.equal(value, getattr(g, name)), name


def test_files(swing: Swing, tmp_path: Path) -> None:
    check_files(str(tmp_path), swing)


def test_files_on_s3(swing: Swing, s3_here: Any) -> None:
    check_files(f"s3://{s3_here.bucket()}/project/model", swing)


def test_settings_are_a_namespace(tmp_path: Path) -> None:
    names = ["a.mp4", "b.mp4"]
    raw: dict[str, Any] = {"data": {"directory": "/r", "videos": names, "masks": names, "calibration": "c.h5"}}
    raw |= {"center_rotation": {"ell": 1}, "crop": {"ell": 1}, "dynamic": {"multires": [1, 2]}}
    files.write_settings(str(tmp_path), Experiment.model_validate(raw))
    call = ast.parse((tmp_path / "cfg_args").read_text(), mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    assert call.func.id == "Namespace"
    found = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert found["multires"] == [1, 2]
    assert found["kplanes_config"]["resolution"] == [64, 64, 64, 25]
    assert (found["sh_degree"], found["white_background"], found["defor_depth"]) == (3, True, 1)


def test_ply_has_the_attributes_of_3dgs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    g = GaussianSet.from_points(torch.rand(7, 3), torch.rand(7, 3))
    g.f_rest.data.normal_()
    data = files.to_ply(g.values())
    header = data.partition(b"end_header\n")[0].decode().splitlines()
    attributes = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3))]
    attributes += [*(f"f_rest_{i}" for i in range(45)), "opacity", *(f"scale_{i}" for i in range(3))]
    attributes += [f"rot_{i}" for i in range(4)]
    assert header == ["ply", "format binary_little_endian 1.0", "element vertex 7"] + [
        f"property float {name}" for name in attributes
    ]
    columns = ply.decode(data)
    assert list(columns) == attributes
    # 15 harmonics of red, then of green, then of blue.
    assert columns["f_rest_16"] == pytest.approx(g.f_rest[:, 1, 1].tolist())
    path = tmp_path / "points.ply"
    path.write_bytes(data)
    points, colors = files.read_points(str(path))
    assert torch.equal(points, g.xyz)
    assert torch.allclose(colors, g.f_dc[:, 0] * SH_C0 + 0.5, atol=1e-6)


def test_points_of_other_programs(tmp_path: Path) -> None:
    head = "ply\nformat binary_little_endian 1.0\ncomment made by hand\nelement vertex 2\nproperty double x\n"
    head += "property double y\nproperty double z\nproperty uchar red\nproperty uchar green\nproperty uchar blue\n"
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    rows = np.array([(1, 2, 3, 255, 0, 51), (4, 5, 6, 0, 255, 0)], "<f8,<f8,<f8,u1,u1,u1")
    path = tmp_path / "points.ply"
    path.write_bytes(head.encode() + rows.tobytes() + b"whatever")
    points, colors = files.read_points(str(path))
    assert points.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert torch.allclose(colors[0], torch.tensor([1, 0, 0.2]))


class Foreign:
    """What a file of a stranger may hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize("kind", ["foreign", "cut off", "text", "another tuple", "missing", "misnamed"])
def test_damaged_checkpoints(kind: str, swing: Swing, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("model.pth" if kind == "misnamed" else "chkpnt_fine_3.pth")
    if kind == "foreign":
        torch.save((Foreign(), 3), path)
    elif kind == "another tuple":
        torch.save(((1, 2), 3), path)
    elif kind == "text":
        path.write_bytes(b"hello")
    elif kind == "cut off":
        save(swing.trainer(BRIEF), str(tmp_path))
        data = (tmp_path / "chkpnt_coarse_0.pth").read_bytes()
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"\.pth: ") as error:
        files.read_checkpoint(str(path))
    assert len(str(error.value).splitlines()) == 1
    assert "executed" not in capsys.readouterr().out
