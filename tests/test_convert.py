"""Show which layers of a model are converted, with which configuration, and what the report says of the others."""

import copy
import io
import json
import logging
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_switchback as ts
from testing import convert_all
from torch_switchback import RECIPES, SwitchBackConfig, SwitchBackLinear

WIDTH, VOCABULARY = 1024, 4096


class Lora(nn.Module):
    """A layer as PEFT adapts it."""

    def __init__(self, rank):
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WIDTH)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, WIDTH, bias=False)})


def language_model(head="output", rank=8):
    with torch.device("meta"):
        blocks = [
            nn.ModuleDict({"q": Lora(rank), "gate": nn.Linear(WIDTH, 1), "up": nn.Linear(WIDTH, 2 * WIDTH)})
            for _ in range(2)
        ]
        return nn.ModuleDict(
            {
                "embedding": nn.Embedding(VOCABULARY, WIDTH),
                "positions": nn.Embedding(2 * WIDTH, WIDTH),  # of the shape of up, of which there are several
                "blocks": nn.ModuleList(blocks),
                head: nn.Linear(WIDTH, VOCABULARY, bias=False),
            }
        )


def converted(model):
    return [fqn for fqn, module in model.named_modules() if type(module) is SwitchBackLinear]


def reasons(model):
    return {layer.fqn: layer.reason for layer in ts.conversion_report(model).left}


WINNING = [f"blocks.{block}.{name}" for block in (0, 1) for name in ("q.base_layer", "up")]


@pytest.mark.usefixtures("only_where_it_wins")
def test_by_default_what_cannot_win_stays():
    model = ts.convert_to_switchback(language_model())
    assert converted(model) == WINNING == [layer.fqn for layer in ts.conversion_report(model).converted]
    left = reasons(model)
    assert left["output"].startswith("the LM head")
    assert left["blocks.0.gate"].startswith("int8 is never faster: too few features")
    assert left["blocks.1.q.lora_A.default"].startswith("LoRA") and left["blocks.1.q.lora_B.default"].startswith("LoRA")
    assert len(left) == 7


@pytest.mark.usefixtures("only_where_it_wins")
def test_wide_lora_stays_too():
    model = ts.convert_to_switchback(language_model(rank=2 * WIDTH))
    assert converted(model) == WINNING


@pytest.mark.parametrize("how", ["tied", "named"])
def test_a_head_that_shape_alone_does_not_tell(how):
    model = language_model("lm_head" if how == "named" else "output")
    if how == "named":
        del model["embedding"]  # on another stage of a pipeline
    else:
        head = model["output"]
        head.weight = model["embedding"].weight
        model["another of its shape"] = nn.Linear(WIDTH, VOCABULARY, device="meta")
    ts.convert_to_switchback(model)
    assert [fqn for fqn, reason in reasons(model).items() if "LM head" in reason] == [
        "lm_head" if how == "named" else "output"
    ]


class PeftCopy(nn.Module):
    """A layer and the copy that trains in its stead, as PEFT keeps modules_to_save."""

    def __init__(self, layer):
        super().__init__()
        self.original_module = layer
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(layer)})


class SaysItsHead(nn.Module):
    """A model that knows its head, as Transformers' do."""

    def __init__(self, head):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, device="meta")
        self.out = head

    def get_output_embeddings(self):
        return self.out


def head():
    return nn.Linear(WIDTH, VOCABULARY, device="meta")


@pytest.mark.parametrize(
    "out",
    [
        lambda: head(),
        lambda: nn.ModuleList(head() for _ in range(4)),
        lambda: PeftCopy(head()),
        lambda: PeftCopy(PeftCopy(head())),
        lambda: nn.ModuleDict({"base_layer": head(), "lora_A": nn.ModuleDict(), "lora_B": nn.ModuleDict()}),
    ],
    ids=["layer", "list", "copy", "copy of a copy", "LoRA"],
)
def test_what_a_model_says_is_its_head_stays(out):
    model = nn.ModuleDict({"part": SaysItsHead(out())})
    assert converted(ts.convert_to_switchback(model)) == ["part.up"]
    assert len(reasons(model)) >= 1 and all("LM head" in reason for reason in reasons(model).values())


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, None])
def test_a_model_without_a_head_has_none(error):
    class Backbone(SaysItsHead):
        def get_output_embeddings(self):
            if error is not None:
                raise error("no head")

    assert converted(ts.convert_to_switchback(Backbone(nn.Identity()))) == ["up"]


@pytest.mark.usefixtures("only_where_it_wins")
@pytest.mark.parametrize("name", ["lm_head", "output"])
def test_copies_of_a_head_that_its_name_or_shape_tells_stay(name):
    model = language_model(name)
    model[name] = PeftCopy(model[name])
    assert converted(ts.convert_to_switchback(model)) == WINNING


def test_a_filter_replaces_the_default_one():
    model = ts.convert_to_switchback(language_model(), module_filter_fn=lambda module, fqn: fqn == "output")
    assert converted(model) == ["output"]
    assert set(reasons(model).values()) == {"module_filter_fn leaves it out"}


@pytest.mark.usefixtures("only_where_it_wins")
def test_a_mapping_gives_each_layer_its_own():
    model = language_model()
    mine = SwitchBackConfig(cache_quantized_weight=True)
    config = {"*.1.up": None, "*.up": mine, "*": "rowwise", "blocks.1.q.base_layer": "switchback", "output": "rowwise"}
    ts.convert_to_switchback(model, config=config)
    layers = ts.conversion_report(model).converted
    assert all(layer.config.min_tokens for layer in layers)
    configs = {layer.fqn: replace(layer.config, min_tokens=None) for layer in layers}
    assert configs == {
        "blocks.0.q.base_layer": RECIPES["rowwise"],
        "blocks.0.up": mine,  # the first pattern that matches
        "blocks.1.q.base_layer": RECIPES["switchback"],  # its very name, wherever it stands
        "output": RECIPES["rowwise"],  # its very name overrides the default filter
    }
    assert reasons(model)["blocks.1.up"] == "config asks for nn.Linear"


def test_what_no_pattern_matches_stays():
    model = ts.convert_to_switchback(language_model(), config={"*.up": "switchback"})
    assert converted(model) == ["blocks.0.up", "blocks.1.up"]


@pytest.mark.usefixtures("only_where_it_wins")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "2 × int8 is never faster: too few features"),
        ({"0": None, "*": "rowwise"}, "1 × config asks for nn.Linear"),
    ],
)
def test_a_conversion_of_nothing_warns(config, why):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(4096, 64))
    with pytest.warns(UserWarning) as caught:
        ts.convert_to_switchback(model, config=config)
    (warning,) = caught
    assert "converts no layer of the model" in str(warning.message) and why in str(warning.message)
    assert "conversion_report(model)" in str(warning.message) and warning.filename == __file__


@pytest.mark.filterwarnings("error")
def test_a_conversion_of_nothing_that_was_asked_for_does_not_warn():
    ts.convert_to_switchback(nn.Sequential(nn.Linear(8, 8)), config={"0": None})
    ts.convert_to_switchback(nn.Sequential(SwitchBackLinear(8, 8)))


def test_a_model_without_linear_layers_warns():
    with pytest.warns(UserWarning, match=r"\(it has no nn.Linear\)"):
        ts.convert_to_switchback(nn.Sequential(nn.LayerNorm(8)))


def test_names_and_patterns_that_match_nothing_are_named():
    config = {"layres.*": "switchback", "*.up": "rowwise", "head": None, "blocks.0": None, "*": "switchback"}
    with pytest.warns(UserWarning) as caught:
        ts.convert_to_switchback(language_model(), config=config)
    (warning,) = caught
    assert "no linear layer is called 'layres.*' or 'head' or 'blocks.0'" in str(warning.message)
    assert warning.filename == __file__


def test_a_mapping_refuses_what_is_no_recipe():
    model = language_model()
    with pytest.raises(ValueError, match="the recipes are"):
        ts.convert_to_switchback(model, config={"*": "int4"})
    with pytest.raises(TypeError, match="got 4"):
        ts.convert_to_switchback(model, config={"*": 4})
    assert converted(model) == []


def test_one_layer_under_two_names():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    with pytest.raises(ValueError, match="a and b are one layer"):
        ts.convert_to_switchback(model, config={"a": "switchback", "b": "rowwise"})
    with pytest.warns(UserWarning, match="converts no layer"):
        ts.convert_to_switchback(model, config={"a": "switchback", "b": None})
    assert type(model["a"]) is nn.Linear
    ts.convert_to_switchback(model, config={"a": "switchback", "b": "switchback"})
    assert type(model["b"]) is SwitchBackLinear


def test_a_root_linear_is_asked_for():
    layer = ts.convert_to_switchback(nn.Linear(8, 8), config={"*": "rowwise"})
    assert layer.config == RECIPES["rowwise"]
    assert ts.conversion_report(layer).converted[0].fqn == ""


@pytest.mark.filterwarnings("error")
def test_twice_is_once():
    model = ts.convert_to_switchback(language_model(), config="rowwise")
    first = converted(model)
    for config in (None, "rowwise", {"*.up": "rowwise"}):
        ts.convert_to_switchback(model, config=config)
        assert converted(model) == first
        assert {layer.config for layer in ts.conversion_report(model).converted} == {RECIPES["rowwise"]}


@pytest.mark.parametrize("config", ["rowwise", {"*.up": "rowwise"}, {"blocks.0.up": None}])
def test_another_config_for_converted_layers_is_not_ignored_in_silence(config):
    model = ts.convert_to_switchback(language_model())
    with pytest.warns(UserWarning, match=r"config: .*'blocks.0.up' .*; revert_switchback\(model\) before") as caught:
        ts.convert_to_switchback(model, config=config)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert {layer.config for layer in ts.conversion_report(model).converted} == {SwitchBackConfig()}


@pytest.mark.filterwarnings("error")
def test_a_filter_says_that_another_config_is_not_for_converted_layers():
    model = ts.convert_to_switchback(language_model())
    ts.convert_to_switchback(model, config="rowwise", module_filter_fn=lambda module, fqn: fqn == "output")
    assert model["output"].config == RECIPES["rowwise"] and model["blocks"][0]["up"].config == SwitchBackConfig()


def test_layers_with_one_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    convert_all(model)
    model(torch.randn(4, 8)).sum().backward()
    assert model[2].weight is model[0].weight
    assert len(list(model.parameters())) == 3
    assert model[0].weight.grad is not None


def test_meta_layers_materialize_as_they_were_converted():
    with torch.device("meta"):
        model = convert_all(nn.Sequential(nn.Linear(8, 8)))
    assert model[0].weight.is_meta
    model.to_empty(device="cpu")
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    assert torch.equal(model(torch.ones(1, 8)), torch.full((1, 8), 8.0))


@pytest.mark.parametrize("part", ["model", "child", "wrapper"])
def test_compiled_models_are_refused(part):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    if part == "wrapper":
        model = torch.compile(model, backend="eager")
    else:
        (model if part == "model" else model[1]).compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled already; convert_to_switchback goes before"):
        convert_all(model)
    assert converted(model) == []


def test_compiled_after_conversion_is_no_error():
    model = convert_all(nn.Sequential(nn.Linear(8, 8)))
    model.compile(backend="eager")
    convert_all(model)
    other = nn.ModuleDict({"compiled": model, "layer": nn.Linear(8, 8)})
    assert converted(convert_all(other)) == ["compiled.0", "layer"]


def test_packed_projections_are_reported():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 8, device="meta")})
    with pytest.warns(UserWarning, match="converts no layer"):
        left = reasons(ts.convert_to_switchback(model))
    assert "projections' weights itself" in left["attention"]
    assert "NonDynamicallyQuantizableLinear is a subclass" in left["attention.out_proj"]


@pytest.mark.usefixtures("only_where_it_wins")
def test_the_report():
    model = language_model()
    with pytest.raises(ValueError, match="has not been through convert_to_switchback"):
        ts.conversion_report(model)
    ts.convert_to_switchback(model, config="rowwise")
    report = ts.conversion_report(nn.Sequential(model))
    assert report == ts.conversion_report(copy.deepcopy(model))
    text = str(report)
    assert text.startswith("4 of 11 linear layers, 60 % of their parameters\n")
    row = next(line.split() for line in text.splitlines() if line.startswith("blocks.0.up"))
    assert row[:5] == ["blocks.0.up", "1024", "2048", "rowwise,", "from"] and row[5].isdigit()
    assert re.search("left +the LM head", text)
    rows = json.loads(report.to_json())
    assert {row["fqn"]: row["config"] and row["config"]["weight_scaling"] for row in rows}["blocks.0.up"] == "rowwise"
    assert list(language_model().state_dict()) == list(model.state_dict())
    ts.revert_switchback(model)
    with pytest.raises(ValueError, match="has not been"):
        ts.conversion_report(model)


class Conv1D(nn.Module):
    """Transformers' linear layer of GPT-2: its weight is transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, 3 * WIDTH, device="meta"))
        self.bias = nn.Parameter(torch.empty(3 * WIDTH, device="meta"))


class Experts(nn.Module):
    """Experts that are packed as in Transformers."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(8, 2 * WIDTH, WIDTH, device="meta"))
        self.activation = nn.SiLU()


def test_modules_with_weights_of_their_own_are_reported():
    model = nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH, device="meta"), "experts": Experts(), "conv1d": Conv1D()})
    model["lstm"] = nn.LSTM(8, 8)
    ts.convert_to_switchback(model)
    assert {fqn: reason.partition(" ")[0] for fqn, reason in reasons(model).items()} == {
        "experts": "Experts",
        "conv1d": "Conv1D",
        "lstm": "LSTM",
    }
    report = ts.conversion_report(model)
    sizes = {layer.fqn: layer.in_features * layer.out_features for layer in report.layers}
    assert sizes == {"linear": WIDTH**2, "experts": 16 * WIDTH**2, "conv1d": 3 * WIDTH**2, "lstm": 2 * 4 * 8 * 8}
    assert report.summary == "1 of 4 linear layers, 5 % of their parameters"
    assert ["experts", "1024", "16384", "left", "Experts"] in [line.split()[:5] for line in str(report).splitlines()]


def test_what_multiplies_by_no_matrix_is_not_reported():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.empty(1, 197, 32))
            self.patches = nn.Conv2d(3, 32, 4)
            self.tokens = nn.Embedding(8, 32)
            self.scale = nn.ParameterList([torch.empty(4, 4)])
            self.norm = nn.LayerNorm((4, 4))
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
            self.lazy = nn.LazyConv2d(4, 3)

    with pytest.warns(UserWarning, match=r"\(1 × ParametrizedLinear"):
        ts.convert_to_switchback(model := Vision())
    assert [layer.fqn for layer in ts.conversion_report(model).layers] == ["layer"]


class ReadsWeight(nn.Module):
    """An attention that multiplies by its layer's weight itself, as timm's BEiT, EVA-02 and SwinV2 do."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.q_bias = nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight, self.q_bias)[..., :8])


def uncalled(model):
    return [layer.fqn for layer in ts.conversion_report(model).converted if "no call seen" in layer.reason]


def test_layers_that_are_never_called_are_reported():
    model = convert_all(nn.Sequential(nn.Linear(8, 8), ReadsWeight()))
    assert uncalled(model) == [], "nothing has been called"
    model(torch.randn(2, 8))
    assert uncalled(model) == uncalled(copy.deepcopy(model)) == ["1.qkv"]
    assert "ReadsWeight.forward" in str(ts.conversion_report(model))
    model[1].qkv(torch.randn(2, 8))
    assert uncalled(model) == []


def test_calls_in_compiled_code_are_not_taken_for_missing():
    model = convert_all(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))))
    model[1].compile(backend="eager", fullgraph=True)
    model(torch.randn(2, 8))
    assert uncalled(model) == []
    whole = torch.compile(convert_all(nn.Sequential(nn.Linear(8, 8))), backend="eager", fullgraph=True)
    whole(torch.randn(2, 8))
    assert uncalled(whole) == []


def test_the_report_is_of_the_model_as_it_is():
    model = convert_all(language_model())
    assert not reasons(model)
    model["output"] = nn.Linear(WIDTH, VOCABULARY + 8, device="meta")  # as resize_token_embeddings does
    model["blocks"][0]["up"] = nn.Sequential(model["blocks"][0]["up"], nn.Linear(8, 8))  # as an adapter does
    ts.revert_switchback(model["blocks"][1])
    left = reasons(model)
    assert {reason.partition(",")[0] for reason in left.values()} == {"added"}
    assert {"output", "blocks.0.up.1", "blocks.1.up"} < left.keys()
    assert "blocks.0.up.0" in converted(model) and "blocks.0.up.0" not in left
    convert_all(model)
    assert not reasons(model)


def test_a_converted_model_is_saved_and_copied_whole():
    model = convert_all(nn.Sequential(nn.Linear(8, 8)))
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert ts.conversion_report(torch.load(file, weights_only=False)) == ts.conversion_report(model)


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, logger="torch_switchback")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.mark.usefixtures("only_where_it_wins")
def test_one_line_is_logged(logged):
    model = ts.convert_to_switchback(language_model())
    line = "INFO", "SwitchBack: 4 of 11 linear layers, 60 % of their parameters"
    assert logged() == [line]
    ts.convert_to_switchback(model)
    assert logged() == [line]


@pytest.mark.usefixtures("only_where_it_wins")
def test_a_conversion_of_nothing_is_told_once(logged):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="converts no layer") as caught:
        for _ in range(2):
            ts.convert_to_switchback(model)
    assert len(caught) == 1
    assert logged() == [("INFO", "SwitchBack: 0 of 1 linear layers, 0 % of their parameters")]
    with pytest.warns(UserWarning, match="module_filter_fn leaves it out"):  # another reason
        ts.convert_to_switchback(model, module_filter_fn=lambda module, fqn: False)


def test_only_the_first_process_logs(logged, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ts.convert_to_switchback(language_model())
    assert logged() == []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        ts.convert_to_switchback(language_model())
    assert len(logged()) == 1


NO_MODULES = ["model", [nn.Linear(8, 8)], nn.Linear, None]


@pytest.mark.parametrize("model", NO_MODULES)
@pytest.mark.parametrize("function", [ts.convert_to_switchback, ts.revert_switchback, ts.conversion_report])
def test_a_model_that_is_no_module_is_refused(function, model):
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be"):
        function(model)


@pytest.mark.parametrize("arguments", [{"module_filter_fn": ["0"]}, {"config": {0: "rowwise"}}])
def test_arguments_of_another_type_are_refused(arguments):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=f"convert_to_switchback: {next(iter(arguments))} must"):
        ts.convert_to_switchback(model, **arguments)
    assert converted(model) == []


# The class swap


def make_model():
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Linear(8, 2))


def test_convert_swaps_the_class_and_nothing_else():
    model = make_model()
    before = {name: (id(parameter), parameter.clone()) for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    assert convert_all(model, SwitchBackConfig("rowwise")) is model
    assert [type(module) for module in (model[0], model[1][0], model[2])] == [SwitchBackLinear] * 3
    assert model[0].config == SwitchBackConfig("rowwise")
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert ts.revert_switchback(model) is model
    assert [type(module) for module in (model[0], model[1][0], model[2])] == [nn.Linear] * 3
    assert vars(model[0]).keys() == vars(nn.Linear(8, 8)).keys()


def test_convert_takes_a_filter():
    model = make_model()
    seen = []
    ts.convert_to_switchback(model, module_filter_fn=lambda module, fqn: seen.append(fqn) or fqn != "2")
    assert seen == ["0", "1.0", "2"]
    assert [type(module) for module in (model[0], model[1][0], model[2])] == [SwitchBackLinear] * 2 + [nn.Linear]


def test_convert_leaves_subclasses_and_converted_layers_alone():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.warns(UserWarning, match="converts no layer"):
        convert_all(attention)
    assert type(attention.out_proj) is not SwitchBackLinear
    layer = ts.nn.SwitchBackLinearVectorwise(8, 8)
    ts.convert_to_switchback(layer)
    assert layer.config == SwitchBackConfig("rowwise")


def test_convert_asks_the_filter_for_every_name_of_a_shared_layer():
    model = nn.ModuleDict({"projection": nn.Linear(8, 8)})
    model["head"] = model["projection"]
    with pytest.warns(UserWarning, match="converts no layer"):
        ts.convert_to_switchback(model, module_filter_fn=lambda module, fqn: fqn != "head")
    assert type(model["head"]) is nn.Linear
    convert_all(model)
    assert type(model["head"]) is SwitchBackLinear


def test_convert_leaves_a_replaced_forward_alone_and_says_so():
    model = make_model()
    model[0].forward = nn.Linear(8, 8).forward
    with pytest.warns(UserWarning, match="leaves '0' alone"):
        convert_all(model)
    assert type(model[0]) is nn.Linear
    assert type(model[2]) is SwitchBackLinear


@pytest.mark.parametrize("name", ["config", "weight_absmax", "weight_rotation", "is_prepared", "_weight_cache"])
def test_convert_leaves_a_layer_with_an_attribute_of_that_name_alone(name):
    model = make_model()
    setattr(model[0], name, "mine")
    model[0].extra = "mine"
    model[2].extra = "mine"
    with pytest.warns(UserWarning, match=f"leaves '0' alone: it has an attribute '{name}' of its own"):
        convert_all(model)
    assert type(model[0]) is nn.Linear and f"attribute '{name}'" in reasons(model)["0"]
    assert type(model[2]) is SwitchBackLinear
    ts.revert_switchback(model)
    assert vars(model[0])[name] == vars(model[0])["extra"] == vars(model[2])["extra"] == "mine"


def test_convert_refuses_another_config():
    with pytest.raises(TypeError, match="config must be a SwitchBackConfig or the name of a recipe, got 8"):
        ts.convert_to_switchback(make_model(), config=8)
    with pytest.raises(ValueError, match=r"the recipes are switchback, .*; got 'int4'"):
        ts.convert_to_switchback(make_model(), config="int4")


@pytest.mark.parametrize("recipe", ts.RECIPES)
def test_convert_takes_a_recipe(recipe):
    assert ts.convert_to_switchback(nn.Linear(8, 8), config=recipe).config == ts.RECIPES[recipe]


def test_convert_a_bare_linear():
    linear = nn.Linear(8, 8)
    assert type(ts.convert_to_switchback(linear)) is SwitchBackLinear


def test_optimizer_and_hooks_survive_conversion():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    convert_all(model)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert calls == [1]
    assert not torch.equal(model[0].weight, before)


def test_revert_gives_a_prepared_layer_a_weight_again():
    model = convert_all(make_model())
    model[0].prepare_for_eval()
    ts.revert_switchback(model)
    assert list(model[0].state_dict()) == ["weight", "bias"]
    model(torch.randn(4, 8)).sum().backward()


def test_revert_takes_a_subclass_only_to_what_it_names_itself():
    class Plain(nn.Linear):
        pass

    class Named(SwitchBackLinear):
        reverts_to = Plain

    class Unnamed(Named):
        pass

    model = nn.Sequential(Named(8, 8), Unnamed(8, 8), nn.utils.parametrizations.weight_norm(SwitchBackLinear(8, 8)))
    kept = [type(module) for module in model[1:]]
    with pytest.warns(UserWarning, match="leaves '[12]' as it is: .* is a subclass of SwitchBackLinear") as warned:
        ts.revert_switchback(model)
    assert len(warned) == 2
    assert [type(module) for module in model] == [Plain, *kept]
    assert vars(model[0]).keys() == vars(nn.Linear(8, 8)).keys()


@pytest.mark.parametrize("kind", [list, tuple, lambda heads: dict(enumerate(heads))], ids=["list", "tuple", "dict"])
def test_heads_in_a_python_container_stay(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(1024, 2048, device="meta") for _ in range(2)])

        def get_output_embeddings(self):
            return kind(self.heads)

    model = ts.convert_to_switchback(Model())
    assert [type(head) for head in model.heads] == [nn.Linear, nn.Linear]


def test_a_model_whose_output_embeddings_cannot_be_asked_for_is_converted():
    class Model(nn.Sequential):
        def get_output_embeddings(self):
            raise RuntimeError("no head")

    assert type(ts.convert_to_switchback(Model(nn.Linear(1024, 1024)))[0]) is SwitchBackLinear
