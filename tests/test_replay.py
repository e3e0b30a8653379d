"""Launches made again for other arguments of a kind: each tensor in its place, and none kept. No GPU is needed."""

import gc
import threading
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from torch_switchback.kernels import _replay


def kernel(x, y, factor, out):
    out.copy_(x * y * factor)


def launch(*args):
    kernel(*args)
    _replay.note(kernel, *args)


@pytest.fixture
def launcher(monkeypatch):
    """Fills sums with 0 and out with x * x * y * factor; counts how often it is asked to."""
    monkeypatch.setattr(_replay, "_replays", {})

    def launcher(x, y, factor, out, sums):
        launcher.calls += 1
        product = _replay.scratch(x, *x.shape)
        launch(x, y.view(y.shape), 1.0, product)
        launch(x, product, factor, out)
        _replay.zero(sums)

    launcher.calls = 0
    return launcher


def check(launcher, x, y, factor=2.0):
    out, sums = torch.full_like(x, 99), torch.full((3,), 99.0)
    _replay.run(launcher, (x, y, factor), (out, sums))
    assert torch.equal(out, x * (x * y) * factor)
    assert not sums.any()


def two(*shape):
    return torch.randn(shape), torch.randn(shape)


def test_a_launcher_runs_once_for_arguments_of_a_kind(launcher):
    for _ in range(3):
        check(launcher, *two(4, 5))
    assert launcher.calls == 1


@pytest.mark.parametrize(
    ("x", "y", "factor"),
    [
        (torch.randn(5, 4), torch.randn(5, 4), 2.0),
        (torch.randn(4, 5), torch.randn(5, 4).t(), 2.0),
        (torch.randn(4, 5), torch.full((4, 5), 2.0, dtype=torch.float16), 2.0),
        (torch.randn(4, 5), torch.randn(21)[1:].view(4, 5), 2.0),
        (torch.randn(4, 5), torch.randn(4, 5), 3.0),
    ],
    ids=["shape", "strides", "dtype", "alignment", "value"],
)
def test_arguments_of_another_kind_are_launched_anew(x, y, factor, launcher):
    check(launcher, *two(4, 5))
    for _ in range(2):
        check(launcher, x, y, factor)
    assert launcher.calls == 2
    check(launcher, *two(4, 5))
    assert launcher.calls == 2


def test_two_arguments_in_one_place_say_nothing_of_others(launcher):
    x, y = two(4, 5)
    check(launcher, x, x)
    check(launcher, x, y)
    check(launcher, y, y)
    assert launcher.calls == 2


def test_a_launcher_that_copies_its_arguments_runs_every_time(launcher):
    def copying(x, y, factor, out, sums):
        launcher(x.clone(), y, factor, out, sums)

    for _ in range(2):
        check(copying, *two(4, 5))
    assert launcher.calls == 2


@pytest.mark.parametrize("shape", [(4, 5), (4, 8), (1, 1), (4, 0)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice"])
def test_widened_copies_are_made_again(layout, shape, monkeypatch):
    """Of views of the arguments too."""
    monkeypatch.setattr(_replay, "_replays", {})
    rows, cols = shape
    operands = {
        "contiguous": lambda: torch.randn(rows, cols),
        "transposed": lambda: torch.randn(cols, rows).t(),
        "slice": lambda: torch.randn(rows, cols + 2)[:, 1:-1],
    }[layout]
    calls = []

    def launcher(x_t, out):
        calls.append(1)
        wide = _replay.widened(x_t.t(), 8)
        out.copy_(wide)
        _replay.note(torch.Tensor.copy_, out, wide)

    kept = []
    for _ in range(3):
        x, out = operands(), torch.full((rows, 8), 99.0)
        _replay.run(launcher, (x.t(),), (out,))
        assert torch.equal(out[:, :cols], x) and not out[:, cols:].any()
        kept.append(x)  # so that the next one lies elsewhere
    assert len(calls) == 1


def test_a_launcher_that_fails_leaves_nothing_behind(launcher):
    def failing(x, y, factor, out, sums):
        launcher(x, y, factor, out, sums)
        raise RuntimeError("no C compiler")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no C compiler"):
            check(failing, *two(4, 5))
    check(launcher, *two(4, 5))
    assert launcher.calls == 3


def test_no_tensor_is_kept(launcher):
    x, y = two(4, 5)
    references = [weakref.ref(x), weakref.ref(y)]
    check(launcher, x, y)
    del x, y
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert _replay._recording.calls is None
    assert _replay._recording.scratch == []


def test_descriptors_get_the_new_tensor_and_keep_the_rest(monkeypatch):
    monkeypatch.setattr(_replay, "_replays", {})

    @dataclass
    class Descriptor:
        base: torch.Tensor
        block_shape: list

    seen = []

    def see(descriptor):
        seen.append(SimpleNamespace(**vars(descriptor)))

    def launcher(x, out):
        descriptor = Descriptor(x, [64, 128])
        see(descriptor)
        _replay.note(see, descriptor)

    tensors = two(4, 5)
    for x in tensors:
        _replay.run(launcher, (x,), (torch.empty(1),))
    assert [one.base is x for one, x in zip(seen, tensors, strict=True)] == [True, True]
    assert [one.block_shape for one in seen] == [[64, 128]] * 2


def test_the_number_of_replays_is_bounded(launcher, monkeypatch):
    monkeypatch.setattr(_replay, "MOST_REPLAYS", 3)
    for rows in range(1, 9):
        check(launcher, *two(rows, 5))
        assert len(_replay._replays) <= 3


def test_threads_record_apart(launcher):
    """A backward runs in a thread of its own, at the same time as another's forward."""
    entered, may_leave = threading.Event(), threading.Event()

    def slow(x, y, factor, out, sums):
        entered.set()
        may_leave.wait(10)
        launcher(x, y, factor, out, sums)

    thread = threading.Thread(target=check, args=(slow, *two(4, 5)))
    thread.start()
    entered.wait(10)
    check(launcher, *two(4, 5))
    may_leave.set()
    thread.join()
    for each in (slow, launcher):
        check(each, *two(4, 5))
    assert launcher.calls == 2
