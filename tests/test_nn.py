"""SwitchBackLinear as an nn.Linear: signature, variants, repr, state_dict, copies and meta initialization."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import torch_switchback as ts
from testing import (
    make_layer,
    strategies,
    unrotated,
)
from torch_switchback import SwitchBackConfig, SwitchBackLinear


def test_signature_is_the_one_it_replaces():
    parameters = list(inspect.signature(SwitchBackLinear).parameters.values())
    assert [(p.name, p.default) for p in parameters] == [
        ("in_features", inspect.Parameter.empty),
        ("out_features", inspect.Parameter.empty),
        ("bias", True),
        ("device", None),
        ("dtype", None),
        ("vector_wise_quantization", False),
        ("mem_efficient", False),
        ("config", None),
    ]
    assert parameters[-1].kind == inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (SwitchBackLinear, SwitchBackConfig()),
        (ts.nn.SwitchBackLinearGlobal, SwitchBackConfig()),
        (ts.nn.SwitchBackLinearGlobalMemEfficient, SwitchBackConfig(mem_efficient=True)),
        (ts.nn.SwitchBackLinearVectorwise, SwitchBackConfig("rowwise")),
    ],
)
def test_variants_take_three_positionals_as_open_clip_calls_them(make, config):
    layer = make(6, 4, False)
    assert isinstance(layer, nn.Linear)
    assert layer.config == config
    assert layer.bias is None
    assert make(6, 4, True).bias.shape == (4,)


def test_starts_from_the_weights_of_nn_linear():
    torch.manual_seed(3)
    ours = SwitchBackLinear(6, 4)
    torch.manual_seed(3)
    assert torch.equal(ours.weight, nn.Linear(6, 4).weight)


def test_a_copy_of_a_compiled_layer_has_code_and_weights_of_its_own():
    layer = make_layer(SwitchBackConfig())
    x = torch.randn(4, 64)
    layer.compile(backend="eager")
    layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            copied.weight.zero_()
            copied.bias.fill_(3.0)
        assert torch.equal(copied(x), torch.full((4, 48), 3.0))


@strategies
def test_repr_says_the_strategy(config):
    assert f"in_features=64, out_features=48, bias=True, strategy={config.strategy}" in repr(make_layer(config))


def test_a_prepared_layers_repr_says_that_the_number_of_tokens_does_not_count():
    layer = make_layer(SwitchBackConfig("rowwise", cache_quantized_weight=True, min_tokens=100))
    assert "strategy=rowwise, cached, from 100 tokens" in repr(layer)
    layer.prepare_for_eval()
    assert repr(layer).endswith("strategy=rowwise, cached, prepared)")


def test_config_refuses_an_unknown_scaling():
    with pytest.raises(ValueError, match=r"weight_scaling must be one of 'global', 'rowwise', got 'columnwise'$"):
        SwitchBackConfig("columnwise")
    with pytest.raises(ValueError, match=r"got 'switchback'; RECIPES\['switchback'\] is a whole SwitchBackConfig"):
        SwitchBackConfig("switchback")


# State


def test_state_dict_is_nn_linears_both_ways():
    linear, ours = nn.Linear(6, 4), SwitchBackLinear(6, 4)
    ours.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(ours.weight, linear.weight)
    linear.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(linear.state_dict())


@unrotated
def test_copy_and_pickle(config):
    layer = make_layer(config)
    x = torch.randn(3, 64)
    for prepare in (False, True):
        if prepare:
            layer.prepare_for_eval()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.config == config
            assert torch.equal(other(x), layer(x))


@strategies
def test_meta_initialization(config, device):
    layer = make_layer(config, device="meta")
    assert layer(torch.empty(2, 64, device="meta")).shape == (2, 48)
    layer = layer.to_empty(device=device)
    layer.reset_parameters()
    assert layer(torch.randn(2, 64, device=device)).isfinite().all()


# Quantization by others


class Quantized(torch.Tensor):
    """A weight like torchao's: a wrapper of another tensor, with an F.linear of its own and little else."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, requires_grad=False)

    def __init__(self, values):
        self.values_ = values

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].values_, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].values_)
        raise NotImplementedError(f"unimplemented: {function}")


@strategies
def test_a_weight_that_another_library_quantized_is_refused_by_name(config):
    model = nn.Sequential(make_layer(config))
    model[0].weight = nn.Parameter(Quantized(model[0].weight.detach()), requires_grad=False)
    x = torch.randn(2, 64)
    with pytest.raises(NotImplementedError, match=r"weight of class Quantized: revert_switchback\(model\)"):
        model(x)
    ts.revert_switchback(model)
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight.values_, model[0].bias))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_torch_ao_quantization_says_what_it_leaves():
    model = nn.Sequential(SwitchBackLinear(8, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"leaves SwitchBackLinear as it is: revert_switchback\(model\) first"):
        quantized = torch.ao.quantization.quantize_dynamic(model)
    assert [type(layer).__module__.startswith("torch.ao") for layer in quantized] == [False, True]
