"""Global quantisation: absmax of parts; then reduce the parts, quantise and store, plain, transposed or both."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._absmax import partial_absmax, parts_block, reduce_absmax, whole_vectors
from ._numerics import inverse_scale, quantize
from ._transpose import quantize_transpose
from .launch import VECTOR, ceil_div, launch

BLOCK = 4096


@triton.jit(do_not_specialize=["elements", "parts"])
def quantize_global_kernel(
    x_ptr,  # [elements] fp16/bf16/fp32
    parts_ptr,  # [parts] fp16/bf16/fp32 with the absmax of x
    codes_ptr,  # [elements] int8
    absmax_ptr,  # [1] fp32
    elements,
    whole,  # elements in whole vectors
    parts,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # From the end: what the first pass read last may still be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < whole, other=0.0)
    absmax = reduce_absmax(parts_ptr, parts, 0, BLOCK_PARTS, BLOCK_PARTS)
    inverse = inverse_scale(absmax)
    tl.store(codes_ptr + offset, quantize(x, inverse), mask=offset < whole)
    if program == 0:
        tl.store(absmax_ptr, absmax)
        rest = whole + tl.arange(0, VECTOR)
        last = tl.load(x_ptr + rest, mask=rest < elements, other=0.0)
        tl.store(codes_ptr + rest, quantize(last, inverse), mask=rest < elements)


class Tile(NamedTuple):
    """Constants of :func:`quantize_global_kernel`."""

    BLOCK: int
    BLOCK_PARTS: int
    VECTOR: int
    num_warps: int


def quantize_global(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    x = x.contiguous()
    parts = partial_absmax(x)
    elements, count = x.numel(), parts.numel()
    whole = whole_vectors(elements)
    args = (x, parts, codes, absmax, elements, whole, count)
    tile = Tile(BLOCK, parts_block(count), VECTOR, num_warps=4)
    launch(quantize_global_kernel, (max(1, ceil_div(whole, BLOCK)),), args, tile)


def quantize_global_transpose(input: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    quantize_transpose(input, partial_absmax(input.contiguous()), codes, absmax)


def quantize_transpose_by_absmax(x: torch.Tensor, absmax: torch.Tensor, codes: torch.Tensor) -> None:
    quantize_transpose(x, absmax, codes, None)


def quantize_global_with_transpose(
    x: torch.Tensor, codes: torch.Tensor, codes_t: torch.Tensor, absmax: torch.Tensor
) -> None:
    quantize_transpose(x, partial_absmax(x.contiguous()), codes_t, absmax, codes)
