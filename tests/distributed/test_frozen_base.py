"""Adapters over a base that is kept in int8: DistributedDataParallel and fully_shard train them as one process does."""

import pytest
import torch
from dist_utils import in_processes
from models import assert_close, batch, converted, loss_of, mlp, own, sgd
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import torch_switchback as ts

CONFIGS = [
    {},
    {"weight_scaling": "rowwise"},
    {"weight_scaling": "rowwise", "rotate_features": 16},
    {"cache_quantized_weight": True},
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=str)


class Adapted(nn.Module):
    """A frozen layer, and LoRA's two matrices beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def frozen(config):
    first, activation, last = converted(mlp(hidden=32), **config)
    torch.manual_seed(1)
    return ts.prepare_for_eval(nn.Sequential(Adapted(first), activation, Adapted(last)))


def steps(model, rows=lambda x: x, count=3):
    """Train, and return the outputs of each step's batch."""
    optimizer = sgd(model)
    outputs = []
    for step in range(count):
        y = model(rows(batch(step=step)))
        loss_of(y).backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(y.detach())
    return outputs


def int8_buffers(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(("weight_int8", "weight_absmax"))}


@pytest.mark.parametrize("broadcast_buffers", [False, True])
@configs
@in_processes(2)
def test_ddp(config, broadcast_buffers):
    expected = steps(frozen(config))
    model = frozen(config)
    before = {name: buffer.clone() for name, buffer in int8_buffers(model).items()}
    parallel = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    for actual, whole in zip(steps(parallel, own), expected, strict=True):
        assert_close(actual, own(whole))
    for name, buffer in int8_buffers(model).items():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("reshard", [False, True])
@configs
@in_processes(2)
def test_fsdp_shards_the_adapters_and_keeps_the_int8_values_whole(config, reshard):
    expected = steps(frozen(config))
    model = frozen(config)
    before = {name: buffer.clone() for name, buffer in int8_buffers(model).items()}
    for block in (model[0], model[2]):
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    for actual, whole in zip(steps(model, own), expected, strict=True):
        assert_close(actual, own(whole))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert len(before) == 4
    for name, buffer in int8_buffers(model).items():
        assert type(buffer) is torch.Tensor
        assert torch.equal(buffer, before[name]), name


@configs
@in_processes(2)
def test_fsdp_with_a_policy_computes_in_its_dtype(config):
    model = frozen(config)
    for block in (model[0], model[2]):
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x = own(batch())
    y = model(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, frozen(config).to(torch.bfloat16)(x.to(torch.bfloat16)))
    loss_of(y).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("restore", [ts.prepare_for_training, ts.revert_switchback])
@in_processes(2)
def test_a_weight_does_not_come_back_to_train_under_fully_shard(restore):
    model = ts.prepare_for_eval(converted(mlp()))
    fully_shard(model)
    with pytest.raises(RuntimeError, match="0: call it before fully_shard wraps the model"):
        restore(model)
    assert model[0].is_prepared
    model = ts.prepare_for_eval(converted(mlp()))
    with pytest.raises(RuntimeError, match=r"\.0: call it before FullyShardedDataParallel wraps the model"):
        restore(FullyShardedDataParallel(model, device_id=torch.device("cpu")))
    model = frozen({})
    for block in (model[0], model[2]):
        fully_shard(block)
    ts.prepare_for_training(model)
    assert type(model[0].base.weight) is nn.Parameter and not model[0].base.weight.requires_grad


@in_processes(2)
def test_a_float_state_that_would_train_is_not_loaded_under_fully_shard():
    state = converted(mlp()).state_dict()
    model = ts.prepare_for_eval(converted(mlp()))
    fully_shard(model)
    with pytest.raises(RuntimeError, match=r"mismatch for 0\.weight: it would train, and fully_shard does not know it"):
        model.load_state_dict(state)
    assert model[0].is_prepared and model[2].is_prepared


@in_processes(2)
def test_what_fully_shard_leaves_to_other_layers_is_put_back_and_prepared():
    model = ts.prepare_for_eval(converted(mlp()))
    fully_shard(model[2])  # becomes a subclass, which is not reverted
    with pytest.warns(UserWarning, match="leaves '2' as it is"):
        ts.revert_switchback(model)
    assert type(model[0]) is nn.Linear
    model = converted(mlp()).requires_grad_(False)
    model.append(nn.Linear(model[2].out_features, 4))
    fully_shard(model, ignored_params={*model[0].parameters(), *model[2].parameters()})
    assert ts.prepare_for_eval(model)[0].is_prepared
