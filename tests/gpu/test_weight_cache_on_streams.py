"""cache_quantized_weight, with work on several streams."""

import copy

import pytest
import torch

import torch_switchback as ts


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_stream_does_not_take_int8_values_that_another_has_yet_to_compute(is_prepared):
    layer, plain = (ts.SwitchBackLinear(1024, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    layer.config = ts.SwitchBackConfig(cache_quantized_weight=True)
    if is_prepared:
        layer.prepare_for_eval()
        plain.prepare_for_eval()
    x = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)

    def step(layer):
        x_here = x.detach().requires_grad_()  # of this stream: autograd makes a leaf's wait for its gradient
        y = layer(x_here)
        return y, torch.autograd.grad(y, x_here, grad)[0]

    step(copy.deepcopy(layer))  # compiles
    expected = step(plain)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(1_000_000_000)  # half a second
        step(layer)
    actual = step(layer)
    assert not other.query()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
