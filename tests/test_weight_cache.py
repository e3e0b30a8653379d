"""cache_quantized_weight: the weight is quantized once until it changes, and never used after it has."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import torch_switchback as ts
from testing import assert_same, count_weight_quantizations, patch_scheme
from torch_switchback.ops import quantize_global
from torch_switchback.weight_cache import WeightCache


@pytest.fixture(params=["global", "rowwise"])
def layers(request, device, monkeypatch):
    """A caching layer, its twin that does not, and the list of quantizations that the caching one makes."""
    calls = count_weight_quantizations(
        monkeypatch, ts.SwitchBackConfig(request.param), lambda weight: weight.data_ptr() == caching.weight.data_ptr()
    )
    linear = nn.Linear(64, 48, device=device)
    config = ts.SwitchBackConfig(request.param, cache_quantized_weight=True)
    caching = ts.convert_to_switchback(copy.deepcopy(linear), config=config)
    plain = ts.convert_to_switchback(copy.deepcopy(linear), config=ts.SwitchBackConfig(request.param))
    return caching, plain, calls


def step(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, layer.weight), torch.ones_like(y))


def check_same(caching, plain, x):
    for actual, expected in zip(step(caching, x), step(plain, x), strict=True):
        assert_same(actual, expected)


def test_microbatches_quantize_once(layers, device):
    caching, plain, calls = layers
    for _ in range(4):
        check_same(caching, plain, torch.randn(5, 64, device=device))
    assert calls == ["quantize_weight_with_transpose"]


def test_an_evaluation_quantizes_no_transpose(layers, device):
    caching, plain, calls = layers
    x = torch.randn(5, 64, device=device)
    for _ in range(2):
        assert_same(caching(x), plain(x))
    assert calls == ["quantize_weight"]
    for _ in range(2):
        check_same(caching, plain, x)
    assert_same(caching(x), plain(x))
    assert calls == ["quantize_weight", "quantize_weight_with_transpose"]


def test_memory_efficient_steps_use_it_too(layers, device):
    caching, plain, calls = layers
    for layer in (caching, plain):
        layer.config = dataclasses.replace(layer.config, mem_efficient=True)
    for _ in range(2):
        check_same(caching, plain, torch.randn(5, 64, device=device))
    assert calls == ["quantize_weight_with_transpose"]


@pytest.mark.parametrize("fails", ["quantize_weight", "quantize_weight_with_transpose"])
def test_a_failure_leaves_nothing_stale(layers, fails, device, monkeypatch):
    caching, plain, _ = layers
    x = torch.randn(5, 64, device=device)
    check_same(caching, plain, x)
    for layer in (caching, plain):
        with_edit(layer)

    def out_of_memory(weight):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch_scheme(patch, caching.config, **{fails: lambda function: out_of_memory})
        with pytest.raises(MemoryError):
            caching(x.requires_grad_(fails == "quantize_weight_with_transpose"))
    check_same(caching, plain, x)


def with_optimizer(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 64, device=layer.weight.device)).sum().backward()
    optimizer.step()


class SignThroughData(torch.optim.Optimizer):
    """Writes where no version counter sees it, as ZeroRedundancyOptimizer does to the parameters that others own."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad.sign())


def with_optimizer_through_data(layer):
    optimizer = SignThroughData(layer.parameters())
    layer(torch.ones(1, 64, device=layer.weight.device)).sum().backward()
    optimizer.step()


def with_data_and_a_new_version(layer):
    layer.weight.data.mul_(2)
    torch.autograd.graph.increment_version(layer.weight)


def with_load_state_dict(layer):
    layer.load_state_dict({"weight": torch.full((48, 64), 0.5), "bias": torch.zeros(48)})


def with_edit(layer):
    with torch.no_grad():
        layer.weight[3, 4] = 7.0


def with_new_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def with_cast(layer):
    layer.bfloat16()


def with_cast_and_back(layer):
    layer.bfloat16().float()


@pytest.mark.parametrize(
    "change",
    [
        with_optimizer,
        with_optimizer_through_data,
        with_data_and_a_new_version,
        with_load_state_dict,
        with_edit,
        with_new_parameter,
        with_cast,
        with_cast_and_back,
    ],
)
def test_a_change_is_seen(layers, change, device):
    caching, plain, _ = layers
    x = torch.randn(5, 64, device=device)
    check_same(caching, plain, x)
    for layer in (caching, plain):
        change(layer)
    check_same(caching, plain, x)


def with_data(layer):
    layer.weight.data.mul_(2)


@pytest.mark.parametrize("change", [with_data, with_edit, with_new_parameter])
@pytest.mark.parametrize("cached_before", [False, True])
def test_a_frozen_weight_is_never_cached(layers, change, cached_before, device):
    """Nothing tells of a broadcast, or of what writes to a teacher's weights through ``.data``."""
    caching, plain, _ = layers
    x = torch.randn(5, 64, device=device)
    if cached_before:
        check_same(caching, plain, x)
    for layer in (caching, plain):
        layer.weight.requires_grad_(False)
    for _ in range(2):
        assert_same(caching(x), plain(x))
        for layer in (caching, plain):
            change(layer)
            layer.weight.requires_grad_(False)
    assert_same(caching(x), plain(x))


def test_a_change_of_config_is_seen(layers, device):
    caching, _, _ = layers
    x = torch.randn(5, 64, device=device)
    for scaling in ("global", "rowwise", "global"):
        caching.config = ts.SwitchBackConfig(scaling, cache_quantized_weight=True)
        expected = ts.switchback_linear(x, caching.weight, caching.bias, ts.SwitchBackConfig(scaling))
        assert_same(caching(x), expected)


def test_an_edit_between_forward_and_backward_still_raises(layers, device):
    caching, _, _ = layers
    x = torch.randn(5, 64, device=device, requires_grad=True)
    y = caching(x)
    with_edit(caching)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_evaluation_in_inference_mode_between_two_steps(layers, device):
    caching, plain, _ = layers
    x = torch.randn(5, 64, device=device)
    with torch.inference_mode():
        assert_same(caching(x), plain(x))
    check_same(caching, plain, x)


def test_a_parametrized_weight_is_never_cached(layers, device):
    """Its values change without a sign, and its memory is used again by the next."""
    caching, plain, _ = layers
    for layer in (caching, plain):
        nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(5, 64, device=device)
    for _ in range(8):
        assert_same(caching(x), plain(x))
        for layer in (caching, plain):
            with torch.no_grad():
                layer.parametrizations.weight.original0.mul_(1.5)


def test_what_another_thread_quantizes_meanwhile_is_its_own(device, monkeypatch):
    """The threads of nn.DataParallel quantize at once, and their replicas share what a layer has."""
    one, other = (nn.Parameter(torch.randn(48, 64, device=device)) for _ in range(2))
    config, cache = ts.SwitchBackConfig(), WeightCache()

    def quantize_disturbed(weight):
        if weight is one:
            cache.get(other, config, with_transpose=False)
        return quantize_global(weight)

    patch_scheme(monkeypatch, config, quantize_weight=lambda function: quantize_disturbed)
    for weight in (one, other, one):
        quantized, _ = cache.get(weight, config, with_transpose=False)
        for actual, expected in zip(quantized, quantize_global(weight), strict=True):
            assert_same(actual, expected)


def test_weights_that_functional_call_passes(layers, device):
    caching, plain, _ = layers
    x = torch.randn(5, 64, device=device)
    for seed in range(8):
        torch.manual_seed(seed)
        state = {"weight": nn.Parameter(torch.randn(48, 64, device=device)), "bias": torch.zeros(48, device=device)}
        assert_same(torch.func.functional_call(caching, state, x), torch.func.functional_call(plain, state, x))


def test_it_is_no_state(layers, device):
    caching, _, _ = layers
    x = torch.randn(5, 64, device=device)
    expected = caching(x)
    assert list(caching.state_dict()) == ["weight", "bias"]
    assert "_weight_cache" in vars(caching)
    assert "_weight_cache" not in vars(copy.deepcopy(caching))
    assert torch.equal(copy.deepcopy(caching)(x), expected)
    ts.revert_switchback(caching)
    assert "_weight_cache" not in vars(caching)


@pytest.mark.parametrize("scaling", ["global", "rowwise"])
def test_the_compiler_sees_none(scaling, device):
    config = ts.SwitchBackConfig(scaling, cache_quantized_weight=True)
    layer = ts.convert_to_switchback(nn.Linear(64, 48, device=device), config=config)
    x = torch.randn(5, 64, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert "_weight_cache" not in vars(layer)
    assert torch.equal(compiled, layer(x))


def test_preparing_frees_it(layers, device):
    caching, _, _ = layers
    caching(torch.randn(5, 64, device=device))
    caching.prepare_for_eval()
    assert "_weight_cache" not in vars(caching)


def test_a_weight_that_was_frozen_meanwhile_is_quantized_anew():
    layer = ts.SwitchBackLinear(32, 32, config=ts.SwitchBackConfig(cache_quantized_weight=True))
    x = torch.randn(4, 32)
    layer(x)
    layer.requires_grad_(False)
    layer.weight.data.mul_(2)
    layer(x)
    layer.requires_grad_(True)
    assert torch.equal(layer(x), ts.switchback_linear(x, layer.weight, layer.bias))


def test_nothing_fake_is_kept():
    layer = ts.SwitchBackLinear(64, 48, config=ts.SwitchBackConfig(cache_quantized_weight=True))
    x = torch.randn(5, 64)
    expected = layer(x)
    vars(layer).pop("_weight_cache")
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(5, 64))
    assert torch.equal(layer(x), expected)
