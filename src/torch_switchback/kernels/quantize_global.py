"""Global quantization: absmax of parts; then reduce the parts, quantize and store, plain, transposed or both."""

import torch
import triton
import triton.language as tl

from ._absmax import bind_partial_absmax, empty_parts, parts_block, reduce_absmax, whole_vectors
from ._numerics import inverse_scale, quantize
from ._transpose import plan_quantize_transpose
from .launch import VECTOR, Plan, bind, ceil_div

BLOCK = 4096


@triton.jit(do_not_specialize=["elements", "parts"])
def quantize_global_kernel(
    x_ptr,  # [elements] fp16/bf16/fp32
    parts_ptr,  # [parts] fp16/bf16/fp32 with the absmax of x
    qdata_ptr,  # [elements] int8
    absmax_ptr,  # [1] fp32
    elements,
    parts,
    whole,  # elements in whole vectors
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
    tl.store(qdata_ptr + offset, quantize(x, inverse), mask=offset < whole)
    if program == 0:
        tl.store(absmax_ptr, absmax)
        rest = whole + tl.arange(0, VECTOR)
        last = tl.load(x_ptr + rest, mask=rest < elements, other=0.0)
        tl.store(qdata_ptr + rest, quantize(last, inverse), mask=rest < elements)


def plan_quantize_global(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> Plan:
    is_contiguous, x = x.is_contiguous(), x.contiguous()
    parts = empty_parts(x)
    find_parts = bind_partial_absmax(x, parts)
    elements, count = x.numel(), parts.numel()
    args = x, parts, qdata, absmax, elements, count, whole_vectors(elements)
    launch = bind(quantize_global_kernel, args, BLOCK=BLOCK, BLOCK_PARTS=parts_block(count), VECTOR=VECTOR, num_warps=4)

    def run(x: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        if not is_contiguous:
            x = x.contiguous()
        parts, elements = empty_parts(x), x.numel()
        whole = whole_vectors(elements)
        if find_parts is not None:
            find_parts((parts.numel() - 1, 1, 1), x, parts, elements, whole)
        launch((max(1, ceil_div(whole, BLOCK)), 1, 1), x, parts, qdata, absmax, elements, parts.numel(), whole)

    return run


def plan_quantize_global_transpose(input: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> Plan:
    transpose = plan_quantize_global_with_transpose(input, None, qdata, absmax)

    def run(input: torch.Tensor, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        transpose(input, None, qdata, absmax)

    return run


def plan_quantize_global_with_transpose(
    x: torch.Tensor, qdata: torch.Tensor | None, qdata_t: torch.Tensor, absmax: torch.Tensor
) -> Plan:
    contiguous = x.contiguous()
    parts = empty_parts(contiguous)
    find_parts = bind_partial_absmax(contiguous, parts)
    transpose = plan_quantize_transpose(x, parts, qdata_t, absmax, qdata)

    def run(x: torch.Tensor, qdata: torch.Tensor | None, qdata_t: torch.Tensor, absmax: torch.Tensor) -> None:
        contiguous = x.contiguous()
        parts, elements = empty_parts(contiguous), x.numel()
        if find_parts is not None:
            find_parts((parts.numel() - 1, 1, 1), contiguous, parts, elements, whole_vectors(elements))
        transpose(x, parts, qdata_t, absmax, qdata)

    return run


def plan_quantize_transpose_by_absmax(x: torch.Tensor, absmax: torch.Tensor, qdata: torch.Tensor) -> Plan:
    transpose = plan_quantize_transpose(x, absmax, qdata, None, None)

    def run(x: torch.Tensor, absmax: torch.Tensor, qdata: torch.Tensor) -> None:
        transpose(x, absmax, qdata, None, None)

    return run
