"""When the CUDA driver launches kernels again by itself, and when Triton does. No GPU is needed."""

import threading
from types import SimpleNamespace

import pytest
import torch
import triton

from torch_switchback.kernels import _driver

DEVICE = 3


class Captured:
    """A captured launch, which notes what it is given and that it is launched."""

    def __init__(self, name, log):
        self.arguments, self._log, self.error, self.fails = (name,), log, 0, False

    def give(self, given):
        self._log.append((*self.arguments, given))
        return self.fails

    def enqueue(self, name):
        self._log.append(name if not self.error else f"not {name}")
        return self.error


@pytest.fixture
def gpu(monkeypatch):
    """A driver that launches, and what surrounds it: a stream, whether it is captured, and how often this looks."""
    gpu = SimpleNamespace(stream=7, capturing=False, captures=0, log=[])
    gpu.launches = [Captured("a", gpu.log), Captured("b", gpu.log)]

    def capture(kernels, count):
        assert count == 2
        gpu.captures += 1
        return gpu.launches

    def current_stream(device):
        assert device == DEVICE
        return gpu.stream

    monkeypatch.setattr(_driver, "_cuda", lambda: gpu)
    monkeypatch.setattr(_driver, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current_stream, raising=False)
    return gpu


@pytest.fixture
def launches(gpu):
    def by_triton(name):
        return _driver.Kernel(lambda addresses: gpu.log.append((f"Triton's {name}", addresses)), overlaps=False)

    return _driver.Launches([by_triton("a"), by_triton("b")])


def by_triton(*addresses):
    return [("Triton's a", list(addresses)), ("Triton's b", list(addresses))]


def done_by(gpu):
    log, gpu.log[:] = gpu.log[:], []
    return log


def test_addresses_and_streams_are_given_if_they_are_others(gpu, launches):
    launches([10, 11])
    assert done_by(gpu) == [("a", [10, 11, 7]), ("b", [10, 11, 7]), "a", "b"]
    launches([10, 11])
    assert done_by(gpu) == ["a", "b"]
    launches([10, 12])
    assert done_by(gpu) == [("a", [10, 12, 7]), ("b", [10, 12, 7]), "a", "b"]
    gpu.stream = 8
    launches([10, 12])
    assert done_by(gpu) == [("a", [10, 12, 8]), ("b", [10, 12, 8]), "a", "b"]
    assert gpu.captures == 1


def test_hooks_see_every_launch(gpu, launches):
    """Such as a profiler's: a chain of them, one that was put there, or none."""
    runtime = triton.knobs.runtime
    launches([10, 11])
    done_by(gpu)
    with runtime.scope():
        runtime.launch_exit_hook.add(print)
        try:
            launches([10, 11])
        finally:
            runtime.launch_exit_hook.remove(print)
        assert done_by(gpu) == by_triton(10, 11)
        runtime.launch_enter_hook = print
        launches([10, 11])
        assert done_by(gpu) == by_triton(10, 11)
        runtime.launch_enter_hook = None
        launches([10, 11])
        assert done_by(gpu) == ["a", "b"]


def test_launches_that_a_thread_has_in_hand_are_not_anothers(gpu, launches):
    give = gpu.launches[0].give

    def give_slowly(given):
        thread = threading.Thread(target=launches, args=([20, 21],))
        thread.start()
        thread.join()
        return give(given)

    gpu.launches[0].give = give_slowly
    launches([10, 11])
    assert done_by(gpu) == [*by_triton(20, 21), ("a", [10, 11, 7]), ("b", [10, 11, 7]), "a", "b"]


def test_what_the_driver_refuses_triton_launches_and_what_follows(gpu, launches):
    gpu.launches[1].error = 201  # no context, as in a thread that has done nothing on the GPU
    launches([10, 11])
    assert done_by(gpu)[2:] == ["a", "not b", ("Triton's b", [10, 11])]
    gpu.launches[0].error = 201
    launches([10, 11])
    assert done_by(gpu) == ["not a", *by_triton(10, 11)]


def test_what_cannot_be_given_triton_launches(gpu, launches):
    """It is given again: the first may have got it."""
    gpu.launches[1].fails = True
    launches([10, 11])
    assert done_by(gpu) == [("a", [10, 11, 7]), ("b", [10, 11, 7]), *by_triton(10, 11)]
    gpu.launches[1].fails = False
    launches([10, 11])
    assert done_by(gpu) == [("a", [10, 11, 7]), ("b", [10, 11, 7]), "a", "b"]


def test_nothing_is_captured_within_a_capture(gpu, launches):
    gpu.capturing = True
    launches([10, 11])
    assert done_by(gpu) == by_triton(10, 11)
    gpu.capturing = False
    launches([10, 11])
    gpu.capturing = True
    launches([10, 11])
    assert done_by(gpu)[2:] == ["a", "b", "a", "b"]
    assert gpu.captures == 1


def test_without_a_driver_that_does_it_triton_launches(monkeypatch):
    monkeypatch.setattr(_driver, "_cuda", lambda: None)
    log = []
    launches = _driver.Launches([_driver.Kernel(log.append, overlaps=False)])
    launches([10])
    launches([11])
    assert log == [[10], [11]]


def test_a_launch_that_cannot_be_read_is_said_once(monkeypatch):
    def fail(launch):
        raise RuntimeError("cuStreamCreate failed")

    _driver._warn_of_slow_launches.cache_clear()
    monkeypatch.setattr(_driver, "_cuda", lambda: True)
    monkeypatch.setattr(_driver, "_read_launch", fail)
    with pytest.warns(UserWarning, match="takes the host longer: cuStreamCreate failed"):
        assert _driver._capture([_driver.Kernel(print, overlaps=False)], 2) == []
    assert _driver._capture([_driver.Kernel(print, overlaps=False)], 2) == []


@pytest.mark.parametrize("parameters", [[], [b"\0" * 8], [(_driver.FIRST_MARK + 4096).to_bytes(8, "little")]])
def test_a_launch_whose_addresses_are_not_found_again_is_not_made(parameters, monkeypatch):
    def read(launch):
        launch()
        return _driver._LaunchConfig(), None, parameters

    of_first = _driver.Kernel(lambda addresses: addresses[0], overlaps=False)
    monkeypatch.setattr(_driver, "_read_launch", read)
    with pytest.raises(LookupError, match=r"of the addresses \[0\]"):
        _driver._Captured(of_first, [_driver.FIRST_MARK, _driver.FIRST_MARK + 4096])


def test_a_launch_is_given_addresses_where_the_first_had_marks(monkeypatch):
    marks = [_driver.FIRST_MARK + number * _driver.MARKS_APART for number in range(3)]
    replaced, error = [], 0

    def read(launch):
        launch()
        values = [marks[2].to_bytes(128, "little"), b"\x11" * 4, marks[0].to_bytes(8, "little")]
        return _driver._LaunchConfig(5, 1, 1, 128), "function", values

    driver = SimpleNamespace(
        cuLaunchKernelEx=print,
        cuTensorMapReplaceAddress=lambda place, address: replaced.append((place.value, address.value)) or error,
    )
    monkeypatch.setattr(_driver, "_read_launch", read)
    monkeypatch.setattr(_driver, "_cuda", lambda: driver)
    of_two = _driver.Kernel(lambda addresses: (addresses[0], addresses[2]), overlaps=True)
    captured = _driver._Captured(of_two, marks)
    assert not captured.give([111, None, 222, 333])
    config, function, pointers, extra = captured.arguments
    config = config._obj
    assert (config.grid_x, config.block_x, config.stream, config.num_attributes) == (5, 128, 333, 1)
    assert (function, extra) == ("function", None)
    assert replaced == [(pointers[0], 222)] and pointers[0] % 64 == 0
    error = 201
    assert captured.give([111, None, 222, 333])
    value = _driver.ctypes.string_at
    assert value(pointers[1], 4) == b"\x11" * 4
    assert int.from_bytes(value(pointers[2], 8), "little") == 111


def test_a_driver_that_is_not_there_knows_no_cuda(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(_driver.ctypes, "CDLL", missing)
    assert _driver.cuda_of_the_driver() == 0
