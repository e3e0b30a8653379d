"""Column-wise quantisation of x rotated along its rows, alone or together with the row-wise one, in two passes over x.

The first pass finds every absmax, the second rotates again, quantises and stores. Both see a tile of whole blocks of
rows, so that the row-wise codes cost no further pass. An absmax is gathered by an atomic integer maximum over the bits
(see ``magnitude_bits``), which is exact in any order.
"""

import torch
import triton
import triton.language as tl

from ._hadamard import hadamard, load_parts, stack
from ._launch import ceil_div, launch, next_power_of_2
from ._numerics import bits_to_float, inverse_scale, magnitude_bits, quantize

# Each thread holds a column or two of a tile: more rows are more registers, fewer are shorter pieces of a row of codes.
TILE_ROWS = 64
TILE = 16384  # elements
NUM_WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def rotated_absmax_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    row_absmax_ptr,  # [rows] int32 bits, zeros at first; unused unless ROWWISE
    col_absmax_ptr,  # [cols] int32 bits, zeros at first
    rows,
    cols,
    stride_row,
    stride_col,
    ROWWISE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * TILE_ROWS
    col = tl.program_id(1).to(tl.int64) * TILE_COLS + tl.arange(0, TILE_COLS)
    tile = x_ptr + start * stride_row + col * stride_col
    inside = tl.where(col < cols, (rows - start).to(tl.int32), 0)
    parts = hadamard(load_parts(tile, stride_row, inside, TILE_ROWS), BLOCK)
    bits = magnitude_bits(parts[0])
    for i in tl.static_range(1, TILE_ROWS):
        bits = tl.maximum(bits, magnitude_bits(parts[i]))
    # Rounding keeps the order: the largest product is that of the largest.
    bits = magnitude_bits(bits_to_float(bits) * BLOCK**-0.5)
    tl.atomic_max(col_absmax_ptr + col, bits, mask=col < cols, sem="relaxed")

    if ROWWISE:
        # The tile once more, from the cache: here a warp holds pieces of rows, above whole columns.
        row = start + tl.arange(0, TILE_ROWS)
        in_x = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_row + (col * stride_col)[None, :], mask=in_x, other=0.0)
        bits = tl.max(magnitude_bits(x), axis=1)
        tl.atomic_max(row_absmax_ptr + row, bits, mask=row < rows, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def quantize_rotated_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    row_absmax_ptr,  # [rows] fp32; unused unless ROWWISE
    col_absmax_ptr,  # [cols] fp32
    row_codes_ptr,  # [rows, cols] int8, contiguous; unused unless ROWWISE
    col_codes_ptr,  # [cols, padded_rows] int8, contiguous
    rows,
    cols,
    padded_rows,
    stride_row,
    stride_col,
    ROWWISE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * TILE_ROWS
    row = start + tl.arange(0, TILE_ROWS)
    col = tl.program_id(1).to(tl.int64) * TILE_COLS + tl.arange(0, TILE_COLS)
    tile = x_ptr + start * stride_row + col * stride_col
    inside = tl.where(col < cols, (rows - start).to(tl.int32), 0)
    parts = hadamard(load_parts(tile, stride_row, inside, TILE_ROWS), BLOCK)
    inverse = inverse_scale(tl.load(col_absmax_ptr + col, mask=col < cols, other=0.0))
    codes = ()
    for i in tl.static_range(TILE_ROWS):
        codes += (quantize(parts[i] * BLOCK**-0.5, inverse),)
    in_codes = (col < cols)[:, None] & (row < padded_rows)[None, :]
    tl.store(col_codes_ptr + col[:, None] * padded_rows + row[None, :], stack(codes), mask=in_codes)

    if ROWWISE:
        in_x = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_row + (col * stride_col)[None, :], mask=in_x, other=0.0)
        inverse = inverse_scale(tl.load(row_absmax_ptr + row, mask=row < rows, other=0.0))
        tl.store(row_codes_ptr + row[:, None] * cols + col[None, :], quantize(x, inverse[:, None]), mask=in_x)


def quantize_rotated_columnwise_and_transpose(
    x: torch.Tensor, rotate_tokens: int, codes: torch.Tensor, absmax: torch.Tensor
) -> None:
    _quantize(x, rotate_tokens, None, None, codes, absmax)


def quantize_rowwise_and_rotated_columnwise(
    x: torch.Tensor,
    rotate_tokens: int,
    row_codes: torch.Tensor,
    row_absmax: torch.Tensor,
    col_codes: torch.Tensor,
    col_absmax: torch.Tensor,
) -> None:
    _quantize(x, rotate_tokens, row_codes, row_absmax.zero_(), col_codes, col_absmax)


def _quantize(
    x: torch.Tensor,
    rotate_tokens: int,
    row_codes: torch.Tensor | None,
    row_absmax: torch.Tensor | None,
    col_codes: torch.Tensor,
    col_absmax: torch.Tensor,
) -> None:
    rows, cols = x.shape
    tile_rows = max(TILE_ROWS, rotate_tokens)
    tile_cols = min(next_power_of_2(cols), TILE // tile_rows)
    grid = (ceil_div(rows, tile_rows), ceil_div(cols, tile_cols))
    rowwise = row_absmax is not None
    row_absmax = col_absmax if row_absmax is None else row_absmax
    constants = {
        "ROWWISE": rowwise,
        "BLOCK": rotate_tokens,
        "TILE_ROWS": tile_rows,
        "TILE_COLS": tile_cols,
        "num_warps": NUM_WARPS,
    }
    col_absmax.zero_()
    launch(
        rotated_absmax_kernel,
        grid,
        x,
        row_absmax.view(torch.int32),
        col_absmax.view(torch.int32),
        rows,
        cols,
        x.stride(0),
        x.stride(1),
        **constants,
    )
    launch(
        quantize_rotated_kernel,
        grid,
        x,
        row_absmax,
        col_absmax,
        col_codes if row_codes is None else row_codes,
        col_codes,
        rows,
        cols,
        col_codes.shape[1],
        x.stride(0),
        x.stride(1),
        **constants,
    )
