"""Small models, and what one process computes with them."""

import copy

import torch
import torch.distributed as dist
from torch import nn

import torch_switchback as ts
from testing import convert_all


def mlp(hidden=33, out=7):
    """Two layers; 33 rows cut into 2 or 4 leave uneven shards."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, hidden), nn.GELU(), nn.Linear(hidden, out))


def converted(model, **config):
    return convert_all(copy.deepcopy(model), ts.SwitchBackConfig(**config))


def batch(rows=8, features=20, step=0):
    """The whole batch of a step, the same on every rank."""
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(step))


def own(x):
    """This rank's part of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(y):
    return y.square().mean()


def sgd(model):
    """Not Adam, whose first steps are the gradients' signs and so make much of their last bits."""
    return torch.optim.SGD(model.parameters(), lr=0.5)


def assert_close(actual, expected):
    """To 1e-6 of the largest element."""
    difference, largest = (actual - expected).abs().max(), expected.abs().max()
    assert difference <= 1e-6 * largest, f"off by {difference / largest:.2e} of the largest"
