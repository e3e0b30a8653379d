"""The matmul for Hopper in Gluon: one warp loads tiles by TMA, two warp groups multiply and store.

Plain Triton gives every warp the same program, so that the loads, MMAs and epilogue of a tile wait for one another.
Here the loading warp runs ahead, also into the next tile. Each warp group owns half of a tile's rows and does not wait
for the other. Both share one tile of b, which takes three quarters of the L2 traffic of 128 × 128 tiles.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..tuning import MatmulConfig
from ._matmul import Operands, dequantize, load_bias, load_scale
from ._tiles import tile_position
from .int8_matmul_tma import Box, plan_persistent
from .launch import Plan

GROUPS = gl.constexpr(2)  # warp groups that multiply
OUT_BUFFERS = gl.constexpr(2)  # of a warp group: one is stored while the next is filled
SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor
BARRIERS = 256  # bytes at most

# Renamed after Triton 3.7.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """Return the next stage of the ring, and the phase of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def split_columns(x, WIDTH: gl.constexpr):
    """Return x [rows, cols] as a tuple of [rows, WIDTH]."""
    if x.shape[1] == WIDTH:
        return (x,)
    else:
        left, right = x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()
        return split_columns(left, WIDTH) + split_columns(right, WIDTH)


@gluon.jit
def load_operands(
    a_desc,
    b_desc,
    ring,
    size,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Load every operand of every tile into the ring, as soon as a stage is empty: the loading warp."""
    a_tiles, b_tiles, full, empty = ring
    M, N, K = size
    HALF: gl.constexpr = BLOCK_M // GROUPS
    STAGES: gl.constexpr = b_tiles.shape[0]
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        block_m, block_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        for k in range(0, K, BLOCK_K):
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready, (BLOCK_M + BLOCK_N) * BLOCK_K)
            for group in gl.static_range(GROUPS):
                rows = a_tiles.index(GROUPS * stage + group)
                load_tile(a_desc, [block_m * BLOCK_M + group * HALF, k], ready, rows)
            load_tile(b_desc, [block_n * BLOCK_N, k], ready, b_tiles.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def multiply(
    group: gl.constexpr,
    out_desc,
    ring,
    epilogue,
    size,
    ABSMAX_PER_COL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Multiply and store half of the rows of every tile: a warp group."""
    a_tiles, b_tiles, full, empty = ring
    absmax_a_ptr, absmax_b_ptr, bias_ptr, columns, out_tiles = epilogue
    M, N, K = size
    HALF: gl.constexpr = BLOCK_M // GROUPS
    STAGES: gl.constexpr = b_tiles.shape[0]
    WIDTH: gl.constexpr = out_tiles.shape[2]
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(BLOCK_N, 128), 32])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    col_layout: gl.constexpr = gl.SliceLayout(0, out_layout)
    flat_layout: gl.constexpr = gl.BlockedLayout([BLOCK_N // 128], [32], [4], [0])
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        block_m, block_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = block_m * BLOCK_M + group * HALF

        # What the epilogue needs is asked for first and arrives during the MMAs.
        scale_a = load_scale(absmax_a_ptr, start_m + gl.arange(0, HALF, row_layout), M)
        col = block_n * BLOCK_N + gl.arange(0, BLOCK_N, flat_layout)
        if ABSMAX_PER_COL:
            scale_b = load_scale(absmax_b_ptr, col, N)
        else:
            scale_b = load_scale(absmax_b_ptr, 0, 1)
        if HAS_BIAS:
            bias = load_bias(bias_ptr, col, N)

        # One MMA is in flight while the next is issued; its stage is free when the one after it is waited for.
        mbarrier.wait(full.index(stage), phase)
        acc = gl.zeros((HALF, BLOCK_N), gl.int32, acc_layout)
        a, b = a_tiles.index(GROUPS * stage + group), b_tiles.index(stage).permute((1, 0))
        acc = hopper.warpgroup_mma(a, b, acc, use_acc=False, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, deps=[acc])
        before = stage
        stage, phase = advance(stage, phase, STAGES)
        for _ in range(BLOCK_K, K, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            a, b = a_tiles.index(GROUPS * stage + group), b_tiles.index(stage).permute((1, 0))
            acc = hopper.warpgroup_mma(a, b, acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = advance(stage, phase, STAGES)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before), count=1)

        # Per-column values change hands, from a few a thread to those of its accumulators, through shared memory.
        if ABSMAX_PER_COL:
            columns.index(group).store(scale_b)
        if HAS_BIAS:
            columns.index(GROUPS * ABSMAX_PER_COL + group).store(bias)
        parts = split_columns(acc, WIDTH)
        for i in gl.static_range(BLOCK_N // WIDTH):
            part_scale = scale_b
            part_bias = None
            if ABSMAX_PER_COL:
                part_scale = columns.index(group).slice(i * WIDTH, WIDTH).load(col_layout)[None, :]
            if HAS_BIAS:
                part_bias = (
                    columns.index(GROUPS * ABSMAX_PER_COL + group).slice(i * WIDTH, WIDTH).load(col_layout)[None, :]
                )
            part = gl.convert_layout(parts[i], out_layout, assert_trivial=True)
            out = dequantize(part, scale_a[:, None], part_scale, part_bias)
            out_tile = out_tiles.index(OUT_BUFFERS * group + i % OUT_BUFFERS)
            tma.store_wait(OUT_BUFFERS - 1)
            out_tile.store(out.to(out_desc.dtype))
            hopper.fence_async_shared()
            store_tile(out_desc, [start_m, block_n * BLOCK_N + i * WIDTH], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def int8_matmul_warp_specialized_kernel(
    a_desc,  # [M, K] int8, blocks of [BLOCK_M / 2, BLOCK_K]
    b_desc,  # [N, K] int8, blocks of [BLOCK_N, BLOCK_K]
    out_desc,  # [M, N] fp16/bf16/fp32, blocks of [BLOCK_M / 2, WIDTH]
    absmax_a_ptr,  # [M] fp32
    absmax_b_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N] fp16/bf16/fp32, or unused
    M,
    N,
    K,
    ABSMAX_PER_COL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    WIDTH: gl.constexpr,
):
    a_tiles = gl.allocate_shared_memory(gl.int8, [GROUPS * STAGES, BLOCK_M // GROUPS, BLOCK_K], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    out_tiles = gl.allocate_shared_memory(
        out_desc.dtype, [GROUPS * OUT_BUFFERS, BLOCK_M // GROUPS, WIDTH], out_desc.layout
    )
    columns = gl.allocate_shared_memory(
        gl.float32, [max(GROUPS * (ABSMAX_PER_COL + HAS_BIAS), 1), BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)

    ring = (a_tiles, b_tiles, full, empty)
    epilogue = (absmax_a_ptr, absmax_b_ptr, bias_ptr, columns, out_tiles)
    size = (M, N, K)
    gl.warp_specialize(
        [
            (
                multiply,
                (0, out_desc, ring, epilogue, size, ABSMAX_PER_COL, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M),
            ),
            (
                multiply,
                (1, out_desc, ring, epilogue, size, ABSMAX_PER_COL, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M),
            ),
            (load_operands, (a_desc, b_desc, ring, size, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)),
        ],
        [4, 1],  # warps of the partitions after the first
        [240, 24],  # and their registers a thread
    )


def plan_warp_specialized(operands: Operands, absmax_per_col: bool, config: MatmulConfig) -> Plan:
    """Return the plan that fills the output, which fits TMA, as a and b do. See :func:`plan_persistent`."""
    has_bias, dtype = operands.bias is not None, operands.out.dtype
    half = config.block_m // GROUPS.value
    width = out_width(config, absmax_per_col + has_bias, dtype.itemsize)
    constants = dict(
        ABSMAX_PER_COL=absmax_per_col,
        HAS_BIAS=has_bias,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        STAGES=config.num_stages,
        WIDTH=width,
        num_warps=4,
    )
    box_a, box_b = _box(half, config.block_k, torch.int8), _box(config.block_n, config.block_k, torch.int8)
    boxes = box_a, box_b, _box(half, width, dtype)
    return plan_persistent(int8_matmul_warp_specialized_kernel, constants, operands, boxes, config)


def out_width(config: MatmulConfig, vectors: int, out_bytes: int) -> int:
    """Return the columns of the output that one buffer holds: 128 bytes, the widest TMA box, or what there is room for.

    vectors: how many of absmax_b and bias there are per column. The least is 32 bytes.
    """
    operands = config.num_stages * (config.block_m + config.block_n) * config.block_k
    left = SHARED_MEMORY - BARRIERS - operands - 4 * config.block_n * max(GROUPS.value * vectors, 1)
    width_bytes = 128
    while width_bytes > 32 and OUT_BUFFERS.value * config.block_m * width_bytes > left:
        width_bytes //= 2
    return width_bytes // out_bytes


@functools.cache
def _box(rows: int, cols: int, dtype: torch.dtype) -> Box:
    types = {torch.int8: gl.int8, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], types[dtype])
    return Box(TensorDescriptor, [rows, cols], layout)
