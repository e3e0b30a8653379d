"""Accelerate's Accelerator, on the CPU."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")

from accelerate import load_checkpoint_in_model
from accelerate.state import AcceleratorState
from tasks import (
    Regressor,
    all_but_the_head,
    assert_falls,
    assert_reloads_and_reverts,
    converted,
    regression_batches,
)

import torch_switchback.integrations.accelerate as bridge
from torch_switchback import SwitchBackConfig, convert_to_switchback
from torch_switchback.integrations.accelerate import SwitchBackAccelerator


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerator(tmp_path):
    config = SwitchBackConfig(mem_efficient=True)
    accelerator = SwitchBackAccelerator(
        conversion={"config": config, "module_filter_fn": all_but_the_head}, cpu=True, mixed_precision="bf16"
    )
    model = Regressor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert converted(model) == ["body.0", "body.2"]
    assert model.body[0].config == config
    dtypes = []
    model.head.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    losses = []
    for x, y in regression_batches(40):
        loss = F.mse_loss(prepared(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert set(dtypes) == {torch.bfloat16}
    assert_falls(losses, to=0.6)

    accelerator.save_model(prepared, tmp_path)
    plain = Regressor()
    load_checkpoint_in_model(plain, tmp_path, strict=True)
    x = torch.randn(16, 32)
    trained = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert_reloads_and_reverts(trained, plain, lambda model: model(x))


@pytest.mark.parametrize("prepare", ["prepare", "prepare_model"])
def test_a_model_is_converted_once_whatever_prepares_it(prepare, monkeypatch):
    calls = []
    monkeypatch.setattr(
        bridge, "convert_to_switchback", lambda *args, **kw: calls.append(convert_to_switchback(*args, **kw))
    )
    accelerator = SwitchBackAccelerator(conversion={"module_filter_fn": all_but_the_head}, cpu=True)
    model = Regressor()
    prepared = getattr(accelerator, prepare)(model)
    assert converted(model) == ["body.0", "body.2"]
    getattr(accelerator, prepare)(prepared)
    assert calls == [model]


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="recipe"):
        SwitchBackAccelerator(recipe="rowwise", cpu=True)
    accelerator = SwitchBackAccelerator(conversion={"recipe": "rowwise"}, cpu=True)
    for prepare in (accelerator.prepare, accelerator.prepare_model):
        with pytest.raises(TypeError, match="recipe"):
            prepare(Regressor())


def test_preparing_a_prepared_model_again_leaves_it():
    accelerator = SwitchBackAccelerator(conversion={"module_filter_fn": all_but_the_head}, cpu=True)
    model = accelerator.prepare(Regressor())
    accelerator._conversion = {}
    assert converted(accelerator.prepare(model)) == ["body.0", "body.2"]
