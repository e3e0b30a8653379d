"""Kernels that the CUDA driver launches again: as Triton's launches, in any thread and stream."""

import gc
import threading

import pytest
import torch
from triton import knobs

import torch_switchback as ts
from test_nn import STRATEGIES, gradients, make_layer
from torch_switchback.kernels import _repeat, _replay

pytestmark = pytest.mark.skipif(bool(_repeat.why_triton_launches()), reason=_repeat.why_triton_launches())
strategies = pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    monkeypatch.setattr(_replay, "_replays", {})


def repetitions():
    return list(_replay._replays.values())


def kernels():
    """All that are launched again."""
    return [step for each in repetitions() for step in each._trace.steps if isinstance(step, _repeat.Kernel)]


def new_arguments(layer, tokens=1024):
    x = torch.randn(tokens, layer.in_features, device="cuda", dtype=layer.weight.dtype, requires_grad=True)
    return x, torch.randn(tokens, layer.out_features, device="cuda", dtype=layer.weight.dtype)


def by_triton(layer, x, grad):
    """Launched for the first time, which is never the driver's."""
    replays, _replay._replays = _replay._replays, {}
    try:
        return gradients(layer, x, grad)
    finally:
        _replay._replays = replays


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@strategies
@pytest.mark.parametrize(("in_features", "out_features"), [(256, 384), (83, 129)])
def test_they_compute_what_tritons_do(in_features, out_features, config):
    """Of other tensors each time, and of the same."""
    layer = make_layer(config, in_features, out_features, "cuda", torch.bfloat16)
    kept = [new_arguments(layer) for _ in range(3)]
    for x, grad in [*kept, *kept[-1:], *kept]:
        assert_equal(gradients(layer, x, grad), by_triton(layer, x, grad))
    assert kernels()
    assert all(each._known is not None for each in repetitions())


def test_triton_is_not_asked_again(monkeypatch):
    """As it would be by a driver that refuses to launch, with the same results."""
    layer = ts.SwitchBackLinear(256, 128, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        gradients(layer, *new_arguments(layer))

    def ask(kernel, *args):
        raise AssertionError("launched by Triton")

    monkeypatch.setattr(_repeat.Kernel, "__call__", ask)
    gradients(layer, *new_arguments(layer))


def test_they_go_to_the_current_stream():
    layer = ts.SwitchBackLinear(256, 128, device="cuda", dtype=torch.bfloat16)
    x, grad = new_arguments(layer)
    expected = by_triton(layer, x, grad)
    gradients(layer, x, grad)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for stream in [*streams, *streams]:
        with torch.cuda.stream(stream):
            y = gradients(layer, x, grad)
        assert {given_stream(each) for each in repetitions()} == {stream.cuda_stream}
        stream.synchronize()
        assert_equal(y, expected)


def given_stream(repetition):
    plan = repetition._known.kept[-1]
    return plan.given[plan.given_count - 1]


def test_launched_for_the_second_time_within_a_capture():
    """Where no launch can be captured to be read."""
    layer = ts.SwitchBackLinear(256, 128, device="cuda", dtype=torch.bfloat16)
    x, grad = new_arguments(layer)
    torch.mm(grad.t(), x)  # what cuBLAS sets up
    expected = gradients(layer, x, grad)
    assert not any(each._known is not None for each in repetitions())
    gc.collect()  # a graph of an earlier test, freed within a capture, would end it
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(layer, x, grad)
    assert not any(each._known is not None for each in repetitions())
    graph.replay()
    assert_equal(captured, expected)
    assert_equal(gradients(layer, x, grad), expected)
    assert all(each._known is not None for each in repetitions())


def test_hooks_see_them():
    layer = ts.SwitchBackLinear(256, 128, device="cuda", dtype=torch.bfloat16)
    x, grad = new_arguments(layer)
    gradients(layer, x, grad)
    expected, names = gradients(layer, x, grad), []

    def note(metadata):
        names.append(metadata.get()["name"])

    with knobs.runtime.scope():
        knobs.runtime.launch_enter_hook.add(note)
        try:
            actual = gradients(layer, x, grad)
        finally:
            knobs.runtime.launch_enter_hook.remove(note)
    assert_equal(actual, expected)
    assert len(names) == len(kernels())


def test_many_threads_at_once():
    """Some of which have done nothing on the GPU before."""
    layer = ts.SwitchBackLinear(256, 128, device="cuda", dtype=torch.bfloat16)
    arguments = [new_arguments(layer) for _ in range(6)]
    expected = [by_triton(layer, *each) for each in arguments]
    gradients(layer, *arguments[0])
    gradients(layer, *arguments[0])
    torch.cuda.synchronize()
    failures = []

    def repeat(number):
        try:
            for _ in range(200):
                assert_equal(gradients(layer, *arguments[number]), expected[number])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_gradients_of_several_backwards_at_once():
    layer = ts.SwitchBackLinear(64, 48, device="cuda", dtype=torch.bfloat16)
    x, _ = new_arguments(layer, tokens=600)
    grads = torch.randn(3, 600, 48, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    inputs = x, *layer.parameters()
    expected = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    actual = torch.autograd.grad(y, inputs, grads, is_grads_batched=True)
    for number, (grad_input, *others) in enumerate(expected):
        assert torch.equal(actual[0][number], grad_input)
        for one, other in zip(actual[1:], others, strict=True):  # products and sums of all three at once
            torch.testing.assert_close(one[number], other)
