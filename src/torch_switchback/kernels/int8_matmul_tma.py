"""The matmul as a persistent kernel on TMA descriptors that the CPU makes."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tuning import MatmulConfig
from ._matmul import K_CHUNK, Operands, dequantize_tile
from ._tiles import tile_position
from .device import num_sms, supports_pdl
from .launch import Plan, bind, ceil_div

# Two accumulators a thread: with 4 warps they spill.
WIDE_SUMS = MatmulConfig("tma", 128, 128, 128, group_m=8, num_stages=4, num_warps=8)


@triton.jit(do_not_specialize=["M"])
def int8_matmul_tma_kernel(
    a_desc,  # [M, K] int8, blocks of [BLOCK_M, BLOCK_K]
    b_desc,  # [N, K] int8, blocks of [BLOCK_N, BLOCK_K]
    out_desc,  # [M, N] fp16/bf16/fp32, blocks of [BLOCK_M, BLOCK_N / 2]
    absmax_a_ptr,  # [M] fp32
    absmax_b_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N] fp16/bf16/fp32, or unused
    M,
    N,
    K,
    ABSMAX_PER_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    K_CHUNK: tl.constexpr,  # carry what is above 16 bits out of acc before each chunk of this many products; 0: never
    PDL_WAIT: tl.constexpr,  # this kernel may start before the one ahead of it ends
):
    if PDL_WAIT:
        tl.extra.cuda.gdc_wait()
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=K_CHUNK == 0):
        block_m, block_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = block_m * BLOCK_M
        start_n = block_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        high = acc
        if K_CHUNK:  # the sum is acc + 2**16 * high; in int64 it would not fit the registers
            for start in range(0, K, K_CHUNK):
                high += acc >> 16
                acc = acc & 0xFFFF
                for k in range(start, tl.minimum(start + K_CHUNK, K), BLOCK_K):
                    a = a_desc.load([start_m, k])
                    b = b_desc.load([start_n, k])
                    acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        else:
            for k in range(0, K, BLOCK_K):
                a = a_desc.load([start_m, k])
                b = b_desc.load([start_n, k])
                acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)

        # Two halves: the first is stored while the second is dequantized, through half the shared memory.
        halves = acc.reshape((BLOCK_M, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
        high_halves = high.reshape((BLOCK_M, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
        row = start_m + tl.arange(0, BLOCK_M)
        for half in tl.static_range(2):
            start = start_n + half * (BLOCK_N // 2)
            col = start + tl.arange(0, BLOCK_N // 2)
            total = halves[half]
            if K_CHUNK:
                total = total.to(tl.int64) + (high_halves[half].to(tl.int64) << 16)
            out = dequantize_tile(total, row, col, absmax_a_ptr, absmax_b_ptr, bias_ptr, M, N, ABSMAX_PER_COL, HAS_BIAS)
            out_desc.store([start_m, start], out.to(out_desc.dtype))


def plan_tma(operands: Operands, absmax_per_col: bool, config: MatmulConfig) -> Plan:
    """Return the plan that fills the output, which fits TMA, as a and b do. See :func:`plan_persistent`."""
    K = operands.a.shape[1]
    if K > K_CHUNK:
        config = WIDE_SUMS
    constants = dict(
        ABSMAX_PER_COL=absmax_per_col,
        HAS_BIAS=operands.bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        K_CHUNK=K_CHUNK if K > K_CHUNK else 0,
        PDL_WAIT=supports_pdl(operands.a.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    boxes = (
        Box(TensorDescriptor, [config.block_m, config.block_k]),
        Box(TensorDescriptor, [config.block_n, config.block_k]),
        Box(TensorDescriptor, [config.block_m, config.block_n // 2]),
    )
    return plan_persistent(int8_matmul_tma_kernel, constants, operands, boxes, config)


class Box(NamedTuple):
    """Describes a block that TMA moves, as a tensor descriptor needs it."""

    kind: type  # of descriptor: Triton's or Gluon's
    shape: list[int]
    layout: Any = None  # in shared memory; Gluon's alone say it

    def descriptor(self, base: torch.Tensor, shape: tuple[int, int], strides: tuple[int, int]) -> Any:
        """Return the descriptor of a matrix, without its validation, which takes longer."""
        result: Any = object.__new__(self.kind)
        result.base, result.shape, result.strides, result.block_shape = base, shape, strides, self.shape
        if self.layout is not None:
            result.layout = self.layout
        return result


def plan_persistent(
    kernel: Any, constants: dict[str, Any], operands: Operands, boxes: tuple[Box, Box, Box], config: MatmulConfig
) -> Plan:
    """Return the plan of a kernel on descriptors, each of whose programs takes one tile of the output after another.

    It takes a, b, absmax_a, absmax_b, bias, out_dtype and out.

    Args:
        boxes: those of a, b and out.
    """
    K, N = operands.b.shape
    strides_a, strides_b = (operands.a.stride(0), 1), (operands.b.stride(1), 1)
    max_programs, blocks_n = config.ctas_per_sm * num_sms(operands.a.device), ceil_div(N, config.block_n)
    describe_a, describe_b, describe_out = (box.descriptor for box in boxes)

    def arguments(a: Any, b: Any, absmax_a: Any, absmax_b: Any, bias: Any, out: Any) -> tuple[Any, ...]:
        M = a.shape[0]
        read = describe_a(a, (M, K), strides_a), describe_b(b, (N, K), strides_b)
        vectors = absmax_a, absmax_b, absmax_b if bias is None else bias
        return (*read, describe_out(out, (M, N), (N, 1)), *vectors, M, N, K)

    launch = bind(kernel, arguments(*operands), **constants)

    def run(a: Any, b: Any, absmax_a: Any, absmax_b: Any, bias: Any, out_dtype: Any, out: Any) -> None:
        programs = min(ceil_div(a.shape[0], config.block_m) * blocks_n, max_programs)
        launch((programs, 1, 1), *arguments(a, b, absmax_a, absmax_b, bias, out))

    return run
