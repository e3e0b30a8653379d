"""Launches made again for other arguments of a kind: each tensor in its place, and none kept. No GPU is needed."""

import ctypes
import gc
import math
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch

from torch_switchback.kernels import _replay
from torch_switchback.kernels._repeat import Kernel


def kernel(x, y, factor, out):
    out.copy_(x * y * factor)


def kernel_at(shape, *args):
    """The same as a compiled kernel would do it, that is told where tensors lie."""

    def tensor(address):
        return torch.frombuffer((ctypes.c_float * math.prod(shape)).from_address(address), dtype=torch.float32)

    kernel(*(tensor(arg).view(shape) if type(arg) is int else arg for arg in args))


def launch(*args, by_address=False):
    kernel(*args)
    if by_address:
        _replay.note(Kernel(kernel_at, overlaps=False), args[0].shape, *args)
    else:
        _replay.note(kernel, *args)


def run(function, args):
    return _replay.run(function, args, _replay.kind_of(args))


@pytest.fixture
def function(monkeypatch):
    """Returns x * x * y * factor, None, zeros and y; counts how often it is asked to."""
    monkeypatch.setattr(_replay, "_replays", {})

    def function(x, y, factor):
        function.calls += 1
        by_address = x.is_contiguous() and y.is_contiguous() and y.dtype == torch.float32
        sums, square, product = _replay.scratch(x, 3), _replay.scratch(x, *x.shape), _replay.scratch(x, *x.shape)
        out = torch.empty_like(x)
        _replay.note_memory(out)
        launch(x, x.view(x.shape), 1.0, square, by_address=by_address)
        launch(square, y.view(y.shape), 1.0, product, by_address=by_address)
        _replay.zero(sums)
        launch(product, 1.0, factor, out)
        return out, None, sums, y

    function.calls = 0
    return function


def check(function, x, y, factor=2.0):
    out, nothing, sums, same = run(function, (x, y, factor))
    assert torch.equal(out, x * x * y * factor)
    assert nothing is None and same is y
    assert sums.shape == (3,) and not sums.any()


def two(*shape):
    return torch.randn(shape), torch.randn(shape)


def test_a_function_runs_once_for_arguments_of_a_kind(function):
    for _ in range(3):
        check(function, *two(4, 5))
    assert function.calls == 1


def test_one_that_runs_within_another_is_a_part_of_it(function):
    def twice(x, y, factor):
        y, *_ = run(function, (x, y, 1.0))
        out, *_ = run(function, (x, y, factor))
        return out

    for _ in range(3):
        x, y = two(4, 5)
        assert torch.equal(run(twice, (x, y, 2.0)), x * x * (x * x * y) * 2.0)
    assert function.calls == 2
    assert len(_replay._replays) == 1


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
def test_arguments_of_another_kind_are_launched_anew(x, y, factor, function):
    check(function, *two(4, 5))
    for _ in range(2):
        check(function, x, y, factor)
    assert function.calls == 2
    check(function, *two(4, 5))
    assert function.calls == 2


def test_two_arguments_in_one_place_say_nothing_of_others(function):
    x, y = two(4, 5)
    for args in ((x, x), (x, y), (y, y)):
        check(function, *args)


def test_a_function_that_copies_its_arguments_runs_every_time(function):
    def copying(x, y, factor):
        out, nothing, sums, _ = function(x.clone(), y, factor)
        return out, nothing, sums, y

    for _ in range(2):
        check(copying, *two(4, 5))
    assert function.calls == 2


@pytest.mark.parametrize("result", [torch.clone, torch.t], ids=["copy", "view"])
def test_a_function_that_returns_something_else_runs_every_time(result, function):
    def other(x, y):
        return result(function(x, y, 2.0)[0])

    for _ in range(2):
        x, y = two(4, 5)
        assert torch.equal(run(other, (x, y)), result(x * x * y * 2.0))
    assert function.calls == 2


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

    def widened(x_t):
        calls.append(1)
        return _replay.widened(x_t.t(), 8)

    kept = []
    for _ in range(3):
        x = operands()
        out = run(widened, (x.t(),))
        assert torch.equal(out[:, :cols], x) and not out[:, cols:].any()
        kept.append((x, out))  # so that the next ones lie elsewhere
    assert len(calls) == 1


def test_a_function_that_fails_leaves_nothing_behind(function):
    def failing(x, y, factor):
        function(x, y, factor)
        raise RuntimeError("no C compiler")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no C compiler"):
            check(failing, *two(4, 5))
    check(function, *two(4, 5))
    assert function.calls == 3


def test_no_tensor_is_kept(function):
    x, y = two(4, 5)
    references = [weakref.ref(x), weakref.ref(y)]
    check(function, x, y)
    del x, y
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert _replay._recording.calls is None
    assert _replay._recording.memory == []


@pytest.mark.parametrize("is_kernel", [False, True])
def test_descriptors_get_the_new_tensor_and_keep_the_rest(is_kernel, monkeypatch):
    monkeypatch.setattr(_replay, "_replays", {})

    @dataclass
    class Descriptor:
        base: torch.Tensor
        block_shape: list

    seen = []

    def see(descriptor):
        seen.append((descriptor.base.data_ptr(), descriptor.block_shape))

    def described(x):
        descriptor = Descriptor(x, [64, 128])
        see(descriptor)
        _replay.note(Kernel(see, overlaps=False) if is_kernel else see, descriptor)
        return x

    tensors = two(4, 5)
    for x in tensors:
        run(described, (x,))
    assert seen == [(x.data_ptr(), [64, 128]) for x in tensors]


def test_the_number_of_replays_is_bounded(function, monkeypatch):
    monkeypatch.setattr(_replay, "MOST_REPLAYS", 3)
    for rows in range(1, 9):
        check(function, *two(rows, 5))
        assert len(_replay._replays) <= 3


def test_threads_record_apart(function):
    """A backward runs in a thread of its own, at the same time as another's forward."""
    entered, may_leave = threading.Event(), threading.Event()

    def slow(x, y, factor):
        entered.set()
        may_leave.wait(10)
        return function(x, y, factor)

    thread = threading.Thread(target=check, args=(slow, *two(4, 5)))
    thread.start()
    entered.wait(10)
    check(function, *two(4, 5))
    may_leave.set()
    thread.join()
    for each in (slow, function):
        check(each, *two(4, 5))
    assert function.calls == 2


def test_a_pending_negation_is_of_no_kind():
    x = torch.randn(5, 7, dtype=torch.complex64).conj().imag
    assert _replay.kind_of((x,)) is None
    plain = x.resolve_neg()
    assert _replay.kind_of((plain, None, torch.nn.Parameter(plain), torch.float16)) is not None


def test_gradients_of_several_backwards_at_once_are_of_no_kind():
    """They have no memory of their own, though nothing else tells them from tensors that have."""
    of_no_kind = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            of_no_kind.append(_replay.kind_of((grad,)) is None)
            return grad

    x = torch.randn(3, requires_grad=True)
    torch.autograd.grad(Identity.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert of_no_kind == [True]


def test_what_is_of_no_kind_is_called_and_not_kept(function):
    class Other(torch.Tensor):
        pass

    x, y = two(4, 5)
    assert _replay.kind_of((x.as_subclass(Other), y, 2.0)) is None
    for _ in range(2):
        _replay.run(function, (x, y, 2.0), None)
    assert function.calls == 2
    assert not _replay._replays


def test_zeros_without_memory_are_of_no_kind():
    """But a tensor without elements is of one."""
    assert _replay.kind_of((torch._efficientzerotensor((3,)),)) is None
    assert _replay.kind_of((torch.empty(0, 3),)) is not None


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_kernel_stays_one_that_overlaps(overlaps, monkeypatch):
    monkeypatch.setattr(_replay, "_replays", {})

    def launching(x):
        _replay.note(Kernel(print, overlaps), x)
        return x

    run(launching, two(4, 5)[:1])
    (replay,) = _replay._replays.values()
    assert [step.overlaps for step in replay._trace.steps] == [overlaps]
