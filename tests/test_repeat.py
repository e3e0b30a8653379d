"""What a function did, done again with launches by the CUDA driver; and when Triton launches. No GPU is needed."""

import ctypes
import gc
import shutil
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton

from torch_switchback.kernels import _driver, _repeat
from torch_switchback.kernels._repeat import Kernel, Repetition, Trace

DEVICE, STREAM, FUNCTION = 3, 7, 0xF0000
BY_TRITON = object()


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


class Gpu:
    """fake_cuda.c, loaded anew, and what surrounds it: a stream, and whether it is captured."""

    def __init__(self, library):
        self.cuda = ctypes.CDLL(str(library))
        self.stream, self.is_capturing = STREAM, False

    def __getitem__(self, name):
        return ctypes.c_int.in_dll(self.cuda, name).value

    def __setitem__(self, name, value):
        ctypes.c_int.in_dll(self.cuda, name).value = value

    def launches(self):
        """(what is described, the address, the stream) of all launches since the last look."""
        launched = (Launched * 8).in_dll(self.cuda, "launched")[: self["launches"]]
        self["launches"] = 0
        return [
            (*(int.from_bytes(bytes(each)[:8], "little") for each in one.parameters[:2]), one.stream or 0)
            for one in launched
        ]


@pytest.fixture
def gpu(library, tmp_path, monkeypatch):
    gpu = Gpu(shutil.copy(library, tmp_path))
    module, why = _repeat._compiled()
    assert why == ""
    monkeypatch.setattr(_repeat, "_module", lambda: module)
    for user in (_driver, _repeat):
        monkeypatch.setattr(user, "cuda", lambda: gpu.cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.is_capturing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "ExternalStream", int)

    def current_stream(device):
        assert device == DEVICE
        return gpu.stream

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current_stream, raising=False)
    monkeypatch.setattr(Trace, "through_triton", lambda trace, args, addresses: BY_TRITON)
    return gpu


def kernel(gpu, described, address, overlaps=False):
    """By the numbers of its addresses."""

    def launch(addresses):
        gpu.cuda.launch_as_triton(ctypes.c_void_p(addresses[described]), ctypes.c_ulonglong(addresses[address]), -9)

    return Kernel(launch, overlaps)


def trace(*steps, arg_count=2, results=(0,), is_single=True, **others):
    return Trace(
        arg_count, **({"allocators": [], "offsets": []} | others), steps=steps, results=results, is_single=is_single
    )


@pytest.fixture
def two_kernels(gpu):
    """Of two arguments; returns the first."""
    return Repetition(trace(kernel(gpu, 0, 1), kernel(gpu, 1, 0)))


def repeat(repetition, *addresses):
    """Whether the driver launches, for arguments at these addresses."""
    args = tuple(object() for _ in addresses)
    result = repetition(args, list(addresses))
    assert result is BY_TRITON or result is args[0]
    return result is not BY_TRITON


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_driver_gets_what_triton_gave_it_but_for_addresses_and_stream(overlaps, gpu):
    repetition = Repetition(trace(kernel(gpu, 2, 0, overlaps), arg_count=4))
    launched = (Launched * 8).in_dll(gpu.cuda, "launched")
    for count, given in enumerate([(0x111, None, 0x222, None), (2**64 - 2**32, None, 0x555, None)]):
        gpu.stream = 0x333 * count
        assert repeat(repetition, *given)
        assert gpu["launches"] == count + 1
        one = launched[count]
        assert one.function == FUNCTION
        assert [*one.grid, *one.block, one.shared_bytes] == [7, 5, 3, 128, 2, 1, 4096]
        assert (one.stream or 0) == gpu.stream
        assert (one.attribute, one.value) == ((6, 1) if overlaps else (0, 0))
        descriptor, address, constant = (bytes(each) for each in one.parameters)
        assert descriptor == given[2].to_bytes(8, "little") + b"\x11" * 120
        assert address[:8] == given[0].to_bytes(8, "little")
        assert int.from_bytes(constant[:4], "little", signed=True) == -9


def test_descriptors_are_aligned(gpu):
    repetition = Repetition(trace(kernel(gpu, 0, 1)))
    assert repeat(repetition, 10, 11)
    assert repetition._known.kept[-1].steps[0].launches[0].descriptors[0].place % 128 == 0


def test_addresses_and_streams_are_given_if_they_are_others(gpu, two_kernels):
    for addresses, stream, readdressed in (((10, 11), 7, 2), ((10, 11), 7, 0), ((10, 12), 7, 2), ((10, 12), 8, 2)):
        gpu["readdressed"], gpu.stream = 0, stream
        assert repeat(two_kernels, *addresses)
        assert gpu.launches() == [(*addresses, stream), (*addresses[::-1], stream)]
        assert gpu["readdressed"] == readdressed


def test_memory_is_allocated_and_what_else_there_is_to_call_is_called_in_its_place(gpu):
    """Kernels see the arguments, what is allocated, and offsets in the last of it."""
    log = []

    def note(tensors):
        log.append((len(gpu.launches()), tensors))

    x = torch.ones(4)
    allocators = [partial(torch.empty, 3), partial(torch.empty, 1024, dtype=torch.uint8)]
    done = trace(
        kernel(gpu, 0, 2),
        note,
        note,
        kernel(gpu, 3, 4),
        kernel(gpu, 5, 2),
        arg_count=2,
        allocators=allocators,
        offsets=[0, 512],
        results=(2, None, 0),
        is_single=False,
    )
    repetition = Repetition(done)
    for _ in range(2):
        out, nothing, same = repetition((x, "no tensor"), [x.data_ptr(), None])
        assert out.shape == (3,) and nothing is None and same is x
        assert [count for count, _ in log] == [1, 0]
        given, no_tensor, allocated, block = log[0][1]
        assert given is x and no_tensor == "no tensor" and allocated is out and block.shape == (1024,)
        start = block.data_ptr()
        assert gpu.launches() == [(start, start, STREAM), (start + 512, out.data_ptr(), STREAM)]
        log.clear()


@pytest.mark.parametrize(
    "ending", ["done", "step fails", "allocator fails", "first launch refused", "later one refused"]
)
def test_nothing_is_kept(ending, gpu):
    """Of arguments, of what is allocated, of what functions return and of numbers, however it ends."""
    kept, refused = [], {"first launch refused": 0, "later one refused": 1}
    gpu["failing_launch"] = refused.get(ending, -1)

    def allocate():
        kept.append(torch.empty(3))
        return kept[-1]

    def allocate_last():
        if ending == "allocator fails":
            raise torch.OutOfMemoryError("all of it")
        return allocate()

    def step(tensors):
        if ending == "step fails":
            raise OSError("no space left")
        kept.append(torch.empty(5))
        return kept[-1]

    steps = kernel(gpu, 1, 0), step, kernel(gpu, 2, 0)
    repetition = Repetition(
        trace(*steps, arg_count=1, allocators=[allocate, allocate_last], results=(1, None), is_single=False)
    )
    address = 2**62
    for _ in range(3):
        gpu["launches"] = 0
        kept.append(torch.ones(2))
        count = sys.getrefcount(address)
        with nullcontext() if ending in ("done", "first launch refused") else pytest.raises((OSError, RuntimeError)):
            result = repetition((kept[-1],), [address])
            assert (result is BY_TRITON) == (ending == "first launch refused")
            del result
        assert sys.getrefcount(address) == count
    references = [weakref.ref(tensor) for tensor in kept]
    kept.clear()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    reference = weakref.ref(repetition)
    del repetition
    gc.collect()
    assert reference() is None


def test_errors_are_raised_and_leave_it_free(gpu):
    def failing(*_):
        raise torch.OutOfMemoryError("all of it")

    for done in (trace(kernel(gpu, 0, 1), allocators=[failing]), trace(kernel(gpu, 0, 1), failing)):
        repetition = Repetition(done)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="all of it"):
                repeat(repetition, 10, 11)


@pytest.mark.parametrize("args", [((), []), ((1, 2), [3]), ([1, 2], [3, 4]), ((1, 2), (3, 4))], ids=str)
def test_other_arguments_than_there_were_are_refused(args, gpu, two_kernels):
    assert repeat(two_kernels, 10, 11)
    with pytest.raises(TypeError, match="not a plan and its arguments"):
        two_kernels(*args)
    with pytest.raises(TypeError, match="int"):
        two_kernels((1, 2), ["10", 11])
    assert repeat(two_kernels, 10, 11)


def test_hooks_see_every_launch(gpu, two_kernels):
    """Such as a profiler's: a chain of them, one that was put there, or none."""
    runtime = triton.knobs.runtime
    with runtime.scope():
        runtime.launch_enter_hook = pytest.fail  # as Triton calls it, also of launches that are only read
        assert not repeat(two_kernels, 10, 11)
    assert two_kernels._known is None
    assert repeat(two_kernels, 10, 11)
    with runtime.scope():
        runtime.launch_exit_hook.add(print)
        try:
            assert not repeat(two_kernels, 10, 11)
        finally:
            runtime.launch_exit_hook.remove(print)
        assert repeat(two_kernels, 10, 11)
        runtime.launch_enter_hook = print
        assert not repeat(two_kernels, 10, 11)
        runtime.launch_enter_hook = None
        assert repeat(two_kernels, 10, 11)


def test_launches_in_hand_are_not_anothers(gpu):
    """Not another thread's, nor those of what this one calls on the way."""
    log = []

    def disturb(_):
        thread = threading.Thread(target=lambda: log.append(repeat(repetition, 20, 21)))
        thread.start()
        thread.join()
        log.append(repeat(repetition, 20, 21))

    repetition = Repetition(trace(disturb, kernel(gpu, 0, 1)))
    assert repeat(repetition, 10, 11)
    assert log == [False, False]
    assert gpu.launches() == [(10, 11, STREAM)]


def test_many_threads_launch_what_they_were_given(gpu, two_kernels):
    """Or are told that they must do it another way. The two addresses of a launch are those of one thread."""
    done = []

    def launch(number):
        done.append(sum(repeat(two_kernels, number, number + 1) for _ in range(300)))

    threads = [threading.Thread(target=launch, args=(number,)) for number in (100, 200, 300, 400)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert gpu["launches"] == 2 * sum(done) > 0
    assert gpu["apart"] == 0


def waits_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_while_the_driver_waits_other_threads_run(gpu, two_kernels):
    """It has room only once this one has run."""
    gpu["is_full"] = 1
    thread = threading.Thread(target=repeat, args=(two_kernels, 10, 11))
    thread.start()
    waits_for(lambda: gpu["waiting"])
    gpu["is_full"] = 0
    thread.join()
    assert gpu.launches() == [(10, 11, STREAM), (11, 10, STREAM)]


def test_launches_are_not_read_again_while_they_are_made(gpu, two_kernels, monkeypatch):
    """By a thread that was held up after it had found them unread: what the driver was given would be freed."""
    module, found_unread, may_go_on = _repeat._module(), threading.Event(), threading.Event()

    def slow_module():
        if threading.current_thread() is late:
            found_unread.set()
            assert may_go_on.wait(30)
        return module

    results = []
    late = threading.Thread(target=lambda: results.append(repeat(two_kernels, 20, 21)))
    monkeypatch.setattr(_repeat, "_module", slow_module)
    late.start()
    assert found_unread.wait(30)
    gpu["is_full"] = 1
    first = threading.Thread(target=lambda: results.append(repeat(two_kernels, 10, 11)))
    first.start()
    waits_for(lambda: gpu["waiting"])
    known = two_kernels._known
    may_go_on.set()
    late.join(5)
    gpu["is_full"] = 0
    first.join()
    late.join()
    assert two_kernels._known is known
    assert results == [False, True]  # they were in hand
    assert gpu.launches() == [(10, 11, STREAM), (11, 10, STREAM)]


def test_where_the_driver_refuses_the_first_launch_nothing_is_done(gpu, two_kernels):
    """As in a thread that has done nothing on the GPU."""
    gpu["failing_launch"] = 0
    assert not repeat(two_kernels, 10, 11)
    gpu["failing_launch"] = -1
    assert repeat(two_kernels, 10, 11)


def test_where_the_driver_refuses_another_it_is_an_error(gpu, two_kernels):
    gpu["failing_launch"] = 1
    for _ in range(2):
        gpu["launches"] = 0
        with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed with CUDA's error 201"):
            repeat(two_kernels, 10, 11)
    repetition = Repetition(trace(lambda tensors: None, kernel(gpu, 0, 1)))
    gpu["launches"], gpu["failing_launch"] = 0, 0
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx"):
        repeat(repetition, 10, 11)


def test_where_a_descriptor_gets_no_address_nothing_is_done(gpu, two_kernels):
    """What was given before is given again: some of it has been overwritten."""
    assert repeat(two_kernels, 10, 11)
    gpu["failing_readdress"] = 1
    assert not repeat(two_kernels, 20, 21)
    gpu["failing_readdress"] = 0
    gpu.launches()
    assert repeat(two_kernels, 10, 11)
    assert gpu.launches() == [(10, 11, STREAM), (11, 10, STREAM)]


def test_nothing_is_read_within_a_capture(gpu, two_kernels):
    gpu.is_capturing = True
    assert not repeat(two_kernels, 10, 11)
    gpu.is_capturing = False
    assert repeat(two_kernels, 10, 11)
    gpu.is_capturing = True
    assert repeat(two_kernels, 10, 11)


def test_without_kernels_there_is_nothing_to_read(gpu, monkeypatch):
    monkeypatch.setattr(_repeat, "_module", pytest.fail)
    assert not repeat(Repetition(trace(print)), 10, 11)


def test_why_triton_launches(monkeypatch):
    compiled = (None, "no C compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_repeat, "cuda_of_the_driver", lambda: 12_040)
    monkeypatch.setattr(_repeat, "_compiled", lambda: compiled)
    module = _repeat._module.__wrapped__  # past its cache
    assert (_repeat.why_triton_launches(), module()) == ("no C compiler", None)
    compiled = ("module", "")
    assert (_repeat.why_triton_launches(), module()) == ("", "module")
    monkeypatch.setattr(_repeat, "cuda_of_the_driver", lambda: 12_030)
    assert (_repeat.why_triton_launches(), module()) == ("a driver before CUDA 12.4", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (_repeat.why_triton_launches(), module()) == ("no GPU", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert (_repeat.why_triton_launches(), module()) == ("ROCm", None)
    monkeypatch.setenv("TORCH_SWITCHBACK_DRIVER", "0")
    assert (_repeat.why_triton_launches(), module()) == ("TORCH_SWITCHBACK_DRIVER=0", None)


def test_where_it_does_not_compile_triton_launches_and_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/no/compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _repeat._warn_of_slow_launches.cache_clear()
    with pytest.warns(UserWarning, match=r"takes the host longer: _repeat\.c does not compile: .*/no/compiler"):
        module, why = _repeat._compiled.__wrapped__()
    assert module is None and why.startswith("_repeat.c does not compile: FileNotFoundError")


def test_reading_launches_is_tried_again(gpu, two_kernels):
    """Another thread may have been in the way."""
    gpu["operations_a_launch"] = 2
    for _ in range(_repeat.ATTEMPTS - 1):
        assert not repeat(two_kernels, 10, 11)
    gpu["operations_a_launch"] = 1
    assert repeat(two_kernels, 10, 11)


def test_launches_that_cannot_be_read_are_said_once(gpu, two_kernels):
    _repeat._warn_of_slow_launches.cache_clear()
    gpu["operations_a_launch"] = 2
    with pytest.warns(UserWarning, match="takes the host longer: 2 operations where one launch") as warned:
        for _ in range(2 * _repeat.ATTEMPTS):
            assert not repeat(two_kernels, 10, 11)
    assert len(warned) == 1
    gpu["operations_a_launch"] = 1
    assert not repeat(two_kernels, 10, 11)


@pytest.mark.parametrize("parameters", [[], [b"\0" * 8], [(_repeat.FIRST_MARK + 4096).to_bytes(8, "little")]])
def test_a_launch_whose_addresses_are_not_found_again_is_not_made(parameters, gpu, monkeypatch):
    def read(launch):
        launch()
        return _driver.LaunchConfig(), None, parameters

    monkeypatch.setattr(_repeat, "read_launch", read)
    with pytest.raises(LookupError, match=r"of the addresses \[0\]"):
        _repeat._read(trace(Kernel(lambda addresses: addresses[0], overlaps=False)))


def test_nothing_is_left_of_reading(gpu):
    """Nor has it forbidden this thread anything."""
    for operations, error in ((1, None), (2, "2 operations where one launch"), (0, "0 operations where one launch")):
        gpu["operations_a_launch"] = operations
        with pytest.raises(RuntimeError, match=error) if error else nullcontext():
            _driver.read_launch(lambda: kernel(gpu, 0, 1)([1, 2]))
        assert [gpu[name] for name in ("launches", "streams", "graphs", "mode")] == [0, 0, 0, 0]


def test_a_driver_that_is_not_there_knows_no_cuda(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(_driver.ctypes, "CDLL", missing)
    monkeypatch.setattr(_driver, "cuda", _driver.cuda.__wrapped__)
    assert _driver.cuda_of_the_driver() == 0
