"""Below its min_tokens a layer computes as nn.Linear does, with the same bits."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_switchback as ts
from testing import gradients
from torch_switchback import RECIPES, SwitchBackConfig, SwitchBackLinear, switchback_linear

LEAST = 8


def layer_with(device="cpu", dtype=torch.float32, **fields):
    config = SwitchBackConfig(**{"min_tokens": LEAST} | fields)
    return SwitchBackLinear(32, 48, device=device, dtype=dtype, config=config)


def as_linear(layer):
    other = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
    other.load_state_dict(layer.state_dict())
    return other


@pytest.fixture
def int8_matmuls(monkeypatch):
    """Count the calls of the autograd Function."""
    calls = []
    apply = ts.functional.SwitchBackFunction.apply
    monkeypatch.setattr(ts.functional.SwitchBackFunction, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_below_it_a_layer_has_the_bits_of_nn_linear(dtype, recipe, training, device, int8_matmuls):
    layer = SwitchBackLinear(32, 48, device=device, dtype=dtype, config=RECIPES[recipe])
    layer.config = SwitchBackConfig(**vars(layer.config) | {"min_tokens": LEAST})
    layer.train(training)
    x, grad = torch.randn(LEAST - 1, 32, device=device, dtype=dtype), None
    grad = torch.randn(LEAST - 1, 48, device=device, dtype=dtype)
    for ours, theirs in zip(gradients(layer, x, grad), gradients(as_linear(layer), x, grad), strict=True):
        assert torch.equal(ours, theirs)
    assert int8_matmuls == []


@pytest.mark.parametrize("shape", [(LEAST, 32), (2, LEAST // 2, 32), (LEAST + 5, 32)])
def test_from_it_on_a_layer_is_int8(shape, device, int8_matmuls):
    layer, x = layer_with(device), torch.randn(shape, device=device)
    always = SwitchBackLinear(32, 48, device=device)
    always.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), always(x)) and len(int8_matmuls) == 2


@pytest.mark.parametrize("min_tokens", [None, 0])
def test_a_layer_without_it_is_always_int8(min_tokens, device, int8_matmuls):
    layer = layer_with(device, min_tokens=min_tokens)
    layer(torch.randn(1, 32, device=device))
    switchback_linear(torch.randn(1, 32, device=device), layer.weight, config=layer.config)
    layer(torch.randn(0, 32, device=device))
    assert len(int8_matmuls) == 3


def test_another_dtype_is_cast_to_the_inputs(device):
    layer = layer_with(device)
    x = torch.randn(3, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16()))
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


def test_under_autocast_it_is_autocasts_nn_linear(device):
    layer, x = layer_with(device), torch.randn(3, 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(layer(x), as_linear(layer)(x)) and layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("x", [torch.zeros(3, 32, dtype=torch.float64), torch.zeros(3, 32, dtype=torch.int32), [1.0]])
def test_what_int8_refuses_is_refused(x):
    with pytest.raises(TypeError, match="switchback_linear: x"):
        layer_with()(x)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x", torch.tensor(1.0)),
        ("x", torch.zeros(3, 31)),
        ("x", torch.zeros(3, 32).to_sparse()),
        ("x", torch.nested.nested_tensor([torch.zeros(1, 32), torch.zeros(2, 32)], layout=torch.jagged)),
        ("weight", torch.zeros(48, 32, dtype=torch.float64)),
        ("weight", torch.zeros(48, 32, dtype=torch.int8)),
        ("weight", torch.zeros(32)),
        ("bias", torch.zeros(48, dtype=torch.float64)),
        ("bias", torch.zeros(1)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}-{value.layout}-{value.dim()}-d",
)
def test_what_int8_refuses_is_refused_by_the_arguments_name(argument, value):
    fitting = {"x": torch.zeros(3, 32), "weight": torch.zeros(48, 32), "bias": torch.zeros(48)}
    with pytest.raises((TypeError, ValueError), match=f"switchback_linear: {argument} must"):
        switchback_linear(**fitting | {argument: value}, config=SwitchBackConfig(min_tokens=LEAST))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_another_dtype_than_the_weights_is_cast(x_dtype, device):
    layer, x = layer_with(device, dtype=torch.bfloat16), torch.randn(3, 32, device=device, dtype=x_dtype)
    layer.bias = nn.Parameter(layer.bias.detach().float())
    assert torch.equal(layer(x), F.linear(x, layer.weight.to(x_dtype), layer.bias.to(x_dtype)))


def test_another_dtype_is_cast_on_the_meta_device():
    y = layer_with("meta")(torch.empty(3, 32, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((3, 48), torch.bfloat16)


def test_a_prepared_layer_ignores_it(device, int8_matmuls):
    layer = layer_with(device)
    layer.prepare_for_eval()
    layer.eval()
    layer(torch.randn(3, 32, device=device))
    assert len(int8_matmuls) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_takes_the_forwards_path(reentrant, device, int8_matmuls):
    layer, x = layer_with(device), torch.randn(3, 32, device=device, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    (expected,) = torch.autograd.grad(as_linear(layer)(x).sum(), x)
    assert torch.equal(x.grad, expected) and int8_matmuls == []


def test_a_memory_efficient_layer_keeps_the_input_itself(device):
    layer, kept = layer_with(device, mem_efficient=True), []
    x = torch.randn(3, 32, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.dtype) or tensor, lambda t: t):
        layer(x)
    assert torch.float32 in kept and torch.int8 not in kept


@pytest.mark.parametrize("tokens", [LEAST - 1, LEAST])
def test_compiled_with_static_shapes_it_chooses_while_tracing(tokens, device):
    layer, x = layer_with(device), torch.randn(tokens, 32, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(x), layer(x))


def test_compiled_with_a_symbolic_token_count_it_is_int8_without_a_guard(device):
    layer, always = layer_with(device), layer_with(device, min_tokens=0)
    always.load_state_dict(layer.state_dict())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (3, LEAST - 1, LEAST, 5 * LEAST):
        x = torch.randn(tokens, 32, device=device)
        assert torch.equal(compiled(x), always(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_exports_are_int8(strict):
    if strict and not ts.functional.DYNAMO_KNOWS_EXPORTS:
        pytest.skip("before torch 2.13 Dynamo cannot tell an export from torch.compile")
    layer = layer_with()
    program = torch.export.export(nn.Sequential(layer), (torch.randn(3, 32),), strict=strict)
    assert "torch_switchback.linear" in program.graph_module.code


def test_traced_programs_are_int8():
    layer, x = layer_with(), torch.randn(LEAST, 32)
    traced = torch.jit.trace(layer, torch.randn(LEAST - 1, 32))
    assert torch.equal(traced(x), layer(x))


def test_it_is_saved_with_the_layer():
    layer = layer_with()
    assert pickle.loads(pickle.dumps(layer)).config.min_tokens == LEAST
    assert "from 8 tokens" in repr(layer)


@pytest.mark.parametrize("value", [-1, 2.0, True, "8"])
def test_config_refuses_what_is_no_count(value):
    with pytest.raises(ValueError, match="min_tokens"):
        SwitchBackConfig(min_tokens=value)
