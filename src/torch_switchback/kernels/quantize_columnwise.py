"""Column-wise quantization: the absmax of each column; then quantize and store transposed.

Of columns there are too many parts to reduce them again in every program of the second pass, so atomics gather them. An
integer max over the bits of float32 (see ``magnitude_bits``) is exact in any order.
"""

import torch
import triton
import triton.language as tl

from . import _absmax
from ._numerics import magnitude_bits
from ._transpose import plan_quantize_transpose
from .device import num_sms
from .launch import Plan, bind, ceil_div

BLOCK_ROWS, BLOCK_COLS = 128, 64
CTAS_PER_SM = 8


@triton.jit(do_not_specialize=["rows", "tiles"])
def columnwise_absmax_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    absmax_ptr,  # [cols] int32 bits, zeros at first
    rows,
    tiles,  # below each other, that a program does
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    col = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first = (tl.program_id(0) // col_blocks).to(tl.int64) * tiles * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    tile = x_ptr + (first + row)[:, None] * stride_row + (col * stride_col)[None, :]
    left = tl.minimum(rows - first, tiles * BLOCK_ROWS).to(tl.int32)
    bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
    for start in tl.range(0, left, BLOCK_ROWS, num_stages=3):  # tiles on their way at once
        x = tl.load(tile, mask=(start + row < left)[:, None] & (col < cols)[None, :], other=0.0)
        tile += tl.cast(stride_row, tl.int64) * BLOCK_ROWS
        bits = tl.maximum(bits, magnitude_bits(x))
    tl.atomic_max(absmax_ptr + col, tl.max(bits, axis=0), mask=col < cols, sem="relaxed")


def plan_quantize_columnwise_and_transpose(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> Plan:
    if x.numel() <= _absmax.MAX_SMALL:
        transpose = plan_quantize_transpose(x, x, qdata, absmax, None, columnwise=True)

        def run_once(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
            transpose(x, x, qdata, absmax, None)

        return run_once

    rows, cols = x.shape
    sizes = cols, *x.stride()
    col_blocks, most_programs = ceil_div(cols, BLOCK_COLS), CTAS_PER_SM * num_sms(x.device)
    args = x, absmax.view(torch.int32), rows, 1, *sizes
    find_absmax = bind(columnwise_absmax_kernel, args, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS, num_warps=4)
    transpose = plan_quantize_transpose(x, absmax[None], qdata, None, None, columnwise=True)

    def run(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        rows = x.shape[0]
        row_blocks = ceil_div(rows, BLOCK_ROWS)
        tiles = max(1, row_blocks * col_blocks // most_programs)
        absmax.zero_()
        grid = (ceil_div(row_blocks, tiles) * col_blocks, 1, 1)
        find_absmax(grid, x, absmax.view(torch.int32), rows, tiles, *sizes)
        transpose(x, absmax[None], qdata, None, None)

    return run
