"""When the CUDA driver launches kernels again by itself, and when Triton does. No GPU is needed."""

import ctypes
import shutil
import subprocess
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
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
    gpu = SimpleNamespace(stream=7, capturing=False, captures=0, failures=0, log=[])
    gpu.launches = [Captured("a", gpu.log), Captured("b", gpu.log)]

    def captured(kernel, marks):
        assert len(marks) == 2
        if gpu.failures:
            gpu.failures -= 1
            raise RuntimeError("cuStreamCreate failed")
        gpu.captures += 1
        return gpu.launches[gpu.captures - 1]

    def current_stream(device):
        assert device == DEVICE
        return gpu.stream

    monkeypatch.setattr(_driver, "_cuda", lambda: gpu)
    monkeypatch.setattr(_driver, "_Captured", captured)
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
    assert gpu.captures == 2


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
    """What was given before is given again: some of it has been overwritten."""
    launches([10, 11])
    done_by(gpu)
    gpu.launches[1].fails = True
    launches([20, 21])
    assert done_by(gpu) == [("a", [20, 21, 7]), ("b", [20, 21, 7]), *by_triton(20, 21)]
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
    assert gpu.captures == 2


def test_without_a_driver_that_does_it_triton_launches(monkeypatch):
    monkeypatch.setattr(_driver, "_cuda", lambda: None)
    log = []
    launches = _driver.Launches([_driver.Kernel(log.append, overlaps=False)])
    launches([10])
    launches([11])
    assert log == [[10], [11]]


def test_why_triton_launches(monkeypatch):
    monkeypatch.setattr(_driver.ctypes, "CDLL", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_driver, "cuda_of_the_driver", lambda: 12_040)
    driver = _driver._cuda.__wrapped__  # past its cache
    assert (_driver.why_triton_launches(), driver()) == ("", "libcuda.so.1")
    monkeypatch.setattr(_driver, "cuda_of_the_driver", lambda: 12_030)
    assert (_driver.why_triton_launches(), driver()) == ("a driver before CUDA 12.4", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (_driver.why_triton_launches(), driver()) == ("no GPU", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert (_driver.why_triton_launches(), driver()) == ("ROCm", None)
    monkeypatch.setenv("TORCH_SWITCHBACK_DRIVER", "0")
    assert (_driver.why_triton_launches(), driver()) == ("TORCH_SWITCHBACK_DRIVER=0", None)


def test_reading_launches_is_tried_again(gpu, launches):
    """Another thread may have been in the way."""
    gpu.failures = _driver.ATTEMPTS - 1
    for _ in range(gpu.failures):
        launches([10, 11])
        assert done_by(gpu) == by_triton(10, 11)
    launches([10, 11])
    assert done_by(gpu)[2:] == ["a", "b"]


def test_launches_that_cannot_be_read_are_said_once(gpu, launches):
    _driver._warn_of_slow_launches.cache_clear()
    gpu.failures = 100
    with pytest.warns(UserWarning, match="takes the host longer: cuStreamCreate failed") as warned:
        for _ in range(2 * _driver.ATTEMPTS):
            launches([10, 11])
            assert done_by(gpu) == by_triton(10, 11)
    assert len(warned) == 1
    assert gpu.failures == 100 - _driver.ATTEMPTS


@pytest.mark.parametrize("parameters", [[], [b"\0" * 8], [(_driver.FIRST_MARK + 4096).to_bytes(8, "little")]])
def test_a_launch_whose_addresses_are_not_found_again_is_not_made(parameters, monkeypatch):
    def read(launch):
        launch()
        return _driver._LaunchConfig(), None, parameters

    of_first = _driver.Kernel(lambda addresses: addresses[0], overlaps=False)
    monkeypatch.setattr(_driver, "_read_launch", read)
    with pytest.raises(LookupError, match=r"of the addresses \[0\]"):
        _driver._Captured(of_first, [_driver.FIRST_MARK, _driver.FIRST_MARK + 4096])


class Launched(ctypes.Structure):
    """``Launch`` in fake_cuda.c."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attribute", ctypes.c_uint),
        ("value", ctypes.c_uint),
        ("parameters", (ctypes.c_ubyte * 128) * 3),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """fake_cuda.c, as a C compiler reads the declarations of cuda.h."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not (include / "cuda.h").exists():
        pytest.skip("needs a C compiler and Triton's cuda.h")
    source, built = Path(__file__).with_name("fake_cuda.c"), tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{include}", source, "-o", built], check=True)
    return built


@pytest.fixture
def cuda(library, tmp_path, monkeypatch):
    """It, loaded anew."""
    copy = shutil.copy(library, tmp_path)
    cuda = ctypes.CDLL(str(copy))
    monkeypatch.setattr(_driver, "_cuda", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "ExternalStream", int)
    return cuda


def number(cuda, name):
    return ctypes.c_int.in_dll(cuda, name)


MARKS = [_driver.FIRST_MARK + count * _driver.MARKS_APART for count in range(4)]


def kernel_of(cuda, overlaps=False):
    """It describes the third of its addresses and takes the first."""

    def launch(addresses):
        cuda.launch_as_triton(ctypes.c_void_p(addresses[2]), ctypes.c_ulonglong(addresses[0]), -9)

    return _driver.Kernel(launch, overlaps)


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_driver_gets_what_triton_gave_it_but_for_addresses_and_stream(overlaps, cuda):
    captured = _driver._Captured(kernel_of(cuda, overlaps), MARKS)
    assert number(cuda, "launches").value == 0
    launched = Launched.in_dll(cuda, "launched")
    for given in ([0x111, None, 0x222, None, 0x333], [0x444, None, 0x555, None, 0]):
        assert not captured.give(given)
        assert captured.enqueue(*captured.arguments) == 0
        assert launched.function == 0xF0000
        assert [*launched.grid, *launched.block, launched.shared_bytes] == [7, 5, 3, 128, 2, 1, 4096]
        assert (launched.stream or 0) == given[-1]
        assert (launched.attribute, launched.value) == ((6, 1) if overlaps else (0, 0))
        descriptor, address, constant = (bytes(each) for each in launched.parameters)
        assert descriptor == given[2].to_bytes(8, "little") + b"\x11" * 120
        assert address[:8] == given[0].to_bytes(8, "little")
        assert int.from_bytes(constant[:4], "little", signed=True) == -9
    assert captured.arguments[2][0] % 128 == 0
    assert number(cuda, "launches").value == 2


def test_nothing_is_left_of_a_capture(cuda):
    """Nor has it forbidden this thread anything."""
    for operations, error in ((1, None), (2, "2 operations where one launch"), (0, "0 operations where one launch")):
        number(cuda, "operations_a_launch").value = operations
        with pytest.raises(RuntimeError, match=error) if error else nullcontext():
            _driver._read_launch(lambda: kernel_of(cuda)(MARKS))
        assert [number(cuda, name).value for name in ("streams", "graphs", "mode")] == [0, 0, 0]


def test_a_descriptor_that_gets_no_address(cuda):
    captured = _driver._Captured(kernel_of(cuda), MARKS)
    number(cuda, "failing_readdress").value = 1
    assert captured.give([1, 2, 3, 4, 5])


def test_a_driver_that_is_not_there_knows_no_cuda(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(_driver.ctypes, "CDLL", missing)
    assert _driver.cuda_of_the_driver() == 0
