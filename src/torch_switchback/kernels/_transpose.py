"""Quantise tiles of x and store them transposed, and plain where asked: the second pass of four quantisers."""

import torch
import triton
import triton.language as tl

from . import _absmax
from ._absmax import reduce_absmax, reduce_columnwise_absmax
from ._launch import ceil_div, launch, next_power_of_2
from ._numerics import inverse_scale, quantize

BLOCK_ROWS, BLOCK_COLS = 128, 64
NUM_WARPS = 4
NUM_WARPS_ODD = 8  # of rows that are no whole vectors: each element is a load and a store of its own


@triton.jit
def quantize_transpose_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    parts_ptr,  # [parts, cols] if COLUMNWISE, else [parts], fp16/bf16/fp32, with the absmax of x
    codes_ptr,  # [rows, cols] int8, contiguous; unused unless STORE_PLAIN
    codes_t_ptr,  # [cols, rows] int8, contiguous
    absmax_ptr,  # [cols] if COLUMNWISE, else [1], fp32; unused unless STORE_ABSMAX
    rows,
    cols,
    parts,
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
    # Neighbouring programs write neighbouring pieces of the same rows of the transposed codes.
    row_blocks = tl.maximum(tl.cdiv(rows, BLOCK_ROWS), 1)
    row_block = tl.program_id(0) % row_blocks
    start_row = row_block.to(tl.int64) * BLOCK_ROWS
    col_block = tl.program_id(0) // row_blocks
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
            parts_ptr,
            start_col + col,
            parts,
            cols,
            stride_part,
            stride_part_col,
            0,
            BLOCK_PARTS,
            BLOCK_PARTS,
            BLOCK_COLS,
        )
        codes = quantize(x, inverse_scale(absmax)[None, :])
    else:
        absmax = reduce_absmax(parts_ptr, parts, 0, BLOCK_PARTS, BLOCK_PARTS)
        codes = quantize(x, inverse_scale(absmax))

    if STORE_PLAIN:
        code_rows = codes_ptr + start_row * cols + start_col + row[:, None].to(tl.int64) * cols
        tl.store(code_rows + col[None, :], codes, mask=in_x)
    code_cols = codes_t_ptr + start_col * rows + start_row + col[:, None].to(tl.int64) * rows
    tl.store(code_cols + row[None, :], tl.trans(codes), mask=in_cols[:, None] & in_rows[None, :])
    if STORE_ABSMAX:
        if COLUMNWISE:
            if row_block == 0:
                tl.store(absmax_ptr + start_col + col, absmax, mask=in_cols)
        elif tl.program_id(0) == 0:
            tl.store(absmax_ptr, absmax)


def quantize_transpose(
    x: torch.Tensor,
    parts: torch.Tensor,
    codes_t: torch.Tensor,
    absmax: torch.Tensor | None,
    codes: torch.Tensor | None = None,
    *,
    columnwise: bool = False,
) -> None:
    """Fill codes_t [cols, rows], and absmax and codes [rows, cols] if they are given, from x [rows, cols].

    parts: values with the absmax of x, contiguous; if columnwise, [parts, cols] with that of each column, any strides.
    """
    rows, cols = x.shape
    count = parts.shape[0] if columnwise else parts.numel()
    block = _absmax.BLOCK_ROWS if columnwise else _absmax.BLOCK
    launch(
        quantize_transpose_kernel,
        # At least one program a block of columns: without rows there is still an absmax to store.
        (max(1, ceil_div(rows, BLOCK_ROWS)) * max(1, ceil_div(cols, BLOCK_COLS)),),
        x,
        parts,
        codes_t if codes is None else codes,
        codes_t,
        codes_t if absmax is None else absmax,
        rows,
        cols,
        count,
        x.stride(0),
        x.stride(1),
        *(parts.stride() if columnwise else (1, 1)),
        COLUMNWISE=columnwise,
        STORE_PLAIN=codes is not None,
        STORE_ABSMAX=absmax is not None,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLS=BLOCK_COLS,
        BLOCK_PARTS=min(next_power_of_2(count), block),
        num_warps=NUM_WARPS if rows % 16 == 0 and cols % 16 == 0 else NUM_WARPS_ODD,
    )
