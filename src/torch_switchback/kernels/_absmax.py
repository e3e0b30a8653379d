"""The first half of a two-pass quantiser: absmax over parts of the data. The second half reduces the parts itself.

Both take and give the bits of a float32 (see ``magnitude_bits``): a plain integer max, in any order, is exact,
so there is nothing to zero beforehand, no atomic and no order to fix.
"""

import torch
import triton
import triton.language as tl

from ._launch import ceil_div, launch, multiprocessors, next_power_of_2
from ._numerics import magnitude_bits

BLOCK = 8192
MAX_PARTS = 1024


@triton.jit
def partial_absmax_kernel(
    x_ptr,  # [elements] fp16/bf16/fp32
    partial_ptr,  # [programs] int32
    elements,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    block = tl.arange(0, BLOCK)
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for offset in range(start, elements, step):
        x = tl.load(x_ptr + offset + block, mask=offset + block < elements, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    tl.store(partial_ptr + tl.program_id(0), tl.max(bits, axis=0))


def partial_absmax(x: torch.Tensor) -> torch.Tensor:
    """int32 bits of the absmax of up to MAX_PARTS parts of x (contiguous), which no one has reduced yet."""
    programs = max(1, min(ceil_div(x.numel(), BLOCK), 8 * multiprocessors(x.device), MAX_PARTS))
    partial = x.new_empty((programs,), dtype=torch.int32)
    launch(partial_absmax_kernel, (programs,), x, partial, x.numel(), BLOCK=BLOCK, num_warps=8)
    return partial


@triton.jit
def partial_columnwise_absmax_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    partial_ptr,  # [parts, cols] int32
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    step = tl.num_programs(1).to(tl.int64) * BLOCK_ROWS
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    block = tl.arange(0, BLOCK_ROWS)[:, None]
    bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
    for start in range(part * BLOCK_ROWS, rows, step):
        row = start + block
        mask = (row < rows) & (col < cols)[None, :]
        x = tl.load(x_ptr + row * stride_row + col[None, :] * stride_col, mask=mask, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    tl.store(partial_ptr + part * cols + col, tl.max(bits, axis=0), mask=col < cols)


def partial_columnwise_absmax(x: torch.Tensor) -> torch.Tensor:
    """int32 bits [parts, cols] of the absmax of each column of x [rows, cols] over parts of its rows."""
    rows, cols = x.shape
    block_rows, block_cols = 64, min(next_power_of_2(cols), 128)
    column_blocks = ceil_div(cols, block_cols)
    parts = max(1, min(ceil_div(rows, block_rows), ceil_div(2 * multiprocessors(x.device), max(column_blocks, 1))))
    partial = x.new_empty((parts, cols), dtype=torch.int32)
    launch(
        partial_columnwise_absmax_kernel,
        (column_blocks, parts),
        x,
        partial,
        rows,
        cols,
        x.stride(0),
        x.stride(1),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=8,
    )
    return partial
