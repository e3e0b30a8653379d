"""INT8 products with fused dequantisation: a persistent kernel on TMA descriptors, and one on pointers.

Both share the order of the tiles and the epilogue, so their outputs are the same bit for bit.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tuning import MatmulConfig, matmul_config
from ._launch import architecture, ceil_div, launch, multiprocessors
from ._numerics import ONE_OVER_127

# Partial sums over this many products of codes fit int32: 131072 * 127² < 2**31 (the limit is 133,144).
FOLD = 131072


@triton.jit
def tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The block row and column of a tile: down GROUP_M block rows, then one block column on, for reuse in L2."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    group = tile // (GROUP_M * blocks_n)
    group_height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * blocks_n)
    return group * GROUP_M + within % group_height, within // group_height


@triton.jit
def dequantize(
    acc,  # [rows, cols] int32 or int64
    row,  # [rows]
    col,  # [cols]
    absmax_a_ptr,  # [M] fp32
    absmax_b_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N] fp16/bf16/fp32, or unused
    M,
    N,
    ABSMAX_PER_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """fp32(acc) * (scale_a * scale_b) + bias, each operation rounded once, in this order."""
    scale_a = tl.load(absmax_a_ptr + row, mask=row < M, other=0.0) * ONE_OVER_127
    if ABSMAX_PER_COL:
        scale_b = tl.load(absmax_b_ptr + col, mask=col < N, other=0.0)[None, :] * ONE_OVER_127
    else:
        scale_b = tl.load(absmax_b_ptr) * ONE_OVER_127
    out = acc.to(tl.float32) * (scale_a[:, None] * scale_b)
    if HAS_BIAS:
        out += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit(do_not_specialize=["M"])
def int8_matmul_tma_kernel(
    a_desc,  # [M, K] int8, blocks of [BLOCK_M, BLOCK_K]
    b_desc,  # [N, K] int8, blocks of [BLOCK_N, BLOCK_K]
    out_desc,  # [M, N] fp16/bf16/fp32, blocks of [BLOCK_M, BLOCK_N / 2]
    absmax_a_ptr,  # [M] fp32
    absmax_b_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N] fp16/bf16/fp32, or unused
    M,
    N,
    K,
    ABSMAX_PER_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FOLD: tl.constexpr,  # carry what is above 16 bits out of acc before each chunk of this many products; 0: never
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FOLD == 0):
        block_m, block_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = block_m * BLOCK_M
        start_n = block_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        high = acc
        if FOLD:  # the sum is acc + 2**16 * high; in int64 it would not fit the registers
            for start in range(0, K, FOLD):
                high += acc >> 16
                acc = acc & 0xFFFF
                for k in range(start, tl.minimum(start + FOLD, K), BLOCK_K):
                    a = a_desc.load([start_m, k])
                    b = b_desc.load([start_n, k])
                    acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        else:
            for k in range(0, K, BLOCK_K):
                a = a_desc.load([start_m, k])
                b = b_desc.load([start_n, k])
                acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)

        # Two halves: the first is stored while the second is dequantised, through half the shared memory.
        halves = acc.reshape((BLOCK_M, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
        high_halves = high.reshape((BLOCK_M, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
        row = start_m + tl.arange(0, BLOCK_M)
        for half in tl.static_range(2):
            start = start_n + half * (BLOCK_N // 2)
            col = start + tl.arange(0, BLOCK_N // 2)
            total = halves[half]
            if FOLD:
                total = total.to(tl.int64) + (high_halves[half].to(tl.int64) << 16)
            out = dequantize(total, row, col, absmax_a_ptr, absmax_b_ptr, bias_ptr, M, N, ABSMAX_PER_COL, HAS_BIAS)
            out_desc.store([start_m, start], out.to(out_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def int8_matmul_kernel(
    a_ptr,  # [M, K] int8, K contiguous
    b_ptr,  # [N, K] int8, K contiguous
    out_ptr,  # [M, N] fp16/bf16/fp32, contiguous
    absmax_a_ptr,  # [M] fp32
    absmax_b_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N] fp16/bf16/fp32, or unused
    M,
    N,
    K,
    stride_a,
    stride_b,
    ABSMAX_PER_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FOLD: tl.constexpr,  # sum chunks of this many products in int32 and the chunks in int64; 0: all in int32
):
    block_m, block_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_rows = a_ptr + row[:, None] * stride_a
    b_rows = b_ptr + col[None, :] * stride_b
    in_a = (row < M)[:, None]
    in_b = (col < N)[None, :]

    if FOLD:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int64)
        for start in range(0, K, FOLD):
            total += inner_product(
                a_rows, b_rows, in_a, in_b, start, tl.minimum(start + FOLD, K), BLOCK_M, BLOCK_N, BLOCK_K
            ).to(tl.int64)
    else:
        total = inner_product(a_rows, b_rows, in_a, in_b, 0, K, BLOCK_M, BLOCK_N, BLOCK_K)

    out = dequantize(total, row, col, absmax_a_ptr, absmax_b_ptr, bias_ptr, M, N, ABSMAX_PER_COL, HAS_BIAS)
    mask = (row < M)[:, None] & (col < N)[None, :]
    tl.store(out_ptr + row[:, None] * N + col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


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
    """The int32 sums over k in [start, stop)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(start, stop, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        a = tl.load(a_rows + inner[None, :], mask=in_a & (inner < stop)[None, :], other=0)
        b = tl.load(b_rows + inner[:, None], mask=in_b & (inner < stop)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


def int8_matmul_mixed_dequantize(
    a: torch.Tensor,
    b: torch.Tensor,
    state_x: torch.Tensor,
    state_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    dequantized_product(a, b, state_x, state_w, bias, out, absmax_per_col=False)


def int8_matmul_rowwise_dequantize(
    a: torch.Tensor,
    b: torch.Tensor,
    state_x: torch.Tensor,
    state_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    dequantized_product(a, b, state_x, state_w, bias, out, absmax_per_col=True)


def dequantized_product(
    a: torch.Tensor,
    b: torch.Tensor,
    absmax_a: torch.Tensor,
    absmax_b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    absmax_per_col: bool,
    config: MatmulConfig | None = None,
) -> None:
    """Fill out [M, N] with the product of a [M, K] and b [K, N], by the tuned configuration or a given one."""
    M, K = a.shape
    N = b.shape[1]
    a, b = _inner_contiguous(a), _inner_contiguous(b.t())  # b: [N, K] from here
    fits_tma = _fits_tma(a) and _fits_tma(b) and _fits_tma(out)
    if config is None:
        config = matmul_config(architecture(a.device), M, N, K, tma=fits_tma)
    constants = {
        "ABSMAX_PER_COL": absmax_per_col,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "FOLD": FOLD if K > FOLD else 0,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.tma and fits_tma and K > FOLD:  # a second accumulator
        constants["num_warps"] = max(config.num_warps, min(config.block_m * config.block_n // 2048, 8))
    vectors = (absmax_a.contiguous(), absmax_b.contiguous(), absmax_b if bias is None else bias.contiguous())
    tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_n)
    if config.tma and fits_tma:
        launch(
            int8_matmul_tma_kernel,
            (min(tiles, config.programs_per_multiprocessor * multiprocessors(a.device)),),
            _descriptor(a, config.block_m, config.block_k),
            _descriptor(b, config.block_n, config.block_k),
            _descriptor(out, config.block_m, config.block_n // 2),
            *vectors,
            M,
            N,
            K,
            **constants,
        )
    else:
        launch(
            int8_matmul_kernel,
            (tiles,),
            a,
            b,
            out,
            *vectors,
            M,
            N,
            K,
            a.stride(0),
            b.stride(0),
            **constants,
        )


def _inner_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The tensor cores take int8 operands with a contiguous inner dimension only."""
    return x if x.stride(1) == 1 else x.contiguous()


def _fits_tma(x: torch.Tensor) -> bool:
    """Whether x [rows, cols] can stand behind a TMA descriptor: 16-byte aligned rows that do not overlap."""
    pitch = x.stride(0)
    return (
        x.numel() > 0
        and x.stride(1) == 1
        and pitch >= x.shape[1]
        and (pitch * x.element_size()) % 16 == 0
        and x.data_ptr() % 16 == 0
    )


def _descriptor(x: torch.Tensor, *block: int) -> TensorDescriptor:
    """TensorDescriptor.from_tensor without its checks, which repeat _fits_tma's and take longer than the launch."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = x, x.shape, x.stride()
    descriptor.block_shape, descriptor.padding = list(block), "zero"
    return descriptor
