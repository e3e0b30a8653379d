"""torch.utils.flop_counter counts the matmuls of a SwitchBack layer as those of nn.Linear."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torch_switchback as ts
from torch_switchback import SwitchBackConfig


def flops(layer, x):
    """Count those of the forward alone, and with the backward."""
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        forward = counter.get_total_flops()
        y.sum().backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("grad_weight", ["high_precision", "int8"])
@pytest.mark.parametrize("scaling", ["global", "rowwise"])
def test_as_many_as_nn_linear(scaling, grad_weight, trains, device):
    for _ in range(2):
        ts.ops.register_flop_formulas()
    linear = nn.Linear(32, 48, bias=False, device=device).requires_grad_(trains)
    x = torch.randn(2, 64, 32, device=device, requires_grad=True)
    expected = flops(linear, x)
    layer = ts.convert_to_switchback(linear, config=SwitchBackConfig(scaling, grad_weight=grad_weight))
    assert flops(layer, x) == expected == (2 * 128 * 32 * 48, (6 if trains else 4) * 128 * 32 * 48)


@pytest.mark.parametrize("config", ["switchback", "rowwise", "rowwise_rotated_features"])
def test_as_many_once_prepared(config, device):
    layer = ts.SwitchBackLinear(64, 128, device=device, config=config)
    layer.prepare_for_eval()
    x = torch.randn(2, 64, 64, device=device, requires_grad=True)
    ts.ops.register_flop_formulas()
    assert flops(layer.eval(), x) == (2 * 128 * 64 * 128, 4 * 128 * 64 * 128)
