"""Global quantisation in two passes: absmax of parts; then reduce the parts, quantise and store."""

import torch
import triton
import triton.language as tl

from ._absmax import MAX_PARTS, partial_absmax
from ._launch import ceil_div, launch
from ._numerics import bits_to_float, inverse_scale, quantize
from ._transpose import quantize_transpose

BLOCK = 4096


@triton.jit
def quantize_global_kernel(
    x_ptr,  # [elements] fp16/bf16/fp32
    partial_ptr,  # [parts] int32 bits of absmax
    codes_ptr,  # [elements] int8
    absmax_ptr,  # [1] fp32
    elements,
    parts,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    part = tl.arange(0, MAX_PARTS)
    absmax = bits_to_float(tl.max(tl.load(partial_ptr + part, mask=part < parts, other=0), axis=0))
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < elements, other=0.0)
    tl.store(codes_ptr + offset, quantize(x, inverse_scale(absmax)), mask=offset < elements)
    if tl.program_id(0) == 0:
        tl.store(absmax_ptr, absmax)


def quantize_global(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    x = x.contiguous()
    partial = partial_absmax(x)
    launch(
        quantize_global_kernel,
        (max(1, ceil_div(x.numel(), BLOCK)),),
        x,
        partial,
        codes,
        absmax,
        x.numel(),
        partial.numel(),
        BLOCK=BLOCK,
        MAX_PARTS=MAX_PARTS,
        num_warps=8,
    )


def quantize_global_transpose(input: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    quantize_transpose(input, partial_absmax(input.contiguous())[:, None], codes, absmax)


def quantize_transpose_by_absmax(x: torch.Tensor, absmax: torch.Tensor, codes: torch.Tensor) -> None:
    quantize_transpose(x, absmax.view(torch.int32)[:, None], codes, None)
