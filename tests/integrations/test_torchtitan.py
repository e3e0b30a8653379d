"""torchtitan's converter on its own Llama configuration, with its Trainer and without."""

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchtitan")

from tasks import assert_falls, assert_reloads_and_reverts, converted
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3 import model_registry
from torchtitan_model import CONFIG, converter, model_spec

from torch_switchback import SwitchBackConfig
from torch_switchback.integrations.torchtitan import SwitchBackLinearConverter, SwitchBackTitanLinear


def build(*converters):
    """The model as torchtitan's Trainer builds and initializes it."""
    with torch.device("meta"):
        model = model_spec(*converters).model.build()
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model.train()


def logits(model):
    return model(TOKENS[:, :-1], torch.arange(32).expand(len(TOKENS), -1))


TOKENS = torch.arange(4)[:, None] * 100 + torch.arange(33)


def test_trainer_trains_resumes_and_its_checkpoint_is_the_stock_models(tmp_path):
    process = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("torchtitan_training.py"), tmp_path],
        env=os.environ | process | {"HF_HOME": str(tmp_path / "huggingface")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_converted_model_trains_and_its_state_is_the_stock_models():
    model, stock = build(converter()), build()
    names = converted(model)
    assert names == [name for name, module in stock.named_modules() if type(module) is Linear and name != "lm_head"]
    assert len(names) == 2 * 5
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer) is SwitchBackTitanLinear
        assert layer.config == CONFIG
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours, theirs), f"{name} was initialized otherwise"

    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(logits(model).flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_falls(losses, to=0.6)

    stock.load_state_dict(model.state_dict(), strict=True)
    assert_reloads_and_reverts(model, stock, logits)
    assert all(type(model.get_submodule(name)) is Linear for name in names)


def test_lora_of_torchtitan_comes_on_top():
    from torchtitan.components.lora import LoRAConverter

    model = build(converter(), LoRAConverter.Config(rank=4))
    layer = model.get_submodule("layers.0.feed_forward.w1")
    assert isinstance(layer, SwitchBackTitanLinear)
    assert not layer.weight.requires_grad
    assert type(layer.lora_a) is Linear
    logits(model).sum().backward()
    assert layer.weight.grad is None
    assert layer.lora_b.weight.grad.isfinite().all()


def test_only_plain_linears_are_replaced_and_others_keep_their_fields():
    seen = {}

    def everything(module, fqn):
        seen[fqn] = (module.in_features, module.out_features, module.weight.device.type)
        return True

    spec = model_registry("debugmodel", converters=[converter(module_filter_fn=everything)])
    assert seen["lm_head"] == (256, 2048, "meta")
    stock = dict((fqn, each) for fqn, each, *_ in model_registry("debugmodel").model.traverse(Linear.Config))
    for fqn, each, *_ in spec.model.traverse(Linear.Config):
        assert type(each) is SwitchBackTitanLinear.Config
        for field in dataclasses.fields(stock[fqn]):
            if field.name != "param_init":  # functions, compared by what they initialize above
                assert getattr(each, field.name) == getattr(stock[fqn], field.name)


def test_arguments_have_the_names_that_sharding_configurations_know():
    ours, theirs = (inspect.signature(layer.forward).parameters for layer in (SwitchBackTitanLinear, Linear))
    assert list(ours) == list(theirs)


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="recipe"):
        SwitchBackLinearConverter.Config(recipe="rowwise")
    with pytest.raises(TypeError, match="recipe"):
        model_registry("debugmodel", converters=[SwitchBackLinearConverter.Config(conversion={"recipe": "rowwise"})])


def test_int8_all_gather_is_refused():
    with pytest.raises(ValueError, match="all_gather must be 'high_precision', got 'int8'"):
        model_registry("debugmodel", converters=[converter(SwitchBackConfig(all_gather="int8"))])
