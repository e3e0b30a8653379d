"""PEFT's adapters over converted base layers, trained or kept in int8 alone, on the CPU."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft")

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config
from tasks import (
    Regressor,
    all_but_the_head,
    assert_falls,
    converted,
    regression_batches,
    signal_to_noise,
)

import torch_switchback as ts
from torch_switchback.integrations.peft import _reads_weight, adapters_over_int8, freeze_base, unfreeze_base
from torch_switchback.nn import _warn_that_it_does_not_train

TARGETS = ["body.0", "body.2"]
BASES = [f"base_model.model.{name}.base_layer" for name in TARGETS]
CACHED = {"cache_quantized_weight": True}


def make_model(config=None, base=None, **lora):
    """LoRA on both layers of the body; the head stays nn.Linear, and frozen."""
    base = base or Regressor()
    ts.convert_to_switchback(base, config=config, module_filter_fn=all_but_the_head)
    return get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **lora))


def base_layers(model):
    return [model.get_submodule(name) for name in BASES]


def train(model, steps=60):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for x, y in regression_batches(steps):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model, x):
    """The output, and the gradients of the input and of all that trains."""
    x = x.clone().requires_grad_()
    y = model(x)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), [x, *trainable])


@pytest.mark.parametrize("frozen", [False, True])
def test_lora_trains_over_a_converted_base_and_reloads_over_a_plain_one(frozen, tmp_path):
    original = Regressor()
    model = make_model(base=copy.deepcopy(original))
    assert converted(model) == BASES, "LoRA's own layers stay nn.Linear"
    if frozen:
        assert freeze_base(model) is model
    assert_falls(train(model), to=0.6)

    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    assert not converted(plain)
    x = torch.randn(16, 32)
    expected = plain(x)
    assert 25 < signal_to_noise(model(x), expected) < 70
    ts.revert_switchback(model)
    assert not converted(model)
    if frozen:  # its weights were rounded
        assert 25 < signal_to_noise(model(x), expected) < 70
    else:
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("cached", [{}, CACHED])
def test_freezing_changes_no_bit_with_one_absmax_a_weight(cached):
    model = make_model(ts.SwitchBackConfig(**cached))
    x = torch.randn(16, 32)
    before = gradients(model, x)
    freeze_base(model)
    for _ in range(2):
        for actual, expected in zip(gradients(model, x), before, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("cached", [{}, CACHED])
@pytest.mark.parametrize("rotated", [{}, {"rotate_features": 16}])
def test_freezing_rowwise_keeps_the_output_and_almost_the_gradients(rotated, cached):
    model = make_model(ts.SwitchBackConfig("rowwise", **rotated, **cached))
    x = torch.randn(16, 32)
    before = gradients(model, x)
    freeze_base(model)
    for _ in range(2):
        output, *after = gradients(model, x)
        assert torch.equal(output, before[0])
        assert all(signal_to_noise(a, b) > 30 for a, b in zip(after, before[1:], strict=True))


def tensors_of_size(numel):
    """Every tensor alive of so many elements."""
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.numel() == numel]


@pytest.mark.parametrize(("cached", "bytes_an_element"), [({}, 1), (CACHED, 2)])
@pytest.mark.parametrize("scaling", ["global", "rowwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frozen_base_takes_one_byte_an_element_between_forward_and_backward_too(
    scaling, cached, bytes_an_element, dtype
):
    features = 192, 320  # a number of elements that nothing else here has
    numel = features[0] * features[1]
    base = torch.nn.Sequential(torch.nn.Linear(*features, bias=False, dtype=dtype))
    config = ts.SwitchBackConfig(scaling, **cached)
    ts.convert_to_switchback(base, config=config, module_filter_fn=lambda module, fqn: True)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
    layer = model.get_submodule("base_model.model.0.base_layer")
    before = layer.weight.nbytes
    assert before == numel * dtype.itemsize
    freeze_base(model)
    x = torch.randn(8, features[0], dtype=dtype, requires_grad=True)
    for _ in range(2):
        y = model(x)
        alive = tensors_of_size(numel)
        assert alive
        assert all(tensor.dtype == torch.int8 for tensor in alive)
        y.sum().backward()
    del y
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of_size(numel)}
    assert sum(kept.values()) == numel * bytes_an_element
    scales = 1 if scaling == "global" else features[1]
    assert sum(buffer.nbytes for buffer in layer.buffers()) == numel + 4 * scales


def test_merging_after_unfreezing():
    model = freeze_base(make_model())
    x = torch.randn(16, 32)
    expected = model(x)
    unfreeze_base(model)
    assert not any(layer.is_prepared for layer in base_layers(model))
    merged = model.merge_and_unload()
    assert converted(merged) == TARGETS
    assert signal_to_noise(merged(x), expected) > 25


def test_what_trains_or_is_shared_stays():
    base = Regressor()
    base.twin = torch.nn.Linear(64, 4)
    base.twin.weight = base.head.weight
    model = make_model(base=base)
    ts.convert_to_switchback(model, module_filter_fn=lambda module, fqn: True)
    freeze_base(model)
    prepared = [name for name in converted(model) if model.get_submodule(name).is_prepared]
    assert prepared == BASES
    assert len(converted(model)) == len(BASES) + 4 + 2, "LoRA's A and B, the head and its twin"


def test_refusals():
    with pytest.raises(ValueError, match="model has no adapter layers; call get_peft_model first"):
        freeze_base(ts.convert_to_switchback(Regressor(), module_filter_fn=all_but_the_head))
    lora = LoraConfig(r=4, target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"no frozen SwitchBackLinear .*: convert_to_switchback was not called"):
        freeze_base(get_peft_model(Regressor(), lora))
    with pytest.raises(ValueError, match=r"no frozen SwitchBackLinear .*: all of its SwitchBack layers train"):
        freeze_base(make_model().requires_grad_(True))
    model = freeze_base(make_model())
    assert freeze_base(model) is model, "frozen already"
    model = make_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"body.0 is merged into its base layer; call unmerge_adapter first"):
        freeze_base(model)


def test_a_model_with_a_layer_that_cannot_be_frozen_stays_as_it_was():
    model = make_model()
    torch.nn.utils.parametrize.register_parametrization(base_layers(model)[1], "weight", torch.nn.Identity())
    with pytest.raises(RuntimeError, match=BASES[1]):
        freeze_base(model)
    assert not any(layer.is_prepared for layer in base_layers(model))


# Every method of PEFT that has an adapter beside a linear layer, and whether it works over a frozen base.


class Square(torch.nn.Module):
    """Layers of one shape: some methods share matrices between layers, or need as many inputs as outputs."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def lora(init=False, **arguments):
    return LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=init, **arguments)


def other(name, **arguments):
    return getattr(peft, f"{name}Config")(target_modules=["up", "down"], **arguments)


RANDOM = {"r": 4, "init_weights": False}
WORKING = {
    "LoRA": lora,
    "LoRA with biases": lambda: lora(lora_bias=True),
    "rsLoRA": lambda: lora(use_rslora=True),
    "PiSSA": lambda: lora("pissa"),
    "OLoRA": lambda: lora("olora"),
    "orthogonal": lambda: lora("orthogonal"),
    "MiCA": lambda: lora("mica"),
    "KaSA": lambda: lora(kasa_config=lora_config.KasaConfig()),
    "VeLoRA": lambda: lora(velora_config=lora_config.VeloraConfig()),
    "BD-LoRA": lambda: lora(use_bdlora=lora_config.BdLoraConfig(["up"], ["down"], nblocks=2)),
    "MonteCLoRA": lambda: lora(monteclora_config=lora_config.MontecloraConfig()),
    "AdaLoRA": lambda: other("AdaLora", init_r=4, target_r=2, total_step=10, init_lora_weights=False),
    "BEFT": lambda: other("Beft", init_weights=False),
    "BOFT": lambda: other("BOFT", boft_block_size=4, init_weights=False),
    "C3A": lambda: other("C3A", block_size=8, init_weights=False),
    "DEFT": lambda: other("Deft", **RANDOM),
    "DeLoRA": lambda: other("Delora", **RANDOM),
    "FourierFT": lambda: other("FourierFT", n_frequency=50, init_weights=False),
    "FRoD": lambda: other("Frod", init_weights=False, progressbar=False),
    "GraLoRA": lambda: other("Gralora", gralora_k=2, **RANDOM),
    "IA3": lambda: other("IA3", feedforward_modules=["down"], init_ia3_weights=False),
    "Lily": lambda: other("Lily", **RANDOM),
    "MiSS": lambda: other("Miss", **RANDOM),
    "OFT": lambda: other("OFT", r=0, oft_block_size=8, init_weights=False),
    "OSF": lambda: other("OSF", effective_rank=8),
    "PSOFT": lambda: other("Psoft", **RANDOM),
    "PVeRA": lambda: other("Pvera", **RANDOM),
    "RandLoRA": lambda: other("RandLora", **RANDOM),
    "RoAd": lambda: other("Road", group_size=8, init_weights=False),
    "TinyLoRA": lambda: other("TinyLora", r=2, u=8),
    "UniLoRA": lambda: other("UniLora", r=4, theta_d_length=64),
    "VB-LoRA": lambda: other("VBLoRA", r=4, vector_length=8, num_vectors=16),
    "VeRA": lambda: other("Vera", **RANDOM),
    "WaveFT": lambda: other("WaveFT", n_frequency=50, init_weights=False),
}
READING = {
    "DoRA": lambda: lora(use_dora=True),
    "target_parameters": lambda: LoraConfig(r=4, target_modules=[], target_parameters=["up.weight", "down.weight"]),
    "LoHa": lambda: other("LoHa", **RANDOM),
    "LoKr": lambda: other("LoKr", **RANDOM),
    "HRA": lambda: other("HRA", **RANDOM),
    "HiRA": lambda: other("Hira", **RANDOM),
    "SHiRA": lambda: other("Shira", **RANDOM),
    "Bone": lambda: other("Miss", r=4, init_weights="bat"),
    "PEANuT": lambda: other("Peanut", **RANDOM),
    "Supertuning": lambda: other("Supertuning"),
}
CANNOT_MERGE = {"Lily"}
MERGE_NO_WEIGHT = {"BEFT"}  # it trains biases


def adapted(config, base=None):
    base = ts.convert_to_switchback(base or Square(), module_filter_fn=lambda module, fqn: True)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # no method's first output is its base's
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def prepared(model):
    return [module.is_prepared for module in model.modules() if isinstance(module, ts.SwitchBackLinear)]


def used_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), [x, *trainable], allow_unused=True)


@pytest.mark.parametrize("method", WORKING)
def test_a_method_over_a_frozen_base_computes_saves_and_merges(method, tmp_path):
    original = Square()
    model = adapted(WORKING[method](), copy.deepcopy(original))
    x = torch.randn(16, 32)
    before = used_gradients(model, x)
    freeze_base(model)
    assert prepared(model) == [True, True]
    for actual, expected in zip(used_gradients(model, x), before, strict=True):
        assert actual is expected or torch.equal(actual, expected)

    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    assert signal_to_noise(plain(x), before[0]) > 25
    if method in CANNOT_MERGE:
        return
    if method not in MERGE_NO_WEIGHT:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(AttributeError, match="has no weight while it is prepared"):
                merge()
    merged = unfreeze_base(model).merge_and_unload()
    assert signal_to_noise(merged(x), before[0]) > 25


@pytest.mark.parametrize("method", READING)
def test_a_method_that_reads_the_bases_weight_is_refused(method):
    model = adapted(READING[method]())
    x = torch.randn(16, 32)
    expected = model(x)
    with pytest.raises(ValueError, match=r"base_model.model.up \(peft\..*\) computes with its base layer's weight"):
        freeze_base(model)
    assert prepared(model) == [False, False]
    assert torch.equal(model(x), expected)


def with_another_active(model):
    model.add_adapter("second", lora())
    model.set_adapter("second")


def disabled(model):
    model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("change", [with_another_active, disabled])
def test_an_adapter_that_is_not_active_is_refused_too(change):
    model = adapted(lora(use_dora=True))
    change(model)
    x = torch.randn(16, 32)
    expected = model(x)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="computes with its base layer's weight"):
        freeze_base(model)
    assert torch.equal(model(x), expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


@pytest.mark.parametrize("held", [False, True])
def test_weights_under_adapters_over_int8_come_back_frozen(held):
    base = ts.convert_to_switchback(Square(), config="rowwise", module_filter_fn=lambda *_: True)
    before = list(base.parameters()) if held else []
    ts.prepare_for_eval(base)
    if not held:
        base = copy.deepcopy(base)
    with adapters_over_int8(base):
        model = get_peft_model(base, lora()).train()
    _warn_that_it_does_not_train.cache_clear()
    with warnings.catch_warnings(action="error"):
        model(torch.randn(16, 32)).sum().backward()
    unfreeze_base(model)
    assert prepared(model) == [False, False]
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name)
    assert not any(parameter.requires_grad for parameter in before)


def test_trying_an_adapter_leaves_no_trace():
    model = adapted(lora(lora_dropout=0.5)).train()
    base = model.base_model.model.up.base_layer
    base.forward = forward = base.forward  # as Accelerate's hooks set one
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert not _reads_weight(model.base_model.model.up, base)
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(base)["forward"] is forward
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_adapters_come_and_go_while_the_base_is_frozen(tmp_path):
    model = freeze_base(adapted(lora()))
    x = torch.randn(16, 32)
    first = model(x)
    with model.disable_adapter():
        base = model(x)
    model.add_adapter("second", lora())
    model.set_adapter("second")
    second = model(x)
    assert not torch.equal(second, first)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "second", "loaded")
    model.set_adapter("loaded")
    assert torch.equal(model(x), second)
    both = model(x, adapter_names=["default"] * 8 + ["second"] * 8)
    torch.testing.assert_close(both, torch.cat([first[:8], second[8:]]))
    with pytest.raises(AttributeError, match="has no weight while it is prepared"):
        model.add_adapter("third", lora("pissa"))
    assert torch.equal(model.unload()(x), base)


class Reading(Square):
    """It asks a layer's weight for its dtype, as T5's MLP does."""

    def forward(self, x):
        return self.down(F.gelu(self.up(x)).to(self.down.weight.dtype))


def test_a_layer_whose_weight_its_model_reads_stays():
    model = adapted(lora(), Reading())
    x = torch.randn(16, 32)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"base_model.model.down.base_layer \(Reading.forward\)"):
        freeze_base(model)
    assert prepared(model) == [True, False]
    assert torch.equal(model(x), expected)


def test_a_base_that_is_unfrozen_inside_adapters_over_int8_stays_so():
    base = ts.prepare_for_eval(ts.convert_to_switchback(Square(), config="rowwise", module_filter_fn=lambda *_: True))
    with adapters_over_int8(base):
        model = unfreeze_base(get_peft_model(base, lora()))
    assert prepared(model) == [False, False]
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name)
    model(torch.randn(16, 32)).sum().backward()


def test_the_report_says_why_a_layer_under_an_adapter_was_left():
    base = ts.convert_to_switchback(Square(), config={"up": "rowwise", "*": None})
    report = ts.conversion_report(get_peft_model(base, lora()))
    reasons = {layer.fqn: layer.reason for layer in report.layers if layer.fqn.endswith(".base_layer")}
    assert reasons == {"up.base_layer": "", "down.base_layer": "config asks for nn.Linear"}
