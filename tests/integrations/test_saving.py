"""Prepared models that other libraries save and load: equal outputs, bit for bit, or an error."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, load_model, save_file, save_model
from tasks import Regressor, all_but_the_head, converted
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Molmo2TextConfig,
    Molmo2TextModel,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers import HfQuantizer

import torch_switchback as ts
from torch_switchback import RECIPES, SwitchBackConfig, convert
from torch_switchback.cli.export import read, restored
from torch_switchback.integrations.transformers import SwitchBackHfQuantizer, SwitchBackQuantizationConfig

TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**TEXT, max_position_embeddings=64)
PROJECTIONS = 2 * 7
IDS = torch.arange(32)[None]
recipes = pytest.mark.parametrize("recipe", ["switchback", "rowwise", "rowwise_rotated_features"])


@pytest.fixture
def plain(tmp_path):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(path, **arguments):
    return AutoModelForCausalLM.from_pretrained(path, **arguments)


def convert_model(model, config="rowwise"):
    return ts.convert_to_switchback(model, config=config, module_filter_fn=lambda module, fqn: fqn != "lm_head")


def prepare_model(model, config="rowwise"):
    return ts.prepare_for_eval(convert_model(model, config))


def prepared_layers(model):
    return [fqn for fqn in converted(model) if model.get_submodule(fqn).is_prepared]


def written(path):
    return json.loads((path / "config.json").read_text()).get("quantization_config")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# Transformers


@pytest.mark.parametrize("max_shard_size", ["50GB", 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@recipes
def test_a_saved_prepared_model_reloads_with_equal_logits(
    recipe, dtype, max_shard_size, plain, tmp_path, break_even_rule, monkeypatch
):
    model = prepare_model(load(plain, dtype=dtype), recipe)
    expected = logits(model)
    model.save_pretrained(tmp_path / "int8", max_shard_size=max_shard_size)
    assert len([*(tmp_path / "int8").glob("*.safetensors")]) > (0 if max_shard_size == "50GB" else 3)
    monkeypatch.setattr(convert, "with_min_tokens", break_even_rule)
    again, info = load(tmp_path / "int8", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), expected)
    assert prepared_layers(again) == prepared_layers(model)
    assert len(prepared_layers(again)) == PROJECTIONS
    assert again.model.layers[0].mlp.up_proj.config == SwitchBackConfig(**vars(RECIPES[recipe]) | {"min_tokens": 0})
    again.save_pretrained(tmp_path / "again", max_shard_size=max_shard_size)
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    ts.prepare_for_training(again)
    assert again.model.layers[0].mlp.up_proj.weight.dtype == dtype


def test_the_int8_values_keep_their_dtypes_in_a_model_of_another_dtype(plain, tmp_path):
    prepare_model(load(plain)).save_pretrained(tmp_path / "int8")
    model = load(tmp_path / "int8", dtype=torch.float16)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight_int8.dtype, layer.weight_absmax.dtype) == (torch.int8, torch.float32)
    assert logits(model).dtype == torch.float16
    ts.prepare_for_training(model)
    assert layer.weight.dtype == torch.float16


def llava():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=63)
    )
    ids = torch.cat([torch.full((1, 4), 63), IDS], 1)
    return model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4)), {"input_ids": IDS}


def molmo2():
    """Its checkpoints have q, k and v in one matrix, of different sizes."""
    return Molmo2TextModel(Molmo2TextConfig(**TEXT, head_dim=16)), {"input_ids": IDS}


def dinov2():
    """It initializes the weight of every nn.Linear, loaded or not."""
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=14,
        use_swiglu_ffn=True,
    )
    return Dinov2Model(config), {"pixel_values": torch.randn(1, 3, 28, 28)}


@pytest.mark.parametrize("source", ["new", "loaded", "loaded converted"])
@pytest.mark.parametrize("make", [llava, mixtral, molmo2, dinov2])
def test_models_whose_checkpoints_have_other_names_or_matrices(make, source, tmp_path):
    model, inputs = make()
    model.save_pretrained(tmp_path / "plain")
    cls = type(model)
    asked = SwitchBackQuantizationConfig("rowwise", ["lm_head"]) if source == "loaded converted" else None
    if source != "new":
        model = cls.from_pretrained(tmp_path / "plain", quantization_config=asked)

    @torch.no_grad()
    def output(model):
        return model.eval()(**inputs)[0]

    def names_in(name):
        return load_file(tmp_path / name / "model.safetensors").keys()

    prepare_model(model)
    assert len(prepared_layers(model)) >= 8
    expected = output(model)
    model.save_pretrained(tmp_path / "int8")
    again = cls.from_pretrained(tmp_path / "int8")
    assert torch.equal(output(again), expected)
    for each in (model, again):
        ts.prepare_for_training(each).save_pretrained(tmp_path / "put back")
        ts.revert_switchback(each).save_pretrained(tmp_path / "reverted")
        assert names_in("put back") == names_in("reverted") == names_in("plain")
        assert torch.equal(output(cls.from_pretrained(tmp_path / "reverted")), output(each))


def test_a_part_of_a_model_is_saved_and_loaded(plain, tmp_path):
    model = prepare_model(load(plain))
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "part")
    load(tmp_path / "whole").model.save_pretrained(tmp_path / "part of a reloaded one")
    for name in ("whole", "part", "part of a reloaded one"):
        with torch.no_grad():
            assert torch.equal(AutoModel.from_pretrained(tmp_path / name)(IDS).last_hidden_state, expected)
    again = load(tmp_path / "part")
    assert prepared_layers(again) == prepared_layers(model)


def test_layers_that_are_not_prepared_stay_so(plain, tmp_path):
    model = convert_model(load(plain), {"*.mlp.*": "rowwise", "*.q_proj": "switchback"})
    ts.prepare_for_eval(model.model.layers[1].mlp)
    ts.prepare_for_eval(model.model.layers[0].mlp.up_proj)
    model.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert torch.equal(logits(again), logits(model))
    assert prepared_layers(again) == prepared_layers(model)
    assert len(prepared_layers(again)) == 1 + 3
    assert converted(again) == converted(model)
    assert len(converted(again)) == 2 * (3 + 1)


def one_by_one(model):
    for fqn in converted(model):
        model.get_submodule(fqn).prepare_for_eval()
    return model


def by_load_state_dict(model):
    model.load_state_dict(ts.prepare_for_eval(copy.deepcopy(model)).state_dict())
    return model


def by_a_part(model):
    ts.prepare_for_eval(model.model.layers)
    return model


def as_a_copy(model):
    return ts.prepare_for_eval(copy.deepcopy(model))


def as_a_copy_one_by_one(model):
    return ts.prepare_for_eval(one_by_one(copy.deepcopy(model)))


@pytest.mark.parametrize("prepare", [one_by_one, by_load_state_dict, by_a_part, as_a_copy, as_a_copy_one_by_one])
def test_however_layers_are_prepared_they_are_saved(prepare, plain, tmp_path):
    model = prepare(convert_model(load(plain)))
    model.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert len(prepared_layers(again)) == PROJECTIONS
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_prepared_model_is_saved(duplicate, plain, tmp_path):
    model = prepare_model(load(plain))
    duplicate(model).save_pretrained(tmp_path / "int8")
    assert torch.equal(logits(load(tmp_path / "int8")), logits(model))


@pytest.mark.parametrize("put_back", [ts.prepare_for_training, ts.revert_switchback])
@pytest.mark.parametrize("reloaded", [False, True])
def test_put_back_a_model_saves_plain_weights(put_back, reloaded, plain, tmp_path):
    model = prepare_model(load(plain))
    model.save_pretrained(tmp_path / "int8")
    model = load(tmp_path / "int8") if reloaded else model
    put_back(model)
    assert not any(hasattr(part, "hf_quantizer") for part in (model, model.model))
    model.save_pretrained(tmp_path / "put back")
    assert written(tmp_path / "put back") is None
    again = load(tmp_path / "put back")
    assert not converted(again)
    assert torch.equal(logits(again), logits(ts.revert_switchback(model)))


def test_a_model_put_back_layer_by_layer_saves_plain_weights(plain, tmp_path):
    model = prepare_model(load(plain))
    model.save_pretrained(tmp_path / "int8")
    for fqn in converted(model):
        model.get_submodule(fqn).prepare_for_training()
    model.save_pretrained(tmp_path / "put back")
    assert written(tmp_path / "put back") is None
    assert torch.equal(logits(load(tmp_path / "put back")), logits(ts.revert_switchback(model)))


def test_a_model_with_a_quantization_config_keeps_it_while_it_is_converted(plain, tmp_path):
    asked = SwitchBackQuantizationConfig("rowwise", modules_to_not_convert=["lm_head"])
    model = load(plain, quantization_config=asked)
    expected = logits(model)
    ts.prepare_for_eval(model).save_pretrained(tmp_path / "int8")
    assert written(tmp_path / "int8")["config"] is None
    again = load(tmp_path / "int8")
    assert torch.equal(logits(again), expected)
    assert prepared_layers(again) == prepared_layers(model)

    ts.prepare_for_training(model).save_pretrained(tmp_path / "put back")
    assert written(tmp_path / "put back") == asked.to_dict()
    ts.revert_switchback(model).save_pretrained(tmp_path / "reverted")
    assert written(tmp_path / "reverted") is None
    again.dequantize()
    assert not converted(again)
    assert not hasattr(again, "hf_quantizer")


def test_without_its_quantization_config_a_prepared_model_does_not_load_as_random_weights(plain, tmp_path):
    prepare_model(load(plain)).save_pretrained(tmp_path / "int8")
    content = json.loads((tmp_path / "int8" / "config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "int8" / "config.json").write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path / "int8")


WITHOUT_THE_BRIDGE = """
import sys, torch_switchback
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print(type(error).__name__)
"""


def test_without_importing_the_bridge_a_prepared_model_does_not_load(plain, tmp_path):
    prepare_model(load(plain)).save_pretrained(tmp_path / "int8")
    command = [sys.executable, "-c", WITHOUT_THE_BRIDGE, str(tmp_path / "int8")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["RuntimeError"]
    assert "Unknown quantization type, got switchback" in done.stderr


@pytest.mark.parametrize("prepared", [False, True])
@recipes
def test_load_state_dict_takes_what_was_saved(recipe, prepared, plain, tmp_path):
    model = prepare_model(load(plain), recipe)
    model.save_pretrained(tmp_path / "int8")
    again = convert_model(LlamaForCausalLM(CONFIG), recipe)
    if prepared:
        ts.prepare_for_eval(again)
    again.load_state_dict(load_file(tmp_path / "int8" / "model.safetensors"), strict=True)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.self_attn\.q_proj\.weight"):
        LlamaForCausalLM(CONFIG).load_state_dict(load_file(tmp_path / "int8" / "model.safetensors"), strict=False)


def train_what_is_not_frozen(model, path, checkpoint=None):
    """Two steps of the Trainer, from a checkpoint the second alone."""
    defaults = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    data = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(16)[:, None] + torch.arange(32)) % 64]
    trainer = Trainer(model, TrainingArguments(str(path), save_strategy="steps", **defaults), train_dataset=data)
    trainer.train(resume_from_checkpoint=checkpoint)
    return logits(model.eval())


def test_the_trainer_resumes_a_model_with_prepared_layers(plain, tmp_path):
    expected = train_what_is_not_frozen(prepare_model(load(plain)), tmp_path / "run")
    again = prepare_model(load(plain))
    before = logits(again)
    assert not torch.equal(before, expected)
    assert torch.equal(train_what_is_not_frozen(again, tmp_path / "run", tmp_path / "run" / "checkpoint-1"), expected)
    for step in (1, 2):
        checkpoint = load(tmp_path / "run" / f"checkpoint-{step}")
        assert torch.equal(logits(checkpoint), expected) == (step == 2)


def test_layers_go_without_a_conversion():
    for other in ({"config": "rowwise"}, {"modules_to_not_convert": []}):
        with pytest.raises(ValueError, match="layers goes without"):
            SwitchBackQuantizationConfig(**other, layers=[])


class OtherQuantizer(HfQuantizer):
    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


def test_another_librarys_quantizer_is_named(plain):
    model = convert_model(load(plain))
    model.hf_quantizer = OtherQuantizer(SwitchBackQuantizationConfig(quant_method="other"))
    with pytest.warns(UserWarning, match="save_pretrained loses .* LlamaForCausalLM has a OtherQuantizer"):
        ts.prepare_for_eval(model)
    assert not isinstance(model.hf_quantizer, SwitchBackHfQuantizer)


@pytest.mark.parametrize("max_shard_size", ["50GB", 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@recipes
def test_the_command_dequantizes_a_saved_model(recipe, dtype, max_shard_size, plain, tmp_path):
    model = prepare_model(load(plain, dtype=dtype), recipe)
    model.save_pretrained(tmp_path / "int8", max_shard_size=max_shard_size)
    checkpoint = read(tmp_path / "int8")
    state, layers = restored(checkpoint.state, checkpoint.notes)
    assert len(layers) == PROJECTIONS
    expected = ts.revert_switchback(model).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name


# PEFT over a base of Transformers

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


def adapt(base, **lora):
    peft = pytest.importorskip("peft")
    from torch_switchback.integrations.peft import freeze_base

    return freeze_base(peft.get_peft_model(base, peft.LoraConfig(**LORA | lora)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@recipes
def test_adapters_reload_over_the_plain_base_and_over_the_int8_one(recipe, dtype, plain, tmp_path):
    model = adapt(convert_model(load(plain, dtype=dtype), recipe))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapters")
    assert [*(tmp_path / "adapters").glob("*.safetensors")] == [tmp_path / "adapters" / "adapter_model.safetensors"]
    assert all("lora_" in name for name in load_file(tmp_path / "adapters" / "adapter_model.safetensors"))
    from peft import PeftModel

    from torch_switchback.integrations.peft import adapters_over_int8, freeze_base

    base = convert_model(load(plain, dtype=dtype), recipe)
    assert torch.equal(logits(freeze_base(PeftModel.from_pretrained(base, tmp_path / "adapters"))), expected)

    prepare_model(load(plain, dtype=dtype), recipe).save_pretrained(tmp_path / "int8")
    base = load(tmp_path / "int8")
    with pytest.raises(AttributeError, match=r"prepare_for_training\(\)"):
        PeftModel.from_pretrained(load(tmp_path / "int8"), tmp_path / "adapters")
    with adapters_over_int8(base):
        again = PeftModel.from_pretrained(base, tmp_path / "adapters")
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(freeze_base(again)), expected)
    for name, parameter in again.named_parameters():
        assert parameter.dtype == model.get_parameter(name).dtype
    assert not any("weight" in vars(layer) for layer in again.modules())


def test_an_adapter_does_not_start_from_a_weight_that_is_not_there(plain):
    from torch_switchback.integrations.peft import adapters_over_int8

    base = prepare_model(load(plain))
    with pytest.raises(RuntimeError, match="non-finite"), adapters_over_int8(base):
        adapt(base, init_lora_weights="pissa")
    assert not any("weight" in vars(layer) for layer in base.modules())


@pytest.fixture
def adapted(plain):
    """A PeftModel over a frozen base, which is a copy of the model that was converted."""
    return adapt(copy.deepcopy(convert_model(load(plain))))


def test_the_base_is_saved_when_its_adapters_are_unloaded(adapted, tmp_path):
    model, expected = adapted, logits(adapted)
    base = model.base_model.model
    with pytest.raises(ValueError, match=r"q_proj.base_layer has an adapter; save the PeftModel, or call its unload"):
        base.save_pretrained(tmp_path / "base")
    assert model.unload() is base
    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base")
    assert torch.equal(logits(again), logits(base))
    assert not torch.equal(logits(again), expected)


def test_a_merged_model_saves_plain_weights(adapted, tmp_path):
    from torch_switchback.integrations.peft import unfreeze_base

    expected = logits(adapted)
    merged = unfreeze_base(adapted).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert written(tmp_path / "merged") is None
    again = load(tmp_path / "merged")
    assert not converted(again)
    assert torch.equal(logits(again), logits(ts.revert_switchback(merged)))
    assert not torch.equal(logits(again), expected)


def test_a_transformers_model_with_an_adapter_saves_the_adapter(plain, tmp_path):
    peft = pytest.importorskip("peft")
    from torch_switchback.integrations.peft import adapters_over_int8, freeze_base

    model = convert_model(load(plain))
    model.add_adapter(peft.LoraConfig(**LORA))
    freeze_base(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    prepare_model(load(plain)).save_pretrained(tmp_path / "int8")
    for again in (convert_model(load(plain)), load(tmp_path / "int8")):
        with adapters_over_int8(again):
            again.load_adapter(tmp_path / "adapter")
        assert torch.equal(logits(freeze_base(again)), logits(model))


# Accelerate, torch.save and safetensors


def regressor(recipe, prepared=True):
    model = ts.convert_to_switchback(Regressor(), config=recipe, module_filter_fn=all_but_the_head)
    return ts.prepare_for_eval(model) if prepared else model


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shards(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    def save(model, max_shard_size, safe_serialization=True):
        accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "saved", max_shard_size, safe_serialization)
        return tmp_path / "saved"

    yield save
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("max_shard_size", "safe_serialization"), [("10GB", True), ("4KB", True), ("4KB", False)])
@recipes
def test_accelerate_loads_into_a_prepared_model(recipe, max_shard_size, safe_serialization, shards, tmp_path):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model

    model = regressor(recipe)
    expected = model(X)
    path = shards(model, max_shard_size, safe_serialization)
    assert (len([*path.glob("*.index.json")]) == 1) == (max_shard_size == "4KB")
    for device_map in (None, {"": "cpu"}):
        again = regressor(recipe)
        load_checkpoint_in_model(again, path, device_map, strict=True)
        assert torch.equal(again(X), expected)
    split = {"body.0": "cpu", "body.1": "cpu", "body.2": "disk", "body.3": "cpu", "head": "disk"}
    for device_map in ("auto", {"": "cpu"}, split):
        with init_empty_weights():
            empty = regressor(recipe)
        arguments = {"offload_folder": tmp_path / "offloaded", "offload_buffers": True, "strict": True}
        dispatched = load_checkpoint_and_dispatch(empty, path, device_map, **arguments)
        assert torch.equal(dispatched(X), expected)


def test_accelerate_does_not_load_into_a_model_that_is_not_prepared(shards):
    """With a device_map and strict=False, its default, it only warns, as it does of any checkpoint."""
    from accelerate import load_checkpoint_in_model

    path = shards(regressor("rowwise"), "10GB")
    model = regressor("rowwise", prepared=False)
    with pytest.raises(ValueError, match="does not have a parameter or a buffer named weight_"):
        load_checkpoint_in_model(model, path, {"": "cpu"}, strict=True)
    with pytest.raises(RuntimeError, match=r"mismatch for body\.0\.weight: a prepared layer needs weight_int8 and"):
        load_checkpoint_in_model(model, path)


@recipes
def test_modules_are_copied_and_pickled(recipe, tmp_path):
    model = regressor(recipe)
    torch.save(model, tmp_path / "model.pt")
    others = (
        torch.load(tmp_path / "model.pt", weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    )
    for other in others:
        assert torch.equal(other(X), model(X))
        assert prepared_layers(other) == prepared_layers(model)
        ts.prepare_for_training(other)
    assert len(prepared_layers(model)) == 2
    expected = ts.prepare_for_training(model).state_dict()
    for other in others:
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("prepared", [True, False])
@recipes
def test_safetensors_of_a_prepared_model(recipe, prepared, tmp_path):
    model = regressor(recipe)
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    save_model(model, str(tmp_path / "model.safetensors"))
    again = regressor(recipe, prepared)
    again.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(again(X), model(X))
    again = regressor(recipe, prepared)
    assert load_model(again, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(again(X), model(X))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*body\.0\.weight_int8"):
        load_model(Regressor(), tmp_path / "model.safetensors")
