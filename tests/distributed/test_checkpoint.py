"""Distributed Checkpoint: what is saved at one world size is loaded at another, and goes on as if never stopped."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import batch, converted, loss_of, mlp, own
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from torch_switchback.distributed import precompute_absmax_for_fsdp

CONFIGS = [{}, {"all_gather": "int8"}, {"weight_scaling": "rowwise", "all_gather": "int8"}]


def build(config):
    model = converted(mlp(), **config)
    for module in (model[0], model[2], model):
        fully_shard(module)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps):
    """The losses of a batch's samples before each step, each of whole batches, whoever computed them."""
    losses = []
    for step in steps:
        y = model(own(batch(step=step)))
        samples = [torch.empty(y.shape) for _ in range(dist.get_world_size())]
        dist.all_gather(samples, y.detach())
        losses.append(torch.cat(samples).square().sum(1))
        loss_of(y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if model[0].config.all_gather == "int8":
            precompute_absmax_for_fsdp(model)
    return torch.stack(losses)


def save_and_go_on(directory, config):
    model, optimizer = build(config)
    train(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{directory}/checkpoint")
    losses = train(model, optimizer, range(3, 6))
    if dist.get_rank() == 0:
        torch.save(losses, f"{directory}/losses.pt")
        torch.save(list(weights), f"{directory}/keys.pt")


def load(directory, config):
    model, optimizer = build(config)
    train(model, optimizer, range(1))  # other weights, and absmaxes of them
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{directory}/checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return model, optimizer


def go_on_to_the_bit(directory, config):
    losses = train(*load(directory, config), range(3, 6))
    assert torch.equal(losses, torch.load(f"{directory}/losses.pt"))


def go_on_with_other_sums(directory, config):
    """The loaded weights give the same loss; gradients of other parts of a batch are summed in another order."""
    losses, expected = train(*load(directory, config), range(3, 6)), torch.load(f"{directory}/losses.pt")
    assert torch.equal(losses[0], expected[0])
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("saved", "loaded"), [(2, 2), (4, 2), (2, 4)])
def test_resume(world, tmp_path, saved, loaded, config):
    arguments = {"directory": str(tmp_path), "config": config}
    world(saved).run(save_and_go_on, arguments)
    world(loaded).run(go_on_to_the_bit if saved == loaded else go_on_with_other_sums, arguments)
    assert torch.load(tmp_path / "keys.pt") == list(mlp().state_dict())


def test_a_plain_process_loads_it(world, tmp_path):
    """Without torch.distributed, and into nn.Linear."""
    world(4).run(save_and_go_on, {"directory": str(tmp_path), "config": {"all_gather": "int8"}})
    model = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 7))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    model.load_state_dict(state["model"])
    losses = converted(model)(batch(step=3)).square().sum(1)
    assert torch.equal(losses, torch.load(tmp_path / "losses.pt")[0])
