"""Row-wise quantization of x times one scale per column: x is read once where a row fits a program."""

import torch
import triton
import triton.language as tl

from ._numerics import bits_to_float, inverse_scale, magnitude_bits, quantize
from .launch import Plan, bind, ceil_div
from .quantize_rowwise import load_chunk, row_tile

# Blocks of rows that a program does one after the other: it loads the scales, twice as many bytes as a row, only once.
BLOCKS = 4
FEW_ROWS = 4096  # at most: they are too few programs then
LONG_ROW = 12288  # columns, at most: registers hold the scales of no more


@triton.jit
def load_scale_chunk(scale_ptr, col, cols, stride_scale):
    return tl.load(scale_ptr + col * stride_scale, mask=col < cols, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def quantize_folded_rowwise_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    scale_ptr,  # [cols] fp32
    qdata_ptr,  # [rows, cols] int8, contiguous
    absmax_ptr,  # [rows] fp32
    one_ptr,  # [1] fp32
    rows,
    cols,
    stride_row,
    stride_col,
    stride_scale,
    BLOCKS: tl.constexpr,  # of BLOCK_ROWS rows, that a program does
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_COLS columns, that hold a row; 0: it is too long to be held and is read twice
):
    if tl.program_id(0) == 0:
        tl.store(one_ptr, 1.0)
    block = tl.arange(0, BLOCK_COLS).to(tl.int64)[None, :]
    scales = ()
    for chunk in tl.static_range(CHUNKS):
        scales += (load_scale_chunk(scale_ptr, chunk * BLOCK_COLS + block, cols, stride_scale),)
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    for start_row in range(0, BLOCKS * BLOCK_ROWS, BLOCK_ROWS):
        row = first + start_row
        x_rows = x_ptr + row * stride_row
        qdata_rows = qdata_ptr + row * cols
        in_rows = row < rows

        held = ()
        for chunk in tl.static_range(CHUNKS):
            held += (load_chunk(x_rows, in_rows, chunk * BLOCK_COLS + block, cols, stride_col),)
        bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
        for chunk in tl.static_range(CHUNKS):
            bits = tl.maximum(bits, magnitude_bits(held[chunk].to(tl.float32) * scales[chunk]))
        if CHUNKS == 0:
            for start in range(0, cols, BLOCK_COLS):
                x = load_chunk(x_rows, in_rows, start + block, cols, stride_col)
                scale = load_scale_chunk(scale_ptr, start + block, cols, stride_scale)
                bits = tl.maximum(bits, magnitude_bits(x.to(tl.float32) * scale))

        absmax = bits_to_float(tl.max(bits, axis=1, keep_dims=True))
        inverse = inverse_scale(absmax)
        tl.store(absmax_ptr + row, absmax, mask=in_rows)
        for chunk in tl.static_range(CHUNKS):
            col = chunk * BLOCK_COLS + block
            qdata = quantize(held[chunk].to(tl.float32) * scales[chunk], inverse)
            tl.store(qdata_rows + col, qdata, mask=in_rows & (col < cols))
        if CHUNKS == 0:
            for start in range(0, cols, BLOCK_COLS):
                col = start + block
                x = load_chunk(x_rows, in_rows, col, cols, stride_col)
                scale = load_scale_chunk(scale_ptr, col, cols, stride_scale)
                tl.store(qdata_rows + col, quantize(x.to(tl.float32) * scale, inverse), mask=in_rows & (col < cols))


def plan_quantize_folded_rowwise(
    x: torch.Tensor, scale: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor, one: torch.Tensor
) -> Plan:
    rows, cols = x.shape
    sizes = cols, *x.stride(), scale.stride(0)
    tile = row_tile(cols)
    blocks = 1 if rows <= FEW_ROWS or cols > LONG_ROW else BLOCKS
    constants = dict(BLOCKS=blocks, BLOCK_ROWS=tile.BLOCK_ROWS, BLOCK_COLS=tile.BLOCK_COLS, CHUNKS=tile.CHUNKS)
    rows_per_program = blocks * tile.BLOCK_ROWS
    tensors = x, scale, qdata, absmax, one
    launch = bind(quantize_folded_rowwise_kernel, (*tensors, rows, *sizes), **constants, num_warps=tile.num_warps)

    def run(x: torch.Tensor, scale: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor, one: torch.Tensor) -> None:
        rows = x.shape[0]
        launch((max(1, ceil_div(rows, rows_per_program)), 1, 1), x, scale, qdata, absmax, one, rows, *sizes)

    return run
