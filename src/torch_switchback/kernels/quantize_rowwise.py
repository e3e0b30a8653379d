"""Row-wise quantization and dequantization: memory-bound, so x is read once where a row fits a program."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._numerics import ONE_OVER_127, bits_to_float, inverse_scale, magnitude_bits, quantize
from .device import supports_pdl
from .launch import Plan, bind, ceil_div, next_power_of_2

# Fastest on an H200 (docs/performance-log.md): one row per program, few warps with much to do each, and rows whose
# length is no power of two in blocks that fit it.
SMALLEST_TILE = 1024  # elements of x that a program holds at least; shorter rows share one
MAX_BLOCK_COLS = 16384  # longer rows are read twice, in blocks of this
MAX_CHUNKS = 8  # blocks that a row is held in at most,
SMALLEST_CHUNK = 128  # none smaller than this
ELEMENTS_PER_THREAD = 80  # about
FEW_ROWS = 128  # at most: they leave SMs idle, and the gap before the matmul counts
ELEMENTS_PER_THREAD_OF_FEW_ROWS = 16  # about
DEQUANTIZE_TILE = 4096
LONGEST_SHARED = 2048  # columns of rows of int8 values that share a program


@triton.jit
def load_chunk(x_rows, in_rows, col, cols, stride_col):
    return tl.load(x_rows + col * stride_col, mask=in_rows & (col < cols), other=0.0)


@triton.jit(do_not_specialize=["rows"])
def quantize_rowwise_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    qdata_ptr,  # [rows, cols] int8, contiguous
    absmax_ptr,  # [rows] fp32
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_COLS columns, that hold a row; 0: it is too long to be held and is read twice
    PDL_TRIGGER: tl.constexpr,  # let the next kernel start early
):
    if PDL_TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    block = tl.arange(0, BLOCK_COLS).to(tl.int64)[None, :]
    x_rows = x_ptr + row * stride_row
    qdata_rows = qdata_ptr + row * cols
    in_rows = row < rows

    held = ()
    for chunk in tl.static_range(CHUNKS):
        held += (load_chunk(x_rows, in_rows, chunk * BLOCK_COLS + block, cols, stride_col),)
    bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
    for chunk in tl.static_range(CHUNKS):
        bits = tl.maximum(bits, magnitude_bits(held[chunk]))
    if CHUNKS == 0:
        for start in range(0, cols, BLOCK_COLS):
            bits = tl.maximum(bits, magnitude_bits(load_chunk(x_rows, in_rows, start + block, cols, stride_col)))

    absmax = bits_to_float(tl.max(bits, axis=1, keep_dims=True))
    inverse = inverse_scale(absmax)
    tl.store(absmax_ptr + row, absmax, mask=in_rows)
    for chunk in tl.static_range(CHUNKS):
        col = chunk * BLOCK_COLS + block
        tl.store(qdata_rows + col, quantize(held[chunk], inverse), mask=in_rows & (col < cols))
    if CHUNKS == 0:
        for start in range(0, cols, BLOCK_COLS):
            col = start + block
            x = load_chunk(x_rows, in_rows, col, cols, stride_col)
            tl.store(qdata_rows + col, quantize(x, inverse), mask=in_rows & (col < cols))


class RowTile(NamedTuple):
    """Constants of :func:`quantize_rowwise_kernel`."""

    BLOCK_ROWS: int
    BLOCK_COLS: int
    CHUNKS: int
    PDL_TRIGGER: bool
    num_warps: int


def plan_quantize_rowwise(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> Plan:
    rows, cols = x.shape
    stride_row, stride_col = x.stride()
    few_rows = rows <= FEW_ROWS
    # With many small programs, letting the next kernel start early costs each of them more than it saves.
    tile = row_tile(cols, few_rows, few_rows and supports_pdl(x.device))
    block_rows = tile.BLOCK_ROWS
    launch = bind(quantize_rowwise_kernel, (x, qdata, absmax, rows, cols, stride_row, stride_col), **tile._asdict())

    def run(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        rows = x.shape[0]
        launch((ceil_div(rows, block_rows), 1, 1), x, qdata, absmax, rows, cols, stride_row, stride_col)

    return run


@functools.lru_cache(1024)
def row_tile(cols: int, few_rows: bool = False, pdl_trigger: bool = False) -> RowTile:
    """Return the tile with the fewest idle lanes that up to MAX_CHUNKS chunks allow, and of those the fewest chunks."""
    if cols > MAX_BLOCK_COLS:
        return RowTile(1, MAX_BLOCK_COLS, CHUNKS=0, PDL_TRIGGER=pdl_trigger, num_warps=4)
    whole = next_power_of_2(cols)
    sizes = [whole]
    while sizes[-1] > max(whole // MAX_CHUNKS, SMALLEST_CHUNK):
        sizes.append(sizes[-1] // 2)
    block_cols = min(sizes, key=lambda size: ceil_div(cols, size) * size)
    chunks = max(1, ceil_div(cols, block_cols))
    block_rows = next_power_of_2(ceil_div(SMALLEST_TILE, block_cols * chunks))
    per_thread = ELEMENTS_PER_THREAD_OF_FEW_ROWS if few_rows else ELEMENTS_PER_THREAD
    num_warps = min(next_power_of_2(ceil_div(block_rows * block_cols * chunks, 32 * per_thread)), 8)
    return RowTile(block_rows, block_cols, chunks, pdl_trigger, num_warps)


@triton.jit(do_not_specialize=["rows"])
def dequantize_rowwise_kernel(
    x_ptr,  # [rows, cols] int8
    absmax_ptr,  # [rows] fp32
    out_ptr,  # [rows, cols] fp16/bf16/fp32, contiguous
    rows,
    cols,
    stride_row,
    stride_col,
    stride_absmax,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_COLS columns that a program does
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    start = tl.program_id(1).to(tl.int64) * (CHUNKS * BLOCK_COLS)
    scale = tl.load(absmax_ptr + row * stride_absmax, mask=row < rows, other=0.0) * ONE_OVER_127
    for chunk in tl.static_range(CHUNKS):
        col = start + chunk * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        mask = (row < rows) & (col < cols)
        x = tl.load(x_ptr + row * stride_row + col * stride_col, mask=mask, other=0)
        out = x.to(tl.float32) * scale
        tl.store(out_ptr + row * cols + col, out.to(out_ptr.dtype.element_ty), mask=mask)


class DequantizeTile(NamedTuple):
    """Constants of :func:`dequantize_rowwise_kernel`."""

    BLOCK_ROWS: int
    BLOCK_COLS: int
    CHUNKS: int
    num_warps: int


def plan_dequantize_rowwise(x: torch.Tensor, absmax: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> Plan:
    rows, cols = x.shape
    sizes = cols, *x.stride(), absmax.stride(0)
    tile = dequantize_tile(cols)
    grid_cols = ceil_div(cols, tile.BLOCK_COLS * tile.CHUNKS)
    launch = bind(dequantize_rowwise_kernel, (x, absmax, out, rows, *sizes), **tile._asdict())

    def run(x: torch.Tensor, absmax: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> None:
        rows = x.shape[0]
        launch((ceil_div(rows, tile.BLOCK_ROWS), grid_cols, 1), x, absmax, out, rows, *sizes)

    return run


@functools.lru_cache(1024)
def dequantize_tile(cols: int) -> DequantizeTile:
    """Return the tile for rows of some length: short rows share a program, long ones are done in whole chunks."""
    block_cols = next_power_of_2(cols)
    if block_cols <= LONGEST_SHARED:
        return DequantizeTile(DEQUANTIZE_TILE // block_cols, block_cols, CHUNKS=1, num_warps=4)
    tile = row_tile(min(cols, MAX_BLOCK_COLS))
    return DequantizeTile(tile.BLOCK_ROWS, tile.BLOCK_COLS, tile.CHUNKS, tile.num_warps)
