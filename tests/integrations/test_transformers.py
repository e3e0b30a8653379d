"""Hugging Face's Trainer and from_pretrained, on the CPU with a tiny Llama."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers.quantizers.auto as auto
from tasks import assert_falls, assert_reloads_and_reverts, converted
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from torch_switchback import SwitchBackConfig
from torch_switchback.analysis.monitor import CsvWriter
from torch_switchback.integrations.transformers import SwitchBackCallback, SwitchBackQuantizationConfig

VOCABULARY = 64
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
PROJECTIONS = 2 * 7


def counting(length=32):
    """Sequences that count up from anywhere."""
    starts = torch.arange(80)
    return [{"input_ids": ids, "labels": ids} for ids in (starts[:, None] + torch.arange(length)) % VOCABULARY]


def make_trainer(model, path, callbacks=(), **arguments):
    defaults = {
        "max_steps": 20,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(path), **defaults | arguments)
    return Trainer(model, arguments, train_dataset=counting(), callbacks=list(callbacks))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model):
    return model(counting()[0]["input_ids"][None]).logits[0]


def not_the_lm_head(module, fqn):
    return fqn != "lm_head"


def test_callback_converts_trains_and_monitors(tmp_path):
    callback = SwitchBackCallback(monitor_every=8, monitor_layers="*.down_proj", module_filter_fn=not_the_lm_head)
    trainer = make_trainer(LlamaForCausalLM(CONFIG), tmp_path, [callback], bf16=True)
    assert len(converted(trainer.model)) == PROJECTIONS
    trainer.train()
    assert_falls(losses(trainer), to=0.8)
    samples = [entry for entry in trainer.state.log_history if "switchback_step" in entry]
    assert [entry["switchback_step"] for entry in samples] == [0, 8, 16]
    for entry in samples:
        tags = sorted(tag for tag in entry if tag.endswith("/output_snr"))
        assert tags == [f"switchback/model.layers.{layer}.mlp.down_proj/output_snr" for layer in (0, 1)]
        assert all(entry[tag] > 25 for tag in tags)

    trainer.save_model(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert_reloads_and_reverts(trained, plain, logits)


def test_callback_without_monitor_logs_nothing_and_a_writer_gets_all(tmp_path):
    rows = tmp_path / "noise.csv"
    monitor = {"monitor_every": 1, "monitor_layers": "*.0.mlp.up_proj", "writer": CsvWriter(rows)}
    for arguments in ({}, monitor):
        callback = SwitchBackCallback(module_filter_fn=not_the_lm_head, **arguments)
        trainer = make_trainer(LlamaForCausalLM(CONFIG), tmp_path, [callback], max_steps=2)
        trainer.train()
        assert not any("switchback_step" in entry for entry in trainer.state.log_history)
    steps = {line.partition(",")[0] for line in rows.read_text().splitlines()[1:]}
    assert steps == {"0", "1"}


def test_a_callbacks_keywords_are_used_or_named(tmp_path):
    with pytest.raises(TypeError, match="recipe"):
        make_trainer(LlamaForCausalLM(CONFIG), tmp_path, [SwitchBackCallback(recipe="rowwise")])
    for arguments in ({"writer": CsvWriter(tmp_path / "noise.csv")}, {"monitor_layers": "*.up_proj"}):
        with pytest.raises(ValueError, match="monitor_every"):
            SwitchBackCallback(**arguments)


@pytest.mark.parametrize("keyword", ["module_filter_fn", "recipe"])
def test_what_a_config_json_cannot_keep_is_named(keyword):
    with pytest.raises(TypeError, match=keyword):
        SwitchBackQuantizationConfig(**{keyword: "rowwise"})
    with pytest.raises(TypeError, match=keyword):
        SwitchBackQuantizationConfig.from_dict({"quant_method": "switchback", keyword: "rowwise"})


def test_a_name_instead_of_names_is_refused():
    with pytest.raises(TypeError, match="modules_to_not_convert must be a list of names, got 'lm_head'"):
        SwitchBackQuantizationConfig(modules_to_not_convert="lm_head")


class Interrupt(TrainerCallback):
    """Ctrl-C in the first step of the first train()."""

    def __init__(self):
        self.times = 1

    def on_step_begin(self, *_, **trainer):
        if self.times:
            self.times -= 1
            raise KeyboardInterrupt


def test_an_interrupted_training_leaves_no_monitor_to_the_next(tmp_path):
    callback = SwitchBackCallback(monitor_every=100, module_filter_fn=not_the_lm_head)
    trainer = make_trainer(LlamaForCausalLM(CONFIG), tmp_path, [callback, Interrupt()], max_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    _interrupted = callback._monitor  # that someone holds on to it must not keep it at work
    trainer.train()
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_a_model_that_the_trainer_makes_anew_is_converted_too(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", use_cpu=True, report_to="none")
    trainer = Trainer(
        args=arguments,
        model_init=lambda: LlamaForCausalLM(CONFIG),
        train_dataset=counting(),
        callbacks=[SwitchBackCallback(module_filter_fn=not_the_lm_head)],
    )
    before = trainer.model
    trainer.train()
    assert trainer.model is not before
    assert len(converted(trainer.model)) == PROJECTIONS


@pytest.fixture
def saved(tmp_path):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_quantizer_trains_and_round_trips(saved, tmp_path):
    config = SwitchBackConfig("rowwise", mem_efficient=True)
    quantization = SwitchBackQuantizationConfig(config, modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantization)
    assert len(converted(model)) == PROJECTIONS
    assert model.model.layers[0].mlp.up_proj.config == config
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    assert model.hf_quantizer.is_serializable()
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    assert_falls(losses(trainer), to=0.8)

    trainer.save_model(tmp_path / "trained")
    written = json.loads((tmp_path / "trained" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "switchback"
    assert written["config"]["weight_scaling"] == "rowwise"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert converted(again) == converted(model)
    assert again.model.layers[0].mlp.up_proj.config == config
    assert torch.equal(logits(again), logits(model))

    again.dequantize()
    assert not converted(again)
    assert again.dtype == torch.float32
    again.save_pretrained(tmp_path / "dequantized")
    assert "quantization_config" not in json.loads((tmp_path / "dequantized" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized")
    assert_reloads_and_reverts(model, plain, logits)


def test_dequantizing_gives_the_dtype_that_is_asked_for(saved):
    quantization = SwitchBackQuantizationConfig(modules_to_not_convert=[])
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantization)
    model.dequantize(torch.bfloat16)
    assert not converted(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_quantized_checkpoint_loads_as_nn_linear_without_this_library(saved, tmp_path, monkeypatch):
    quantization = SwitchBackQuantizationConfig(modules_to_not_convert=[])
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantization)
    model.save_pretrained(tmp_path / "quantized")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "switchback")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert_reloads_and_reverts(model, plain, logits)


@pytest.mark.parametrize(
    "config",
    [
        None,
        "rowwise",
        SwitchBackConfig(mem_efficient=True),
        {"*.mlp.*": SwitchBackConfig("rowwise"), "*": "switchback"},
    ],
)
def test_any_configuration_survives_json(config):
    quantization = SwitchBackQuantizationConfig(config, modules_to_not_convert=["lm_head"])
    again = SwitchBackQuantizationConfig.from_dict(json.loads(quantization.to_json_string()))
    assert again.config == config
    assert again.to_dict() == quantization.to_dict()
