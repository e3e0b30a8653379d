"""PEFT's LoRA over converted base layers, trained or kept in int8 alone, on the CPU."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from tasks import (
    Regressor,
    all_but_the_head,
    assert_falls,
    converted,
    regression_batches,
    signal_to_noise,
)

import torch_switchback as ts
from torch_switchback.integrations.peft import freeze_base, unfreeze_base

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
def test_freezing_rowwise_keeps_the_output_and_almost_the_gradients(cached):
    model = make_model(ts.SwitchBackConfig("rowwise", **cached))
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
    with pytest.raises(ValueError, match=r"no frozen SwitchBackLinear .* call convert_to_switchback"):
        freeze_base(get_peft_model(Regressor(), lora))
    with pytest.raises(ValueError, match="no frozen SwitchBackLinear"):
        freeze_base(make_model().requires_grad_(True))
    model = freeze_base(make_model())
    assert freeze_base(model) is model, "frozen already"
    with pytest.raises(ValueError, match="computes with its base layer's weight"):
        freeze_base(make_model(use_dora=True))
    model = make_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        freeze_base(model)


def test_a_model_with_a_layer_that_cannot_be_frozen_stays_as_it_was():
    model = make_model({TARGETS[0]: "rowwise", TARGETS[1]: "rowwise_rotated_features"})
    with pytest.raises(ValueError, match="rotated features cannot be kept as int8 values"):
        freeze_base(model)
    assert not any(layer.is_prepared for layer in base_layers(model))
