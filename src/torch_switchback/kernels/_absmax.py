"""The absmax of a whole x for quantizers whose programs share it: the first of two passes, and its use in the second.

The first pass leaves the absmax of each part of x, the second reduces them, in every program, before it quantizes.
Small x has no first pass: it is its own parts.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ._numerics import bits_to_float, magnitude_bits
from .device import empty, num_sms
from .launch import VECTOR, bind, ceil_div

BLOCK = 8192
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
    """Return the fp32 absmax of the blocks of x that begin at start, start + step, …"""
    block = tl.arange(0, BLOCK)
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for offset in range(start, elements, step):
        x = tl.load(x_ptr + offset + block, mask=offset + block < elements, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    return bits_to_float(tl.max(bits, axis=0))


def parts_block(parts: int) -> int:
    """Return how many parts a program reads at once: the same for most tensors, so that they share compiled kernels."""
    if parts == 1:
        return 1
    return MAX_PARTS if parts <= MAX_PARTS else BLOCK


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
    return bind(partial_absmax_kernel, args, BLOCK=BLOCK, VECTOR=VECTOR, num_warps=8)


def whole_vectors(elements: int) -> int:
    """Return how many of some elements are read by vectors. A load of the others too would read each by itself."""
    return elements // VECTOR * VECTOR
