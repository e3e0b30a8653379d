"""torch.fx, torch.jit and torch.onnx: a layer is a leaf as nn.Linear is, or one operation, or it is refused by name."""

import io
import pickle

import pytest
import torch
from torch import nn

from testing import convert_all
from torch_switchback import SwitchBackConfig, SwitchBackLinear, prepare_for_eval

CONFIGS = [
    SwitchBackConfig(),
    SwitchBackConfig("rowwise", grad_weight="int8"),
    SwitchBackConfig(cache_quantized_weight=True),
    SwitchBackConfig("rowwise", rotate_features=16),
]


@pytest.mark.parametrize("prepared", [False, True], ids=["training", "prepared"])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_traced_model_computes_the_same(config, prepared, device):
    model = convert_all(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), config).to(device)
    if prepared:
        model[0].prepare_for_eval()
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2"]
    x = torch.randn(2, 5, 8, device=device, requires_grad=True)
    wanted = [x, *model.parameters()]
    y = model(x)
    expected = y, *torch.autograd.grad(y.sum(), wanted)
    for program in (traced, pickle.loads(pickle.dumps(traced))):
        y = program(x)
        wanted = [x, *(program.get_parameter(name) for name, _ in model.named_parameters())]
        for actual, value in zip((y, *torch.autograd.grad(y.sum(), wanted)), expected, strict=True):
            assert torch.equal(actual, value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("wrap", [nn.Sequential, lambda layer: layer], ids=["model", "layer"])
def test_torch_jit_script_is_refused_by_name(wrap):
    with pytest.raises(NotImplementedError, match=r"SwitchBackLinear.*revert_switchback"):
        torch.jit.script(wrap(convert_all(nn.Linear(8, 16))))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("prepared", [False, True], ids=["training", "prepared"])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_model_of_torch_jit_trace_is_saved_and_trains(config, prepared, device):
    model = convert_all(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), config).to(device)
    if prepared:
        model[0].prepare_for_eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.randn(2, 5, 8, device=device)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x = torch.randn(3, 8, device=device, requires_grad=True)
    results = []
    for program in (model, loaded):
        y = program(x)
        results.append((y, *torch.autograd.grad(y.sum(), [x, *program.parameters()])))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_frozen_model_of_torch_jit_trace_is_saved(config, grad, device):
    model = convert_all(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), config).to(device)
    model.requires_grad_(False).eval()
    prepare_for_eval(model)
    file, x = io.BytesIO(), torch.randn(2, 5, 8, device=device)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
    torch.jit.save(torch.jit.freeze(traced), file)
    file.seek(0)
    for program in (traced, torch.jit.load(file)):
        assert torch.equal(program(x), model(x))


@pytest.mark.filterwarnings("ignore:.*(torch.jit|TorchScript)")
@pytest.mark.parametrize("prepared", [False, True], ids=["training", "prepared"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_torch_onnx_export_is_refused_by_name(dynamo, prepared):
    if dynamo:
        pytest.importorskip("onnxscript")
    model = convert_all(nn.Sequential(nn.Linear(8, 16))).eval().requires_grad_(False)
    if prepared:
        prepare_for_eval(model)
    with pytest.raises(Exception, match=r"SwitchBackLinear.*revert_switchback"):
        torch.onnx.export(model, (torch.randn(2, 8),), io.BytesIO(), dynamo=dynamo)


class Shifted(SwitchBackLinear):
    def forward(self, x):
        return super().forward(x) + 1


def hooked():
    layer = SwitchBackLinear(8, 8)
    layer.register_forward_pre_hook(lambda module, args: args[0] * 2)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    "model",
    [hooked, lambda: nn.Sequential(Shifted(8, 8)), lambda: SwitchBackLinear(8, 8)],
    ids=["hooks", "subclass", "root"],
)
def test_what_surrounds_the_forward_runs_once(model):
    model, x = model(), torch.randn(2, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
