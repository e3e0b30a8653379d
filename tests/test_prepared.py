"""Layers prepared for evaluation, back in training, and the state_dicts of both."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_switchback as ts
from testing import assert_same, dtypes, gradients, make_layer, revert_copy, signal_to_noise, strategies, unrotated
from torch_switchback import SwitchBackLinear
from torch_switchback.functional import quantize_weight


@strategies
@dtypes
def test_prepare_for_eval_changes_no_output(config, dtype, device):
    layer = make_layer(config, device=device, dtype=dtype)
    x = torch.randn(5, 64, device=device, dtype=dtype)
    before = layer(x)
    layer.eval()
    layer.prepare_for_eval()
    assert layer.is_prepared
    assert not hasattr(layer, "weight")
    assert layer.weight_int8.dtype == torch.int8
    assert_same(layer(x), before)
    layer.prepare_for_eval()  # idempotent
    assert_same(layer(x), before)
    assert "prepared" in repr(layer)


@strategies
def test_prepared_layer_still_has_an_input_gradient(config, device):
    layer = make_layer(config, device=device)
    x, grad = torch.randn(5, 64, device=device), torch.randn(5, 48, device=device)
    _, exact, *_ = gradients(revert_copy(layer), x, grad)
    _, unprepared, _, bias = gradients(layer, x, grad)
    layer.prepare_for_eval()
    _, prepared, prepared_bias = gradients(layer, x, grad)
    assert torch.equal(bias, prepared_bias)
    assert signal_to_noise(prepared, exact) > 33
    if config.weight_scaling == "global":
        assert torch.equal(prepared, unprepared)


@unrotated
@dtypes
def test_preparing_is_reversible(config, dtype, device):
    layer = make_layer(config, device=device, dtype=dtype)
    layer.weight.requires_grad_(False)
    before = layer.weight.detach().clone()
    layer.prepare_for_eval()
    qdata = layer.weight_int8
    layer.train()
    assert layer.is_prepared, "train() is called by every trainer on frozen layers too: it must not undo anything"
    layer.prepare_for_training()
    layer.prepare_for_training()
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.dtype == dtype
    assert not layer.weight.requires_grad
    step = before.float().abs().max() / 127
    assert ((layer.weight - before).abs() <= step * (0.5 + 127 * torch.finfo(dtype).eps)).all()
    layer.prepare_for_eval()
    assert torch.equal(layer.weight_int8, qdata)


def with_another_weight(layer):
    layer.weight = nn.Parameter(torch.ones(48, 64))


def with_none(layer):
    layer.weight = None


def with_functional_call(layer):
    torch.func.functional_call(layer, {"weight": torch.ones(48, 64)}, torch.ones(2, 64))


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.weight.dtype,
        SwitchBackLinear.reset_parameters,
        with_another_weight,
        with_none,
        with_functional_call,
        lambda layer: layer.register_parameter("weight", nn.Parameter(torch.ones(48, 64))),
    ],
)
def test_a_prepared_layer_says_where_its_weight_is(use):
    layer = SwitchBackLinear(64, 48)
    layer.prepare_for_eval()
    x = torch.randn(5, 64)
    expected = layer(x)
    with pytest.raises(AttributeError, match=r"prepare_for_training\(\).*revert_switchback"):
        use(layer)
    assert "weight" not in dict(layer.named_parameters()) | vars(layer)
    assert layer.is_prepared
    assert torch.equal(layer(x), expected)


def test_a_prepared_layer_in_training_says_once_that_its_weight_does_not_train(recwarn):
    ts.nn._warn_that_it_does_not_train.cache_clear()
    layer, frozen = SwitchBackLinear(64, 48), SwitchBackLinear(64, 48)
    frozen.weight.requires_grad_(False)
    for each in (layer, frozen):
        each.prepare_for_eval()
    x = torch.randn(5, 64)
    frozen(x)
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert not recwarn
    for _ in range(2):
        layer(x)
    (said,) = recwarn
    assert "its weight does not train" in str(said.message)
    assert "prepare_for_training()" in str(said.message)


def test_a_prepared_weight_is_not_parametrized_or_pruned():
    layer = SwitchBackLinear(64, 48)
    layer.prepare_for_eval()
    for change in (nn.utils.parametrizations.spectral_norm, lambda layer: prune.identity(layer, "weight")):
        with pytest.raises((ValueError, AttributeError), match="weight"):
            change(layer)
    assert type(layer) is SwitchBackLinear
    layer.prepare_for_training()
    assert isinstance(layer.weight, nn.Parameter)


def test_looking_at_a_layer_does_not_compute_its_weight():
    layer = nn.utils.parametrizations.spectral_norm(SwitchBackLinear(8, 8))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    repr(layer)
    layer.to(torch.float64).float()
    layer.load_state_dict(layer.state_dict(), assign=True)
    assert not layer.is_prepared
    with pytest.raises(RuntimeError, match="weight is no parameter of this layer"):
        layer.prepare_for_eval()
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


@pytest.mark.parametrize("remove", [lambda layer: delattr(layer, "weight"), with_none], ids=["deleted", "None"])
def test_a_layer_without_a_weight_is_not_prepared(remove):
    layer = SwitchBackLinear(8, 8)
    remove(layer)
    assert not layer.is_prepared
    assert "prepared" not in repr(layer.to(torch.bfloat16))
    assert list(layer.state_dict()) == ["bias"]
    layer.prepare_for_training()
    with pytest.raises(RuntimeError, match="weight is no parameter of this layer"):
        layer.prepare_for_eval()
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    assert layer(torch.ones(2, 8)).shape == (2, 8)


@strategies
def test_prepared_state_dict_reloads_into_a_fresh_layer(config, device):
    layer = make_layer(config, device=device)
    layer.prepare_for_eval()
    x = torch.randn(5, 64, device=device)
    for prepare in (False, True):
        fresh = make_layer(config, device=device)
        if prepare:
            fresh.prepare_for_eval()
        fresh.load_state_dict(layer.state_dict(), strict=True)
        assert fresh.is_prepared
        assert torch.equal(fresh(x), layer(x))


@strategies
def test_training_state_dict_reloads_into_a_prepared_layer(config, device):
    layer, other = make_layer(config, device=device), make_layer(config, device=device)
    other.prepare_for_eval()
    with pytest.warns(UserWarning, match="load_state_dict: a float weight takes the place of a prepared layer's int8"):
        other.load_state_dict(layer.state_dict(), strict=True)
    assert not other.is_prepared
    assert torch.equal(other.weight, layer.weight)
    assert other.weight.requires_grad


def test_prepared_state_of_another_strategy_is_refused(device):
    layer = ts.nn.SwitchBackLinearVectorwise(64, 48, device=device)
    layer.prepare_for_eval()
    with pytest.raises(RuntimeError, match="size mismatch for weight_absmax"):
        SwitchBackLinear(64, 48, device=device).load_state_dict(layer.state_dict())


CODES, ABSMAX, BIAS = torch.zeros(48, 64, dtype=torch.int8), torch.ones(1), torch.ones(48)
HOSTILE_STATES = {
    "absmax of another strategy": {"weight_int8": CODES, "weight_absmax": torch.ones(48), "bias": BIAS},
    "short int8 values": {"weight_int8": CODES[:, :63], "weight_absmax": ABSMAX, "bias": BIAS},
    "float int8 values": {"weight_int8": CODES.float(), "weight_absmax": ABSMAX, "bias": BIAS},
    "half absmax": {"weight_int8": CODES, "weight_absmax": ABSMAX.half(), "bias": BIAS},
    "no absmax": {"weight_int8": CODES, "bias": BIAS},
    "int8 values and a weight": {
        "weight": torch.ones(48, 64),
        "weight_int8": CODES,
        "weight_absmax": ABSMAX,
        "bias": BIAS,
    },
    "int8 values and a short bias": {"weight_int8": CODES, "weight_absmax": ABSMAX, "bias": BIAS[:47]},
    "short weight": {"weight": torch.ones(47, 64), "bias": BIAS},
    "short bias": {"weight": torch.ones(48, 64), "bias": BIAS[:47]},
    "a list": {"weight": torch.ones(48, 64).tolist(), "bias": BIAS},
}


@pytest.mark.parametrize(
    ("state", "prepared"),
    [
        *((name, True) for name in HOSTILE_STATES),
        *((name, False) for name, state in HOSTILE_STATES.items() if "weight_int8" in state),
    ],
)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_int8_values_that_do_not_fit_leave_the_layer_as_it_was(state, prepared, assign, device):
    hostile = HOSTILE_STATES[state]
    layer = SwitchBackLinear(64, 48, device=device)
    if prepared:
        layer.prepare_for_eval()
    x = torch.randn(3, 64, device=device)
    before, keys = layer(x), list(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"mismatch for (weight|bias)"):
        layer.load_state_dict(hostile, assign=assign)
    assert list(layer.state_dict()) == keys
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("absmaxes", [1, 48])
def test_a_state_dict_that_bitsandbytes_prepared_is_refused_by_name(absmaxes, strict, prepared, device):
    model = nn.Sequential(ts.SwitchBackLinear(64, 48, device=device))
    if prepared:
        model[0].prepare_for_eval()
    x = torch.randn(3, 64, device=device)
    before = model(x)
    state = {"0.W_int8": CODES, "0.state_W": torch.ones(absmaxes), "0.bias": BIAS}
    with pytest.raises(RuntimeError, match=r"0\.weight was prepared for evaluation by bitsandbytes"):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(model(x), before)


TRAINING_STATES = {
    "float64 and bfloat16": {"weight": torch.ones(48, 64, dtype=torch.float64), "bias": BIAS.bfloat16()},
    "int64": {"weight": torch.ones(48, 64, dtype=torch.int64), "bias": BIAS.int()},
    "short weight": {"weight": torch.ones(47, 64), "bias": BIAS},
    "short bias": {"weight": torch.ones(48, 64), "bias": BIAS[:47]},
    "a list": {"weight": torch.ones(48, 64).tolist(), "bias": BIAS},
    "another": {"kernel": torch.ones(48, 64), "bias": BIAS},
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("state", TRAINING_STATES.values(), ids=TRAINING_STATES)
def test_a_training_state_dict_loads_as_into_nn_linear(state, hooked):
    def transpose(module, state_dict, prefix, *_):
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].t()

    results = []
    for kind in (nn.Linear, SwitchBackLinear):
        torch.manual_seed(0)
        layer, loaded = kind(64, 48), dict(state)
        if hooked and isinstance(loaded.get("weight"), torch.Tensor):
            layer.register_load_state_dict_pre_hook(transpose)
            loaded["weight"] = loaded["weight"].t()
        try:
            outcome = repr(layer.load_state_dict(loaded))
        except RuntimeError as error:
            outcome = str(error).replace("SwitchBackLinear", "Linear")
        results.append((outcome, layer.weight.tolist(), layer.bias.tolist()))
    assert results[0] == results[1]


@strategies
def test_a_hook_may_transpose_or_rename_int8_values(config):
    layer = make_layer(config)
    layer.prepare_for_eval()
    state = layer.state_dict()
    state["kernel"] = state.pop("weight_int8").t()

    def transpose(module, state_dict, prefix, *_):
        calls.append(prefix)
        state_dict[f"{prefix}weight_int8"] = state_dict.pop(f"{prefix}kernel").t()

    for prepared in (False, True):
        calls = []
        fresh = nn.Sequential(make_layer(config))
        if prepared:
            fresh[0].prepare_for_eval()
        fresh[0].register_load_state_dict_pre_hook(transpose)
        for _ in range(2):
            fresh.load_state_dict({f"0.{name}": value for name, value in state.items()})
        assert calls == ["0.", "0."]
        assert torch.equal(fresh[0].weight_int8, layer.weight_int8)


def test_int8_values_do_not_replace_a_computed_weight():
    layer = nn.utils.parametrizations.weight_norm(SwitchBackLinear(64, 48))
    with pytest.raises(RuntimeError, match="mismatch for weight: it comes as int8 values, and weight is no parameter"):
        layer.load_state_dict({"weight_int8": CODES, "weight_absmax": ABSMAX, "bias": BIAS})
    assert not layer.is_prepared


def test_a_state_dict_in_another_float_dtype_is_cast(device):
    layer = SwitchBackLinear(64, 48, device=device)
    layer.load_state_dict({"weight": torch.ones(48, 64, dtype=torch.float64), "bias": BIAS.bfloat16()})
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert (layer.weight == 1).all()


def test_a_partial_state_dict_that_is_not_strict(device):
    layer = SwitchBackLinear(64, 48, device=device)
    weight = layer.weight.detach().clone()
    assert layer.load_state_dict({"bias": BIAS, "other": BIAS}, strict=False) == (["weight"], ["other"])
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, BIAS.to(device))


def test_a_hook_may_rename_the_keys(device):
    layer = SwitchBackLinear(64, 48, device=device)

    def rename(module, state_dict, prefix, *_):
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")

    layer.register_load_state_dict_pre_hook(rename)
    layer.load_state_dict({"kernel": torch.ones(48, 64), "bias": BIAS})
    assert (layer.weight == 1).all()


@unrotated
def test_any_order_of_states(config, device):
    """Only the two that prepare change what is kept. Its int8 values never change; an absmax may by its last bit."""
    layer = make_layer(config, device=device)
    x = torch.randn(5, 64, device=device)
    expected, qdata = layer(x), quantize_weight(layer.weight, config)[0]
    is_prepared = False
    for order in itertools.permutations(["train", "eval", "prepare_for_eval", "prepare_for_training"]):
        for call in order:
            getattr(layer, call)()
            is_prepared = {"prepare_for_eval": True, "prepare_for_training": False}.get(call, is_prepared)
            assert layer.is_prepared == is_prepared
            weights = ["weight_int8", "weight_absmax"] if is_prepared else ["weight"]
            assert sorted(layer.state_dict()) == sorted(["bias", *weights])
            assert layer.training == {"train": True, "eval": False}.get(call, layer.training)
            assert torch.equal(layer.weight_int8 if is_prepared else quantize_weight(layer.weight, config)[0], qdata)
            torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_a_computed_weight_is_not_prepared(device):
    layer = nn.utils.parametrizations.weight_norm(SwitchBackLinear(64, 48, device=device))
    keys = list(layer.state_dict())
    with pytest.raises(RuntimeError, match="prepare_for_eval: weight is no parameter of this layer"):
        layer.prepare_for_eval()
    assert list(layer.state_dict()) == keys


@strategies
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_weight_that_the_forward_refuses_is_not_prepared(config, dtype, device):
    layer = make_layer(config, device=device, bias=False).to(dtype)
    for refused in (layer.prepare_for_eval, lambda: layer(torch.zeros(2, 64, device=device))):
        called = "prepare_for_eval" if refused == layer.prepare_for_eval else "switchback_linear"
        with pytest.raises(TypeError, match=f"{called}: weight must be float16, bfloat16 or float32, got {dtype}"):
            refused()
        assert list(layer.state_dict()) == ["weight"]


@strategies
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_casting_a_prepared_layer_leaves_its_absmax_in_float32(config, dtype, device):
    layer = make_layer(config, device=device)
    layer.prepare_for_eval()
    before = copy.deepcopy(layer.state_dict())
    layer.half()
    for cast in (layer.to, layer.type):  # the second casts integers, too
        cast(dtype)
        assert layer.bias.dtype == dtype
        for name, tensor in layer.state_dict().items():
            if name != "bias":
                assert_same(tensor, before[name])
    layer.prepare_for_training()
    assert layer.weight.dtype == layer.bias.dtype


@pytest.mark.parametrize("config", ["switchback", "rowwise"])
def test_a_layer_made_ready_in_inference_mode_trains(config):
    prepared, plain = (SwitchBackLinear(32, 32, config=config) for _ in range(2))
    prepared.prepare_for_eval()
    with torch.inference_mode():
        plain.load_state_dict(prepared.state_dict())
        prepared.prepare_for_training()
    x = torch.randn(4, 32, requires_grad=True)
    plain.eval()(x).sum().backward()
    assert x.grad is not None
    prepared(x).sum().backward()
    assert prepared.weight.grad is not None


def test_a_layer_that_was_cut_smaller_comes_back():
    layer = SwitchBackLinear(64, 64, config="rowwise")
    layer.weight, layer.bias = nn.Parameter(layer.weight[:32].detach()), nn.Parameter(layer.bias[:32].detach())
    layer.prepare_for_eval()
    layer.prepare_for_training()
    assert layer.weight.shape == (32, 64)


# Whole models


def make_model(config="switchback"):
    return nn.Sequential(SwitchBackLinear(64, 48, config=config), nn.ReLU(), SwitchBackLinear(48, 32, config=config))


@pytest.mark.parametrize("config", ts.RECIPES)
def test_a_model_is_prepared_and_comes_back(config):
    model = make_model(config)
    x = torch.randn(5, 64)
    before = model(x)
    assert ts.prepare_for_eval(model) is model
    assert [layer.is_prepared for layer in model[::2]] == [True, True]
    assert torch.equal(model.eval()(x), before)
    assert ts.prepare_for_eval(model) is model
    assert ts.prepare_for_training(model) is model
    assert ts.prepare_for_training(model) is model
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert signal_to_noise(model(x), before) > 40


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_trains_the_parameters_that_come_back(make):
    model = make_model()
    parameters = list(model.parameters())
    optimizer = make(parameters, lr=0.1)
    model(torch.randn(5, 64)).sum().backward()
    ts.prepare_for_eval(model)
    assert [each.untyped_storage().nbytes() for each in parameters[::2]] == [0, 0]
    optimizer.step()  # of the biases alone
    ts.prepare_for_training(model)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    before = [each.detach().clone() for each in parameters]
    optimizer.zero_grad()
    model(torch.randn(5, 64)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(each, old) for each, old in zip(parameters, before, strict=True))


def test_moved_and_cast_while_prepared():
    model = make_model()
    parameters = list(model.parameters())
    ts.prepare_for_training(ts.prepare_for_eval(model).bfloat16())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert {each.dtype for each in parameters} == {torch.bfloat16}
    model(torch.randn(5, 64, dtype=torch.bfloat16)).sum().backward()
    assert all(each.grad is not None for each in parameters)


@pytest.mark.parametrize("config", ts.RECIPES)
def test_moved_to_meta_while_prepared(config):
    model = make_model(config)
    optimizer = torch.optim.SGD(model.parameters())
    ts.prepare_for_training(ts.prepare_for_eval(model).to("meta"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model[0].weight.shape == (48, 64)
    assert optimizer.param_groups[0]["params"][0].shape == (0,)  # as nn.Linear, a layer has other parameters on meta


def test_a_parameter_comes_back_with_its_hooks_though_nothing_else_holds_it():
    model = make_model()
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.shape))
    model[0].weight.tag = "first"
    ts.prepare_for_training(ts.prepare_for_eval(model))
    model(torch.randn(5, 64)).sum().backward()
    assert seen == [(48, 64)]
    assert model[0].weight.tag == "first"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_an_optimizer_that_is_copied_with_its_prepared_model_trains_the_copy(duplicate):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = duplicate((ts.prepare_for_eval(model), optimizer))
    before = copy.deepcopy(ts.prepare_for_training(model))
    model(torch.randn(5, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0].weight)


def test_a_weight_that_another_model_freed_is_not_prepared():
    model, other = make_model(), make_model()
    other[2].weight = model[2].weight
    ts.prepare_for_eval(model)
    with pytest.raises(RuntimeError, match="prepare_for_eval: 2: weight is freed: prepare_for_training"):
        ts.prepare_for_eval(other)
    assert not other[0].is_prepared
    ts.prepare_for_training(model)
    assert other(torch.randn(5, 64)).shape == (5, 32)


def test_a_layer_prepared_by_itself_comes_back_to_who_holds_its_parameter():
    layer = SwitchBackLinear(64, 48)
    weight = layer.weight
    layer.prepare_for_eval()
    assert weight.shape == (48, 64)
    twin = copy.deepcopy(layer)
    for each in (layer, twin):
        each.prepare_for_training()
    assert layer.weight is weight
    assert twin.weight is not weight
    assert torch.equal(twin.weight, weight)


def test_a_graph_from_before_does_not_use_what_is_gone():
    model = make_model()
    loss = model(torch.randn(5, 64, requires_grad=True)).sum()
    ts.prepare_for_eval(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def tied(model):
    model.embedding = nn.Embedding(32, 48)
    model.embedding.weight = model[2].weight


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model[2])


def in_float64(model):
    model[2].double()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (tied, RuntimeError, "prepare_for_eval: 2: weight is shared with another module"),
        (parametrized, RuntimeError, "prepare_for_eval: 2: weight is no parameter of this layer"),
        (in_float64, TypeError, r"prepare_for_eval: 2\.weight must be float16, bfloat16 or float32, got torch.float64"),
    ],
)
def test_a_model_that_is_refused_is_as_it_was(change, error, message):
    model = make_model()
    change(model)
    with pytest.raises(error, match=message):
        ts.prepare_for_eval(model)
    assert not any(module.is_prepared for module in model.modules() if isinstance(module, SwitchBackLinear))
    assert model[0].weight.numel() == 48 * 64


def test_a_model_without_a_layer_is_refused():
    with pytest.raises(ValueError, match="prepare_for_eval: model has no SwitchBackLinear"):
        ts.prepare_for_eval(nn.Sequential(nn.Linear(4, 4)))
