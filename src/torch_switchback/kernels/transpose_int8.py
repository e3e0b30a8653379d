"""The transpose of int8 values: memory-bound, so tiles are read and written in whole lines."""

import torch
import triton
import triton.language as tl

from ._tiles import tile_position
from ._transpose import GROUP_ROWS
from .launch import Plan, bind, ceil_div

BLOCK = 128
NUM_WARPS = 4


@triton.jit
def transpose_int8_kernel(
    x_ptr,  # [rows, cols] int8
    out_ptr,  # [cols, rows] int8, contiguous
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK: tl.constexpr,
):
    row_block, col_block = tile_position(tl.program_id(0), rows, cols, BLOCK, BLOCK, GROUP_ROWS)
    row = row_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    col = col_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_cols = row < rows, col < cols
    x_tile = x_ptr + row[:, None] * stride_row + col[None, :] * stride_col
    x = tl.load(x_tile, mask=in_rows[:, None] & in_cols[None, :], other=0)
    out_tile = out_ptr + col[:, None] * rows + row[None, :]
    tl.store(out_tile, tl.trans(x), mask=in_cols[:, None] & in_rows[None, :])


def plan_transpose_int8(x: torch.Tensor, out: torch.Tensor) -> Plan:
    cols, strides = x.shape[1], x.stride()
    launch = bind(transpose_int8_kernel, (x, out, x.shape[0], cols, *strides), BLOCK=BLOCK, num_warps=NUM_WARPS)

    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        rows = x.shape[0]
        launch((ceil_div(rows, BLOCK) * ceil_div(cols, BLOCK), 1, 1), x, out, rows, cols, *strides)

    return run
