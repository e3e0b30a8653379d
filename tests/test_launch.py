"""What a launch makes of what Triton raises, and an operation of a launch that cannot be. No GPU is needed."""

import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.compiler.errors import CompilationError

from cases import assert_same
from torch_switchback.kernels import _launch, _repeat, _replay
from torch_switchback.ops import _library, quantize_rowwise
from torch_switchback.ops.quantize_rowwise import _allocate_quantize, _quantize_rowwise_in_torch


class Kernel:
    """A kernel whose runs end as told: in an exception, or with what compiling returns."""

    __name__, arg_names = "kernel", ()

    def __init__(self, *outcomes):
        self.outcomes, self.caches, self.device_caches = list(outcomes), [], {}

    def __getitem__(self, grid):
        def run(*args, **options):
            self.caches.append(triton.knobs.cache.dir)
            outcome = self.outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return run


COMPILED = {(1, 1, 1): lambda *args: None}


@pytest.fixture(autouse=True)
def _a_fresh_process(monkeypatch):
    monkeypatch.setattr(_library, "not_compiled", {})
    _launch._warn_of_the_cache.cache_clear()


@pytest.mark.parametrize(
    "error", [ValueError("Expecting value: line 1"), PermissionError("read-only"), RuntimeError("?")]
)
def test_a_broken_cache_is_passed_by_and_said_once(error):
    usual = triton.knobs.cache.dir
    kernel = Kernel(error, COMPILED, error, COMPILED)
    with pytest.warns(UserWarning, match=f"past Triton's cache {usual}"):
        _launch.launch(kernel, (1,), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _launch.launch(kernel, (1,), 2)
    assert kernel.caches == [usual, _launch._own_cache().name] * 2
    assert triton.knobs.cache.dir == usual


def test_a_kernel_that_is_wrong_is_not_tried_again():
    kernel = Kernel(CompilationError("", None, "no such operation"))
    with pytest.raises(_launch.CannotCompile, match="no such operation"):
        _launch.launch(kernel, (1,))
    assert len(kernel.caches) == 1


def test_what_fails_without_the_cache_too_is_no_fault_of_the_cache():
    with pytest.raises(_launch.CannotCompile, match="no C compiler"):
        _launch.launch(Kernel(RuntimeError("no C compiler"), RuntimeError("again")), (1,))


METADATA = {"num_ctas": 1, "launch_cooperative_grid": False, "global_scratch_size": 0, "profile_scratch_size": 0}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (METADATA, True),
        ({}, True),  # ROCm's has less
        (METADATA | {"num_ctas": 2}, False),
        (METADATA | {"launch_cooperative_grid": True}, False),
        (METADATA | {"global_scratch_size": 128}, False),
        (METADATA | {"global_scratch_size": None}, True),
        (METADATA | {"profile_scratch_size": 64}, False),
    ],
)
def test_launches_that_are_more_than_parameters_and_a_grid_are_left_to_triton(metadata, expected, monkeypatch):
    class Compiled:
        def __init__(self):
            self.metadata = SimpleNamespace(**metadata)

        def __getitem__(self, grid):
            return lambda *args: None

    compiled, notes = Compiled(), []
    monkeypatch.setattr(_launch, "_run", lambda *args: compiled)
    monkeypatch.setattr(_launch, "is_recording", lambda: True)
    monkeypatch.setattr(_launch, "note", lambda function, *args: notes.append((function, args)))
    kernel = SimpleNamespace(arg_names=["x", "BLOCK"])
    for options in ({}, {"launch_pdl": True}):
        _launch.launch(kernel, (7,), 1, BLOCK=64, num_warps=4, **options)
    for (function, args), overlaps in zip(notes, (False, True), strict=True):
        assert args == (1, 64)
        assert isinstance(function, _repeat.Kernel) is expected
        if expected:
            assert function.overlaps is overlaps


def test_the_drivers_out_of_memory_is_pytorchs():
    with pytest.raises(torch.OutOfMemoryError):
        _launch.launch(Kernel(RuntimeError("Triton Error [CUDA]: out of memory")), (1,))


@pytest.mark.parametrize("kernels", ["quantize_rowwise", "there_is_no_such_module"])
def test_an_operation_gives_way_to_its_meaning(kernels, monkeypatch):
    """As a CUDA tensor's call would: the second time without trying the kernel, or saying anything."""
    tried = []

    def launch(*args, **options):
        tried.append(args)
        raise _launch.CannotCompile("no C compiler")

    monkeypatch.setattr("torch_switchback.kernels.quantize_rowwise.launch", launch)
    x = torch.randn(5, 7)
    with pytest.warns(UserWarning, match="runs quantize_rowwise in plain PyTorch, slowly"):
        run = _library._on_cuda("quantize_rowwise", kernels, _allocate_quantize, _quantize_rowwise_in_torch)
        first = run((x,), _replay.kind_of((x,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = run((x,), _replay.kind_of((x,)))
    for result in (first, second):
        for actual, expected in zip(result, quantize_rowwise(x), strict=True):
            assert_same(actual, expected)
    assert len(tried) == (kernels == "quantize_rowwise")
    assert list(_library.not_compiled) == ["quantize_rowwise"]


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
def test_kernels_overlap_where_it_is_known_to_work(capability, driver, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_launch, "cuda_of_the_driver", lambda: driver)
    overlaps = _launch.overlaps.__wrapped__  # past its cache
    assert overlaps(torch.device("cuda", 0)) is expected
    assert not overlaps(torch.device("cpu"))
