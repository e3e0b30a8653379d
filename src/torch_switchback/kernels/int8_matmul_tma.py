"""The matmul as a persistent kernel on TMA descriptors that the CPU makes."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tuning import MatmulConfig
from ._matmul import K_CHUNK, dequantize_tile
from ._tiles import tile_position
from .device import num_sms, supports_pdl
from .launch import ceil_div, launch

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

        # Two halves: the first is stored while the second is dequantised, through half the shared memory.
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


class Constants(NamedTuple):
    """Constants of :func:`int8_matmul_tma_kernel`."""

    ABSMAX_PER_COL: bool
    HAS_BIAS: bool
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    K_CHUNK: int
    PDL_WAIT: bool
    num_warps: int
    num_stages: int


def plan(
    config: MatmulConfig, device: torch.device, k: int, absmax_per_col: bool, has_bias: bool, out_dtype: torch.dtype
) -> tuple[Constants, int]:
    """Return the kernel's constants, and how many programs share the tiles."""
    if k > K_CHUNK:
        config = WIDE_SUMS
    constants = Constants(
        absmax_per_col,
        has_bias,
        config.block_m,
        config.block_n,
        config.block_k,
        config.group_m,
        K_CHUNK if k > K_CHUNK else 0,
        supports_pdl(device),
        config.num_warps,
        config.num_stages,
    )
    return constants, config.programs_per_multiprocessor * num_sms(device)


def launch_tma(
    a: torch.Tensor,
    b: torch.Tensor,
    absmax_a: torch.Tensor,
    absmax_b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    constants: Constants,
    max_programs: int,
) -> None:
    """Fill out [M, N] with the product of a [M, K] and b [N, K]. All three fit TMA."""
    M, K = a.shape
    N = b.shape[0]
    block_m, block_n = constants.BLOCK_M, constants.BLOCK_N
    tiles = ceil_div(M, block_m) * ceil_div(N, block_n)
    args = (
        descriptor(TensorDescriptor, a, block_m, constants.BLOCK_K),
        descriptor(TensorDescriptor, b, block_n, constants.BLOCK_K),
        descriptor(TensorDescriptor, out, block_m, block_n // 2),
        absmax_a,
        absmax_b,
        absmax_b if bias is None else bias,
        M,
        N,
        K,
    )
    launch(int8_matmul_tma_kernel, (min(tiles, max_programs),), args, constants)


def descriptor(kind: type, x: torch.Tensor, rows: int, cols: int) -> Any:
    """Return a tensor descriptor of x for blocks of [rows, cols], without the validation that takes 3 µs."""
    result: Any = object.__new__(kind)
    result.base, result.shape, result.strides, result.block_shape = x, x.shape, x.stride(), [rows, cols]
    return result
