"""Rehearsals of kernels that Triton really compiles, for a GPU that is not there: loads and launches do nothing."""

import gc
import importlib
import pkgutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import _async_compile
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from test_nn import STRATEGIES, gradients, make_layer
from torch_switchback import kernels
from torch_switchback.kernels import _launch, _rehearsal, _replay

X = torch.zeros(64)
MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)
]


class Driver:
    """Triton's, of a GPU that notes what it launches."""

    def __init__(self):
        self.launched: list[str] = []
        properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 2, 32, 0, 1024),
            get_device_properties=lambda device: properties,
        )

    def launcher_cls(self, src, metadata):
        return lambda *args: self.launched.append(metadata.name)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    gpu = Driver()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(driver, "_active", gpu)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield gpu


def new_kernels():
    """Two that have not been compiled."""

    @triton.jit
    def first_kernel(x_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)

    @triton.jit
    def second_kernel(x_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(x_ptr + i, tl.load(x_ptr + i) * 3)

    return first_kernel, second_kernel


def launch(x, *kernels):
    for kernel in kernels:
        _launch.launch(kernel, (1,), x, BLOCK=64, num_warps=4)


NAMES = ["first_kernel", "second_kernel"]


def test_nothing_is_left_to_compile(gpu, monkeypatch):
    kernels = new_kernels()
    _rehearsal.rehearse(launch, (X, *kernels))
    assert not gpu.launched
    for kernel in kernels:
        monkeypatch.setattr(kernel, "compile", pytest.fail)
    launch(X, *kernels)
    assert gpu.launched == NAMES


def test_another_thread_launches_what_is_being_compiled(gpu, monkeypatch):
    compiling, may_compile, compile = threading.Event(), threading.Event(), triton.compiler.compile

    def compile_slowly(*args, **options):
        compiling.set()
        assert may_compile.wait(30)
        return compile(*args, **options)

    monkeypatch.setattr(triton.compiler, "compile", compile_slowly)
    kernels = new_kernels()
    with ThreadPoolExecutor() as executor:
        rehearsal = executor.submit(_rehearsal.rehearse, launch, (X, *kernels))
        assert compiling.wait(30)
        launching = executor.submit(recorded_launches, X, *kernels)
        wait([launching], timeout=0.3)
        may_compile.set()
        rehearsal.result(30)
        launching.result(30)
    assert gpu.launched == NAMES


def recorded_launches(x, *kernels):
    """As within a function that is recorded: compiled kernels are asked for their launches again."""
    with _replay._recorded():
        launch(x, *kernels)


def test_after_an_interrupt_kernels_are_launched(gpu, monkeypatch):
    kernels = new_kernels()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_async_compile, "as_completed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _rehearsal.rehearse(launch, (X, *kernels))
    recorded_launches(X, *kernels)
    assert gpu.launched == NAMES


def test_within_a_mode_of_the_users_kernels_are_launched(gpu):
    kernels = new_kernels()
    with ThreadPoolExecutor() as executor, triton.AsyncCompileMode(executor):
        recorded_launches(X, *kernels)
    assert gpu.launched == NAMES


def test_a_kernel_that_does_not_compile_keeps_nothing_of_its_callers(gpu):
    """An error has the frames that it went through, and these their tensors."""

    @triton.jit
    def failing_kernel(x_ptr, BLOCK: tl.constexpr):
        tl.static_assert(BLOCK == 1, "not on this GPU")

    def step():
        x, activation = torch.zeros(64), torch.zeros(64)
        _rehearsal.rehearse(launch, (x, failing_kernel))
        with pytest.raises(_launch.CannotCompile, match="not on this GPU"):
            launch(x, failing_kernel)
        return weakref.ref(x), weakref.ref(activation)

    references = step()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_an_executor_that_takes_nothing_leaves_kernels_to_their_launches(gpu, monkeypatch):
    """As every executor once the interpreter ends, in a thread that goes on."""

    def refuse(*_, **__):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    kernels = new_kernels()
    launch(X, kernels[0])
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    _rehearsal.rehearse(launch, (X, *kernels))
    launch(X, *kernels)
    assert gpu.launched == [NAMES[0], *NAMES]


def test_a_triton_without_the_mode_compiles_at_launches(gpu, monkeypatch):
    monkeypatch.delattr(triton, "AsyncCompileMode")
    kernels = new_kernels()
    _rehearsal.rehearse(launch, (X, *kernels))
    launch(X, *kernels)
    assert gpu.launched == NAMES


def forget_compiled():
    """In this process: of the kernels of all operations."""
    for module in MODULES:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()


@pytest.fixture
def compiled(gpu, monkeypatch):
    """(its name, whether before a launch) of every kernel that a layer on the CPU, taken for a GPU, compiles."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.empty(0).get_device())
    forget_compiled()
    monkeypatch.setattr(_replay, "_replays", {})
    monkeypatch.setattr(_replay, "_sizes", set())
    compiled = []

    def note(*, fn, is_manual_warmup, **_):
        compiled.append((fn.name.rpartition(".")[2], is_manual_warmup))

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    yield compiled
    forget_compiled()


@pytest.mark.parametrize("name", ["global", "int8 grad_weight"])
def test_a_layers_kernels_are_compiled_before_their_launches_and_once_a_power_of_two(name, compiled, gpu):
    layer = make_layer(STRATEGIES[name], 256, 128, "cpu", torch.bfloat16)

    def step(tokens):
        x = torch.randn(tokens, 256, dtype=torch.bfloat16)
        gradients(layer, x, torch.randn(tokens, 128, dtype=torch.bfloat16))

    for octave in (256, 2048):
        step(2 * octave)
        before = list(compiled)
        for tokens in (octave + 1, octave + 16, octave + octave // 2, 2 * octave - 1):
            step(tokens)
        assert compiled == before
    assert all(is_before for _, is_before in compiled)
    assert {name for name, _ in compiled} <= set(gpu.launched)
    assert len(compiled) >= 5
