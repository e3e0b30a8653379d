"""cache_quantized_weight of prepared layers: the int8 values are transposed once, for compiled code as well."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import torch_switchback as ts
from testing import assert_same, patch_scheme
from torch_switchback.prepared import keep_transposes

CONFIGS = {
    "global": {"weight_scaling": "global"},
    "rowwise": {"weight_scaling": "rowwise"},
    "rotated": {"weight_scaling": "rowwise", "rotate_features": 16},
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def prepared(config, device, *, cached=True, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(70, 48, device=device)
    layer = ts.convert_to_switchback(linear, config=ts.SwitchBackConfig(**config, cache_quantized_weight=cached))
    layer.prepare_for_eval()
    return layer


def kept(config, device, seed=0):
    layer = prepared(config, device, seed=seed)
    keep_transposes(layer)
    return layer


def step(call, device):
    """Return a layer's output, and its input's gradient."""
    torch.manual_seed(1)
    x = torch.randn(5, 70, device=device, requires_grad=True)
    y = call(x)
    return y.detach(), *torch.autograd.grad(y, x, torch.randn_like(y))


def assert_same_steps(one, other, device):
    for actual, expected in zip(step(one, device), step(other, device), strict=True):
        assert_same(actual, expected)


def compiled(layer):
    """Return a layer for torch.compile to run, and a list of which nodes of its backward transpose."""
    transposes = []

    def record(graph, _):
        for node in graph.graph.nodes:
            name = str(node.target)
            transposes.append("requantize" in name or ("prepared_grad_input" in name and node.args[3] is None))
        return graph

    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=record)
    return torch.compile(layer, backend=backend, fullgraph=True), transposes


@pytest.mark.parametrize("cached", [False, True])
@configs
def test_an_eager_backward_transposes_once(config, cached, device, monkeypatch):
    calls = []

    def counted(transpose):
        def transpose_prepared(weight_int8, absmax):
            calls.append(weight_int8.data_ptr())
            return transpose(weight_int8, absmax)

        return transpose_prepared

    layer, twin = prepared(config, device, cached=cached), prepared(config, device, cached=False)
    patch_scheme(monkeypatch, layer.config, transpose_prepared=counted)
    with torch.no_grad():
        layer(torch.randn(5, 70, device=device))
    assert calls == [] and layer._transposed is None
    steps = [step(layer, device) for _ in range(3)]
    own = layer.weight_int8.data_ptr()
    in_its_operation = layer.config.rotate_features is None  # prepared_grad_input transposes as well
    assert calls == [own] * (1 if cached else 0 if in_its_operation else 3)
    for each in steps:
        for actual, expected in zip(each, step(twin, device), strict=True):
            assert_same(actual, expected)


@configs
def test_compiled_code_uses_what_is_kept(config, device):
    layer, plain = kept(config, device), prepared(config, device)
    (call, transposes), (other, of_other) = compiled(layer), compiled(plain)
    assert_same_steps(call, other, device)
    assert transposes and not any(transposes)
    assert any(of_other)
    assert plain._transposed is None  # compiled code keeps nothing itself
    assert_same_steps(call, layer, device)


@pytest.mark.parametrize("assign", [False, True])
@configs
def test_a_state_dict_that_is_loaded_is_seen(config, assign, device):
    layer, other = kept(config, device), prepared(config, device, seed=2)
    call, transposes = compiled(layer)
    step(call, device)
    step(layer, device)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert_same_steps(call, other, device)
    assert_same_steps(layer, other, device)
    assert transposes and not any(transposes)


@configs
def test_eager_code_sees_what_is_written(config, device):
    layer, other = kept(config, device), prepared(config, device)
    step(layer, device)
    for each in (layer, other):
        each.weight_absmax.mul_(2)
        each.weight_int8[3] = 7
    assert_same_steps(layer, other, device)


@pytest.mark.parametrize("is_compiled", [False, True])
@configs
def test_other_tensors_in_their_place_are_seen(config, is_compiled, device):
    layer, others = kept(config, device), [prepared(config, device, seed=seed) for seed in range(2, 6)]
    call = compiled(layer)[0] if is_compiled else layer
    for other in others:
        step(call, device)
        for name in layer._buffers:  # as Accelerate loads; the next ones often get the same memory
            layer._buffers[name] = getattr(other, name).clone()
        layer.bias = other.bias
        assert_same_steps(call, other, device)


@pytest.mark.parametrize("is_compiled", [False, True])
@configs
def test_tensors_of_functional_call_are_seen(config, is_compiled, device):
    layer = kept(config, device)

    def call_with(x, state):
        return torch.func.functional_call(layer, state, x)

    call = torch.compile(call_with, backend="aot_eager") if is_compiled else call_with
    for seed in (2, 0, 3):
        other = prepared(config, device, seed=seed)
        state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        assert_same_steps(lambda x, state=state: call(x, state), other, device)
    assert_same_steps(layer, prepared(config, device), device)


@configs
def test_compiled_code_uses_none_of_another_device(config):
    layer, plain = prepared(config, "cpu").to("meta"), prepared(config, "cpu")
    keep_transposes(layer)
    for name in layer._buffers:
        layer._buffers[name] = getattr(plain, name)
    layer.bias = plain.bias
    call, transposes = compiled(layer)
    assert_same_steps(call, plain, "cpu")
    assert any(transposes)


def test_another_config_drops_it(device):
    layer = kept(CONFIGS["rowwise"], device)
    layer.config = ts.SwitchBackConfig("rowwise")
    assert layer._transposed is None


def test_a_refused_transform_leaves_none(device):
    layer, plain = prepared(CONFIGS["rowwise"], device), prepared(CONFIGS["rowwise"], device)
    with pytest.raises(NotImplementedError):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(5, 70, device=device))
    assert layer._transposed is None
    assert_same_steps(layer, plain, device)


@pytest.mark.parametrize("move", [lambda layer: layer.half(), lambda layer: layer.to("meta").to_empty(device="cpu")])
@configs
def test_it_moves_along(config, move, device):
    layer, state = kept(config, device), prepared(config, device).state_dict()
    move(layer).float().to(device).load_state_dict(state)
    call, transposes = compiled(layer)
    assert_same_steps(call, prepared(config, device), device)
    assert transposes and not any(transposes)


@configs
def test_it_is_no_state(config, device):
    layer, plain = kept(config, device), prepared(config, device, cached=False)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert copied._transposed is None
        assert_same_steps(copied, plain, device)
    assert layer._transposed is not None
    layer.prepare_for_training()
    assert layer._transposed is None
    assert layer(torch.randn(5, 70, device=device)).requires_grad


@configs
def test_no_exported_program_has_it(config, device):
    x = torch.randn(5, 70, device=device)
    programs = [torch.export.export(layer(config, device).eval(), (x,)) for layer in (kept, prepared)]
    assert len({frozenset(program.state_dict.keys() | program.constants.keys()) for program in programs}) == 1
    assert_same_steps(*(program.module() for program in programs), device)


@configs
def test_none_is_kept_of_inference_tensors(config, device):
    layer, other = kept(config, device), prepared(config, device, seed=2)
    with torch.inference_mode():
        state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    layer.load_state_dict({**state, "bias": other.bias}, assign=True)
    assert layer._transposed is None
    with torch.no_grad():
        assert_same(layer(torch.ones(5, 70, device=device)), other(torch.ones(5, 70, device=device)))


def test_nothing_fake_is_kept():
    layer, plain = prepared(CONFIGS["global"], "cpu"), prepared(CONFIGS["global"], "cpu")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(5, 70, requires_grad=True))
    assert layer._transposed is None
    assert_same_steps(layer, plain, "cpu")
