"""Row-wise quantization of x rotated along its columns: x is read once where a row fits a program."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._hadamard import hadamard_matrix, rotate_transposed, unshuffle
from ._numerics import bits_to_float, inverse_scale, magnitude_bits, quantize
from .launch import Plan, bind, ceil_div
from .quantize_rowwise import load_chunk

SIZE = 64  # columns that one matrix rotates, or one block of 128
TILE_ROWS = 64  # of SIZE columns, at least: what one instruction of tensor cores wants
HELD = 16384  # elements of x that a program holds, about: making the matrix costs it as much as 4096 of them
MAX_HELD = 20480  # rows that need more are read twice
NUM_WARPS = {2: 4, 4: 8}  # by x's bytes per element


@triton.jit(do_not_specialize=["rows"])
def quantize_rotated_rowwise_kernel(
    x_ptr,  # [rows, cols] fp16/bf16/fp32
    qdata_ptr,  # [rows, padded_cols] int8, contiguous
    absmax_ptr,  # [rows] fp32
    rows,
    cols,
    padded_cols,
    stride_row,
    stride_col,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ACROSS: tl.constexpr,  # of a tile's rows, that lie side by side in one row of x
    TILES: tl.constexpr,  # that hold a row; 0: it is too long to be held and is read twice
):
    tile_row = tl.arange(0, TILE_ROWS)
    BLOCK_ROWS: tl.constexpr = TILE_ROWS // ACROSS
    WIDTH: tl.constexpr = ACROSS * SIZE
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = (first + tile_row // ACROSS)[:, None]
    place = (tile_row % ACROSS).to(tl.int64)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x_rows = x_ptr + row * stride_row
    qdata_rows = qdata_ptr + row * padded_cols
    in_rows = row < rows
    matrix = hadamard_matrix(x_ptr.dtype.element_ty, BLOCK, SIZE)

    held = ()
    for tile in tl.static_range(TILES):
        held += (load_chunk(x_rows, in_rows, tile * WIDTH + place, cols, stride_col),)
    rotated = ()
    bits = tl.zeros([TILE_ROWS], dtype=tl.int32)
    for tile in tl.static_range(TILES):
        rotated += (rotate_transposed(tl.trans(held[tile]), matrix),)
        bits = tl.maximum(bits, tl.max(magnitude_bits(rotated[tile]), axis=1))
    if TILES == 0:
        for start in range(0, cols, WIDTH):
            x = load_chunk(x_rows, in_rows, start + place, cols, stride_col)
            bits = tl.maximum(bits, tl.max(magnitude_bits(rotate_transposed(tl.trans(x), matrix)), axis=1))

    # Rounding keeps the order: the largest product is that of the largest.
    absmax = bits_to_float(tl.max(bits.reshape((BLOCK_ROWS, ACROSS)), axis=1, keep_dims=True)) * BLOCK**-0.5
    inverse = (inverse_scale(absmax) * BLOCK**-0.5).broadcast_to((BLOCK_ROWS, ACROSS)).reshape((TILE_ROWS, 1))
    own_row = first + tl.arange(0, BLOCK_ROWS)[:, None]
    tl.store(absmax_ptr + own_row, absmax, mask=own_row < rows)
    for tile in tl.static_range(TILES):
        col = tile * WIDTH + place
        tl.store(qdata_rows + col, unshuffle(quantize(rotated[tile], inverse)), mask=in_rows & (col < padded_cols))
    if TILES == 0:
        for start in range(0, cols, WIDTH):
            col = start + place
            x = load_chunk(x_rows, in_rows, col, cols, stride_col)
            qdata = unshuffle(quantize(rotate_transposed(tl.trans(x), matrix), inverse))
            tl.store(qdata_rows + col, qdata, mask=in_rows & (col < padded_cols))


class Tile(NamedTuple):
    """Constants of :func:`quantize_rotated_rowwise_kernel`."""

    BLOCK: int
    SIZE: int
    TILE_ROWS: int
    ACROSS: int
    TILES: int
    num_warps: int


def plan_quantize_rotated_rowwise(
    x: torch.Tensor, rotate_features: int, qdata: torch.Tensor, absmax: torch.Tensor
) -> Plan:
    rows, cols = x.shape
    tile = rotated_row_tile(cols, rotate_features, NUM_WARPS[x.element_size()])
    sizes = (cols, qdata.shape[1], *x.stride())
    block_rows = tile.TILE_ROWS // tile.ACROSS
    launch = bind(quantize_rotated_rowwise_kernel, (x, qdata, absmax, rows, *sizes), **tile._asdict())

    def run(x: torch.Tensor, rotate_features: int, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        rows = x.shape[0]
        launch((ceil_div(rows, block_rows), 1, 1), x, qdata, absmax, rows, *sizes)

    return run


@functools.lru_cache(1024)
def rotated_row_tile(cols: int, rotate_features: int, num_warps: int) -> Tile:
    """Return the tile with the fewest idle lanes, of those the fewest tiles, and as many rows as HELD allows."""
    size = max(SIZE, rotate_features)
    blocks = max(1, ceil_div(cols, size))
    most = HELD // size
    choices = []
    across = 1
    while across <= most:
        tiles = ceil_div(blocks, across)
        tile_rows = max(TILE_ROWS, across)
        if tiles * tile_rows * size <= MAX_HELD:
            choices.append((tiles * across, tiles, across, tile_rows))
        across *= 2
    if not choices:
        return Tile(rotate_features, size, TILE_ROWS, ACROSS=TILE_ROWS, TILES=0, num_warps=num_warps)
    _, tiles, across, tile_rows = min(choices)
    while 2 * tile_rows * tiles * size <= HELD:
        tile_rows *= 2
    return Tile(rotate_features, size, tile_rows, across, tiles, num_warps)
