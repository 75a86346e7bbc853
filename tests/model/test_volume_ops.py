"""Normalisation and halving on a GPU against PyTorch's own functions in float64."""

import pytest
import torch

from zoosplat_model import triton_support
from zoosplat_model.network.volume_ops import instance_norm_leaky_relu, instance_norm_leaky_relu_reference, max_pool2

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("channels", [1, 8, 32, 128])
@pytest.mark.parametrize("size", [(6, 5, 4), (48, 40, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_plain_functions(channels: int, size: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(channels)
    # A mean far larger than the deviations, as sums of squares would not bear.
    x = (torch.randn(2, channels, *size, device="cuda") + 30).to(dtype).requires_grad_()
    gain = (torch.rand(channels, device="cuda") + 0.5).requires_grad_()
    shift = torch.randn(channels, device="cuda").requires_grad_()
    exact = [v.detach().double().requires_grad_() for v in (x, gain, shift)]
    variance, mean = torch.var_mean(exact[0], (2, 3, 4), keepdim=True, correction=0)
    y = (exact[0] - mean) / (variance + 1e-5).sqrt() * exact[1].view(1, -1, 1, 1, 1) + exact[2].view(1, -1, 1, 1, 1)
    # Not where the leaky ReLU bends: there rounding decides which slope a gradient goes through.
    weight = torch.randn_like(x) * (y.detach().abs() > 1e-4)
    y = torch.where(y > 0, y, 0.01 * y)
    torch.autograd.backward((y * weight).sum())
    torch.autograd.backward((instance_norm_leaky_relu(x, gain, shift) * weight).sum())
    found = [instance_norm_leaky_relu(x, gain, shift), *(v.grad for v in (x, gain, shift))]
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    for value, truth in zip(found, [y, *(v.grad for v in exact)], strict=True):
        assert value is not None
        assert truth is not None
        assert (value.double() - truth).norm() <= tolerance * truth.norm() + 1e-5


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halving_agrees_with_pooling(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 8, 4, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(2, 16, 3, 4, 2, device="cuda").to(dtype)
    found = max_pool2(x)
    torch.autograd.backward((found * weight).sum())
    assert x.grad is not None
    plain = x.detach().cpu().float().requires_grad_()
    truth = torch.nn.functional.max_pool3d(plain, 2)
    torch.autograd.backward((truth * weight.cpu().float()).sum())
    assert torch.equal(found.cpu().float(), truth)
    assert plain.grad is not None
    # bfloat16 has ties, which either may give to any of the equal voxels.
    assert torch.equal(x.grad.cpu().float() if dtype == torch.float32 else plain.grad, plain.grad)


def test_plain_functions_normalise_each_volume() -> None:
    x = torch.randn(2, 3, 4, 5, 6) * 7 + 2
    y = instance_norm_leaky_relu_reference(x, torch.ones(3), torch.full((3,), 100.0))
    assert torch.allclose(y.mean((2, 3, 4)), torch.full((2, 3), 100.0), atol=1e-4)
    assert torch.allclose(y.var((2, 3, 4), correction=0), torch.ones(2, 3), atol=1e-3)


def test_kernels_that_do_not_work_are_a_warning_once() -> None:
    pytest.importorskip("triton")
    tried = []

    def attempt(device: torch.device) -> None:
        tried.append(device)
        if device.index == 1:
            raise RuntimeError("no gcc")

    with pytest.warns(UserWarning, match="no gcc.*install a C compiler"):
        assert not triton_support.runs_on(attempt, 1)
    assert not triton_support.runs_on(attempt, 1)
    assert triton_support.runs_on(attempt, 0)
    assert tried == [torch.device("cuda", 1), torch.device("cuda", 0)]
