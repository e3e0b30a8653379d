"""Faults that take a GPU: its memory, kernels that do not compile, a broken Triton cache, many processes at once."""

import gc
import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

import torch_switchback as ts
from testing import STRATEGIES, assert_same, gradients, make_layer
from torch_switchback import ops
from torch_switchback.kernels import int8_matmul, launch
from torch_switchback.ops import _library

strategies = pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)


def fill_holes(size):
    """-> tensors in every hole of so many bytes that earlier tests left in PyTorch's reserved memory."""
    gc.collect()
    torch.cuda.empty_cache()
    tensors, reserved = [], torch.cuda.memory_reserved()
    while torch.cuda.memory_reserved() == reserved:
        tensors.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    tensors.pop()
    torch.cuda.empty_cache()
    return tensors


@strategies
def test_out_of_memory(config):
    layer = make_layer(config, 4096, 4096, "cuda", torch.bfloat16)
    x, grad = (torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    expected = gradients(layer, x, grad)
    large = torch.randn(2**16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kept = fill_holes(200 * 2**20)
    total = torch.cuda.get_device_properties(0).total_memory
    before = torch.cuda.memory_allocated()
    # Room for the int8 values (256 MiB), not for the output beside them (512 MiB).
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 400 * 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            layer(large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    del kept
    for actual, wanted in zip(gradients(layer, x, grad), expected, strict=True):
        assert torch.equal(actual, wanted)
    layer(large).sum().backward()


@pytest.fixture
def nothing_compiles(monkeypatch):
    """Let Triton refuse every kernel, in a process in which no operation has fallen back yet."""

    def run(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "plans", {})
    monkeypatch.setattr(_library, "not_compiled", {})
    monkeypatch.setattr(int8_matmul, "_replaced", {})


@strategies
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:torch_switchback runs")
def test_nothing_compiles(dtype, config, nothing_compiles):
    layer = make_layer(config, 83, 70, dtype=dtype)
    x, grad = torch.randn(1500, 83).to(dtype), torch.randn(1500, 70).to(dtype)
    x[3, 4] = float("nan")
    y, grad_input, grad_weight, _ = gradients(layer, x, grad)
    layer.cuda()
    on_gpu = gradients(layer, x.cuda(), grad.cuda())
    assert len(_library.not_compiled) >= 3
    assert_same(on_gpu[0], y)
    assert_same(on_gpu[1], grad_input)
    if config.grad_weight != "high_precision":
        assert_same(on_gpu[2], grad_weight)


def test_it_is_said_once(nothing_compiles):
    x = torch.randn(5, 64, device="cuda")
    with pytest.warns(UserWarning, match="runs quantize_rowwise in plain PyTorch, slowly: .*Failed to find C compiler"):
        ts.ops.quantize_rowwise(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ts.ops.quantize_rowwise(x)


@pytest.mark.filterwarnings("ignore:torch_switchback runs")
def test_without_kernels_sums_are_exact_too(nothing_compiles):
    a = torch.full((2, 133_145), 127, dtype=torch.int8)
    absmax = torch.full((2,), 127.0)
    expected = ops.int8_matmul_mixed_dequantize(a, a.t(), absmax, absmax[:1], None, torch.float32)
    on_gpu = ops.int8_matmul_mixed_dequantize(
        a.cuda(), a.t().cuda(), absmax.cuda(), absmax[:1].cuda(), None, torch.float32
    )
    assert_same(on_gpu, expected)


# In processes of their own

# Without Python's own exit: PyTorch's backward thread may still want the interpreter then, and aborts the process
# ("terminate called without an active exception"), with any autograd.Function.
STEP = """
import hashlib, os, sys, warnings
import torch, torch_switchback as ts
warnings.simplefilter("always")
torch.manual_seed(0)
layer = ts.SwitchBackLinear(256, 192).to("cuda", torch.bfloat16)
x = torch.randn(77, 256).to("cuda", torch.bfloat16).requires_grad_()
y = layer(x)
(grad,) = torch.autograd.grad(y.sum(), x)
print(hashlib.sha256(b"".join(t.detach().float().cpu().numpy().tobytes() for t in (y, grad))).hexdigest(), flush=True)
os._exit(0)
"""
NO_TRITON = 'import sys; sys.modules["triton"] = None\n'


def start(folder, code=STEP):
    variables = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    """The hash of a step's output and gradient, and our warnings."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.split()[-1], "\n".join(line for line in err.splitlines() if "Warning: torch_switchback" in line)


@pytest.fixture(scope="module")
def expected():
    torch.manual_seed(0)
    layer = ts.SwitchBackLinear(256, 192).to(torch.bfloat16)
    x = torch.randn(77, 256).to(torch.bfloat16).requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    return hashlib.sha256(b"".join(t.detach().float().numpy().tobytes() for t in (y, grad))).hexdigest()


def test_eight_processes_on_a_cold_cache(tmp_path, expected):
    processes = [start(tmp_path / "cache") for _ in range(8)]
    for process in processes:
        assert finish(process) == (expected, "")


@pytest.mark.parametrize("garbage", [b"", b"\x00garbage"], ids=["truncated", "garbage"])
def test_a_corrupt_cache(garbage, tmp_path, expected):
    """The result stays, and a warning names TRITON_CACHE_DIR; Triton 3.9 and newer mend such a cache themselves."""
    assert finish(start(tmp_path)) == (expected, "")
    damaged = [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix in (".json", ".cubin")]
    assert damaged
    for file in damaged:
        file.write_bytes(garbage)
    result, said = finish(start(tmp_path))
    assert result == expected
    mends_its_cache = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    assert ("TRITON_CACHE_DIR" in said) is not mends_its_cache


def test_a_cache_that_cannot_be_written(tmp_path, expected):
    """Not by its permissions, which root does not heed: its parent is a file."""
    Path(tmp_path, "file").write_text("")
    result, said = finish(start(tmp_path / "file" / "cache"))
    assert result == expected
    assert "TRITON_CACHE_DIR" in said


def test_without_triton(tmp_path, expected):
    result, said = finish(start(tmp_path, NO_TRITON + STEP))
    assert result == expected
    assert said.count("in plain PyTorch") >= 3
