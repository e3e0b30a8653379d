"""Show what recommend measures, and what it makes of the measurements."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import torch_switchback as ts
from torch_switchback import RECIPES, SwitchBackConfig, SwitchBackLinear
from torch_switchback._timing import speed_up
from torch_switchback.analysis import layer_steps, recommendation
from torch_switchback.analysis.recommendation import DEFAULT, LINEAR, MEASURED, LayerShape
from torch_switchback.tuning.break_even import rates_of

# Of a layer's step, by its in_features: the middle one wins, the last by too little.
TIMES = {
    16: {LINEAR: 2.0, "switchback": 3.0, "switchback_memory_efficient": 2.5},
    32: {LINEAR: 2.0, "switchback": 1.0, "switchback_memory_efficient": 1.5},
    48: {LINEAR: 2.0, "switchback": 1.97, "switchback_memory_efficient": 1.99},
}
# Of the model's forward and backward.
MODEL_TIMES = {LINEAR: 10.0, MEASURED: 8.0, DEFAULT: 9.0}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)) for _ in range(2))
        self.wide = nn.Linear(16, 48)
        self.thin = nn.Linear(48, 16, bias=False)
        self.lora_A = nn.Linear(16, 2)
        self.head = nn.Linear(16, 64)
        self.unused = nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.thin(self.wide(x)) + self.lora_A(x).sum()
        return {"logits": self.head(x), "count": 3}


@pytest.fixture
def rule(monkeypatch):
    """Return a function that sets from how many tokens on the shipped rule takes int8; at first it never does."""

    def from_tokens(tokens):
        monkeypatch.setattr(
            recommendation,
            "with_min_tokens",
            lambda config, layer: "never" if tokens is None else replace(config, min_tokens=tokens),
        )

    from_tokens(None)
    return from_tokens


@pytest.fixture
def model_times(monkeypatch):
    """Return the model's times in each round, which a test may change."""
    turns = {choice: [milliseconds] * 5 for choice, milliseconds in MODEL_TIMES.items()}

    def interleaved(clocks, rounds):
        assert all(clock() > 0 for clock in clocks.values())
        return {choice: turns[choice] for choice in clocks}

    monkeypatch.setattr(recommendation, "interleaved", interleaved)
    return turns


@pytest.fixture
def times(monkeypatch, rule, model_times):
    def compare(candidates, *, seconds, device):
        records = []
        for candidate in candidates:
            _, _, x, _ = candidate.build()[0].args
            record = {"name": candidate.name, "mode": candidate.mode, **candidate.notes}
            milliseconds = TIMES[x.shape[1]][candidate.name]
            records.append(record | {"median_ms": milliseconds, "turns": [milliseconds] * 5})
        return records

    monkeypatch.setattr(layer_steps, "compare", compare)


def test_the_fastest_recipe_that_wins_by_enough(times):
    model = Model()
    found = ts.recommend(model, torch.randint(64, (4, 8)), seconds=0)
    config = SwitchBackConfig(min_tokens=32)
    assert found.config == {
        "blocks.0.0": None,
        "blocks.0.1": config,
        "blocks.1.0": None,
        "blocks.1.1": config,
        "wide": None,
        "thin": None,
        "lora_A": None,
        "head": None,
        "unused": None,
    }
    assert set(found.left) == {"lora_A", "head", "unused"}
    assert {layer.tokens for layer in found.layers} == {32}
    assert [layer.recipe for layer in found.layers] == [None, "switchback", None, None]
    assert {layer.reason for layer in found.layers if not layer.recipe} == {"int8 is not faster"}
    # Six calls of 2 ms each, two of them at 1 ms instead.
    assert found.linear_speed_up == pytest.approx(12 / 10)


@pytest.mark.usefixtures("only_where_it_wins")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_measured_in_int8_however_small_the_layer(recipe):
    shape = LayerShape(4, 16, 16, bias=True, dtype="float32", weight_dtype="float32", trains=True)
    assert shape.new_layer(recipe, torch.device("cpu")).config == replace(RECIPES[recipe], min_tokens=0)


@pytest.mark.parametrize(("by_rule", "min_tokens"), [(5, 5), (100, 32), (None, 32)])
def test_min_tokens_are_the_measured_ones_or_fewer_by_the_rule(by_rule, min_tokens, times, rule):
    rule(by_rule)
    found = ts.recommend(Model(), tokens=32)
    assert found.config["blocks.0.1"] == SwitchBackConfig(min_tokens=min_tokens)


@pytest.mark.parametrize(
    ("measured", "default", "recommended", "reason"),
    [
        ([8.0], [9.0], MEASURED, "each layer's fastest recipe"),
        ([9.0], [8.0], DEFAULT, "convert_to_switchback's default"),
        ([12.0], [9.0], DEFAULT, "convert_to_switchback's default"),
        ([12.0], [10.5], LINEAR, "nn.Linear everywhere, as int8 makes the model slower, though not its layers alone"),
        ([8.0, 12.0], [12.0], LINEAR, "nn.Linear everywhere, as the model's times are too noisy to tell"),
    ],
)
def test_the_choice_that_makes_the_model_fastest(measured, default, recommended, reason, times, rule, model_times):
    rule(20)
    model_times[MEASURED], model_times[DEFAULT] = (measured * 6)[:6], default * 6
    model_times[LINEAR] = [10.0] * 6
    found = ts.recommend(Model(), torch.randint(64, (4, 8)), seconds=0)
    assert found.recommended == recommended
    assert reason in str(found).splitlines()[-1]
    assert ("too noisy to tell, kept" in str(found)) == (len(measured) > 1)
    converted = {fqn for fqn, config in found.config.items() if config is not None}
    blocks = {"blocks.0.1", "blocks.1.1"}
    others = {"blocks.0.0", "blocks.1.0", "wide", "thin"}
    assert converted == {MEASURED: blocks, DEFAULT: blocks | others, LINEAR: set()}[recommended]


@pytest.mark.parametrize(
    ("by_rule", "choices"),
    [(None, {MEASURED}), (33, {MEASURED}), (32, {MEASURED, DEFAULT})],
    ids=["never", "from more tokens", "from as many"],
)
def test_a_choice_without_int8_in_the_sample_is_not_measured(by_rule, choices, times, rule):
    rule(by_rule)
    found = ts.recommend(Model(), torch.randint(64, (4, 8)), seconds=0)
    assert found.model.speed_ups.keys() == choices and found.model.milliseconds.keys() == {LINEAR, *choices}


def test_equal_choices_are_measured_once(times, rule):
    rule(8)
    found = ts.recommend(nn.Linear(32, 16), torch.randn(8, 32), seconds=0)
    assert found.model.speed_ups.keys() == {MEASURED}


def test_a_model_without_a_faster_layer_stays(times):
    found = ts.recommend(nn.Linear(16, 16), torch.randn(8, 16), seconds=0)
    assert found.recommended == LINEAR and found.config == {"": None}
    assert str(found).endswith("recommended: nn.Linear everywhere, as int8 makes no layer faster beyond the spread")


def test_a_layer_whose_times_are_too_noisy_stays(monkeypatch, rule):
    def compare_layers(layers, inputs, *, seconds):
        same = {"saved_bytes": 0, "speed_up": 1.3, "speed_up_p10": 0.9, "speed_up_p90": 1.5}
        return [{"name": LINEAR, "median_ms": 1.3} | same, {"name": "rowwise", "median_ms": 1.0} | same]

    monkeypatch.setattr(recommendation, "compare_layers", compare_layers)
    found = ts.recommend(nn.Linear(16, 16), tokens=8, recipes=["rowwise"])
    assert found.config == {"": None} and found.layers[0].reason == "too noisy to tell" and found.recommended == LINEAR
    assert "1.30 × (0.90–1.50)  nn.Linear: too noisy to tell" in str(found)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_without_a_sample_layers_shorter_than_the_cpus_work_stay(cuda_graph, times, monkeypatch):
    slow_host = replace(rates_of("cpu"), cpu_us=900.0)
    monkeypatch.setattr(recommendation, "rates_of", lambda architecture: slow_host)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(32, 16).requires_grad_(False))
    trains, frozen = ts.recommend(model, tokens=8, cuda_graph=cuda_graph).layers
    assert trains.recipe == ("switchback" if cuda_graph else None) and frozen.recipe == "switchback"
    assert trains.reason == ("" if cuda_graph else "shorter than the 2.70 ms that an int8 step may cost the CPU")


@pytest.mark.parametrize("how", [{"tokens": 8}, {"sample_input": torch.ones(8, 32), "cuda_graph": True}], ids=list)
def test_what_was_not_measured_is_said(how, times):
    found = ts.recommend(nn.Linear(32, 16), **how)
    assert found.model is None and found.recommended == MEASURED
    assert "whether the whole model gains was not measured" in str(found).splitlines()[-1]


@pytest.mark.parametrize("architecture", ["sm_103", "sm_75"])
def test_a_gpu_where_int8_is_never_faster_is_refused_before_measuring(architecture, monkeypatch):
    monkeypatch.setattr(recommendation, "device_of", lambda model, device: torch.device("cuda"))
    monkeypatch.setattr(recommendation, "architecture_of", lambda device: architecture)
    monkeypatch.setattr(recommendation, "layer_calls", None)
    with pytest.raises(ValueError, match=f"recommend: .*{architecture}"):
        ts.recommend(nn.Linear(16, 16), tokens=8)


def test_the_model_is_measured_both_ways_and_left_as_it_was(times):
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = ts.recommend(model, torch.randint(64, (4, 8)), recipes=["switchback_memory_efficient"], seconds=0)
    assert found.model.milliseconds == {LINEAR: 10.0, MEASURED: 8.0}
    # The second layer of each block keeps 32 tokens of 32 features in int8 and one absmax per token, not in float32;
    # and an absmax of the weight.
    assert found.model.saved_bytes[LINEAR] - found.model.saved_bytes[MEASURED] == 2 * (32 * 32 * 3 - 32 * 4 - 4)
    assert all(type(module) is not SwitchBackLinear for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_report_of_an_earlier_conversion_stays(times):
    model = ts.convert_to_switchback(Model(), config={"*": None})
    before = str(ts.conversion_report(model))
    assert ts.recommend(model, torch.randint(64, (4, 8)), seconds=0).model.speed_ups
    assert str(ts.conversion_report(model)) == before


def test_a_frozen_model_is_measured_with_the_gradient_of_its_sample(times):
    model, x = nn.Sequential(nn.Linear(32, 16)).requires_grad_(False), torch.randn(8, 32, requires_grad=True)
    assert ts.recommend(model, x, seconds=0).model is not None
    assert x.grad is None


def test_the_original_of_a_compiled_model_is_measured(times):
    model = Model()
    found = ts.recommend(torch.compile(model, backend="eager"), torch.randint(64, (4, 8)), seconds=0)
    assert found.model.saved_bytes[MEASURED] == found.model.saved_bytes[LINEAR] + 2 * 4, "an absmax for each layer"
    assert found.config == ts.recommend(model, tokens=32).config


@pytest.mark.parametrize("how", ["model", "child", "wrapped child"])
def test_compiled_models_are_refused_before_measuring(monkeypatch, how):
    monkeypatch.setattr(recommendation, "compare_layers", None)
    model = Model()
    if how == "wrapped child":
        model.wide = torch.compile(model.wide, backend="eager")
    else:
        (model if how == "model" else model.wide).compile(backend="eager")
    with pytest.raises(RuntimeError, match="is compiled already; recommend goes before"):
        ts.recommend(model, torch.randint(64, (4, 8)))


def test_what_one_layer_keeps(times):
    (layer,) = ts.recommend(nn.Linear(32, 16), tokens=8).layers
    assert layer.saved_bytes[LINEAR] == 8 * 32 * 4
    assert layer.saved_bytes["switchback_memory_efficient"] == 8 * 32 + 8 * 4 + 4
    assert layer.speed_up == 2.0


def test_frozen_layers_are_measured_as_such(times):
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32), nn.Linear(32, 16))
    model[2].requires_grad_(False)
    found = ts.recommend(model, tokens=8)
    assert [(layer.in_features, layer.trains) for layer in found.layers] == [(32, True), (16, True), (32, False)]
    assert found.layers[2].saved_bytes == {LINEAR: 0, "switchback": 4, "switchback_memory_efficient": 4}
    kept = 8 * 32 * 4 + 8 * 16 * 4
    assert found.linear_saved_bytes == (kept, kept + 4 + 4)


def test_convert_takes_it_through_json(times):
    model = Model()
    found = ts.recommend(model, tokens=32)
    assert found.model is None
    content = json.loads(found.to_json())
    ts.convert_to_switchback(model, config=content["config"])
    converted = [fqn for fqn, module in model.named_modules() if type(module) is SwitchBackLinear]
    assert converted == ["blocks.0.1", "blocks.1.1"]
    assert asdict(model.blocks[0][1].config) == content["config"]["blocks.0.1"] == asdict(found.config["blocks.0.1"])
    assert content["linear_speed_up"] == found.linear_speed_up and content["recommended"] == MEASURED


def test_models_on_meta_and_the_layers_dtype(times):
    with torch.device("meta"):
        model = Model()
    found = ts.recommend(model, tokens=32, device="cpu", dtype=torch.bfloat16)
    assert {layer.dtype for layer in found.layers} == {"bfloat16"}
    assert model.head.weight.is_meta


def test_a_layer_whose_calls_disagree_stays(times, monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 16)

        def forward(self, x):
            return self.layer(x).sum() + self.layer(x[:1]).sum()

    def compare_layers(layers, inputs, *, seconds):
        times = {LINEAR: 1.0, "switchback": 2.0 if len(inputs[0][0]) == 1 else 0.5}
        records = [{"name": name, "median_ms": ms, "turns": [ms] * 5, "saved_bytes": 0} for name, ms in times.items()]
        return [record | speed_up(record, records[0]) for record in records]

    monkeypatch.setattr(recommendation, "compare_layers", compare_layers)
    found = ts.recommend(Twice(), torch.randn(8, 32), recipes=["switchback"], seconds=0)
    assert [layer.recipe for layer in found.layers] == ["switchback", None]
    assert found.config == {"layer": None}


def test_a_layer_under_two_names(times):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(32, 32), nn.Linear(32, 16)
            self.second = nn.ModuleDict({"layer": self.first})
            self.lm_head = self.head

        def forward(self, x):
            return self.lm_head(self.second["layer"](self.first(x)))

    model = Shared()
    found = ts.recommend(model, torch.randn(8, 32), seconds=0)
    config = SwitchBackConfig(min_tokens=8)
    assert found.config == {"first": config, "second.layer": config, "head": None, "lm_head": None}
    assert [layer.fqns for layer in found.layers] == [("first", "first")], "once for each of its calls"
    ts.convert_to_switchback(model, config=json.loads(found.to_json())["config"])
    assert type(model.first) is SwitchBackLinear and type(model.head) is nn.Linear


def test_real_measurements():
    found = ts.recommend(nn.Linear(16, 16), tokens=8, recipes=["rowwise"], seconds=0)
    assert set(found.layers[0].milliseconds) == {LINEAR, "rowwise"}
    assert all(ms > 0 for ms in found.layers[0].milliseconds.values())
    assert "linear layers alone" in str(found) and "rowwise" in str(found)


def test_what_is_refused():
    with pytest.raises(ValueError, match="is converted already"):
        ts.recommend(ts.SwitchBackLinear(16, 16), tokens=8)
    with pytest.raises(ValueError, match="no linear layer that could be converted"):
        ts.recommend(nn.LayerNorm(16), tokens=8)
    with pytest.raises(ValueError, match="the recipes are"):
        ts.recommend(nn.Linear(16, 16), tokens=8, recipes=["int4"])
    with pytest.raises(ValueError, match="recommend: recipes is empty"):
        ts.recommend(nn.Linear(16, 16), tokens=8, recipes=[])
    with pytest.raises(ValueError, match="either sample_input or tokens"):
        ts.recommend(nn.Linear(16, 16))


@pytest.mark.parametrize("kind", ["no tensor", "detached", "frozen"])
def test_a_model_without_a_backward_is_refused_before_measuring(kind, monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16).requires_grad_(kind != "frozen")

        def forward(self, x):
            y = self.layer(x)
            return {"no tensor": str(y), "detached": y.detach(), "frozen": y}[kind], 5

    monkeypatch.setattr(recommendation, "compare_layers", None)
    with pytest.raises(ValueError, match="recommend: model returns no tensor that requires a gradient"):
        ts.recommend(Model(), torch.randn(8, 16), seconds=0)


def test_progress_comes_before_the_model_runs(times):
    steps = []

    model = nn.Sequential(nn.Linear(32, 16))
    model.register_forward_pre_hook(lambda *_: steps.append("run") if steps[-1:] != ["run"] else None)
    ts.recommend(model, torch.randn(8, 32), seconds=0, progress=lambda found, following: steps.append(following))
    assert steps == ["the model on its sample", "run", "1/1  8 tokens, 32 → 16", "the model", "run"]


def test_a_layer_in_float64_is_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.wide = nn.Linear(32, 32), nn.Linear(32, 4).double()

        def forward(self, x):
            return self.wide(self.plain(x).double())

    assert "float64" in ts.recommend(Model(), torch.randn(4, 32), seconds=0.01).left["wide"]
