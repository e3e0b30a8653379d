"""The cache of compiled kernels, what a launch makes of Triton's errors, and operations whose kernel cannot run.

No GPU is needed: kernels are compiled for a GPU that is not there, or are stand-ins.
"""

import random
import warnings
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from cases import assert_same
from torch_switchback.kernels import CannotCompile, device, launch
from torch_switchback.ops import _library, quantize_rowwise
from torch_switchback.ops.quantize_rowwise import _fake_quantize, _quantize_rowwise_reference


class Constants(NamedTuple):
    BLOCK: int = 64
    PDL_WAIT: bool = False
    num_warps: int = 4


class Kernel:
    """A kernel whose runs end as told: in an exception, or with what compiling returns."""

    __name__ = "kernel"

    def __init__(self, *outcomes, count=1):
        self.outcomes, self.runs = list(outcomes), []
        self.arg_names = [f"arg{number}" for number in range(count)] + ["BLOCK", "PDL_WAIT"]

    def __getitem__(self, grid):
        def run(*args, **options):
            self.runs.append((grid, args, options))
            outcome = self.outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return run


class Compiled:
    """Stands for what Triton compiles, and keeps how it was launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs, self.hooked = [], []

    def run(self, *args):
        self.runs.append(args)

    def __getitem__(self, grid):
        return lambda *args: self.hooked.append((grid, args))


@pytest.fixture(autouse=True)
def a_fresh_process(monkeypatch):
    monkeypatch.setattr(_library, "not_compiled", {})
    monkeypatch.setattr(launch, "compiled_kernels", {})
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "current_stream", lambda device: 7)


# The cache


def test_the_second_launch_of_a_key_goes_past_triton():
    kernel, compiled = Kernel(Compiled()), None
    x = torch.empty(8)
    launch.launch(kernel, (3,), (x,), Constants())
    compiled = kernel.outcomes or next(iter(launch.compiled_kernels.values()))[0]
    launch.launch(kernel, (5, 2), (x,), Constants())
    assert kernel.runs == [((3,), (x,), {"BLOCK": 64, "PDL_WAIT": False, "num_warps": 4, "enable_fp_fusion": False})]
    assert compiled.runs == [(5, 2, 1, 7, "function", "metadata", None, None, None, x.data_ptr(), 64, False)]


def test_an_empty_grid_runs_nothing():
    kernel = Kernel()
    launch.launch(kernel, (3, 0), (torch.empty(8),), Constants())
    assert kernel.runs == []


def test_another_constant_or_another_setting_is_another_kernel(monkeypatch):
    kernel = Kernel(Compiled(), Compiled(), Compiled())
    x = torch.empty(8)
    launch.launch(kernel, (1,), (x,), Constants())
    launch.launch(kernel, (1,), (x,), Constants(BLOCK=128))
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    for _ in range(2):
        launch.launch(kernel, (1,), (x,), Constants())
    assert len(kernel.runs) == 3


def test_a_kernel_that_waits_is_launched_early():
    kernel = Kernel(Compiled())
    launch.launch(kernel, (1,), (torch.empty(8),), Constants(PDL_WAIT=True))
    assert kernel.runs[0][2]["launch_pdl"] is True


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_are_called_by_triton(name):
    kernel, compiled = Kernel(Compiled()), Compiled()
    kernel.outcomes = [compiled]
    x = torch.empty(8)
    hooks = getattr(triton.knobs.runtime, name)
    launch.launch(kernel, (1,), (x,), Constants())
    hooks.add(print)
    try:
        launch.launch(kernel, (4,), (x,), Constants())
    finally:
        hooks.remove(print)
    launch.launch(kernel, (4,), (x,), Constants())
    assert compiled.hooked == [((4, 1, 1), (x, 64, False))]
    assert len(compiled.runs) == 1


def test_a_changed_compiler_pipeline_goes_through_triton(monkeypatch):
    kernel = Kernel(Compiled(), Compiled())
    x = torch.empty(8)
    launch.launch(kernel, (1,), (x,), Constants())
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *args: None)
    launch.launch(kernel, (1,), (x,), Constants())
    assert len(kernel.runs) == 2


# The key, beside Triton's own


@triton.jit(do_not_specialize=["rows"])
def pointers_kernel(x_ptr, out_ptr, rows, cols, stride, BLOCK: tl.constexpr, PDL_WAIT: tl.constexpr):
    pass


@triton.jit
def descriptor_kernel(x_desc, out_ptr, rows, cols, stride, BLOCK: tl.constexpr, PDL_WAIT: tl.constexpr):
    pass


DTYPES = [torch.int8, torch.float16, torch.bfloat16, torch.float32]
SIZES = [0, 1, 2, 15, 16, 17, 4096, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**40]


def random_arguments(kernel, rng):
    memory = torch.empty(64)
    x = memory.view(torch.int8)[rng.choice([0, 1, 4, 16]) :].view(torch.int8)
    dtype = rng.choice(DTYPES)
    first = x.view(dtype) if x.data_ptr() % dtype.itemsize == 0 and x.numel() % dtype.itemsize == 0 else x
    if kernel is descriptor_kernel:
        dtype = rng.choice(DTYPES[:3])
        base = torch.empty(256, 256, dtype=dtype)
        first = TensorDescriptor.from_tensor(base, [rng.choice([32, 64]), rng.choice([32, 64])])
    second = memory[rng.choice([0, 1, 4]) :]
    constants = Constants(rng.choice([32, 64]), rng.choice([False, True]), rng.choice([4, 8]))
    return (first, second, *(rng.choice(SIZES) for _ in range(3))), constants


def tritons_key(kernel, backend, args, constants):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*args, **constants._asdict(), debug=False)
    return tuple(specialization), str(options)


@pytest.mark.parametrize("kernel", [pointers_kernel, descriptor_kernel], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=["cuda", "hip"])
def test_launches_of_one_key_are_of_one_key_of_tritons(kernel, target):
    """Over random arguments. The reverse need not hold."""
    rng = random.Random(0)
    backend = triton.compiler.make_backend(target)
    seen = {}
    for _ in range(3000):
        args, constants = random_arguments(kernel, rng)
        key, values = launch.specialization_key(kernel, args, constants)
        theirs = tritons_key(kernel, backend, args, constants)
        assert seen.setdefault(key, theirs) == theirs
        addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        assert all(one is other or one == other for one, other in zip(values, addresses, strict=True))


def test_sizes_of_one_kind_share_a_key():
    """Or the cache would grow with every token count."""
    x = torch.empty(64)
    keys = {launch.specialization_key(pointers_kernel, (x, x, n, n, n), Constants())[0] for n in range(2, 10_000)}
    assert len(keys) == 2  # what 16 divides, and the rest


# Triton's errors


def test_a_kernel_that_is_wrong_is_not_tried_again():
    kernel = Kernel(CompilationError("", None, "no such operation"))
    with pytest.raises(CannotCompile, match="no such operation"):
        launch.launch(kernel, (1,), (1,), Constants())
    assert len(kernel.runs) == 1


@pytest.mark.parametrize(
    "error", [ValueError("Expecting value: line 1"), PermissionError("read-only"), RuntimeError("no C compiler")]
)
def test_what_may_be_the_caches_fault_names_it(error):
    with pytest.raises(CannotCompile, match="TRITON_CACHE_DIR") as caught:
        launch.launch(Kernel(error), (1,), (1,), Constants())
    assert str(error) in str(caught.value)
    assert triton.knobs.cache.dir in str(caught.value)


def test_the_drivers_out_of_memory_is_pytorchs():
    with pytest.raises(torch.OutOfMemoryError):
        launch.launch(Kernel(RuntimeError("Triton Error [CUDA]: out of memory")), (1,), (1,), Constants())


@pytest.mark.parametrize("kernels", ["quantize_rowwise", "there_is_no_such_module"])
def test_an_operation_falls_back_to_its_reference(kernels, monkeypatch):
    """As a CUDA tensor's call would: the second time without trying the kernel, or saying anything."""
    tried = []

    def refuse(*args):
        tried.append(args)
        raise CannotCompile("no C compiler")

    monkeypatch.setattr("torch_switchback.kernels.quantize_rowwise.launch", refuse)
    monkeypatch.setattr(_library, "current_device", lambda: -1)  # a CPU tensor's
    x = torch.randn(5, 7)
    run = _library._cuda_implementation("quantize_rowwise", kernels, _fake_quantize, _quantize_rowwise_reference)
    with pytest.warns(UserWarning, match="runs quantize_rowwise in plain PyTorch, slowly"):
        first = run(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = run(x)
    for result in (first, second):
        for actual, expected in zip(result, quantize_rowwise(x), strict=True):
            assert_same(actual, expected)
    assert len(tried) == (kernels == "quantize_rowwise")
    assert list(_library.not_compiled) == ["quantize_rowwise"]


# Programmatic dependent launch


@pytest.mark.parametrize(
    ("capability", "driver", "expected"),
    [
        ((9, 0), 13_000, True),
        ((9, 0), 12_030, True),
        ((9, 0), 12_020, False),  # in which a CUDA graph could not hold it
        ((9, 0), 0, False),
        ((8, 0), 13_000, False),
        ((12, 0), 13_000, False),
    ],
)
def test_kernels_start_early_where_it_is_known_to_work(capability, driver, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    supports_pdl = device.supports_pdl.__wrapped__  # past its cache
    assert supports_pdl(torch.device("cuda", 0)) is expected
    assert not supports_pdl(torch.device("cpu"))
