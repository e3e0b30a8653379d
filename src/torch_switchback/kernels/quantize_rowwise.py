"""Row-wise quantisation and dequantisation: memory-bound, so x is read once where a row fits a program."""

import torch
import triton
import triton.language as tl

from ._launch import ceil_div, launch, next_power_of_2
from ._numerics import ONE_OVER_127, bits_to_float, inverse_scale, magnitude_bits, quantize

# Measured on an H200 (docs/performance.md): one row a program is fastest, however long, and few warps.
SMALLEST_TILE = 2048  # elements of x that a program holds; shorter rows share one
MAX_BLOCK_COLS = 16384  # longer rows are read twice, in chunks of this
DEQUANTIZE_TILE = 8192


@triton.jit(do_not_specialize=["rows"])
def quantize_rowwise_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    codes_ptr,  # [rows, cols] int8, contiguous
    absmax_ptr,  # [rows] fp32
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ROW_IN_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    block = tl.arange(0, BLOCK_COLS)[None, :]
    x_rows = x_ptr + row * stride_row
    code_rows = codes_ptr + row * cols
    in_rows = row < rows

    if ROW_IN_BLOCK:
        mask = in_rows & (block < cols)
        x = tl.load(x_rows + block.to(tl.int64) * stride_col, mask=mask, other=0.0)
        absmax = bits_to_float(tl.max(magnitude_bits(x), axis=1, keep_dims=True))
        tl.store(code_rows + block, quantize(x, inverse_scale(absmax)), mask=mask)
    else:
        bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
        for start in range(0, cols, BLOCK_COLS):
            col = start + block.to(tl.int64)
            x = tl.load(x_rows + col * stride_col, mask=in_rows & (col < cols), other=0.0)
            bits = tl.maximum(bits, magnitude_bits(x))
        absmax = bits_to_float(tl.max(bits, axis=1, keep_dims=True))
        inverse = inverse_scale(absmax)
        for start in range(0, cols, BLOCK_COLS):
            col = start + block.to(tl.int64)
            mask = in_rows & (col < cols)
            x = tl.load(x_rows + col * stride_col, mask=mask, other=0.0)
            tl.store(code_rows + col, quantize(x, inverse), mask=mask)
    tl.store(absmax_ptr + row, absmax, mask=in_rows)


def quantize_rowwise(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    rows, cols = x.shape
    block_cols = min(next_power_of_2(cols), MAX_BLOCK_COLS)
    block_rows = max(1, SMALLEST_TILE // block_cols)
    launch(
        quantize_rowwise_kernel,
        (ceil_div(rows, block_rows),),
        x,
        codes,
        absmax,
        rows,
        cols,
        x.stride(0),
        x.stride(1),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        ROW_IN_BLOCK=cols <= block_cols,
        num_warps=2 if block_rows * block_cols <= SMALLEST_TILE else 4,
    )


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
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.program_id(1).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < cols)
    scale = tl.load(absmax_ptr + row * stride_absmax, mask=row < rows, other=0.0) * ONE_OVER_127
    x = tl.load(x_ptr + row * stride_row + col * stride_col, mask=mask, other=0)
    out = x.to(tl.float32) * scale
    tl.store(out_ptr + row * cols + col, out.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_rowwise(x: torch.Tensor, absmax: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> None:
    rows, cols = x.shape
    block_cols = min(next_power_of_2(cols), 4096)
    block_rows = max(1, DEQUANTIZE_TILE // block_cols)
    launch(
        dequantize_rowwise_kernel,
        (ceil_div(rows, block_rows), ceil_div(cols, block_cols)),
        x,
        absmax,
        out,
        rows,
        cols,
        x.stride(0),
        x.stride(1),
        absmax.stride(0),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=4,
    )
