"""The int8 weight gradient: how accurate it is, when it is taken, and what it costs where it is not asked for."""

import pytest
import torch

import torch_switchback as ts
from test_signal_to_noise import generator
from testing import signal_to_noise
from torch_switchback import SwitchBackConfig
from torch_switchback.ops import _library

INT8 = SwitchBackConfig(grad_weight="int8")
IN, OUT = 384, 256


def tokens_of_size(sigma, tokens=8192):
    """Output gradients whose tokens differ in size: log-normal with this sigma."""
    grad = torch.randn(tokens, OUT, generator=generator(1, "cpu"))
    return grad * (sigma * torch.randn(tokens, 1, generator=generator(2, "cpu"))).exp()


def activations(outlier_channels, tokens=8192):
    x = torch.randn(tokens, IN, generator=generator(3, "cpu"))
    x[:, :outlier_channels] *= 50
    return x


def grad_weight_of(x, grad, config):
    weight = torch.zeros(grad.shape[1], x.shape[1], device=x.device, requires_grad=True)
    (grad_weight,) = torch.autograd.grad(ts.switchback_linear(x, weight, config=config), weight, grad)
    return grad_weight


def float8(x):
    """Quantized and back: e4m3 with one absmax for the tensor."""
    scale = x.float().abs().max() / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale


@pytest.mark.parametrize(
    ("tokens", "sigma", "outlier_channels"),
    [(2048, 0, 0), (2048, 1, 0), (2048, 1, 2), (2048, 2, 0), (2048, 2, 2), (8192, 2, 0)],
)
def test_signal_to_noise(tokens, sigma, outlier_channels, device):
    x = activations(outlier_channels, tokens).to(device).bfloat16()
    grad = tokens_of_size(sigma, tokens).to(device).bfloat16()
    reference = grad.double().t() @ x.double()
    of_float8 = signal_to_noise(float8(grad.cpu()).t() @ float8(x.cpu()), reference.cpu())
    for rotate_tokens in (64, 128):
        config = SwitchBackConfig(grad_weight="int8", rotate_tokens=rotate_tokens)
        assert signal_to_noise(grad_weight_of(x, grad, config), reference) > max(33, of_float8)


def test_the_rotation_is_what_makes_it_accurate(device):
    x, grad = activations(0).to(device).bfloat16(), tokens_of_size(2).to(device).bfloat16()
    reference = grad.double().t() @ x.double()
    plain = grad_weight_of(x, grad, SwitchBackConfig(grad_weight="int8", rotate_tokens=None))
    assert signal_to_noise(plain, reference) < 28


def test_of_the_same_operands_it_is_the_exact_matmul(device):
    x, grad = torch.randn(150, 24, device=device), torch.randn(150, 40, device=device)
    (x_int8, x_absmax), (grad_int8, grad_absmax) = (
        ts.ops.quantize_columnwise_and_transpose(operand, rotate_tokens=64) for operand in (x, grad)
    )
    expected = ts.ops.int8_matmul_rowwise_dequantize(
        grad_int8, x_int8.t(), grad_absmax, x_absmax, out_dtype=torch.float32
    )
    assert torch.equal(grad_weight_of(x, grad, INT8), expected)


def test_a_million_tokens_do_not_overflow(device):
    """127² a token: int32 would wrap at 133,145 of them."""
    tokens = 2**20
    config = SwitchBackConfig(grad_weight="int8", rotate_tokens=None)
    ones = torch.ones(1, 1, device=device)
    grad_weight = grad_weight_of(ones.expand(tokens, 2), ones.expand(tokens, 3), config)
    torch.testing.assert_close(grad_weight, torch.full((3, 2), float(tokens), device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_it_has_the_weights_dtype_in_one_rounding(grad_dtype, device):
    x, grad = torch.randn(64, 24, device=device).bfloat16(), torch.randn(64, 40, device=device).bfloat16()
    grads = []
    for dtype in (grad_dtype, torch.float32):
        weight = torch.zeros(40, 24, device=device, dtype=dtype, requires_grad=True)
        grads += torch.autograd.grad(ts.switchback_linear(x, weight, config=INT8), weight, grad)
    assert grads[0].dtype == grad_dtype
    assert torch.equal(grads[0], grads[1].to(grad_dtype))


# When it is taken


@pytest.fixture
def calls(monkeypatch):
    """The rotating quantizers' calls, by name."""
    made = []
    for name in ("quantize_rowwise_and_rotated_columnwise", "quantize_rotated_columnwise_and_transpose"):
        for ops in (_library.direct, _library.dispatched):
            op = getattr(ops, name)
            monkeypatch.setattr(ops, name, lambda *args, op=op, name=name: made.append(name) or op(*args))
    return made


@pytest.fixture
def layer(device):
    layer = ts.SwitchBackLinear(64, 48, device=device)
    layer.config = INT8
    return layer


def test_both_operands_share_their_read_with_the_row_wise_int8_values(layer, calls, device):
    layer(torch.randn(5, 64, device=device, requires_grad=True)).sum().backward()
    assert calls == ["quantize_rowwise_and_rotated_columnwise"] * 2


def test_without_an_input_gradient_only_the_rotated_int8_values_of_g_are_made(layer, calls, device):
    layer(torch.randn(5, 64, device=device)).sum().backward()
    assert calls == ["quantize_rowwise_and_rotated_columnwise", "quantize_rotated_columnwise_and_transpose"]


def test_nothing_is_rotated_where_there_is_no_weight_gradient(layer, calls, device):
    x = torch.randn(5, 64, device=device, requires_grad=True)
    expected = layer(x)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    layer.prepare_for_eval()
    layer(x).sum().backward()
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad_weight": "fp8"}, "grad_weight must be one of 'high_precision', 'int8', got 'fp8'"),
        ({"rotate_tokens": 48}, "rotate_tokens must be one of None, 16, 32, 64, 128, got 48"),
        ({"rotate_tokens": 0}, "rotate_tokens must be one of None, 16, 32, 64, 128, got 0"),
    ],
)
def test_config_refuses_what_there_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        SwitchBackConfig(**arguments)


def test_mem_efficient_changes_nothing_more(device):
    x, grad = torch.randn(70, 64, device=device), torch.randn(70, 48, device=device)
    both = SwitchBackConfig(grad_weight="int8", mem_efficient=True)
    assert torch.equal(grad_weight_of(x, grad, both), grad_weight_of(x, grad, INT8))
