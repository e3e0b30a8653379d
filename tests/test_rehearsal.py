"""A function's kernels compiled at the same time, before it launches the first of them. No GPU is needed."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.runtime import _async_compile

from torch_switchback.kernels import _launch, _rehearsal, _replay

X = torch.ones(3)


class Kernel:
    """A kernel that is compiled as Triton's are, and notes what becomes of it."""

    arg_names = ("x", "BLOCK")

    def __init__(self, log, compile=lambda: None, load=lambda: None):
        self.log, self.compile, self.load, self.device_caches = log, compile, load, {"device": "of compiled kernels"}

    def warmup(self, *args, grid, **options):
        self.log.append(("warmed", args, grid, options))

        def compile():
            self.compile()
            return self

        return _async_compile.active_mode.get().submit(id(self), compile, lambda compiled: None)

    def __getitem__(self, grid):
        self.load()
        self.log.append(("loaded", threading.current_thread() is threading.main_thread()))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu = SimpleNamespace(is_capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.is_capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return gpu


def launching(*kernels):
    def function(x):
        for kernel in kernels:
            _launch.launch(kernel, (7,), x, BLOCK=64, num_warps=4)
        return x

    return function


def test_kernels_are_compiled_and_loaded_and_do_not_run():
    log = []
    _rehearsal.rehearse(launching(Kernel(log)), (X,))
    assert log == [
        ("warmed", (X,), (7, 1, 1), {"BLOCK": 64, "num_warps": 4, "enable_fp_fusion": False}),
        ("loaded", False),
    ]
    assert not _rehearsal.is_rehearsal()


def test_they_are_compiled_at_the_same_time():
    """Each waits for the other; so they do when they are loaded, which compiles their launchers."""
    log, compiling, loading = [], threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30)
    kernels = [Kernel(log, compiling.wait, loading.wait) for _ in range(2)]
    _rehearsal.rehearse(launching(*kernels), (X,))
    assert log[2:] == 2 * [("loaded", False)]


def test_a_kernel_launched_twice_is_compiled_once():
    log, compiled = [], []
    kernel = Kernel(log, lambda: compiled.append(1))
    _rehearsal.rehearse(launching(kernel, kernel), (X,))
    assert len(compiled) == 1
    assert log[2:] == [("loaded", False)]


def test_a_kernel_that_fails_is_left_to_its_launch():
    def fail(*_):
        raise RuntimeError("no compiler")

    log = []
    failing = Kernel(log, compile=fail), Kernel(log, load=fail), Kernel(log)
    _rehearsal.rehearse(launching(*failing), (X,))
    assert [one for one in log if one[0] == "loaded"] == [("loaded", False)]
    failing[2].warmup = fail  # Triton itself does not start
    log.clear()
    _rehearsal.rehearse(launching(failing[2], Kernel(log)), (X,))
    assert [one for one in log if one[0] == "loaded"] == [("loaded", False)]


def test_what_is_half_loaded_is_forgotten_and_what_failed_with_its_error():
    def fail():
        raise RuntimeError("CUDA out of memory")

    kernels = Kernel([]), Kernel([], compile=fail), Kernel([], load=fail)
    _rehearsal.rehearse(launching(*kernels), (X,))
    assert [len(kernel.device_caches) for kernel in kernels] == [1, 0, 0]


def test_what_the_function_raises_is_raised():
    """Such as the memory's end."""

    def fail(x):
        raise torch.OutOfMemoryError("all of it")

    with pytest.raises(torch.OutOfMemoryError):
        _rehearsal.rehearse(fail, (X,))
    assert not _rehearsal.is_rehearsal() and _async_compile.active_mode.get() is None


def test_a_mode_of_the_users_is_left_alone():
    log = []
    with ThreadPoolExecutor() as executor, triton.AsyncCompileMode(executor) as mode:
        _rehearsal.rehearse(launching(Kernel(log)), (X,))
        assert log[1:] == [("loaded", False)]
        assert _async_compile.active_mode.get() is not None and not mode.raw_futures


def test_without_triton_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    _rehearsal.rehearse(pytest.fail, (X,))


def test_an_interrupt_leaves_nothing_behind(monkeypatch):
    """Triton's own mode would stay for good, with an executor that takes nothing more."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_async_compile, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _rehearsal.rehearse(launching(Kernel([])), (X,))
    assert not _rehearsal.is_rehearsal() and _async_compile.active_mode.get() is None


def test_what_runs_while_it_waits_for_the_compiler_launches(monkeypatch):
    """Such as a signal's handler."""
    waits, as_completed = [], _async_compile.as_completed

    def wait(futures):
        waits.append(_rehearsal.is_rehearsal())
        return as_completed(futures)

    monkeypatch.setattr(_async_compile, "as_completed", wait)
    _rehearsal.rehearse(launching(Kernel([])), (X,))
    assert waits == [False]


def test_there_is_none_within_a_capture_nor_in_the_interpreter(gpu, monkeypatch):
    gpu.is_capturing = True
    _rehearsal.rehearse(pytest.fail, (X,))
    gpu.is_capturing = False
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        _rehearsal.rehearse(pytest.fail, (X,))


@pytest.fixture
def rehearsed(monkeypatch):
    """Arguments of the rehearsals that a replay has asked for."""
    monkeypatch.setattr(_replay, "_replays", {})
    monkeypatch.setattr(_replay, "_sizes", set())
    rehearsed = []

    def rehearse(function, args):
        assert _replay.is_recording()
        rehearsed.append((function, args))

    monkeypatch.setattr(_replay, "rehearse", rehearse)
    return rehearsed


def run(function, x, *others, device="cuda"):
    """As for a tensor on a device."""
    kind = _replay.kind_of((x, *others))
    _replay.run(function, (SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device)), *others), kind)


def test_a_function_is_rehearsed_once_for_arguments_of_about_a_size(rehearsed):
    def function(x, factor):
        return ()

    def other(x, factor):
        return ()

    for new, *args in [
        (True, torch.ones(1000, 48), 1.0),
        (False, torch.ones(1000, 48), 1.0),
        (False, torch.ones(999, 48), 1.0),
        (True, torch.ones(992, 48), 1.0),
        (True, torch.ones(1100, 48), 1.0),
        (True, torch.ones(1000, 48, dtype=torch.float16), 1.0),
        (True, torch.ones(1000, 48), 2.0),
    ]:
        run(function, *args)
        assert len(rehearsed) == new
        rehearsed.clear()
    run(other, torch.ones(1000, 48), 1.0)
    assert len(rehearsed) == 1


def test_a_cpu_has_nothing_to_compile(rehearsed):
    run(lambda x: (), torch.ones(4, 5), device="cpu")
    assert not rehearsed
