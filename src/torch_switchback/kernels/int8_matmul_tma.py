"""The product as a persistent kernel on TMA descriptors that the host makes."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tuning import MatmulConfig
from ._launch import launch, multiprocessors, waits
from ._product import FOLD, count_tiles, dequantize_tile, product_constants
from ._tiles import tile_position

# Two accumulators a thread: with 4 warps they spill.
FOLDING = MatmulConfig("tma", 128, 128, 128, group_m=8, num_stages=4, num_warps=8)


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
    FOLD: tl.constexpr,  # carry what is above 16 bits out of acc before each chunk of this many products; 0: never
    WAITS: tl.constexpr,
):
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FOLD == 0):
        block_m, block_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = block_m * BLOCK_M
        start_n = block_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        high = acc
        if FOLD:  # the sum is acc + 2**16 * high; in int64 it would not fit the registers
            for start in range(0, K, FOLD):
                high += acc >> 16
                acc = acc & 0xFFFF
                for k in range(start, tl.minimum(start + FOLD, K), BLOCK_K):
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
            if FOLD:
                total = total.to(tl.int64) + (high_halves[half].to(tl.int64) << 16)
            out = dequantize_tile(total, row, col, absmax_a_ptr, absmax_b_ptr, bias_ptr, M, N, ABSMAX_PER_COL, HAS_BIAS)
            out_desc.store([start_m, start], out.to(out_desc.dtype))


def launch_tma(
    a: torch.Tensor,
    b: torch.Tensor,
    absmax_a: torch.Tensor,
    absmax_b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    absmax_per_col: bool,
    config: MatmulConfig,
) -> None:
    """Fill out [M, N] with the product of a [M, K] and b [N, K]; all three fit TMA.

    A K beyond FOLD takes a tile of its own, whichever was configured.
    """
    M, K = a.shape
    N = b.shape[0]
    if K > FOLD:
        config = FOLDING
    launch(
        int8_matmul_tma_kernel,
        (min(count_tiles(config, M, N), config.programs_per_multiprocessor * multiprocessors(a.device)),),
        _descriptor(a, config.block_m, config.block_k),
        _descriptor(b, config.block_n, config.block_k),
        _descriptor(out, config.block_m, config.block_n // 2),
        absmax_a,
        absmax_b,
        absmax_b if bias is None else bias,
        M,
        N,
        K,
        **product_constants(config, absmax_per_col, bias),
        FOLD=FOLD if K > FOLD else 0,
        **waits(a.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _descriptor(x: torch.Tensor, *block: int) -> TensorDescriptor:
    """TensorDescriptor.from_tensor without its checks, which take longer than the launch."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = x, x.shape, x.stride()
    descriptor.block_shape, descriptor.padding = list(block), "zero"
    return descriptor
