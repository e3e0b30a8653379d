"""The tiles of a matrix, and the order in which programs take them."""

import triton
import triton.language as tl


@triton.jit
def tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return a tile's block row and column: down GROUP_M block rows, then one block column on, for reuse in L2."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    group = tile // (GROUP_M * blocks_n)
    group_height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * blocks_n)
    return group * GROUP_M + within % group_height, within // group_height
