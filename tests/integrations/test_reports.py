"""Show what is converted of models of Transformers, PEFT and timm, and what the report says of the rest, on the CPU."""

import logging

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tasks import converted
from transformers import LlamaConfig, LlamaForCausalLM, MusicgenDecoderConfig, MusicgenForCausalLM, TrainingArguments

import torch_switchback as ts
from torch_switchback.integrations.transformers import SwitchBackCallback

SMALL = {"vocab_size": 80, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
LLAMA = LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=False)


def convert_all(model):
    return ts.convert_to_switchback(model, module_filter_fn=lambda module, fqn: True)


def left(model):
    return {layer.fqn: layer.reason for layer in ts.conversion_report(model).left}


def test_a_head_that_peft_copies_stays():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = ts.convert_to_switchback(peft.get_peft_model(LlamaForCausalLM(LLAMA), lora))
    assert len(converted(model)) == 7
    assert not any("lm_head" in fqn for fqn in converted(model))
    model.merge_and_unload()


def test_a_head_that_lora_adapts_stays():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(LlamaForCausalLM(LLAMA), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    assert len(converted(ts.convert_to_switchback(model))) == 7
    assert not any("lm_head" in fqn for fqn in converted(model))


def test_several_heads_stay():
    config = MusicgenDecoderConfig(**SMALL, ffn_dim=96, num_codebooks=4)
    model = ts.convert_to_switchback(MusicgenForCausalLM(config))
    assert [fqn for fqn in left(model) if not fqn.startswith("model")] == [f"lm_heads.{index}" for index in range(4)]
    assert len(converted(model)) == 10


def test_heads_of_other_names_stay():
    whisper = transformers.WhisperConfig(
        vocab_size=80,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    models = {
        "proj_out": transformers.WhisperForConditionalGeneration(whisper),
        "cls.predictions.decoder": transformers.BertForMaskedLM(
            transformers.BertConfig(**SMALL, intermediate_size=96, tie_word_embeddings=False)
        ),
    }
    for head, model in models.items():
        assert list(left(ts.convert_to_switchback(model))) == [head]


def test_conv1d_is_named():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=80, n_embd=64, n_layer=1, n_head=4))
    with pytest.warns(UserWarning, match="4 × Conv1D holds its weights itself"):
        ts.convert_to_switchback(model)
    assert ts.conversion_report(model).summary == "0 of 5 linear layers, 0 % of their parameters"


def test_packed_experts_are_named():
    config = transformers.MixtralConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, num_local_experts=4)
    model = ts.convert_to_switchback(transformers.MixtralForCausalLM(config))
    kinds = {layer.kind for layer in ts.conversion_report(model).left}
    assert {"MixtralExperts", "MixtralTopKRouter"} < kinds
    assert all(left(model).values()) and ts.conversion_report(model).summary.startswith("4 of 7 linear layers, ")


def test_a_head_that_is_resized_is_reported():
    model = convert_all(LlamaForCausalLM(LLAMA))
    assert not left(model)
    model.resize_token_embeddings(96)
    assert left(model) == {"lm_head": "added, renamed, replaced or reverted after the conversion"}
    convert_all(model)
    assert not left(model) and len(converted(model)) == 8


def uncalled(model):
    return [layer.fqn for layer in ts.conversion_report(model).converted if layer.reason]


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_timm_layers_that_are_never_called_are_reported(name):
    timm = pytest.importorskip("timm")
    depth = {"depths": (1, 1)} if "swin" in name else {"depth": 1}
    model = convert_all(timm.create_model(name, **depth))
    with torch.no_grad():
        model(torch.randn(1, 3, *model.patch_embed.img_size))
    assert {fqn.rpartition(".")[2] for fqn in uncalled(model)} == {"qkv"}


def test_transformers_layers_that_are_never_called_are_reported():
    config = transformers.WavLMConfig(
        **SMALL, intermediate_size=96, conv_dim=(32,), conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4
    )
    model = convert_all(transformers.WavLMModel(config)).eval()
    with torch.no_grad():
        model(torch.randn(1, 64))
    assert {fqn.rpartition(".")[2] for fqn in uncalled(model)} == {"q_proj", "k_proj", "v_proj", "out_proj"}


@pytest.mark.usefixtures("only_where_it_wins")
def test_the_callback_says_once_that_nothing_was_converted(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="torch_switchback")
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", use_cpu=True, report_to="none")
    ids = torch.arange(8)
    with pytest.warns(UserWarning, match="converts no layer") as caught:
        transformers.Trainer(
            LlamaForCausalLM(LLAMA),
            arguments,
            train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
            callbacks=[SwitchBackCallback()],
        ).train()
    assert sum("converts no layer" in str(warning.message) for warning in caught) == 1
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("torch_switchback")]
    assert lines == ["SwitchBack: 0 of 8 linear layers, 0 % of their parameters"]
