"""Models of timm and Transformers with prepared layers: those whose weight the model reads itself stay as they are."""

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

import timm
import transformers
from tasks import converted

import torch_switchback as ts

TOKENS = torch.arange(16).reshape(2, 8)
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}


def timm_model(name, size, **arguments):
    model = timm.create_model(name, img_size=size, num_classes=4, **arguments)
    return model, lambda: model(torch.ones(2, 3, size, size))


def language_model(architecture, config, **inputs):
    model = architecture(config)
    return model, lambda: model(input_ids=TOKENS, **inputs).logits


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    return language_model(transformers.T5ForConditionalGeneration, config, labels=TOKENS)


def wavlm():
    config = transformers.WavLMConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    model = transformers.WavLMModel(config)
    return model, lambda: model(torch.linspace(-1, 1, 1600).reshape(2, 800)).last_hidden_state


BLOCKS = {"embed_dim": 64, "depth": 2, "num_heads": 4}
STAGES = {"embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)}
MODELS = {
    "BEiT": (lambda: timm_model("beit_base_patch16_224", 32, **BLOCKS), {"qkv"}),
    "EVA02": (lambda: timm_model("eva02_tiny_patch14_224", 28, **BLOCKS), {"qkv"}),
    "SwinV2": (lambda: timm_model("swinv2_tiny_window8_256", 64, **STAGES), {"qkv"}),
    "ViT": (lambda: timm_model("vit_tiny_patch16_224", 32, **BLOCKS), set()),
    "T5": (t5, {"wo"}),
    "WavLM": (wavlm, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "Mamba": (
        lambda: language_model(transformers.MambaForCausalLM, transformers.MambaConfig(**SMALL, state_size=8)),
        {"x_proj", "dt_proj", "out_proj"},
    ),
    "Llama": (
        lambda: language_model(
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig(**SMALL, intermediate_size=96, num_attention_heads=4),
        ),
        set(),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_a_model_reads_stay_and_the_others_are_prepared(name, recwarn):
    make, expected = MODELS[name]
    model, run = make()
    ts.convert_to_switchback(model.eval())
    layers = {fqn: model.get_submodule(fqn) for fqn in converted(model)}
    before = run()
    recwarn.clear()
    ts.prepare_for_eval(model)
    left = [fqn for fqn, layer in layers.items() if not layer.is_prepared]
    assert {fqn.rpartition(".")[2] for fqn in left} == expected
    assert [str(warning.message).startswith("prepare_for_eval leaves") for warning in recwarn] == [True] * bool(left)
    assert torch.equal(run(), before)
    model.train()
    run().square().mean().backward()
    if left:
        for fqn in left:
            layers[fqn].prepare_for_eval()
        with pytest.raises(AttributeError, match="has no weight while it is prepared"):
            model.eval()
            run()
