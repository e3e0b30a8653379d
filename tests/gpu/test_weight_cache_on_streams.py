"""cache_quantized_weight, with work on several streams."""

import pytest
import torch

import torch_switchback as ts


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_stream_does_not_take_codes_that_another_has_yet_to_compute(is_prepared):
    layer, plain = (ts.SwitchBackLinear(1024, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    layer.config = ts.SwitchBackConfig(cache_quantized_weight=True)
    if is_prepared:
        layer.prepare_for_eval()
        plain.prepare_for_eval()
    x = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)

    def step(layer):
        y = layer(x)
        return y, torch.autograd.grad(y, x, grad)[0]

    expected = step(plain)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(500_000_000)  # some tenths of a second
        step(layer)
    actual = step(layer)
    assert not other.query()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
