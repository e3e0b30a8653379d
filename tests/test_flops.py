"""torch.utils.flop_counter counts a SwitchBack layer's products as those of nn.Linear."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torch_switchback as ts
from torch_switchback import SwitchBackConfig


def flops(layer, x):
    """Of the forward alone, and with the backward."""
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        forward = counter.get_total_flops()
        y.sum().backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("grad_weight", ["high_precision", "int8_always"])
@pytest.mark.parametrize("scaling", ["global", "rowwise"])
def test_as_many_as_nn_linear(scaling, grad_weight, trains, device):
    linear = nn.Linear(32, 48, bias=False, device=device).requires_grad_(trains)
    x = torch.randn(2, 64, 32, device=device, requires_grad=True)
    expected = flops(linear, x)
    layer = ts.convert_to_switchback(linear, config=SwitchBackConfig(scaling, grad_weight=grad_weight))
    assert flops(layer, x) == expected == (2 * 128 * 32 * 48, (6 if trains else 4) * 128 * 32 * 48)


COUNT = """
model = torch_switchback.SwitchBackLinear(8, 16)
with FlopCounterMode(display=False) as counter:
    model(torch.randn(4, 8))
assert counter.get_total_flops() == 2 * 4 * 8 * 16, counter.get_total_flops()
"""
IMPORTS = ("import torch_switchback", "from torch.utils.flop_counter import FlopCounterMode")


@pytest.mark.parametrize("imports", [IMPORTS, IMPORTS[::-1]], ids=["ours first", "ours last"])
def test_whichever_is_imported_first(imports):
    subprocess.run([sys.executable, "-c", "\n".join(("import torch", *imports, COUNT))], check=True)
