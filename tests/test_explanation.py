"""Show what explain says of the layers of a model, and what it calls a fall-back."""

import json
from functools import partial

import pytest
import torch
from torch import nn

import torch_switchback as ts
from testing import convert_all
from torch_switchback import SwitchBackConfig, ops
from torch_switchback._text import grouped
from torch_switchback.analysis import explanation
from torch_switchback.analysis.layer_calls import Call
from torch_switchback.tuning import matmul_config


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 48)
        self.norm = nn.BatchNorm1d(48)
        self.down = nn.Linear(48, 24)
        self.unused = nn.Linear(24, 24)

    def forward(self, x, scale=1.0):
        x = self.norm(self.up(input=x))
        return self.down(x) + self.down(x[:3]).sum() * scale


def layers(found):
    return {layer.fqn: layer for layer in found.layers}


@pytest.fixture
def model():
    model = Model()
    return ts.convert_to_switchback(model, config="rowwise", module_filter_fn=lambda module, fqn: fqn != "unused")


def test_a_row_a_layer(model):
    found = layers(ts.explain(model, torch.randn(8, 24)))
    assert list(found) == ["up", "down", "unused"]
    up, down, unused = found.values()
    assert (up.strategy, up.tokens, up.in_features, up.out_features, up.dtype) == ("rowwise", 8, 24, 48, "float32")
    assert (up.calls, down.calls, down.tokens) == (1, 2, 8)
    assert [(p.name, p.m, p.n, p.k) for p in up.matmuls] == [
        ("output", 8, 48, 24),
        ("grad_input", 8, 24, 48),
        ("grad_weight", 48, 24, 8),
    ]
    assert up.matmuls[2].kernel == "torch.mm float32"
    assert (unused.strategy, unused.tokens, unused.matmuls, unused.fallback) == ("Linear", None, (), "")


def test_running_the_model_changes_nothing(model):
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ts.explain(model, {"x": torch.randn(8, 24), "scale": 2.0})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and not model.norm.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class Merges(nn.Module):
    """A LoRA layer as loralib's: ``train`` takes LoRA out of the weight and puts it in."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(24, 24)
        self.a, self.b = nn.Parameter(torch.randn(2, 24)), nn.Parameter(torch.randn(24, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.base.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + x @ self.a.t() @ self.b.t()


class Counts(nn.Module):
    """Counts its calls in a buffer, in place, and keeps its last input in another, which it replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()
        return x


@pytest.mark.parametrize("diagnose", [ts.explain, partial(ts.recommend, recipes=["rowwise"], seconds=0)])
def test_modes_and_what_train_and_the_forward_change_stay(diagnose):
    model = nn.Sequential(Merges(), Counts(), Merges(), Merges())
    model[2].eval()
    model[3].base.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diagnose(model, torch.randn(8, 24))
    assert [module.training for module in model.modules()] == modes
    assert [model[i].merged for i in (0, 2, 3)] == [False, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_autocast_decides_the_dtype(model):
    model.norm = nn.Identity()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layers(ts.explain(model, (torch.randn(8, 24), 2.0)))["up"].dtype == "bfloat16"


def test_a_compiled_model_is_explained(model):
    compiled = torch.compile(model, backend="eager")
    assert list(layers(ts.explain(compiled, torch.randn(8, 24)))) == ["up", "down", "unused"]


def test_tokens_instead_of_a_sample():
    with torch.device("meta"):
        model = convert_all(Model())
    found = layers(ts.explain(model, tokens=4096, device="cpu"))
    assert {layer.tokens for layer in found.values()} == {4096}
    for wrong in ({}, {"sample_input": torch.ones(1), "tokens": 1}, {"tokens": 0}):
        with pytest.raises(ValueError, match="tokens"):
            ts.explain(model, **wrong)


def test_int8_grad_weight_has_tokens_in_whole_blocks_of_the_rotation():
    model = ts.convert_to_switchback(nn.Linear(24, 48), config=SwitchBackConfig(grad_weight="int8"))
    (layer,) = ts.explain(model, torch.randn(70, 24)).layers
    matmul = layer.matmuls[2]
    assert (matmul.m, matmul.n, matmul.k) == (48, 24, 128)
    assert layer.fallback == ""


def test_a_layer_with_too_few_tokens_says_that_it_computes_as_nn_linear():
    model = ts.convert_to_switchback(nn.Linear(24, 48), config=SwitchBackConfig(min_tokens=71))
    (layer,) = ts.explain(model, torch.randn(70, 24), strict=True).layers
    assert layer.matmuls == () and layer.fallback == ""
    assert layer.reason == "computes as nn.Linear: fewer tokens than its min_tokens=71"
    explained = ts.explain(model, torch.randn(71, 24))
    assert explained.layers[0].reason == "" and explained.int8_share == 1
    assert ts.explain(model, tokens=70).layers[0].reason == layer.reason
    assert ts.explain(model, tokens=71).layers[0].reason == ""
    model.prepare_for_eval()
    assert ts.explain(model, torch.randn(70, 24)).layers[0].reason == ""
    assert ts.explain(model, tokens=70).layers[0].reason == ""


def test_flops_count_every_call():
    """``down`` is called with 8 tokens, in int8, and with 3, as nn.Linear."""
    model = ts.convert_to_switchback(Model(), config={"down": SwitchBackConfig(min_tokens=4)})
    found = ts.explain(model, torch.randn(8, 24))
    up, down, unused = found.layers
    assert (up.flop, up.int8_flop) == (2 * 8 * 24 * 48, 0) and (unused.flop, unused.int8_flop) == (0, 0)
    assert (down.flop, down.int8_flop) == (2 * 11 * 24 * 48, 2 * 8 * 24 * 48) and down.reason == ""
    assert found.int8_flop_share == pytest.approx(8 / 19)
    assert str(found).splitlines()[-1] == "1 of 3 layers run in int8, 40% of their weights, 42% of their FLOPs"


def test_a_model_without_linear_layers_has_no_share():
    found = ts.explain(nn.LayerNorm(4), torch.randn(2, 4))
    assert found.int8_share == found.int8_flop_share == 0


def test_a_layer_that_is_not_called_is_a_fallback(model):
    convert_all(model)
    with pytest.raises(explanation.FallbackError, match="unused: not called"):
        ts.explain(model, torch.randn(8, 24), strict=True)


def test_frozen_and_prepared_layers_have_no_grad_weight():
    layer = ts.SwitchBackLinear(24, 48)
    layer.weight.requires_grad_(False)
    assert len(ts.explain(layer, torch.randn(8, 24)).layers[0].matmuls) == 2
    layer.prepare_for_eval()
    assert len(ts.explain(layer, torch.randn(8, 24)).layers[0].matmuls) == 2


def test_a_cpu_without_exact_int_mm(model, monkeypatch):
    assert ops.int8_matmul.cpu_path(1) == ("float32 matmuls", "torch._int_mm is wrong at inner dimension 1")
    monkeypatch.setattr(ops.int8_matmul, "_int_mm_is_exact", lambda: False)
    fallback = layers(ts.explain(model, torch.randn(8, 24)))["up"].fallback
    assert fallback == (
        "output: torch._int_mm is not exact on this CPU; grad_input: torch._int_mm is not exact on this CPU"
    )


@pytest.fixture
def on_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    name = "torch_switchback.kernels.device.architecture"
    monkeypatch.setattr(explanation, "device_of", lambda model, device: torch.device("cuda"))
    monkeypatch.setattr(explanation, "describe", str)
    monkeypatch.setattr(explanation, "_try", lambda *arguments: None)
    return lambda architecture: monkeypatch.setattr(name, lambda device: architecture)


def test_the_tuned_kernel_of_each_matmul(on_a_gpu):
    on_a_gpu("sm_90")
    layer = ts.SwitchBackLinear(4096, 14336, device="meta", dtype=torch.bfloat16)
    output, grad_input, _ = ts.explain(layer, tokens=16384).layers[0].matmuls
    assert output.tile == matmul_config("sm_90", 16384, 14336, 4096)
    assert grad_input.tile == matmul_config("sm_90", 16384, 4096, 14336)
    assert output.kernel == output.tile.kernel == "warp_specialized"
    assert str(output) == f"warp_specialized {output.tile.block_m}×{output.tile.block_n}×{output.tile.block_k}"


@pytest.mark.filterwarnings("ignore:torch_switchback has no tuning table for sm_103")
@pytest.mark.parametrize(("architecture", "why"), [("sm_90", ""), ("sm_103", ": sm_103 multiplies int8 more slowly")])
def test_a_gpu_where_int8_is_never_faster_is_in_the_header(on_a_gpu, architecture, why):
    on_a_gpu(architecture)
    layer = ts.SwitchBackLinear(4096, 4096, device="meta", dtype=torch.bfloat16)
    found = ts.explain(layer, tokens=4096)
    assert str(found).splitlines()[0].startswith(f"cuda{why}")
    assert bool(found.never_faster) == bool(why)


@pytest.mark.parametrize(("architecture", "falls_back"), [("sm_90", True), ("sm_80", False)])
def test_an_output_that_tma_cannot_store(on_a_gpu, architecture, falls_back):
    on_a_gpu(architecture)
    layer = ts.SwitchBackLinear(4096, 4095, device="meta", dtype=torch.bfloat16)
    (row,) = ts.explain(layer, tokens=4096).layers
    assert row.matmuls[0].kernel == "pointer"
    assert row.fallback.startswith("output: TMA stores rows in units of 16 bytes, not of 8190") == falls_back


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_operands_that_are_copied(on_a_gpu, architecture):
    on_a_gpu(architecture)
    layer = ts.SwitchBackLinear(4095, 4096, device="meta", dtype=torch.bfloat16)
    (row,) = ts.explain(layer, tokens=4096).layers
    assert row.matmuls[0].tile == matmul_config(architecture, 4096, 4096, 4096)
    assert row.fallback.startswith("output: operands are copied, as their rows of 4095 bytes are no multiples of 16")


def test_a_kernel_that_was_replaced(on_a_gpu, monkeypatch):
    from torch_switchback.kernels import int8_matmul

    on_a_gpu("sm_90")
    tuned = matmul_config("sm_90", 4096, 4096, 4096)
    monkeypatch.setattr(int8_matmul, "_replaced", {tuned: (int8_matmul._LAST_RESORT, "no such instruction")})
    layer = ts.SwitchBackLinear(4096, 4096, device="meta", dtype=torch.bfloat16)
    (row,) = ts.explain(layer, tokens=4096).layers
    assert row.matmuls[0].tile == int8_matmul._LAST_RESORT
    assert row.fallback == "output: no such instruction; grad_input: no such instruction"


def test_long_sums_are_folded_by_another_kernel(on_a_gpu):
    on_a_gpu("sm_90")
    layer = ts.SwitchBackLinear(4096, 2**18, device="meta", dtype=torch.bfloat16)
    grad_input = ts.explain(layer, tokens=16384).layers[0].matmuls[1]
    assert grad_input.kernel == "tma" and "above 131072" in grad_input.fallback


def test_as_text_and_as_json(model):
    found = ts.explain(model, torch.randn(8, 24))
    assert str(found).splitlines()[1].split()[:6] == ["layer", "strategy", "tokens", "in", "out", "dtype"]
    assert len(str(found).splitlines()) == 6
    rows = json.loads(found.to_json())["layers"]
    assert rows[0]["matmuls"][0] == {
        "name": "output",
        "m": 8,
        "n": 48,
        "k": 24,
        "kernel": ops.int8_matmul.cpu_path(24)[0],
        "tile": None,
        "fallback": ops.int8_matmul.cpu_path(24)[1],
    }


def test_identical_blocks_are_one_row():
    blocks = [nn.ModuleDict({"up": nn.Linear(24, 48), "down": nn.Linear(48, 24)}) for _ in range(12)]
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": nn.Linear(24, 10)})
    ts.convert_to_switchback(model, module_filter_fn=lambda module, fqn: not fqn.endswith(("4.up", "head")))
    lines = str(ts.explain(model, tokens=8)).splitlines()
    names = [line.split("  ")[0] for line in lines[2:-1]]
    assert names == ["layers.0–3,5–11.up × 11", "layers.0–11.down × 12", "layers.4.up", "head"]


def test_rows_of_which_not_all_are_alike_stay_apart():
    assert grouped([("0.1", 2), ("1.0", 2), ("fc1", 2), ("fc2", 2)]) == [("0.1", 2), ("1.0", 2), ("fc1", 2), ("fc2", 2)]
    experts = [(f"{layer}.experts.{expert}.w", None) for layer in range(2) for expert in (0, 1, 5)]
    assert grouped(experts) == [("0–1.experts.0–1,5.w × 6", None)]


def test_every_layer_without_int8_has_a_reason():
    attention = nn.MultiheadAttention(24, 2)
    model = nn.ModuleDict({"tower": nn.Sequential(nn.Linear(24, 48), attention), "head": nn.Linear(24, 24)})
    assert {layer.reason for layer in ts.explain(model, tokens=8).layers} == {"not converted"}
    ts.convert_to_switchback(model["tower"], module_filter_fn=lambda module, fqn: True)
    found = ts.explain(model, tokens=8)
    reasons = {fqn: layer.reason for fqn, layer in layers(found).items()}
    assert reasons.pop("tower.0") == "" and reasons.pop("head") == "not converted"
    assert "is a subclass of nn.Linear" in reasons.pop("tower.1.out_proj")
    assert "nn.MultiheadAttention multiplies" in reasons.pop("tower.1") and not reasons
    assert found.int8_share == pytest.approx(2 / (2 + 3 + 1 + 1))
    assert str(found).splitlines()[-1] == "1 of 4 layers run in int8, 29% of their weights, 50% of their FLOPs"
    assert all(reason in str(found) for reason in ("not converted", "MultiheadAttention multiplies"))


def test_a_parametrized_weight_is_not_changed():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(ts.SwitchBackLinear(8, 8)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ts.explain(model, torch.randn(2, 8))
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("function", [ts.explain, ts.recommend])
@pytest.mark.parametrize(("arguments", "name"), [((nn.Linear(4, 4), [[1.0]]), "sample_input"), (("model", 3), "model")])
def test_arguments_of_another_type_are_named(function, arguments, name):
    with pytest.raises(TypeError, match=name):
        function(*arguments)


class Scaled(nn.Linear):
    def forward(self, scale, x):
        return super().forward(x) * scale


class UsesScaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.scaled = nn.Linear(32, 32), Scaled(32, 32)

    def forward(self, x):
        return self.scaled(2, self.plain(x))


def test_a_subclass_of_linear_may_take_other_arguments():
    assert ts.explain(UsesScaled(), torch.randn(4, 32))
    assert ts.recommend(UsesScaled(), torch.randn(4, 32), seconds=0.01)


def test_a_model_on_the_meta_device_is_explained():
    layer = ts.SwitchBackLinear(32, 32, device="meta")
    assert ts.explain(layer, torch.empty(4, 32, device="meta")).layers[0].tokens == 4


def test_a_prepared_layer_computes_in_the_dtype_of_its_weight():
    layer = ts.SwitchBackLinear(64, 64, bias=False, dtype=torch.bfloat16)
    layer.prepare_for_eval()
    assert ts.explain(layer, tokens=8).layers[0].dtype == "bfloat16"


@pytest.mark.parametrize("tokens", [0, 2.5, "8", True], ids=repr)
@pytest.mark.parametrize("function", [ts.explain, ts.recommend])
def test_tokens_are_a_positive_int(function, tokens):
    with pytest.raises(ValueError, match="tokens"):
        function(nn.Linear(8, 8), tokens=tokens)


@pytest.mark.parametrize("prepared", [False, True])
def test_layers_on_the_meta_device_are_tried_elsewhere(prepared):
    with torch.device("meta"):
        layer = ts.SwitchBackLinear(24, 48, config=ts.RECIPES["rowwise"])
    if prepared:
        layer.prepare_for_eval()
    explanation._try(layer, Call(8, "float32", True), torch.device("cpu"))


def test_a_prepared_layer_is_said_to_be_so_without_its_min_tokens(model):
    model.up.config = SwitchBackConfig("rowwise", min_tokens=100)
    model.up.prepare_for_eval()
    found = layers(ts.explain(model, torch.randn(8, 24)))["up"]
    assert (found.strategy, found.fallback) == ("rowwise, prepared", "")
    row = next(line for line in str(ts.conversion_report(model)).splitlines() if line.startswith("up"))
    assert "rowwise, prepared" in row
