"""Quantise tiles of x and store them transposed: the second pass of the global and the column-wise quantiser."""

import torch
import triton
import triton.language as tl

from ._absmax import MAX_PARTS
from ._launch import ceil_div, launch
from ._numerics import bits_to_float, inverse_scale, quantize

BLOCK_ROWS, BLOCK_COLS = 64, 128


@triton.jit
def quantize_transpose_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    partial_ptr,  # [parts, cols] or [parts, 1] int32 bits of absmax
    codes_ptr,  # [cols, rows] int8, contiguous
    absmax_ptr,  # [cols] or [1] fp32; unused unless STORE_ABSMAX
    rows,
    cols,
    parts,
    stride_row,
    stride_col,
    COLUMNWISE: tl.constexpr,
    STORE_ABSMAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    # Neighbouring programs write neighbouring pieces of the same rows of the output.
    row_blocks = tl.maximum(tl.cdiv(rows, BLOCK_ROWS), 1)
    row_block = tl.program_id(0) % row_blocks
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (tl.program_id(0) // row_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)

    if COLUMNWISE:
        bits = tl.zeros([BLOCK_COLS], dtype=tl.int32)
        part_ptrs = partial_ptr + col
        for _ in range(parts):
            bits = tl.maximum(bits, tl.load(part_ptrs, mask=col < cols, other=0) & 0x7FFFFFFF)
            part_ptrs += cols
        absmax = bits_to_float(bits)
        inverse = inverse_scale(absmax)[None, :]
    else:
        part = tl.arange(0, MAX_PARTS)
        bits = tl.load(partial_ptr + part, mask=part < parts, other=0) & 0x7FFFFFFF
        absmax = bits_to_float(tl.max(bits, axis=0))
        inverse = inverse_scale(absmax)

    in_x = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_row + col[None, :] * stride_col, mask=in_x, other=0.0)
    in_codes = (col < cols)[:, None] & (row < rows)[None, :]
    tl.store(codes_ptr + col[:, None] * rows + row[None, :], tl.trans(quantize(x, inverse)), mask=in_codes)
    if STORE_ABSMAX:
        if COLUMNWISE:
            if row_block == 0:
                tl.store(absmax_ptr + col, absmax, mask=col < cols)
        elif tl.program_id(0) == 0:
            tl.store(absmax_ptr, absmax)


def quantize_transpose(
    x: torch.Tensor, partial: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor | None
) -> None:
    """Fill codes [cols, rows] from x [rows, cols] and the parts of its absmax; and absmax, if it is given.

    partial: int32 bits, [parts, cols] for one absmax a column, [parts, 1] for one in all.
    """
    rows, cols = x.shape
    launch(
        quantize_transpose_kernel,
        # At least one program a block of columns: without rows there is still an absmax to store.
        (max(1, ceil_div(rows, BLOCK_ROWS)) * max(1, ceil_div(cols, BLOCK_COLS)),),
        x,
        partial,
        codes,
        codes if absmax is None else absmax,
        rows,
        cols,
        partial.shape[0],
        x.stride(0),
        x.stride(1),
        COLUMNWISE=partial.shape[1] != 1,
        STORE_ABSMAX=absmax is not None,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLS=BLOCK_COLS,
        MAX_PARTS=MAX_PARTS,
        num_warps=4,
    )
