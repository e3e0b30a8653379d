"""From how many tokens on a layer's step is faster in int8, by the rates of a device."""

import dataclasses

import pytest
import torch
from torch import nn

import torch_switchback as ts
from torch_switchback import RECIPES, SwitchBackConfig, filters
from torch_switchback.tuning import _tables
from torch_switchback.tuning.break_even import WORTH, min_tokens, rates_of, work

H200 = rates_of("sm_90")
SERVED = sorted({name for table in _tables.shipped_tables().values() for name in table.serves})
SHAPES = [(512, 2048), (768, 3072), (1024, 1024), (2048, 8192), (4096, 1024), (4096, 14336)]


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", SHAPES)
def test_min_tokens_is_where_the_faster_way_changes(sizes, recipe, trains):
    least = min_tokens(H200, *sizes, RECIPES[recipe], trains=trains)

    def is_worth_it(tokens):
        linear = work(tokens, *sizes, None, trains=trains).microseconds(H200)
        int8 = work(tokens, *sizes, RECIPES[recipe], trains=trains).microseconds(H200)
        return WORTH * int8 <= linear and linear >= H200.cpu_us * (3 if trains else 2)

    if least is None:
        assert not any(is_worth_it(2**exponent) for exponent in range(40))
    else:
        assert least > 0 and is_worth_it(least + 1) and not is_worth_it(least - 1)


def test_work_counts_three_matmuls_or_two():
    flop = 2.0 * 100 * 64 * 48
    assert work(100, 64, 48, None)[:2] == (3 * flop, 0)
    assert work(100, 64, 48, RECIPES["switchback"])[:2] == (flop, 2 * flop)
    assert work(100, 64, 48, RECIPES["switchback_int8_grad_weight"])[:2] == (0, 3 * flop)
    for recipe in RECIPES.values():
        assert work(100, 64, 48, recipe, trains=False)[:2] == (0, 2 * flop)


def test_saving_memory_and_int8_weight_gradients_quantize_more():
    plain, *others = (
        work(100, 64, 48, RECIPES[name]).quantized_bytes
        for name in ("switchback", "switchback_memory_efficient", "switchback_int8_grad_weight")
    )
    assert all(other > plain for other in others)


@pytest.mark.parametrize("architecture", [*SERVED, "cpu", "sm_103"])
def test_every_served_architecture_has_rates_of_its_own(architecture):
    rates = rates_of(architecture)
    assert all(value > 0 for name, value in dataclasses.asdict(rates).items() if name not in ("provenance", "cpu_us"))
    assert rates.provenance
    if architecture not in ("cpu", "sm_90"):
        assert rates != H200


def test_an_unlisted_architecture_takes_the_nearest_below():
    assert rates_of("sm_121") == rates_of("sm_120") and rates_of("gfx950") == rates_of("gfx942")


@pytest.mark.parametrize("architecture", ["sm_103", "sm_75"])
def test_a_gpu_that_int8_does_not_suit_keeps_nn_linear_and_says_why(architecture, monkeypatch, break_even_rule):
    monkeypatch.setattr("torch_switchback.convert.with_min_tokens", break_even_rule)
    monkeypatch.setattr(filters, "_where", lambda device: architecture)
    model = nn.Sequential(nn.Linear(4096, 4096, device="meta"))
    with pytest.warns(UserWarning, match=architecture) as caught:
        ts.convert_to_switchback(model)
        ts.convert_to_switchback(model)
    assert len(caught) == 1 and type(model[0]) is nn.Linear
    ts.convert_to_switchback(model, config=SwitchBackConfig(min_tokens=0))
    assert type(model[0]) is ts.SwitchBackLinear


@pytest.mark.usefixtures("only_where_it_wins")
def test_converting_fills_in_min_tokens_unless_the_config_has_it():
    def converted(config=None):
        return ts.convert_to_switchback(nn.Linear(4096, 4096, device="meta"), config=config).config.min_tokens

    assert converted() == min_tokens(H200, 4096, 4096, SwitchBackConfig())
    assert converted(SwitchBackConfig(min_tokens=7)) == 7
    assert converted({"": {"weight_scaling": "rowwise", "min_tokens": 0}}) == 0
    frozen = nn.Linear(4096, 4096, device="meta").requires_grad_(False)
    expected = min_tokens(H200, 4096, 4096, SwitchBackConfig(), trains=False)
    assert ts.convert_to_switchback(frozen).config.min_tokens == expected
    model = nn.Sequential(*(nn.Linear(4096, 4096, device="meta") for _ in range(2)))
    ts.convert_to_switchback(model)
    assert model[0].config is model[1].config  # so that compiled blocks share their code
    assert "from 3" in str(ts.conversion_report(model)) and "tokens" in repr(model[0])


@pytest.mark.usefixtures("only_where_it_wins")
@pytest.mark.parametrize(
    ("sizes", "tokens", "takes_int8"),
    [
        ((768, 3072), 256 * 197, True),  # ViT-B's MLP, 256 images
        ((1024, 4096), 16 * 197, False),  # ViT-L's, 16 images
        ((2048, 8192), 1024, False),  # Llama of width 2048, one short sequence
        ((4096, 14336), 4 * 4096, True),  # Llama-8B, 4 long ones
    ],
)
def test_models_that_people_train(sizes, tokens, takes_int8):
    layer = ts.convert_to_switchback(nn.Linear(*sizes, device="meta"))
    assert (tokens >= layer.config.min_tokens) == takes_int8


@pytest.mark.usefixtures("only_where_it_wins")
def test_what_can_never_win_is_not_converted():
    model = nn.ModuleDict({"router": nn.Linear(4096, 64, device="meta"), "up": nn.Linear(768, 3072, device="meta")})
    ts.convert_to_switchback(model)
    (left,) = ts.conversion_report(model).left
    assert left.fqn == "router" and "too few features" in left.reason


def test_another_conversion_without_min_tokens_changes_nothing(recwarn, only_where_it_wins):
    model = ts.convert_to_switchback(nn.Sequential(nn.Linear(4096, 4096, device="meta")), config="rowwise")
    config = model[0].config
    ts.convert_to_switchback(model, config="rowwise")
    assert model[0].config is config and not recwarn.list


def test_a_model_not_on_a_gpu_takes_what_this_pytorch_is_built_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for cuda, hip, expected in ((None, None, "cpu"), ("13.0", None, "sm_90"), (None, "6.4", "gfx942")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert filters._where(torch.device("cpu")) == filters._where(torch.device("meta")) == expected
