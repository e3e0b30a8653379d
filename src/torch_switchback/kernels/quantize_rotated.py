"""Column-wise quantization of x rotated along its rows, alone or together with the row-wise one, in two passes over x.

x may also be int8 values whose rows were rotated along the columns, as a prepared layer keeps its weight.

The first pass finds every absmax, the second rotates again, quantizes and stores. Both see a tile of whole blocks of
rows, so that the row-wise int8 values cost no further pass. An absmax is gathered by an atomic integer maximum over
the bits (see ``magnitude_bits``), which is exact in any order.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._hadamard import hadamard_matrix, rotate_int8_back, rotate_transposed, unshuffle
from ._matmul import load_scale
from ._numerics import bits_to_float, inverse_scale, magnitude_bits, quantize
from .device import num_sms
from .launch import Plan, bind, ceil_div

TILE_ROWS = 64  # at least: what one instruction of tensor cores wants
TILE = 8192  # elements
NUM_WARPS = {2: 4, 4: 8}  # by x's bytes per element
NUM_STAGES = 3
CTAS_PER_SM = 16  # many, so that few of them run alone at the end


@triton.jit
def load_tile(tile, in_x, row_absmax_ptr, row, rows, ROTATED_BY: tl.constexpr):
    """Return a tile of x, float: of int8 values that were rotated the values that they stand for, in bf16."""
    x = tl.load(tile, mask=in_x, other=0.0)
    if ROTATED_BY:
        x = (rotate_int8_back(x, ROTATED_BY) * load_scale(row_absmax_ptr, row, rows)[:, None]).to(tl.bfloat16)
    return x


@triton.jit(do_not_specialize=["rows", "tiles"])
def rotated_absmax_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32, or int8 if ROTATED_BY
    row_absmax_ptr,  # [rows] int32 bits, zeros at first, if ROWWISE; fp32 of the int8 values if ROTATED_BY; else unused
    col_absmax_ptr,  # [cols] int32 bits, zeros at first
    rows,
    tiles,  # below each other, that a program does
    cols,
    stride_row,
    stride_col,
    ROWWISE: tl.constexpr,
    ROTATED_BY: tl.constexpr,  # columns that a rotation of int8 values has mixed; 0: x is float
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    col_tiles = tl.cdiv(cols, TILE_COLS)
    program = tl.program_id(0)
    col = (program % col_tiles).to(tl.int64) * TILE_COLS + tl.arange(0, TILE_COLS)
    first = (program // col_tiles).to(tl.int64) * tiles * TILE_ROWS
    row = tl.arange(0, TILE_ROWS)
    tile = x_ptr + (first + row)[:, None] * stride_row + (col * stride_col)[None, :]
    dtype: tl.constexpr = tl.bfloat16 if ROTATED_BY else x_ptr.dtype.element_ty
    matrix = hadamard_matrix(dtype, BLOCK, TILE_ROWS)
    bits = tl.zeros([TILE_COLS], dtype=tl.int32)
    left = tl.minimum(rows - first, tiles * TILE_ROWS).to(tl.int32)
    for start in range(0, left, TILE_ROWS):
        in_rows = start + row < left
        in_x = in_rows[:, None] & (col < cols)[None, :]
        x = load_tile(tile, in_x, row_absmax_ptr, first + start + row, rows, ROTATED_BY)
        tile += tl.cast(stride_row, tl.int64) * TILE_ROWS
        bits = tl.maximum(bits, tl.max(magnitude_bits(rotate_transposed(x, matrix)), axis=1))
        if ROWWISE:
            row_bits = tl.max(magnitude_bits(x), axis=1)
            tl.atomic_max(row_absmax_ptr + first + start + row, row_bits, mask=in_rows, sem="relaxed")
    # Rounding keeps the order: the largest product is that of the largest.
    bits = magnitude_bits(bits_to_float(bits) * BLOCK**-0.5)
    tl.atomic_max(col_absmax_ptr + col, bits, mask=col < cols, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "tiles"])
def quantize_rotated_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32, or int8 if ROTATED_BY
    row_absmax_ptr,  # [rows] fp32; unused unless ROWWISE or ROTATED_BY
    col_absmax_ptr,  # [cols] fp32
    row_qdata_ptr,  # [rows, cols] int8, contiguous; unused unless ROWWISE
    col_qdata_ptr,  # [cols, padded_rows] int8, contiguous
    rows,
    tiles,  # below each other, that a program does
    cols,
    padded_rows,
    stride_row,
    stride_col,
    ROWWISE: tl.constexpr,
    ROTATED_BY: tl.constexpr,  # columns that a rotation of int8 values has mixed; 0: x is float
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    # From the last to the first: what the first pass read last may still be in the cache.
    col_tiles = tl.cdiv(cols, TILE_COLS)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    col = (program % col_tiles).to(tl.int64) * TILE_COLS + tl.arange(0, TILE_COLS)
    first = (program // col_tiles).to(tl.int64) * tiles * TILE_ROWS
    row = tl.arange(0, TILE_ROWS)
    tile = x_ptr + (first + row)[:, None] * stride_row + (col * stride_col)[None, :]
    dtype: tl.constexpr = tl.bfloat16 if ROTATED_BY else x_ptr.dtype.element_ty
    matrix = hadamard_matrix(dtype, BLOCK, TILE_ROWS)
    inverse = inverse_scale(tl.load(col_absmax_ptr + col, mask=col < cols, other=0.0)) * BLOCK**-0.5
    left = tl.minimum(rows - first, tiles * TILE_ROWS).to(tl.int32)
    for start in range(0, left, TILE_ROWS):
        in_rows = start + row < left
        in_x = in_rows[:, None] & (col < cols)[None, :]
        x = load_tile(tile, in_x, row_absmax_ptr, first + start + row, rows, ROTATED_BY)
        tile += tl.cast(stride_row, tl.int64) * TILE_ROWS
        qdata = unshuffle(quantize(rotate_transposed(x, matrix), inverse[:, None]))
        place = first + start + row
        in_qdata = (col < cols)[:, None] & (place < padded_rows)[None, :]
        tl.store(
            col_qdata_ptr + col[:, None] * padded_rows + place[None, :],
            qdata,
            mask=in_qdata,
            eviction_policy="evict_last",
        )
        if ROWWISE:
            row_inverse = inverse_scale(tl.load(row_absmax_ptr + place, mask=in_rows, other=0.0))
            qdata = quantize(x, row_inverse[:, None])
            tl.store(
                row_qdata_ptr + place[:, None] * cols + col[None, :], qdata, mask=in_x, eviction_policy="evict_last"
            )


def plan_quantize_rotated_columnwise_and_transpose(
    x: torch.Tensor, rotate_tokens: int, qdata: torch.Tensor, absmax: torch.Tensor
) -> Plan:
    quantize = _plan(x, rotate_tokens, qdata, absmax, qdata, absmax)

    def run(x: torch.Tensor, rotate_tokens: int, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        quantize(x, rotate_tokens, qdata, absmax, qdata, absmax)

    return run


def plan_requantize_rotated(
    x_int8: torch.Tensor, x_absmax: torch.Tensor, rotate_features: int, qdata: torch.Tensor, absmax: torch.Tensor
) -> Plan:
    quantize = _plan(x_int8, rotate_features, qdata, x_absmax, qdata, absmax, rotated_by=rotate_features)

    def run(x_int8: Any, x_absmax: Any, rotate_features: int, qdata: Any, absmax: Any) -> None:
        quantize(x_int8, rotate_features, qdata, x_absmax.contiguous(), qdata, absmax)

    return run


def plan_quantize_rowwise_and_rotated_columnwise(
    x: torch.Tensor,
    rotate_tokens: int,
    row_qdata: torch.Tensor,
    row_absmax: torch.Tensor,
    col_qdata: torch.Tensor,
    col_absmax: torch.Tensor,
) -> Plan:
    return _plan(x, rotate_tokens, row_qdata, row_absmax, col_qdata, col_absmax, rowwise=True)


def _plan(
    x: torch.Tensor,
    block: int,
    row_qdata: torch.Tensor,
    row_absmax: torch.Tensor,
    col_qdata: torch.Tensor,
    col_absmax: torch.Tensor,
    *,
    rowwise: bool = False,
    rotated_by: int = 0,
) -> Plan:
    """Return the plan that fills the outputs, of rows only if rowwise. If rotated_by, row_absmax is an input."""
    rows, cols = x.shape
    strides = x.stride()
    tile_rows = max(TILE_ROWS, block)
    tile_cols = max(TILE // tile_rows, rotated_by)
    constants = dict(
        ROWWISE=rowwise,
        ROTATED_BY=rotated_by,
        BLOCK=block,
        TILE_ROWS=tile_rows,
        TILE_COLS=tile_cols,
        num_warps=NUM_WARPS[2 if rotated_by else x.element_size()],
        num_stages=1 if rotated_by else NUM_STAGES,
    )
    col_tiles = ceil_div(cols, tile_cols)
    most_programs = CTAS_PER_SM * num_sms(x.device)

    row_bits = row_absmax if rotated_by else row_absmax.view(torch.int32)
    find_absmax = bind(
        rotated_absmax_kernel, (x, row_bits, col_absmax.view(torch.int32), rows, 1, cols, *strides), **constants
    )
    tensors = x, row_absmax, col_absmax, row_qdata, col_qdata
    quantize = bind(quantize_rotated_kernel, (*tensors, rows, 1, cols, col_qdata.shape[1], *strides), **constants)

    def run(x: Any, block: int, row_qdata: Any, row_absmax: Any, col_qdata: Any, col_absmax: Any) -> None:
        rows = x.shape[0]
        row_tiles = ceil_div(rows, tile_rows)
        tiles = max(1, row_tiles * col_tiles // most_programs)
        grid = (ceil_div(row_tiles, tiles) * col_tiles, 1, 1)
        col_absmax.zero_()
        if rowwise:
            row_absmax.zero_()
        row_bits = row_absmax if rotated_by else row_absmax.view(torch.int32)
        find_absmax(grid, x, row_bits, col_absmax.view(torch.int32), rows, tiles, cols, *strides)
        padded_rows = col_qdata.shape[1]
        quantize(grid, x, row_absmax, col_absmax, row_qdata, col_qdata, rows, tiles, cols, padded_rows, *strides)

    return run
