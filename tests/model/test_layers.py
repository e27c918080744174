"""Linear layers by oneDNN, against those of torch."""

import pytest
import torch
from torch import nn

from bertlite.core.runtime import Runtime
from bertlite.model.heads import prepare_for_training
from bertlite.model.layers import Linear, linear, onednn_linear

SHAPES = [((3, 5, 8), 12), ((7, 8), 1), ((1, 8), 300), ((2, 0, 8), 4)]


def compute(function, x, weight, bias):
    """Return the output and the gradients of its mean square."""
    tensors = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*tensors)
    return y, *torch.autograd.grad(y.square().sum(), tensors)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape, size", SHAPES)
def test_values_and_gradients_are_those_of_torch(shape, size, compiled):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in (shape, (size, shape[-1]), (size,)))
    function = torch.compile(onednn_linear, backend="aot_eager") if compiled else onednn_linear
    expected = compute(nn.functional.linear, *(tensor.double() for tensor in (x, weight, bias)))
    for ours, reference in zip(compute(function, x, weight, bias), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), reference, atol=1e-6 * max(1, size), rtol=1e-5)


def test_gradients_of_slices_views_and_frozen_weights():
    layer = Linear(8, 12)
    layer.linear = onednn_linear
    x = torch.randn(5, 2, 8).transpose(0, 1).requires_grad_()
    layer.forward_slice(x, slice(4, 8)).sum().backward()  # an expanded gradient
    weight = layer.weight.detach().clone().requires_grad_()
    y = x.detach().clone().requires_grad_()
    nn.functional.linear(y, weight[4:8]).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(x.grad, y.grad)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad[4:8], torch.full((4,), 20.0))


@pytest.mark.parametrize(
    "dtype, name, fast",
    [
        (torch.float32, "AMD EPYC", True),
        (torch.float32, "Intel(R) Xeon(R)", False),
        (torch.bfloat16, "AMD EPYC", False),
    ],
)
def test_fp32_on_amd_is_multiplied_by_onednn(dtype, name, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    runtime = Runtime(torch.device("cpu"), dtype, compile=False, rank=0, world_size=1)
    model = nn.Sequential(Linear(2, 2), nn.GELU())
    prepare_for_training(model, runtime)
    expected = fast and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    assert model[0].linear is (onednn_linear if expected else linear)
    assert ("matrix products" in runtime.environment()) == expected
