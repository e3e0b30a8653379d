"""Show what recommend measures, and what it makes of the measurements."""

import json

import pytest
import torch
from torch import nn

import torch_switchback as ts
from torch_switchback import SwitchBackLinear
from torch_switchback.analysis import layer_steps, recommendation
from torch_switchback.analysis.recommendation import LINEAR

# Of a layer's step, by its in_features: the middle one wins, the last by too little.
TIMES = {
    16: {LINEAR: 2.0, "switchback": 3.0, "switchback_memory_efficient": 2.5},
    32: {LINEAR: 2.0, "switchback": 1.0, "switchback_memory_efficient": 1.5},
    48: {LINEAR: 2.0, "switchback": 1.97, "switchback_memory_efficient": 1.99},
}


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
def times(monkeypatch):
    def compare(candidates, *, seconds, device):
        records = []
        for candidate in candidates:
            _, _, x, _ = candidate.build()[0].args
            record = {"name": candidate.name, "mode": candidate.mode, **candidate.notes}
            records.append(record | {"median_ms": TIMES[x.shape[1]][candidate.name]})
        return records

    monkeypatch.setattr(layer_steps, "compare", compare)


def test_the_fastest_recipe_that_wins_by_enough(times):
    model = Model()
    found = ts.recommend(model, torch.randint(64, (4, 8)), seconds=0)
    assert found.config == {
        "blocks.0.0": None,
        "blocks.0.1": "switchback",
        "blocks.1.0": None,
        "blocks.1.1": "switchback",
        "wide": None,
        "thin": None,
        "lora_A": None,
        "head": None,
        "unused": None,
    }
    assert set(found.left) == {"lora_A", "head", "unused"}
    assert {layer.tokens for layer in found.layers} == {32}
    # Six calls of 2 ms each, two of them at 1 ms instead.
    assert found.linear_speed_up == pytest.approx(12 / 10)


def test_the_model_is_measured_both_ways_and_left_as_it_was(times):
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = ts.recommend(model, torch.randint(64, (4, 8)), recipes=["switchback_memory_efficient"], seconds=0)
    assert found.model.milliseconds > 0 and found.model.milliseconds_converted > 0
    # The second layer of each block keeps 32 tokens of 32 features in int8 and one absmax per token, not in float32;
    # and an absmax of the weight.
    assert found.model.saved_bytes - found.model.saved_bytes_converted == 2 * (32 * 32 * 3 - 32 * 4 - 4)
    assert all(type(module) is not SwitchBackLinear for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_original_of_a_compiled_model_is_measured(times):
    model = Model()
    found = ts.recommend(torch.compile(model, backend="eager"), torch.randint(64, (4, 8)), seconds=0)
    assert found.model.saved_bytes_converted == found.model.saved_bytes + 2 * 4, "an absmax for each converted layer"
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
    assert content["linear_speed_up"] == found.linear_speed_up


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
        return [{"name": name, "median_ms": ms, "saved_bytes": 0} for name, ms in times.items()]

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
    assert found.config == {"first": "switchback", "second.layer": "switchback", "head": None, "lm_head": None}
    assert [layer.fqns for layer in found.layers] == [("first", "first")], "once for each of its calls"
    ts.convert_to_switchback(model, config=json.loads(found.to_json())["config"])
    assert type(model.first) is SwitchBackLinear and type(model.head) is nn.Linear


def test_real_measurements():
    found = ts.recommend(nn.Linear(16, 16), tokens=8, recipes=["rowwise"], seconds=0)
    assert set(found.layers[0].milliseconds) == {LINEAR, "rowwise"}
    assert all(ms > 0 for ms in found.layers[0].milliseconds.values())
    assert "linear layers:" in str(found) and "rowwise" in str(found)


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
