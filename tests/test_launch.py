"""Plans and the launches they make, what Triton's errors become, and operations whose kernel cannot run.

No GPU is needed: Triton's compiler is replaced by stand-ins, and tensors are the CPU's.
"""

import gc
import random
import warnings
import weakref

import pytest
import torch

pytest.importorskip("triton")
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction, create_function_from_signature

import torch_switchback as ts
from testing import assert_same, random_int8
from torch_switchback.kernels import CannotCompile, _absmax, device, launch
from torch_switchback.ops import _library, quantize_rowwise
from torch_switchback.ops.quantize_rowwise import _quantize_rowwise_reference, fake_quantize_rowwise
from torch_switchback.tuning import MatmulConfig

CONSTANTS = {"BLOCK": 64, "PDL_WAIT": False, "num_warps": 4}


class Compiled:
    """Stands for what Triton compiles, and keeps how it was launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs, self.hooked = [], []

    def _init_handles(self):
        pass

    def run(self, *args):
        self.runs.append(args)

    def __getitem__(self, grid):
        return lambda *args: self.hooked.append((grid, args))


class Kernel:
    """A kernel of two arguments whose compilation ends as told: in an exception, or with its result."""

    __name__, arg_names = "kernel", ("x", "rows", "BLOCK", "PDL_WAIT")

    def __init__(self, outcome):
        self.outcome, self.compilations, self.runs = outcome, [], []

    def warmup(self, *args, grid, **options):
        self.compilations.append((args, options))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def __getitem__(self, grid):
        return lambda *args, **options: self.runs.append((grid, args, options))


@pytest.fixture(autouse=True)
def a_fresh_process(monkeypatch):
    monkeypatch.setattr(_library, "not_compiled", {})
    monkeypatch.setattr(launch, "plans", {})


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "current_stream", lambda device: 7)


X = torch.empty(8)


# A launch


def test_a_kernel_is_compiled_once_and_launched_on_the_current_stream(stand_ins):
    kernel = Kernel(Compiled())
    run = launch.bind(kernel, (X, 3), **CONSTANTS)
    run((3, 1, 1), X, 3)
    run((5, 2, 1), X, 4)
    options = {"BLOCK": 64, "PDL_WAIT": False, "num_warps": 4, "enable_fp_fusion": False}
    assert kernel.compilations == [((X, 3), options)]
    expected = ("function", "metadata", None, None, None, X)
    assert kernel.outcome.runs == [(3, 1, 1, 7, *expected, 3, 64, False), (5, 2, 1, 7, *expected, 4, 64, False)]


def test_an_empty_grid_runs_nothing(stand_ins):
    kernel = Kernel(Compiled())
    launch.bind(kernel, (X, 3), **CONSTANTS)((3, 0, 1), X, 3)
    assert kernel.outcome.runs == []


def test_a_kernel_that_waits_is_launched_early(stand_ins):
    kernel = Kernel(Compiled())
    launch.bind(kernel, (X, 3), **(CONSTANTS | {"PDL_WAIT": True}))
    assert kernel.compilations[0][1]["launch_pdl"] is True


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_are_called_by_triton(name, stand_ins):
    kernel = Kernel(Compiled())
    run = launch.bind(kernel, (X, 3), **CONSTANTS)
    hooks = getattr(triton.knobs.runtime, name)
    hooks.add(print)
    try:
        run((4, 1, 1), X, 3)
    finally:
        hooks.remove(print)
    run((4, 1, 1), X, 3)
    assert kernel.outcome.hooked == [((4, 1, 1), (X, 3, 64, False))]
    assert len(kernel.outcome.runs) == 1


def test_another_triton_launches_by_its_public_interface(stand_ins, monkeypatch):
    monkeypatch.setattr(launch, "RUN_IS_KNOWN", False)
    kernel = Kernel(Compiled())
    launch.bind(kernel, (X, 3), **CONSTANTS)((4, 1, 1), X, 3)
    assert kernel.outcome.hooked == [((4, 1, 1), (X, 3, 64, False))]
    assert kernel.outcome.runs == []


def test_a_hook_that_compiles_instead_sees_every_launch(stand_ins):
    kernel = Kernel(None)
    run = launch.bind(kernel, (X, 3), **CONSTANTS)
    run((4, 1, 1), X, 3)
    assert [(grid, args) for grid, args, _ in kernel.runs] == [((4, 1, 1), (X, 3))]


# A plan


def plans_made(calls):
    """Count the plans that are made for these first arguments."""
    made = []

    def make(x, out):
        made.append(x)
        return lambda x, out: None

    for x in calls:
        launch.plan_for(make, (x,), (X,))
    return len(made)


def test_token_counts_share_plans_per_power_of_two():
    """One for multiples of 16, one for the rest."""
    calls = [torch.empty(count, 32) for count in range(65, 129)]
    assert plans_made(calls) == 2
    assert plans_made(calls) == 2  # of another operation


def test_what_decides_how_a_kernel_is_compiled_makes_its_own_plan():
    x = torch.empty(64, 32)
    memory = torch.empty(64 * 33 + 1)
    others = [
        x.half(),
        torch.empty(64, 33),
        torch.empty(64, 33)[:, :32],
        torch.empty(32, 64).t(),
        memory[1 : 64 * 32 + 1].view(64, 32),
    ]
    assert plans_made([x, *others, x]) == 1 + len(others)


@pytest.mark.parametrize("name", ["debug", "add_stages_inspection_hook"])
def test_triton_settings_that_change_code_make_another_plan(name, monkeypatch):
    x, made = torch.empty(4, 4), []

    def make(x, out):
        made.append(x)
        return lambda *args: None

    monkeypatch.setattr(triton.knobs.runtime, name, None)
    launch.plan_for(make, (x,), (X,))
    launch.plan_for(make, (x,), (X,))
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, name, lambda *args: None)
        launch.plan_for(make, (x,), (X,))
    assert len(made) == 2
    launch.plan_for(make, (x,), (X,))  # the one without the setting
    assert len(made) == 2


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(launch, "MAX_PLANS", 3)
    for cols in range(20):
        launch.plan_for(lambda x, out: print, (torch.empty(2, cols),), (X,))
        assert len(launch.plans) <= 3


# The key, beside Triton's own


DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WIDTHS = [1, 5, 80]


def random_matrix(rng, rows, cols, dtype):
    """Contiguous, transposed, or a slice, aligned or not."""
    layout = rng.randrange(4)
    if layout == 0:
        return torch.empty(cols, rows, dtype=dtype).t()
    if layout == 1:
        return torch.empty(rows, cols + 16, dtype=dtype)[:, :cols]
    memory = torch.empty(rows * cols + 1, dtype=dtype)
    return memory[layout - 2 : layout - 2 + rows * cols].view(rows, cols)


def random_call(name, rng):
    """Arguments of an operation."""
    rows, cols, dtype = rng.choice([*range(1, 40), 300]), rng.choice(WIDTHS), rng.choice(DTYPES)
    x = random_matrix(rng, rows, cols, dtype)
    if name.startswith("int8_"):
        n, dtype = rng.choice(WIDTHS), rng.choice(DTYPES[1:])
        a, state_x = random_int8(rows, cols), torch.empty(rows)
        bias = torch.empty(n) if rng.random() < 0.5 else None
        if name == "int8_linear":
            return a, state_x, random_matrix(rng, n, cols, dtype), bias, rng.random() < 0.5, dtype
        if name == "int8_linear_grad_input":
            rowwise = rng.random() < 0.5
            return a, state_x, random_matrix(rng, cols, n, dtype), torch.empty(cols if rowwise else 1), rowwise, dtype
        state_w = torch.empty(n if "rowwise" in name else 1)
        return a, random_int8(n, cols).t(), state_x, state_w, bias, dtype
    if name == "dequantize_rowwise":
        return random_int8(rows, cols), torch.empty(rows), dtype
    if name == "prepared_grad_input":
        rowwise, weight, transposed = rng.random() < 0.5, random_int8(cols, rng.choice(WIDTHS)), None
        if rng.random() < 0.5:  # as a layer keeps it, and then the weight is not read
            transposed = torch.empty(WIDTHS[-1], cols, dtype=torch.int8)
            weight = torch.empty(cols, WIDTHS[-1], dtype=torch.int8)
        return x, weight, torch.empty(cols if rowwise else 1), transposed, rowwise, x.dtype
    if name == "transpose_int8":
        return (random_int8(rows, cols),)
    if name == "quantize_folded_rowwise":
        return x, torch.empty(cols)
    if name == "requantize_rotated":
        return random_int8(rows, -(-cols // 16) * 16), torch.empty(rows), 16
    if "by_absmax" in name:
        return x, torch.empty(rows if name == "quantize_by_absmax" and rng.random() < 0.5 else 1)
    return (x, 16) if "rotated" in name else (x,)


def tritons_key(kernel, args, options):
    backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*args, **options)
    return kernel, tuple(specialization), sorted(options.items())


@pytest.mark.parametrize("name", sorted(vars(_library.direct)))
def test_a_plan_launches_only_what_it_compiled(name, monkeypatch):
    """Over random arguments, by Triton's own key: calls that share a plan share their compiled kernels."""
    compiled, launched = [], []

    class Checked(Compiled):
        def __init__(self, kernel, options):
            super().__init__()
            self.kernel, self.options = kernel, options

        def run(self, *args):
            launched.append(tritons_key(self.kernel, args[9:], self.options))

    def run(kernel, *args, grid, warmup, **options):
        assert warmup
        compiled.append(tritons_key(kernel, args, options))
        return Checked(kernel, {name: value for name, value in options.items() if name not in kernel.arg_names})

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(_absmax, "MAX_SMALL", 2**11)
    config = MatmulConfig("tma", 64, 64, 128, group_m=8, num_stages=3, num_warps=4)
    monkeypatch.setattr("torch_switchback.kernels.int8_matmul.matmul_config", lambda *args, tma: config)
    operation, rng, of_plan = getattr(_library.direct, name), random.Random(0), {}
    for _ in range(600):
        args = random_call(name, rng)
        compiled.clear()
        launched.clear()
        operation(*args)
        assert name not in _library.not_compiled, _library.not_compiled
        key = launch.specialization_key(args)
        assert of_plan.setdefault(key, list(launched)) == launched
        if compiled:
            assert launched == compiled
    assert len(of_plan) < 550  # so that some calls share a plan


@pytest.mark.parametrize("name", sorted(vars(_library.direct)))
def test_plans_keep_no_tensor(name, monkeypatch):
    class Forgetful(Compiled):
        def run(self, *args):
            pass

    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, grid, warmup, **options: Forgetful())
    args = random_call(name, random.Random(0))
    results = getattr(_library.direct, name)(*args)
    results = results if isinstance(results, tuple) else (results,)
    tensors = [weakref.ref(each) for each in (*args, *results) if isinstance(each, torch.Tensor)]
    del args, results
    gc.collect()
    assert launch.plans
    assert [tensor() for tensor in tensors] == [None] * len(tensors)


# Triton's errors


def test_a_kernel_that_is_wrong_cannot_compile(stand_ins):
    with pytest.raises(CannotCompile, match="no such operation"):
        launch.bind(Kernel(CompilationError("", None, "no such operation")), (X, 1), **CONSTANTS)


@pytest.mark.parametrize(
    "error", [ValueError("Expecting value: line 1"), PermissionError("read-only"), RuntimeError("no C compiler")]
)
def test_what_may_be_the_caches_fault_names_it(error, stand_ins):
    with pytest.raises(CannotCompile, match="TRITON_CACHE_DIR") as caught:
        launch.bind(Kernel(error), (X, 1), **CONSTANTS)
    assert str(error) in str(caught.value)
    assert triton.knobs.cache.dir in str(caught.value)


def test_the_drivers_out_of_memory_is_pytorchs(stand_ins):
    with pytest.raises(torch.OutOfMemoryError):
        launch.bind(Kernel(RuntimeError("Triton Error [CUDA]: out of memory")), (X, 1), **CONSTANTS)


@pytest.mark.parametrize("kernels", ["quantize_rowwise", "there_is_no_such_module"])
def test_an_operation_falls_back_to_its_reference(kernels, monkeypatch):
    """The second call does not try the kernel again, and says nothing."""
    tried = []

    def refuse(*args, **options):
        tried.append(args)
        raise CannotCompile("no C compiler")

    monkeypatch.setattr("torch_switchback.kernels.quantize_rowwise.bind", refuse)
    x = torch.randn(5, 7)
    implementations = kernels, fake_quantize_rowwise, _quantize_rowwise_reference
    run = _library._direct_implementation("quantize_rowwise", *implementations)
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


# Past the dispatcher


def test_a_cpu_tensor_does_not_ask_for_the_current_cuda_device(monkeypatch):
    """Asking initializes CUDA: it fails without a driver, and in a forked worker of a process that uses CUDA."""

    def refuse():
        raise RuntimeError("Found no NVIDIA driver")

    monkeypatch.setattr(_library, "current_device", refuse)
    layer = ts.SwitchBackLinear(16, 8)
    layer(torch.randn(2, 16)).sum().backward()
    with FakeTensorMode():
        ts.switchback_linear(torch.empty(2, 16), torch.empty(8, 16))
    layer.to("meta")(torch.empty(2, 16, device="meta"))


def new_dispatch_mode():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    return Mode()


def keys_within(enter):
    """Return whether the thread's dispatch keys are the usual ones while a function runs that PyTorch calls."""
    found = []

    def look(x):
        found.append(torch._C._dispatch_tls_local_include_set().raw_repr() in _library._USUAL_KEYS)
        return x * 2

    enter(look)
    return found[-1]


def with_mode(mode):
    def enter(look):
        with mode:
            look(torch.ones(3))

    return enter


def batched_backward(look):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return look(grad)

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Function.apply(x), x, torch.eye(3), is_grads_batched=True)


WATCHED = {
    "dispatch mode": with_mode(new_dispatch_mode()),
    "fake tensors": with_mode(FakeTensorMode()),
    "vmap": lambda look: torch.vmap(look)(torch.ones(3, 4)),
    "a batched gradient": batched_backward,
    "make_fx": lambda look: make_fx(look)(torch.ones(3)),
    "make_fx before dispatch": lambda look: make_fx(look, pre_dispatch=True)(torch.ones(3)),
    "torch.jit.trace": lambda look: torch.jit.trace(look, torch.ones(3), check_trace=False),
}
UNWATCHED = {
    "inference_mode": with_mode(torch.inference_mode()),
    "no_grad": with_mode(torch.no_grad()),
    "autocast": with_mode(torch.autocast("cpu")),
}


@pytest.mark.parametrize("name", [*WATCHED, *UNWATCHED])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_watches_operations_shows_in_the_dispatch_keys(name):
    assert keys_within((WATCHED | UNWATCHED)[name]) == (name in UNWATCHED)


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
    monkeypatch.setattr(device, "driver_version", lambda: driver)
    supports_pdl = device.supports_pdl.__wrapped__  # past its cache
    assert supports_pdl(torch.device("cuda", 0)) is expected
    assert not supports_pdl(torch.device("cpu"))
