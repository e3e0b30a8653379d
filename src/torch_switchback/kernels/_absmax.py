"""The absmax of x for quantizers whose programs share it: the first of their two passes, and its use in the second.

The first pass leaves the absmax of each part of x, the second reduces them, in every program, before it quantizes.
Small x has no first pass: it is its own parts. Of columns there are too many parts to reduce again in every program:
they are gathered by atomics. An integer max over the bits of float32 (see ``magnitude_bits``) is exact in any order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._numerics import bits_to_float, magnitude_bits
from .device import empty, num_sms
from .launch import VECTOR, Plan, bind, ceil_div

BLOCK = 8192
BLOCK_ROWS, BLOCK_COLS = 128, 64
NUM_STAGES = 3  # tiles of columns on their way at once
CTAS_PER_SM = 8
MAX_PARTS = 1024  # which the second pass reads at once

# Elements that every program of the second pass may read by itself, so that the first need not be launched: as many as
# take an H200 no longer than the first pass and the gap behind it.
MAX_SMALL = 2**14


@triton.jit
def reduce_absmax(
    x_ptr,  # [elements] fp16/bf16/fp32
    elements,
    start,
    step,
    BLOCK: tl.constexpr,
):
    """The fp32 absmax of the blocks of x that begin at start, start + step, …"""
    block = tl.arange(0, BLOCK)
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for offset in range(start, elements, step):
        x = tl.load(x_ptr + offset + block, mask=offset + block < elements, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    return bits_to_float(tl.max(bits, axis=0))


def parts_block(parts: int) -> int:
    """How many parts a program reads at once: for most tensors the same, so that they share compiled kernels."""
    if parts == 1:
        return 1
    return MAX_PARTS if parts <= MAX_PARTS else BLOCK


@triton.jit
def reduce_columnwise_absmax(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    col,  # [BLOCK_COLS]
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The fp32 absmax [BLOCK_COLS] of columns of x."""
    block = tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + block
        mask = (row < rows) & (col < cols)[None, :]
        x = tl.load(x_ptr + row * stride_row + col[None, :] * stride_col, mask=mask, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    return bits_to_float(tl.max(bits, axis=0))


@triton.jit(do_not_specialize=["elements"])
def partial_absmax_kernel(
    x_ptr,  # [elements] fp16/bf16/fp32
    parts_ptr,  # [programs + 1] fp32
    elements,
    whole,  # elements in whole vectors
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    tl.store(parts_ptr + program, reduce_absmax(x_ptr, whole, program.to(tl.int64) * BLOCK, step, BLOCK))
    if program == 0:
        rest = whole + tl.arange(0, VECTOR)
        bits = magnitude_bits(tl.load(x_ptr + rest, mask=rest < elements, other=0.0))
        tl.store(parts_ptr + tl.num_programs(0), bits_to_float(tl.max(bits, axis=0)))


class PartialTile(NamedTuple):
    """Constants of :func:`partial_absmax_kernel`."""

    BLOCK: int
    VECTOR: int
    num_warps: int


def empty_parts(x: torch.Tensor) -> torch.Tensor:
    """Return memory for values with the absmax of x, one per part of it, at most MAX_PARTS; x itself if it is small."""
    elements = x.numel()
    if elements <= MAX_SMALL:
        return x
    programs = min(ceil_div(elements, BLOCK), CTAS_PER_SM * num_sms(x.device), MAX_PARTS - 1)
    return empty(x, (programs + 1,), torch.float32)


def bind_partial_absmax(x: torch.Tensor, parts: torch.Tensor) -> Callable[..., None] | None:
    """Return the launch that fills parts, of :func:`empty_parts`, from x (contiguous); None if x is its own parts.

    Its grid is one program less than there are parts. Its arguments are x, parts, the number of elements, and how many
    of them are in whole vectors.
    """
    if parts is x:
        return None
    args = (x, parts, x.numel(), whole_vectors(x.numel()))
    return bind(partial_absmax_kernel, args, PartialTile(BLOCK, VECTOR, num_warps=8))


def whole_vectors(elements: int) -> int:
    """How many of some elements are read by vectors: the others would have each read by itself."""
    return elements // VECTOR * VECTOR


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
    NUM_STAGES: tl.constexpr,
):
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    col = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first = (tl.program_id(0) // col_blocks).to(tl.int64) * tiles * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    tile = x_ptr + (first + row)[:, None] * stride_row + (col * stride_col)[None, :]
    left = tl.minimum(rows - first, tiles * BLOCK_ROWS).to(tl.int32)
    bits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.int32)
    for start in tl.range(0, left, BLOCK_ROWS, num_stages=NUM_STAGES):
        x = tl.load(tile, mask=(start + row < left)[:, None] & (col < cols)[None, :], other=0.0)
        tile += tl.cast(stride_row, tl.int64) * BLOCK_ROWS
        bits = tl.maximum(bits, magnitude_bits(x))
    tl.atomic_max(absmax_ptr + col, tl.max(bits, axis=0), mask=col < cols, sem="relaxed")


class ColumnTile(NamedTuple):
    """Constants of :func:`columnwise_absmax_kernel`."""

    BLOCK_ROWS: int
    BLOCK_COLS: int
    NUM_STAGES: int
    num_warps: int


def plan_columnwise_absmax(x: torch.Tensor, absmax: torch.Tensor) -> Plan:
    """Return the plan that fills absmax [cols] with that of each column of x [rows, cols]."""
    cols = x.shape[1]
    sizes = cols, *x.stride()
    col_blocks, most_programs = ceil_div(cols, BLOCK_COLS), CTAS_PER_SM * num_sms(x.device)
    tile = ColumnTile(BLOCK_ROWS, BLOCK_COLS, NUM_STAGES, num_warps=4)
    launch = bind(columnwise_absmax_kernel, (x, absmax.view(torch.int32), x.shape[0], 1, *sizes), tile)

    def run(x: torch.Tensor, absmax: torch.Tensor) -> None:
        rows = x.shape[0]
        row_blocks = ceil_div(rows, BLOCK_ROWS)
        tiles = max(1, row_blocks * col_blocks // most_programs)
        absmax.zero_()
        grid = (ceil_div(row_blocks, tiles) * col_blocks, 1, 1)
        launch(grid, x, absmax.view(torch.int32), rows, tiles, *sizes)

    return run
