"""A small model that learns something, and what must hold of every trained model that was converted."""

from statistics import mean

import torch
from torch import nn

import torch_switchback as ts


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.body(x))


def all_but_the_head(module, fqn):
    return not fqn.endswith("head")


def regression_batches(count, size=64):
    """Pairs x [size, 32], y [size, 4] of one fixed function."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 4, generator=generator) / 4
    for _ in range(count):
        x = torch.randn(size, 32, generator=generator)
        yield x, (x @ weight).tanh()


def converted(model):
    """The names of its SwitchBack layers."""
    return [name for name, module in model.named_modules() if isinstance(module, ts.SwitchBackLinear)]


def assert_falls(losses, to):
    assert mean(losses[-5:]) < to * mean(losses[:5]), losses


def signal_to_noise(actual, expected):
    noise = (actual.double() - expected.double()).norm()
    return (20 * torch.log10(expected.double().norm() / noise)).item()


@torch.no_grad()
def assert_reloads_and_reverts(trained, plain, run):
    """plain was loaded from what the trained model saved. run: model -> output [tokens, features]."""
    assert converted(trained)
    assert not converted(plain)
    parameters = dict(trained.named_parameters())
    assert parameters.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    expected = run(plain)
    assert 25 < signal_to_noise(run(trained), expected) < 70
    ts.revert_switchback(trained)
    assert not converted(trained)
    assert all(parameters[name] is parameter for name, parameter in trained.named_parameters())
    assert torch.equal(run(trained), expected)
