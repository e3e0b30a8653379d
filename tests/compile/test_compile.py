"""Every kernel, as its launcher calls it, compiles for every architecture and fits its shared memory."""

import pytest
import torch

pytest.importorskip("triton")
from ahead_of_time import SHARED_MEMORY, TARGETS, record

from torch_switchback.kernels import (
    _absmax,
    _transpose,
    int8_matmul,
    quantize_by_absmax,
    quantize_columnwise,
    quantize_global,
    quantize_rowwise,
)
from torch_switchback.tuning import matmul_table

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ARCHITECTURES = list(TARGETS)


def compile_all(launches, architecture):
    compiled = [launch.compile(TARGETS[architecture]) for launch in launches]
    assert compiled
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY[architecture]
    return compiled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantisers(architecture, dtype):
    x = torch.empty(256, 128, dtype=DTYPES[dtype])
    long_row = torch.empty(1, 20_000, dtype=DTYPES[dtype])
    codes, absmax = torch.empty(256, 128, dtype=torch.int8), torch.empty(256)
    one = torch.empty(1)
    launches = [
        *record(quantize_rowwise.quantize_rowwise, x, codes, absmax),
        *record(quantize_rowwise.quantize_rowwise, long_row, torch.empty(1, 20_000, dtype=torch.int8), one),
        *record(quantize_rowwise.dequantize_rowwise, codes, absmax, x.dtype, x),
        *record(quantize_global.quantize_global, x, codes, one),
        *record(quantize_global.quantize_global_transpose, x, codes.t(), one),
        *record(quantize_global.quantize_transpose_by_absmax, x, one, codes.t()),
        *record(quantize_by_absmax.quantize_by_absmax, x, one, codes),
        *record(quantize_by_absmax.quantize_by_absmax, x, absmax, codes),
        *record(quantize_columnwise.quantize_columnwise_and_transpose, x, codes.t(), absmax),
    ]
    compile_all(launches, architecture)


def product_launches(config, m, n, k, *, bias, out_dtype, per_col=False):
    a, b = torch.empty(m, k, dtype=torch.int8), torch.empty(n, k, dtype=torch.int8)
    return record(
        int8_matmul.dequantized_product,
        a,
        b.t(),
        torch.empty(m),
        torch.empty(n if per_col else 1),
        torch.empty(n, dtype=out_dtype) if bias else None,
        torch.empty(m, n, dtype=out_dtype),
        absmax_per_col=per_col,
        config=config,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_of_the_tuning_table(architecture):
    for _, config in matmul_table(architecture):
        for out_dtype in (torch.bfloat16, torch.float32):
            compile_all(product_launches(config, 256, 256, 256, bias=True, out_dtype=out_dtype), architecture)
        # Odd sizes, which TMA cannot take, and an inner dimension that int32 cannot hold.
        compile_all(product_launches(config, 17, 83, 257, bias=False, out_dtype=torch.float16), architecture)
        compile_all(product_launches(config, 16, 16, 133_152, bias=False, out_dtype=torch.float16), architecture)


@pytest.mark.parametrize("per_col", [False, True], ids=["global", "rowwise"])
@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointer"])
def test_hopper_products_run_on_int8_wgmma(tma, per_col):
    config = next(config for _, config in matmul_table("sm_90") if config.block_m == 128 and config.tma)
    inner = 256 if tma else 264  # a pitch of 264 bytes is none that TMA takes
    launches = product_launches(config, 256, 256, inner, bias=True, out_dtype=torch.bfloat16, per_col=per_col)
    (compiled,) = compile_all(launches, "sm_90")
    assert ("cp.async.bulk.tensor" in compiled.asm["ptx"]) == tma
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert ".s32.s8.s8" in compiled.asm["ptx"]


def test_constants_come_last():
    """The launcher hands a compiled kernel its arguments and then its constants."""
    modules = (_absmax, _transpose, int8_matmul, quantize_global, quantize_rowwise)
    kernels = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]
    assert len(kernels) >= 7
    for kernel in kernels:
        is_constant = [parameter.is_constexpr for parameter in kernel.params]
        assert is_constant == sorted(is_constant)


@pytest.mark.parametrize("allowed", [False, True])
def test_no_sum_is_contracted_with_a_product(allowed):
    """A fused multiply-add rounds once where the CPU meaning rounds twice; only the option keeps it away."""
    config = matmul_table("sm_80")[0][1]
    (product,) = product_launches(config, 256, 256, 256, bias=True, out_dtype=torch.float32)
    assert product.kwargs["enable_fp_fusion"] is False
    product.kwargs["enable_fp_fusion"] = allowed
    assert ("fma.rn" in product.compile(TARGETS["sm_80"]).asm["ptx"]) == allowed
