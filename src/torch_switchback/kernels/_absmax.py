"""The absmax of x for quantisers whose programs share it: the first of their two passes, and its use in the second.

The first pass leaves the absmax of each part of x, the second reduces them, in every program, before it quantises.
Small x has no first pass: it is its own parts. An integer max over the bits of float32 (see ``magnitude_bits``) is
exact in any order, so there is nothing to zero beforehand, no atomic and no order to fix.
"""

import torch
import triton
import triton.language as tl

from ._launch import ceil_div, launch, multiprocessors, next_power_of_2
from ._numerics import bits_to_float, magnitude_bits
from ._replay import scratch

BLOCK = 8192
BLOCK_ROWS, BLOCK_COLS = 128, 64
MAX_PARTS = 1024

# Elements that every program of the second pass may read by itself, so that the first need not be launched: as many as
# take an H200 no longer than the first pass and the gap behind it.
MAX_SMALL = 2**14


@triton.jit
def reduce_absmax(
    x_ptr,  # [elements] fp16/bf16/fp32
    elements,
    start,
    step,
    BLOCK: tl.constexpr,
):
    """The fp32 absmax of the blocks of x that begin at start, start + step, …"""
    block = tl.arange(0, BLOCK)
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for offset in range(start, elements, step):
        x = tl.load(x_ptr + offset + block, mask=offset + block < elements, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    return bits_to_float(tl.max(bits, axis=0))


@triton.jit
def reduce_columnwise_absmax(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    col,  # [BLOCK_COLS]
    rows,
    cols,
    stride_row,
    stride_col,
    start,
    step,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The fp32 absmax [BLOCK_COLS] of columns of x over the blocks of rows that begin at start, start + step, …"""
    block = tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
    for first in range(start, rows, step):
        row = first + block
        mask = (row < rows) & (col < cols)[None, :]
        x = tl.load(x_ptr + row * stride_row + col[None, :] * stride_col, mask=mask, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    return bits_to_float(tl.max(bits, axis=0))


@triton.jit
def partial_absmax_kernel(
    x_ptr,  # [elements] fp16/bf16/fp32
    parts_ptr,  # [programs] fp32
    elements,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    tl.store(parts_ptr + tl.program_id(0), reduce_absmax(x_ptr, elements, start, step, BLOCK))


def partial_absmax(x: torch.Tensor) -> torch.Tensor:
    """Values with the absmax of x (contiguous): x if it is small, else one of each of up to MAX_PARTS parts of it."""
    if x.numel() <= MAX_SMALL:
        return x
    programs = min(ceil_div(x.numel(), BLOCK), 8 * multiprocessors(x.device), MAX_PARTS)
    parts = scratch(x, programs)
    launch(partial_absmax_kernel, (programs,), x, parts, x.numel(), BLOCK=BLOCK, num_warps=8)
    return parts


@triton.jit
def partial_columnwise_absmax_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    parts_ptr,  # [parts, cols] fp32
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    start = part * BLOCK_ROWS
    step = tl.num_programs(1).to(tl.int64) * BLOCK_ROWS
    values = reduce_columnwise_absmax(
        x_ptr, col, rows, cols, stride_row, stride_col, start, step, BLOCK_ROWS, BLOCK_COLS
    )
    tl.store(parts_ptr + part * cols + col, values, mask=col < cols)


def partial_columnwise_absmax(x: torch.Tensor) -> torch.Tensor:
    """Values [parts, cols] with the absmax of each column of x [rows, cols]: x if it is small, else one a part."""
    if x.numel() <= MAX_SMALL:
        return x
    rows, cols = x.shape
    block_cols = min(next_power_of_2(cols), BLOCK_COLS)
    column_blocks = ceil_div(cols, block_cols)
    parts = min(ceil_div(rows, BLOCK_ROWS), ceil_div(2 * multiprocessors(x.device), column_blocks))
    values = scratch(x, parts, cols)
    launch(
        partial_columnwise_absmax_kernel,
        (column_blocks, parts),
        x,
        values,
        rows,
        cols,
        x.stride(0),
        x.stride(1),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLS=block_cols,
        num_warps=8,
    )
    return values
