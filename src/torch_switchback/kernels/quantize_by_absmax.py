"""Quantization by known absmaxes in one pass."""

import torch
import triton
import triton.language as tl

from ._numerics import inverse_scale, quantize
from .launch import Plan, bind, ceil_div, next_power_of_2

BLOCK = 4096


@triton.jit(do_not_specialize=["rows"])
def quantize_by_absmax_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    absmax_ptr,  # [1] or [rows] fp32
    qdata_ptr,  # [rows, cols] int8, contiguous
    rows,
    cols,
    stride_row,
    stride_col,
    stride_absmax,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    inverse = inverse_scale(tl.load(absmax_ptr + row * stride_absmax, mask=row < rows, other=0.0))
    x = tl.load(x_ptr + row[:, None] * stride_row + col[None, :] * stride_col, mask=mask, other=0.0)
    tl.store(qdata_ptr + row[:, None] * cols + col[None, :], quantize(x, inverse[:, None]), mask=mask)


def plan_quantize_by_absmax(x: torch.Tensor, absmax: torch.Tensor, qdata: torch.Tensor) -> Plan:
    rows, cols = x.shape
    block_cols = min(next_power_of_2(cols), 1024)
    block_rows = BLOCK // block_cols
    sizes = (cols, *x.stride(), 0 if absmax.numel() == 1 else absmax.stride(0))
    grid_cols = ceil_div(cols, block_cols)
    launch = bind(
        quantize_by_absmax_kernel,
        (x, absmax, qdata, rows, *sizes),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=8,
    )

    def run(x: torch.Tensor, absmax: torch.Tensor, qdata: torch.Tensor) -> None:
        rows = x.shape[0]
        launch((ceil_div(rows, block_rows), grid_cols, 1), x, absmax, qdata, rows, *sizes)

    return run
