"""The layer works after faults around it: memory, hooks, worker processes."""

import gc
import multiprocessing
import weakref
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import torch_switchback as ts
from testing import STRATEGIES, gradients, make_layer, patch_operations

strategies = pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)


@pytest.fixture
def step(config, device):
    """A step of a layer, always on the same numbers: its output and gradients."""
    layer = make_layer(config, device=device)
    x, grad = torch.randn(6, 64, device=device), torch.randn(6, 48, device=device)
    return lambda: gradients(layer, x, grad)


def assert_same_step(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


class FailsOnce:
    """A function that fails at its call number ``at``, counted from 0."""

    def __init__(self, function, at, error):
        self.function, self.left, self.error = function, at, error

    def __call__(self, *args):
        self.left -= 1
        if self.left == -1:
            raise self.error
        return self.function(*args)


@strategies
@pytest.mark.parametrize("at", range(4))
def test_out_of_memory_in_the_middle(at, config, step, monkeypatch):
    """Any operation that a step calls may fail: at least two in the forward and two in the backward."""
    expected = step()
    fails = FailsOnce(lambda operation, *args: operation(*args), at, torch.OutOfMemoryError("CUDA out of memory"))
    patch_operations(monkeypatch, config, lambda operation: partial(fails, operation))
    with pytest.raises(torch.OutOfMemoryError):
        step()
    assert_same_step(step(), expected)


@strategies
@pytest.mark.parametrize("where", ["pack", "unpack"])
def test_an_exception_inside_a_saved_tensor_hook(where, config, step):
    expected = step()
    for at in range(3):
        hooks = {"pack": lambda tensor: tensor, "unpack": lambda tensor: tensor}
        hooks[where] = FailsOnce(hooks[where], at, OSError("no space left"))
        with pytest.raises(OSError, match="no space left"), torch.autograd.graph.saved_tensors_hooks(*hooks.values()):
            step()
        assert_same_step(step(), expected)


@strategies
def test_an_exception_leaves_nothing_behind(config, device):
    layer = make_layer(config, device=device)
    x = torch.randn(6, 64, device=device, requires_grad=True) * 1.0
    freed = weakref.ref(x)

    def fail(tensor):
        raise OSError("no space left")

    with pytest.raises(OSError), torch.autograd.graph.saved_tensors_hooks(fail, lambda tensor: tensor):
        layer(x)
    del x
    gc.collect()
    assert freed() is None


class Quantized(Dataset):
    """Rows that the worker which loads them has quantized and put through a layer."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            return x, *ts.ops.quantize_rowwise(x), self.layer(x)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_quantize_while_the_parent_trains(method, device):
    layer = ts.SwitchBackLinear(64, 48, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(3, 64, device=device)).sum().backward()  # the parent has computed before it forks
    theirs = ts.SwitchBackLinear(64, 48)
    loader = DataLoader(
        Quantized(theirs), num_workers=1, multiprocessing_context=multiprocessing.get_context(method), timeout=120
    )
    count = 0
    for x, qdata, absmax, y in loader:
        x, qdata, absmax, y = x[0], qdata[0], absmax[0], y[0]
        assert torch.equal(y, theirs(x))
        on_device = ts.ops.quantize_rowwise(x.to(device))
        assert torch.equal(qdata, on_device[0].cpu())
        assert torch.equal(absmax, on_device[1].cpu())
        layer(x.to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1
    assert count == 8
    assert layer.weight.isfinite().all()
