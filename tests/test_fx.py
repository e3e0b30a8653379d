"""torch.fx.symbolic_trace: a layer's computation is one node, which computes what the layer does."""

import pickle

import pytest
import torch
from torch import nn

from testing import convert_all
from torch_switchback import SwitchBackConfig

CONFIGS = [
    SwitchBackConfig(),
    SwitchBackConfig("rowwise", grad_weight="int8"),
    SwitchBackConfig(cache_quantized_weight=True),
]


@pytest.mark.parametrize("prepared", [False, True], ids=["training", "prepared"])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_traced_model_computes_the_same(config, prepared, device):
    model = convert_all(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), config).to(device)
    if prepared:
        model[0].prepare_for_eval()
    traced = torch.fx.symbolic_trace(model)
    called = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count("linear") == 2
    x = torch.randn(2, 5, 8, device=device, requires_grad=True)
    wanted = [x, *model.parameters()]
    y = model(x)
    expected = y, *torch.autograd.grad(y.sum(), wanted)
    for program in (traced, pickle.loads(pickle.dumps(traced))):
        y = program(x)
        wanted = [x, *(program.get_parameter(name) for name, _ in model.named_parameters())]
        for actual, value in zip((y, *torch.autograd.grad(y.sum(), wanted)), expected, strict=True):
            assert torch.equal(actual, value)
