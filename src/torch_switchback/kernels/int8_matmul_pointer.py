"""The matmul as a kernel on pointers, one tile per program: for every GPU, and for outputs that TMA cannot store."""

from typing import Any

import triton
import triton.language as tl

from ..tuning import MatmulConfig
from ._matmul import K_CHUNK, Operands, dequantize_tile, load_bias
from ._tiles import tile_position
from .device import supports_pdl
from .launch import Plan, bind, ceil_div


@triton.jit(do_not_specialize=["M", "has_bias"])
def int8_matmul_kernel(
    a_ptr,  # [M, K] int8, K contiguous
    b_ptr,  # [N, K] int8, K contiguous
    out_ptr,  # [M, N] fp16/bf16/fp32, contiguous
    absmax_a_ptr,  # [M] fp32
    absmax_b_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N] fp16/bf16/fp32; unused unless has_bias
    M,
    has_bias,  # 0 or 1, and no constant: a layer's forward and its backward share a compiled kernel
    N,
    K,
    stride_a,
    stride_b,
    ABSMAX_PER_COL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    K_CHUNK: tl.constexpr,  # sum chunks of this many products in int32 and the chunks in int64; 0: all in int32
    PDL_WAIT: tl.constexpr,  # this kernel may start before the one ahead of it ends
):
    if PDL_WAIT:
        tl.extra.cuda.gdc_wait()
    block_m, block_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    start_m = block_m.to(tl.int64) * BLOCK_M
    start_n = block_n.to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    rows = M - block_m * BLOCK_M
    cols = N - block_n * BLOCK_N
    in_a = (row < rows)[:, None]
    in_b = (col < cols)[None, :]
    a_rows = a_ptr + start_m * stride_a + row[:, None].to(tl.int64) * stride_a
    b_rows = b_ptr + start_n * stride_b + col[None, :].to(tl.int64) * stride_b

    if K_CHUNK:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int64)
        for start in range(0, K, K_CHUNK):
            total += inner_product(
                a_rows, b_rows, in_a, in_b, start, tl.minimum(start + K_CHUNK, K), BLOCK_M, BLOCK_N, BLOCK_K
            ).to(tl.int64)
    else:
        total = inner_product(a_rows, b_rows, in_a, in_b, 0, K, BLOCK_M, BLOCK_N, BLOCK_K)

    out = dequantize_tile(
        total,
        row,
        col,
        absmax_a_ptr + start_m,
        absmax_b_ptr + start_n * ABSMAX_PER_COL,
        None,
        rows,
        cols,
        ABSMAX_PER_COL,
        HAS_BIAS=False,
    )
    # -0.0 leaves every sum as it is. Triton takes a literal one for 0.0, which does not.
    bias = load_bias(bias_ptr + start_n, col, cols * has_bias)
    out += tl.where(has_bias != 0, bias, tl.zeros_like(bias) * -1.0)[None, :]

    out_rows = out_ptr + start_m * N + start_n + row[:, None].to(tl.int64) * N
    tl.store(out_rows + col[None, :], out.to(out_ptr.dtype.element_ty), mask=in_a & in_b)


@triton.jit
def inner_product(
    a_rows,  # [BLOCK_M, 1] pointers to int8
    b_rows,  # [1, BLOCK_N] pointers to int8
    in_a,
    in_b,
    start,
    stop,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the int32 sums over k in [start, stop)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(start, stop, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        a = tl.load(a_rows + inner[None, :], mask=in_a & (inner < stop)[None, :], other=0)
        b = tl.load(b_rows + inner[:, None], mask=in_b & (inner < stop)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


def plan_pointer(operands: Operands, absmax_per_col: bool, config: MatmulConfig) -> Plan:
    """Return the plan that fills the output; it takes a, b, absmax_a, absmax_b, bias, out_dtype and out."""
    a, b, absmax_a, absmax_b, bias, out = operands
    K, N = b.shape
    sizes = int(bias is not None), N, K, a.stride(0), b.stride(1)
    block_m, blocks_n = config.block_m, ceil_div(N, config.block_n)
    tensors = a, b, out, absmax_a, absmax_b, out if bias is None else bias
    launch = bind(
        int8_matmul_kernel,
        (*tensors, a.shape[0], *sizes),
        ABSMAX_PER_COL=absmax_per_col,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        K_CHUNK=K_CHUNK if K > K_CHUNK else 0,
        PDL_WAIT=supports_pdl(a.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

    def run(a: Any, b: Any, absmax_a: Any, absmax_b: Any, bias: Any, out_dtype: Any, out: Any) -> None:
        M = a.shape[0]
        grid = (ceil_div(M, block_m) * blocks_n, 1, 1)
        launch(grid, a, b, out, absmax_a, absmax_b, out if bias is None else bias, M, *sizes)

    return run
