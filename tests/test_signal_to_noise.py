"""Measure how accurate the three matmuls are, in dB, at 2048³ with bf16 inputs, against float64."""

import functools

import pytest
import torch

import torch_switchback as ts
from testing import signal_to_noise
from torch_switchback import SwitchBackConfig

SIZE = 2048


def generator(seed, device):
    return torch.Generator(device).manual_seed(seed)


def gaussian(device):
    return torch.randn(SIZE, SIZE, generator=generator(1, device), device=device)


def layer_norm(device):
    """Normalized rows times a gain a channel, log-normal with sigma 0.4."""
    gain = (0.4 * torch.randn(SIZE, generator=generator(2, device), device=device)).exp()
    return torch.nn.functional.layer_norm(gaussian(device), (SIZE,)) * gain


def post_gelu(device):
    return torch.nn.functional.gelu(gaussian(device))


def log_normal_tokens(device):
    """Gradients whose tokens differ in size: log-normal with sigma 2."""
    return gaussian(device) * (2 * torch.randn(SIZE, 1, generator=generator(4, device), device=device)).exp()


def student_t(device):
    """With 3 degrees of freedom: tails so heavy that one value decides a row's absmax."""
    seeded = generator(6, device)
    squares = [torch.randn(SIZE, SIZE, generator=seeded, device=device).square_() for _ in range(3)]
    return gaussian(device) / (sum(squares) / 3).sqrt()


def outlier_channels(device):
    """Two of 2048 channels, 0.1 %, times 50."""
    x = gaussian(device)
    x[:, [7, 1234]] *= 50
    return x


# (what, input, gate with one absmax for the weight, gate with one per row, gate with rotated features as well): the
# simulated values minus 0.5 dB, or minus 3 where the noise hangs on a few outliers.
GATES = [
    ("output", gaussian, 36.9 - 0.5, 38.6 - 0.5, 38.6 - 0.5),
    ("output", layer_norm, 34.9 - 0.5, 35.9 - 0.5, 38.6 - 0.5),
    ("output", post_gelu, 35.5 - 0.5, 36.7 - 0.5, 38.6 - 0.5),
    ("grad_input", log_normal_tokens, 37.0 - 0.5, 38.7 - 0.5, 38.7 - 0.5),
    ("output", student_t, 28.7 - 3, 29.0 - 3, 38.4 - 3),
    ("output", outlier_channels, 22.0 - 3, 22.0 - 3, 36.9 - 3),
]


@functools.cache
def weight(device):
    return torch.randn(SIZE, SIZE, generator=generator(5, device), device=device).bfloat16()


def worst_rows(actual, reference):
    """The signal to noise that 99 % of the rows are above, in dB."""
    reference = reference.double()
    ratio = reference.norm(dim=1) / (actual.double() - reference).norm(dim=1)
    return (20 * torch.log10(ratio)).kthvalue(max(1, reference.shape[0] // 100)).values.item()


CONFIGS = {
    "global": SwitchBackConfig(),
    "rowwise": SwitchBackConfig("rowwise"),
    "rotated": SwitchBackConfig("rowwise", rotate_features=128),
}


@pytest.mark.parametrize(
    ("what", "data", *(f"gate_{scaling}" for scaling in CONFIGS)), GATES, ids=lambda v: getattr(v, "__name__", v)
)
def test_gates(what, data, gate_global, gate_rowwise, gate_rotated, device):
    x, w = data(device).bfloat16(), weight(device)
    reference = x.double() @ (w.double().t() if what == "output" else w.double())
    gates = {"global": gate_global, "rowwise": gate_rowwise, "rotated": gate_rotated}
    for scaling, config in CONFIGS.items():
        if what == "output":
            actual = ts.switchback_linear(x, w, config=config)
        else:
            inputs = torch.zeros_like(x).requires_grad_()
            (actual,) = torch.autograd.grad(ts.switchback_linear(inputs, w, config=config), inputs, x)
        assert signal_to_noise(actual, reference) >= gates[scaling], scaling
        # A ratio over the whole tensor can hide rows that are all noise.
        assert worst_rows(actual, reference) >= (gate_rotated if scaling == "rotated" else gate_global) - 5, scaling


@pytest.mark.parametrize("mem_efficient", [False, True], ids=["16 bit", "mem_efficient"])
def test_weight_gradient(mem_efficient, device):
    x, grad = layer_norm(device).bfloat16(), log_normal_tokens(device).bfloat16()
    w = weight(device).clone().requires_grad_()
    y = ts.switchback_linear(x, w, config=SwitchBackConfig(mem_efficient=mem_efficient))
    (actual,) = torch.autograd.grad(y, w, grad)
    reference = grad.double().t() @ x.double()
    if mem_efficient:  # X as int8 with one absmax per row, all else exact
        step = x.double().abs().amax(1, keepdim=True) / 127
        expected = grad.double().t() @ ((x.double() / step).round() * step)
    else:  # what PyTorch makes of the same 16-bit product
        expected = grad.t() @ x
    assert signal_to_noise(actual, reference) >= signal_to_noise(expected, reference) - 0.5


@pytest.mark.parametrize(("data", "simulated"), [(gaussian, 37.9), (outlier_channels, 37.1)])
def test_int8_weight_gradient(data, simulated, device):
    x, grad = data(device).bfloat16(), log_normal_tokens(device).bfloat16()
    w = weight(device).clone().requires_grad_()
    config = SwitchBackConfig(grad_weight="int8", rotate_tokens=128)
    (actual,) = torch.autograd.grad(ts.switchback_linear(x, w, config=config), w, grad)
    reference = grad.double().t() @ x.double()
    assert signal_to_noise(actual, reference) >= simulated - 3
    assert worst_rows(actual, reference) >= simulated - 3 - 5
