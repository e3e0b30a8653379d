"""Define what the matmul kernels share: their operands, and the arithmetic of scales, bias and one rounding."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._numerics import ONE_OVER_127

# Sums of this many products of int8 values fit int32: 131072 * 127² < 2**31 (the limit is 133,144).
K_CHUNK = 131072


class Operands(NamedTuple):
    """Holds the tensors that a kernel reads, and the output that it fills."""

    a: torch.Tensor  # [M, K] int8, K contiguous
    b: torch.Tensor  # [K, N] int8, K contiguous
    absmax_a: torch.Tensor  # [M] fp32
    absmax_b: torch.Tensor  # [N] or [1] fp32
    bias: torch.Tensor | None  # [N] fp16/bf16/fp32
    out: torch.Tensor  # [M, N] fp16/bf16/fp32, contiguous


@triton.jit
def load_scale(absmax_ptr, index, size):
    """Return absmax / 127 of some rows or columns."""
    return tl.load(absmax_ptr + index, mask=index < size, other=0.0) * ONE_OVER_127


@triton.jit
def load_bias(bias_ptr, col, N):
    return tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)


@triton.jit
def dequantize(acc, scale_a, scale_b, bias):
    """Return fp32(acc) * (scale_a * scale_b) + bias, each operation rounded once, in this order.

    acc: [rows, cols] int32 or int64; scale_a: [rows, 1]; scale_b: [1, cols] or a scalar; bias: [1, cols] or None.
    """
    out = acc.to(tl.float32) * (scale_a * scale_b)
    if bias is not None:
        out += bias
    return out


@triton.jit
def dequantize_tile(
    acc,
    row,
    col,
    absmax_a_ptr,
    absmax_b_ptr,
    bias_ptr,
    M,
    N,
    ABSMAX_PER_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Return what :func:`dequantize` makes of a tile at row [rows] and col [cols]."""
    scale_a = load_scale(absmax_a_ptr, row, M)[:, None]
    if ABSMAX_PER_COL:
        scale_b = load_scale(absmax_b_ptr, col, N)[None, :]
    else:
        scale_b = load_scale(absmax_b_ptr, 0, 1)
    if HAS_BIAS:
        return dequantize(acc, scale_a, scale_b, load_bias(bias_ptr, col, N)[None, :])
    else:
        return dequantize(acc, scale_a, scale_b, None)
