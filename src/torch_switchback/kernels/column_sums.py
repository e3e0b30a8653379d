"""Sums of columns: of parts of the rows, and then of those parts, always in the same order."""

import torch
import triton
import triton.language as tl

from ._launch import VECTOR, ceil_div, launch, multiprocessors
from ._replay import note, scratch

BLOCK_ROWS, BLOCK_COLS = 32, 64
PROGRAMS = 4  # of a multiprocessor
NUM_STAGES, NUM_WARPS = 5, 4  # tiles on their way at once
NUM_STAGES_ODD, NUM_WARPS_ODD = 1, 8  # of rows that are no whole vectors: they cannot be on their way
FEW_ROWS = 512  # up to which PyTorch's own sum takes no longer
PART = 256  # rows at least


@triton.jit(do_not_specialize=["rows", "part"])
def column_sums_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    sums_ptr,  # [parts, cols] fp16/bf16/fp32, contiguous
    rows,
    cols,
    stride_row,
    stride_col,
    part,  # rows that a program adds up
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first = tl.program_id(1).to(tl.int64) * part
    row = tl.arange(0, BLOCK_ROWS)
    tile = x_ptr + (first + row)[:, None] * stride_row + (col * stride_col)[None, :]
    left = tl.minimum(rows - first, part).to(tl.int32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in tl.range(0, left, BLOCK_ROWS, num_stages=NUM_STAGES):
        sums += tl.load(tile, mask=(start + row < left)[:, None] & (col < cols)[None, :], other=0.0).to(tl.float32)
        tile += tl.cast(stride_row, tl.int64) * BLOCK_ROWS
    out = sums_ptr + tl.program_id(1).to(tl.int64) * cols + col
    tl.store(out, tl.sum(sums, axis=0).to(sums_ptr.dtype.element_ty), mask=col < cols)


def column_sums(x: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> None:
    rows, cols = x.shape
    if rows <= FEW_ROWS or cols == 0:
        _sum_few_rows(x, out)
        note(_sum_few_rows, x, out)
        return
    programs = ceil_div(PROGRAMS * multiprocessors(x.device), ceil_div(cols, BLOCK_COLS))
    part = ceil_div(rows, min(ceil_div(rows, PART), programs))
    sums = scratch(x, ceil_div(rows, part), cols)
    _add_up(x, sums, part)
    _add_up(sums, out, sums.shape[0])


@torch.no_grad()
def _sum_few_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.sum(0, dtype=torch.float32))


def _add_up(x: torch.Tensor, sums: torch.Tensor, part: int) -> None:
    rows, cols = x.shape
    odd = x.stride(0) % VECTOR != 0
    launch(
        column_sums_kernel,
        (ceil_div(cols, BLOCK_COLS), ceil_div(rows, part)),
        x,
        sums,
        rows,
        cols,
        x.stride(0),
        x.stride(1),
        part,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLS=BLOCK_COLS,
        NUM_STAGES=NUM_STAGES_ODD if odd else NUM_STAGES,
        num_warps=NUM_WARPS_ODD if odd else NUM_WARPS,
    )
