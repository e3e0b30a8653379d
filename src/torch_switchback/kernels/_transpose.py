"""Quantize tiles of x and store them transposed, and plain where asked: the second pass of four quantizers."""

from typing import Any

import torch
import triton
import triton.language as tl

from ._absmax import parts_block, reduce_absmax
from ._numerics import bits_to_float, inverse_scale, magnitude_bits, quantize
from ._tiles import tile_position
from .launch import VECTOR, Plan, bind, ceil_div, next_power_of_2

BLOCK_ROWS = 64
BLOCK_COLS, NUM_WARPS = 128, 4
# Of rows that are no whole vectors each element is loaded and stored by itself: a tile half as large takes 0.7 of the
# time to compile, and 0.9 to 1.2 of it to run.
BLOCK_COLS_ODD, NUM_WARPS_ODD = 64, 8
MAX_BLOCK_PARTS = 128  # rows of parts that a program reads at once
GROUP_ROWS = tl.constexpr(8)  # blocks of rows whose transposed int8 values are written side by side


@triton.jit
def reduce_columnwise_absmax(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    col,  # [BLOCK_COLS]
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Return the fp32 absmax [BLOCK_COLS] of columns of x."""
    block = tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + block
        mask = (row < rows) & (col < cols)[None, :]
        x = tl.load(x_ptr + row * stride_row + col[None, :] * stride_col, mask=mask, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    return bits_to_float(tl.max(bits, axis=0))


@triton.jit(do_not_specialize=["parts"])
def quantize_transpose_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    parts_ptr,  # [parts, cols] if COLUMNWISE, else [parts], fp16/bf16/fp32, with the absmax of x
    qdata_ptr,  # [rows, cols] int8, contiguous; unused unless STORE_PLAIN
    qdata_t_ptr,  # [cols, rows] int8, contiguous
    absmax_ptr,  # [cols] if COLUMNWISE, else [1], fp32; unused unless STORE_ABSMAX
    parts,
    rows,
    cols,
    stride_row,
    stride_col,
    stride_part,
    stride_part_col,
    COLUMNWISE: tl.constexpr,
    STORE_PLAIN: tl.constexpr,
    STORE_ABSMAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    # From the last rows, which the first pass read last and the cache may still hold.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row_block, col_block = tile_position(
        program, tl.maximum(rows, 1), tl.maximum(cols, 1), BLOCK_ROWS, BLOCK_COLS, GROUP_ROWS
    )
    start_row = row_block.to(tl.int64) * BLOCK_ROWS
    start_col = col_block.to(tl.int64) * BLOCK_COLS
    row = tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    in_rows = row < rows - row_block * BLOCK_ROWS
    in_cols = col < cols - col_block * BLOCK_COLS
    in_x = in_rows[:, None] & in_cols[None, :]
    x_tile = x_ptr + start_row * stride_row + start_col * stride_col
    x_rows = x_tile + row[:, None].to(tl.int64) * stride_row
    x = tl.load(x_rows + col[None, :].to(tl.int64) * stride_col, mask=in_x, other=0.0)

    if COLUMNWISE:
        absmax = reduce_columnwise_absmax(
            parts_ptr, start_col + col, parts, cols, stride_part, stride_part_col, BLOCK_PARTS, BLOCK_COLS
        )
        qdata = quantize(x, inverse_scale(absmax)[None, :])
    else:
        absmax = reduce_absmax(parts_ptr, parts, 0, BLOCK_PARTS, BLOCK_PARTS)
        qdata = quantize(x, inverse_scale(absmax))

    if STORE_PLAIN:
        qdata_rows = qdata_ptr + start_row * cols + start_col + row[:, None].to(tl.int64) * cols
        tl.store(qdata_rows + col[None, :], qdata, mask=in_x, eviction_policy="evict_last")
    qdata_cols = qdata_t_ptr + start_col * rows + start_row + col[:, None].to(tl.int64) * rows
    in_qdata_t = in_cols[:, None] & in_rows[None, :]
    tl.store(qdata_cols + row[None, :], tl.trans(qdata), mask=in_qdata_t, eviction_policy="evict_last")
    if STORE_ABSMAX:
        if COLUMNWISE:
            if row_block == 0:
                tl.store(absmax_ptr + start_col + col, absmax, mask=in_cols)
        elif program == 0:
            tl.store(absmax_ptr, absmax)


def plan_quantize_transpose(
    x: torch.Tensor,
    parts: torch.Tensor,
    qdata_t: torch.Tensor,
    absmax: torch.Tensor | None,
    qdata: torch.Tensor | None,
    *,
    columnwise: bool = False,
) -> Plan:
    """Return the plan that fills qdata_t [cols, rows], and absmax and qdata [rows, cols] if given, from x [rows, cols].

    parts: values with the absmax of x, contiguous; if columnwise, [parts, cols] with that of each column, any strides.
    """
    rows, cols = x.shape
    count = parts.shape[0] if columnwise else parts.numel()
    in_vectors = rows % VECTOR == 0 and cols % VECTOR == 0
    strides = (*x.stride(), *(parts.stride() if columnwise else (1, 1)))
    # At least one program per block of columns: without rows there is still an absmax to store.
    block_cols = BLOCK_COLS if in_vectors else BLOCK_COLS_ODD
    col_blocks = max(1, ceil_div(cols, block_cols))
    unused = qdata_t
    tensors = x, parts, unused if qdata is None else qdata, qdata_t, unused if absmax is None else absmax
    launch = bind(
        quantize_transpose_kernel,
        (*tensors, count, rows, cols, *strides),
        COLUMNWISE=columnwise,
        STORE_PLAIN=qdata is not None,
        STORE_ABSMAX=absmax is not None,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLS=block_cols,
        BLOCK_PARTS=min(next_power_of_2(count), MAX_BLOCK_PARTS) if columnwise else parts_block(count),
        num_warps=NUM_WARPS if in_vectors else NUM_WARPS_ODD,
    )

    def run(x: Any, parts: Any, qdata_t: Any, absmax: Any, qdata: Any) -> None:
        rows, unused = x.shape[0], qdata_t
        tensors = x, parts, unused if qdata is None else qdata, qdata_t, unused if absmax is None else absmax
        count = parts.shape[0] if columnwise else parts.numel()
        grid = (max(1, ceil_div(rows, BLOCK_ROWS)) * col_blocks, 1, 1)
        launch(grid, *tensors, count, rows, cols, *strides)

    return run
