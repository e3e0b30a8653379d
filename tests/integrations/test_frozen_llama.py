"""A Llama with LoRA over a frozen int8 base: compiled, checkpointed, and trained by the Trainer, on the CPU."""

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from tasks import assert_falls, converted, signal_to_noise
from test_transformers import CONFIG, PROJECTIONS, counting, losses, make_trainer
from transformers import LlamaForCausalLM

import torch_switchback as ts
from torch_switchback.integrations.peft import freeze_base

CONFIGS = {
    "global": "switchback",
    "rowwise": "rowwise",
    "rotated": "rowwise_rotated_features",
    "cached": ts.SwitchBackConfig(cache_quantized_weight=True),
}


def frozen_llama(config="global"):
    torch.manual_seed(0)
    model = ts.convert_to_switchback(LlamaForCausalLM(CONFIG), config=CONFIGS[config])
    assert len(converted(model)) == PROJECTIONS
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = freeze_base(get_peft_model(model, lora))
    assert all(model.get_submodule(name).is_prepared for name in converted(model))
    return model.train()


def batch():
    ids = torch.stack([example["input_ids"] for example in counting()[:4]])
    return {"input_ids": ids, "labels": ids}


def loss_and_gradients(model, run=None):
    model.zero_grad()
    loss = (model if run is None else run)(**batch()).loss
    loss.backward()
    trainable = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * PROJECTIONS
    return loss.detach(), trainable


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_activation_checkpointing_changes_no_bit(config, use_reentrant):
    model = frozen_llama(config)
    loss, expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    again, gradients = loss_and_gradients(model)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(
    ("config", "backend"),
    [*((config, "aot_eager") for config in CONFIGS), ("rowwise", "inductor"), ("cached", "inductor")],
)
def test_compiled(config, backend):
    model = frozen_llama(config)
    loss, expected = loss_and_gradients(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        again, gradients = loss_and_gradients(model, compiled)
        torch.testing.assert_close(again, loss, rtol=1e-3, atol=0)
        for name, gradient in gradients.items():
            assert signal_to_noise(gradient, expected[name]) > 30, name


def test_the_trainer_resumes_as_if_never_stopped(tmp_path):
    def train(path, resume_from_checkpoint=None):
        trainer = make_trainer(frozen_llama(), tmp_path / path, max_steps=10, save_strategy="steps", save_steps=5)
        trainer.train(resume_from_checkpoint)
        return trainer

    whole = train("whole")
    assert_falls(losses(whole), to=0.99)
    resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    saved = {path.name for path in (tmp_path / "whole" / "checkpoint-5").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
