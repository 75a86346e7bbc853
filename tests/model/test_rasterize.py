"""The rasterisers against gsplat's PyTorch pipeline, against the literal reference, and against hand-worked values."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from zoosplat.errors import UserError
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.rasterize import Rendering, rasterize, torch_compositing
from zoosplat_model.rasterize.types import Cameras

Mode = Literal["3d", "2d"]
Backend = Literal["torch", "reference"]
Scene = dict[str, Any]
GAUSSIANS = ("means", "quats", "scales", "opacities", "colors")
BACKENDS: tuple[Backend, ...] = ("torch", "reference")
both_modes = pytest.mark.parametrize("mode", ["3d", "2d"])
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def random_scene(
    seed: int,
    n: int,
    width: int,
    height: int,
    *,
    views: int = 2,
    size: float = 0.12,
    dtype: torch.dtype = torch.float64,
) -> Scene:
    """A cloud around the origin, and cameras on a circle around it at distance 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    world_to_camera = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    for view in range(views):
        cos, sin = math.cos(0.3 + 2 * math.pi * view / views), math.sin(0.3 + 2 * math.pi * view / views)
        world_to_camera[view, :3] = torch.tensor(
            [[cos, 0, sin, 0.05], [0, 1, 0, -0.1], [-sin, 0, cos, 2]], dtype=torch.float64
        )
    focal = 0.9 * max(width, height)
    intrinsics = torch.tensor(
        [[focal, 0, width / 2 - 1.3], [0, 1.1 * focal, height / 2 + 0.7], [0, 0, 1]], dtype=torch.float64
    )
    scene = {
        "means": 0.5 * normal(n, 3),
        "quats": 3 * normal(n, 4),
        "scales": size * torch.exp(0.6 * normal(n, 3)),
        "opacities": torch.sigmoid(1.5 * normal(n)),
        "colors": torch.sigmoid(normal(n, 3)),
        "world_to_camera": world_to_camera,
        "intrinsics": intrinsics.repeat(views, 1, 1),
        "background": torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64),
    }
    return {**{k: v.to(dtype) for k, v in scene.items()}, "width": width, "height": height}


def one_gaussian(**changes: Any) -> Scene:
    """A round Gaussian of 2 pixels in front of one camera (f = 100 px), at the centre of calibration pixel (10, 8)."""
    scene = {
        "means": [[0.0, 0.0, 1.0]],
        "quats": [[1.0, 0.0, 0.0, 0.0]],
        "scales": [[0.02, 0.02, 0.02]],
        "opacities": [0.6],
        "colors": [[1.0, 0.5, 0.25]],
        "world_to_camera": torch.eye(4)[None].tolist(),
        "intrinsics": [[[100.0, 0.0, 10.0], [0.0, 100.0, 8.0], [0.0, 0.0, 1.0]]],
        **changes,
    }
    tensors = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in scene.items() if k not in ("width", "height")}
    return {**tensors, "width": scene.get("width", 21), "height": scene.get("height", 17)}


def pinned(scene: Scene) -> Scene:
    """The same scene with fresh leaves that record gradients."""
    return {k: v.detach().clone().requires_grad_() if k in GAUSSIANS else v for k, v in scene.items()}


def backward(*terms: Tensor) -> None:
    torch.autograd.backward(torch.stack(terms).sum())


def gradients(scene: Scene, render: Callable[..., Rendering], seed: int = 0) -> tuple[Rendering, dict[str, Tensor]]:
    """Render, and the gradient of a random weighting of all its numbers."""
    leaves = pinned(scene)
    out = render(**leaves)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    backward(*((o * w).sum() for o, w in zip(out, weights, strict=True)))
    return out, {k: leaves[k].grad for k in GAUSSIANS}


def assert_same(
    scene: Scene, a: Callable[..., Rendering], b: Callable[..., Rendering], tolerance: float = 1e-9
) -> None:
    (out_a, grad_a), (out_b, grad_b) = gradients(scene, a), gradients(scene, b)
    assert out_b.alpha.max() > 0.3, "the scene shows nothing"
    for x, y in zip(out_a, out_b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    for name in GAUSSIANS:
        torch.testing.assert_close(
            grad_a[name], grad_b[name], rtol=tolerance, atol=tolerance * float(grad_b[name].abs().max())
        )


def with_backend(backend: str, mode: Mode) -> Callable[..., Rendering]:
    return lambda **scene: rasterize(**scene, mode=mode, backend=backend)  # type: ignore[arg-type]


def gsplat_pytorch(mode: Mode) -> Callable[..., Rendering]:
    pytest.importorskip("gsplat")
    name = "zoosplat_tests_gsplat_reference"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("gsplat_reference.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module

    def render(*, intrinsics: Tensor, background: Tensor, **scene: Any) -> Rendering:
        intrinsics = intrinsics.clone()
        intrinsics[:, :2, 2] += 0.5
        default = torch.get_default_dtype()
        torch.set_default_dtype(intrinsics.dtype)  # gsplat allocates its images in the default dtype
        try:
            gaussians = Gaussians(*(scene[key] for key in GAUSSIANS))
            cameras = Cameras(scene["world_to_camera"], intrinsics, scene["width"], scene["height"])
            rgb, alpha = sys.modules[name].render(gaussians, cameras, mode=mode)
        finally:
            torch.set_default_dtype(default)
        return Rendering(rgb + (1 - alpha)[..., None] * background, alpha)

    return render


SCENES = [
    # seed, Gaussians, width, height, size: images that are and are not multiples of a tile, tiles of 4, 8 and 16 pixels
    pytest.param(0, 40, 32, 48, 0.12, id="32x48"),
    pytest.param(1, 40, 37, 29, 0.12, id="37x29"),
    pytest.param(2, 60, 50, 21, 0.02, id="small"),
    pytest.param(3, 25, 35, 51, 0.4, id="large"),
    pytest.param(4, 3, 5, 3, 0.2, id="5x3"),
]


@both_modes
@pytest.mark.parametrize(("seed", "n", "width", "height", "size"), SCENES)
def test_agrees_with_reference(seed: int, n: int, width: int, height: int, size: float, mode: Mode) -> None:
    scene = random_scene(seed, n, width, height, size=size)
    assert_same(scene, with_backend("torch", mode), with_backend("reference", mode))


@both_modes
@pytest.mark.parametrize(("seed", "n", "width", "height", "size"), SCENES)
def test_agrees_with_gsplat_pytorch(seed: int, n: int, width: int, height: int, size: float, mode: Mode) -> None:
    scene = random_scene(seed, n, width, height, size=size)
    assert_same(scene, with_backend("torch", mode), gsplat_pytorch(mode))


@both_modes
def test_reference_agrees_with_gsplat_pytorch(mode: Mode) -> None:
    assert_same(random_scene(5, 40, 37, 29), with_backend("reference", mode), gsplat_pytorch(mode))


def test_numbers_are_those_of_the_installed_gsplat() -> None:
    pytest.importorskip("gsplat")
    version = tuple(int(part) for part in importlib.metadata.version("gsplat").split(".")[:2])
    assert (0.999 if version < (1, 6) else 0.99) == torch_compositing.ALPHA_MAX


@both_modes
def test_deep_tiles_and_blocks(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transmittance, and what lies behind, carry over from block to block in both directions."""
    monkeypatch.setattr(torch_compositing, "BLOCK_DEPTH", 5)
    monkeypatch.setattr(torch_compositing, "BLOCK_ELEMENTS", 700)
    scene = random_scene(6, 60, 27, 22, size=0.3)
    scene["opacities"] = scene["opacities"] * 0.5
    assert_same(scene, with_backend("torch", mode), with_backend("reference", mode))


@both_modes
def test_early_stop(mode: Mode) -> None:
    """Opaque crowds close pixels after a few splats; those behind get nothing."""
    scene = random_scene(7, 60, 33, 26, size=0.4)
    scene["opacities"] = 0.9 + 0.1 * scene["opacities"]
    assert_same(scene, with_backend("torch", mode), with_backend("reference", mode))


@both_backends
@both_modes
def test_splat_that_closes_a_pixel_is_left_out(mode: Mode, backend: Backend) -> None:
    """Four of alpha 0.9 would take T to 1e-4 (within rounding below): the fourth is not drawn, nor is any behind."""
    count = 6
    scene = one_gaussian(
        means=[[0.0, 0.0, 1.0 + 0.001 * i] for i in range(count)],
        quats=[[1.0, 0, 0, 0]] * count,
        scales=[[0.02, 0.02, 0.02]] * count,
        opacities=[0.9001] * 4 + [0.05] * 2,
        colors=torch.eye(count),
    )
    leaves = pinned(scene)
    out = rasterize(**leaves, mode=mode, backend=backend)
    a = 0.9001
    expected = torch.tensor([a, a * (1 - a), a * (1 - a) ** 2, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(out.rgb[0, 8, 10], expected, rtol=1e-12, atol=1e-15)
    backward(out.rgb[0, 8, 10].sum())
    assert leaves["opacities"].grad[3:].abs().max() == 0
    assert leaves["opacities"].grad[:3].abs().min() > 0


@both_backends
def test_closed_form_value_3d(backend: Backend) -> None:
    """2 px of scale and the low pass of 0.3 px^2 make a variance of 4.3 px^2 around pixel (10, 8)."""
    scene = one_gaussian(background=[0.2, 0.0, 0.0])
    out = rasterize(**scene, backend=backend)
    for dx, dy in ((0, 0), (1, 0), (-3, 2), (4, -4)):
        alpha = 0.6 * math.exp(-0.5 * (dx * dx + dy * dy) / 4.3)
        assert out.alpha[0, 8 + dy, 10 + dx].item() == pytest.approx(alpha, rel=1e-12)
        assert out.rgb[0, 8 + dy, 10 + dx].tolist() == pytest.approx(
            [alpha + (1 - alpha) * 0.2, 0.5 * alpha, 0.25 * alpha], rel=1e-12
        )


@both_backends
def test_closed_form_value_2d(backend: Backend) -> None:
    """A surfel that faces the camera has no low pass added; one far smaller than a pixel becomes exp(-r^2)."""
    for scale, exponent in ((0.02, 0.5 / 4), (0.0001, 1.0)):
        out = rasterize(**one_gaussian(scales=[[scale, scale, 5.0]]), mode="2d", backend=backend)
        for dx, dy in ((1, 0), (0, -1), (1, 1), (-2, 0)):
            alpha = 0.6 * math.exp(-exponent * (dx * dx + dy * dy))
            assert out.alpha[0, 8 + dy, 10 + dx].item() == pytest.approx(alpha, rel=1e-6)


@both_backends
@both_modes
def test_calibration_pixel_centre(mode: Mode, backend: Backend) -> None:
    """The principal ray passes through the centre of pixel (cx, cy): the image is symmetric about that pixel."""
    alpha = rasterize(**one_gaussian(), mode=mode, backend=backend).alpha[0]
    assert alpha.argmax() == 8 * 21 + 10
    square = alpha[:, 2:19]
    for flipped in (square.flip(0), square.flip(1), square.T):
        torch.testing.assert_close(flipped, square, rtol=0, atol=1e-12)


@both_backends
@both_modes
def test_faint_contributions_are_skipped(mode: Mode, backend: Backend) -> None:
    alpha = rasterize(**one_gaussian(), mode=mode, backend=backend).alpha
    assert alpha[alpha > 0].min() >= 1 / 255 - 1e-15
    variance = 4.3 if mode == "3d" else 4.0
    reach = math.sqrt(2 * variance * math.log(0.6 * 255))  # 6.6 px (3D), 6.3 px (2D), where 0.6 falls to 1/255
    row = alpha[0, 8, 10:]
    assert (row > 0).nonzero().max().item() == math.floor(reach)
    for opacity in (1.001 / 255, 0.999 / 255):
        alpha = rasterize(**one_gaussian(opacities=[opacity]), mode=mode, backend=backend).alpha
        assert alpha.max().item() == pytest.approx(opacity if opacity > 1 / 255 else 0)


@both_backends
@both_modes
def test_alpha_cap(mode: Mode, backend: Backend) -> None:
    """Opacity 1 draws 0.999 at the centre, where neither geometry nor opacity has a gradient; beside it they have."""
    for (y, x), capped in (((8, 10), True), ((8, 11), False)):
        leaves = pinned(one_gaussian(opacities=[1.0], means=[[0.00001, 0.00002, 1.0]]))
        out = rasterize(**leaves, mode=mode, backend=backend)
        backward(out.alpha[0, y, x])
        assert (out.alpha[0, y, x].item() == pytest.approx(0.999, rel=1e-12)) == capped
        for name in ("means", "scales", "opacities"):
            assert (leaves[name].grad.abs().max().item() == 0) == capped, name


@both_backends
@both_modes
def test_culled_and_empty(mode: Mode, backend: Backend) -> None:
    """Behind the camera, nearer than 0.01, beside the image: background, and zero gradients that are finite."""
    leaves = pinned(
        one_gaussian(
            means=[[0.0, 0, -1], [0, 0, 0], [0, 0, 0.009], [50, 0, 1]],
            quats=[[1.0, 0, 0, 0]] * 4,
            scales=[[0.02, 0.02, 0.02]] * 4,
            opacities=[0.6] * 4,
            colors=[[1.0, 1, 1]] * 4,
            background=[0.1, 0.2, 0.3],
        )
    )
    out = rasterize(**leaves, mode=mode, backend=backend)
    assert out.alpha.abs().max() == 0
    assert torch.equal(out.rgb, leaves["background"].expand_as(out.rgb))
    backward(out.rgb.sum(), out.alpha.sum())
    for name in GAUSSIANS:
        grad = leaves[name].grad
        assert grad is None or torch.equal(grad, torch.zeros_like(grad)), name
        assert grad is not None or backend == "reference"


@both_modes
def test_culled_among_visible(mode: Mode) -> None:
    scene = random_scene(8, 40, 30, 30)
    scene["means"][::3, 2] -= 3.0
    scene["means"][1] = -(scene["world_to_camera"][0, :3, :3].T @ scene["world_to_camera"][0, :3, 3])  # at the eye
    assert_same(scene, with_backend("torch", mode), with_backend("reference", mode))


@both_backends
@both_modes
def test_depth_ties_are_drawn_in_order(mode: Mode, backend: Backend) -> None:
    scene = one_gaussian(
        means=[[0.0, 0.0, 1.0]] * 2,
        quats=[[1.0, 0, 0, 0]] * 2,
        scales=[[0.02, 0.02, 0.02]] * 2,
        opacities=[0.5, 0.5],
        colors=torch.eye(2),
    )
    out = rasterize(**scene, mode=mode, backend=backend)
    assert out.rgb[0, 8, 10].tolist() == pytest.approx([0.5, 0.25])


def test_boxes_cut_the_low_pass_of_surfels() -> None:
    """A tiny surfel one pixel left of column 16 has a box of one pixel: column 16, 1 px off, is in the next tile."""
    columns = {}
    for cx in (14.0, 15.0):
        scene = one_gaussian(scales=[[0.0001] * 3], width=32, intrinsics=[[[100, 0, cx], [0, 100, 8], [0, 0, 1]]])
        for backend in BACKENDS:
            columns[backend, cx] = rasterize(**scene, mode="2d", backend=backend).alpha[0, 8]
    for backend in BACKENDS:
        assert columns[backend, 14.0][15:17].tolist() == pytest.approx([0.6 * math.exp(-1), 0], rel=1e-6)
        assert columns[backend, 15.0][16:19].tolist() == pytest.approx(
            [0.6 * math.exp(-1), 0.6 * math.exp(-4), 0], rel=1e-6
        )


@both_modes
def test_needles_and_edges(mode: Mode) -> None:
    """Extreme aspect ratios and surfels seen edge-on: finite in float32, and the reference's numbers in float64."""
    scene = random_scene(9, 30, 40, 40)
    scene["scales"] = scene["scales"] * torch.tensor([10.0, 0.001, 0.1])
    scene["quats"][:5] = torch.tensor([math.sqrt(0.5), 0.0, math.sqrt(0.5), 0.0])
    assert_same(scene, with_backend("torch", mode), with_backend("reference", mode), tolerance=1e-7)
    single: Scene = {k: v.float() if isinstance(v, Tensor) else v for k, v in scene.items()}
    out, grads = gradients(single, with_backend("torch", mode))
    for tensor in (*out, *grads.values()):
        assert tensor.isfinite().all()


@both_modes
def test_float32(mode: Mode) -> None:
    """Rounding may flip a threshold (1/255) here and there: 99.9 % of pixels within 1e-4 of float64."""
    scene = random_scene(10, 2000, 96, 80, size=0.03)
    exact = rasterize(**scene, mode=mode, backend="torch")
    single: Scene = {k: v.float() if isinstance(v, Tensor) else v for k, v in scene.items()}
    out = rasterize(**single, mode=mode, backend="torch")
    assert out.rgb.dtype == torch.float32
    assert exact.alpha.mean() > 0.3
    assert ((out.rgb - exact.rgb).abs().amax(-1) < 1e-4).double().mean() >= 0.999
    assert ((out.alpha - exact.alpha).abs() < 1e-4).double().mean() >= 0.999


@both_modes
def test_gradcheck(mode: Mode) -> None:
    scene = random_scene(11, 4, 9, 7, views=1, size=0.3)
    scene["opacities"] = 0.2 + 0.6 * scene["opacities"]

    def image(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        *gaussians, background = leaves
        changed: Scene = {**scene, **dict(zip(GAUSSIANS, gaussians, strict=True)), "background": background}
        out = rasterize(**changed, mode=mode, backend="torch")
        return out.rgb, out.alpha

    leaves = [scene[name].clone().requires_grad_() for name in (*GAUSSIANS, "background")]
    # Step far below the distance to the next threshold.
    assert torch.autograd.gradcheck(image, leaves, eps=1e-7, atol=1e-5, rtol=1e-4)


@both_modes
def test_no_gradient_and_autocast(mode: Mode) -> None:
    scene = random_scene(12, 50, 30, 30, dtype=torch.float32)
    black: Scene = {**scene, "background": None}
    with torch.no_grad():
        plain = rasterize(**scene, mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rasterize(**scene, mode=mode)
    assert not plain.rgb.requires_grad
    assert torch.equal(plain.rgb, cast.rgb)
    assert torch.equal(plain.alpha, rasterize(**black, mode=mode).alpha)


def test_bad_input() -> None:
    scene = one_gaussian()
    with pytest.raises(UserError, match="gsplat needs CUDA"):
        rasterize(**scene, backend="gsplat")
    with pytest.raises(ValueError, match="opacities is"):
        rasterize(**{**scene, "opacities": scene["opacities"][:, None]})
    with pytest.raises(ValueError, match="convert it"):
        rasterize(**{**scene, "colors": scene["colors"].float()})


@pytest.mark.gpu
@both_modes
def test_gsplat_agrees_on_gpu(mode: Mode) -> None:
    """Fast exponentials on the GPU, and thresholds that flip: nearly all pixels within 1e-4, gradients within 0.2 %."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    pytest.importorskip("gsplat")
    scene = random_scene(13, 500, 75, 60, size=0.08, dtype=torch.float32)
    on_gpu: Scene = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in scene.items()}
    out, grads = gradients(scene, with_backend("torch", mode))
    out_gpu, grads_gpu = gradients(on_gpu, with_backend("auto", mode))
    for x, y in zip(out, out_gpu, strict=True):
        assert ((x - y.cpu()).abs() < 1e-4).float().mean() >= 0.995
    for name in GAUSSIANS:
        error = (grads[name] - grads_gpu[name].cpu()).norm() / grads[name].norm()
        assert error < 0.002, f"{name}: {error:.2e}"
