"""The configurations worth measuring on an architecture."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ._tables import Kernel, MatmulConfig, served, shipped_table

# The tiles by height: block_m -> every (block_n, block_k).
Tiles = Mapping[int, tuple[tuple[int, int], ...]]

TMA_TILES: Tiles = {
    32: ((32, 256), (64, 256)),  # too few rows for wgmma, but not for an older instruction behind TMA's loads
    64: ((32, 256), (64, 128), (64, 256), (128, 128), (256, 128)),
    128: ((64, 128), (128, 128), (256, 128)),
    256: ((128, 128),),
}
WARP_SPECIALIZED_TILES: Tiles = {128: ((128, 128), (256, 128)), 256: ((128, 128),)}
SHORT_TILES: Tiles = {  # for a few rows, where wgmma's 64 would be mostly padding
    16: ((32, 256), (64, 128), (64, 256), (128, 128)),
    32: ((32, 256), (64, 128), (64, 256), (128, 128)),
}
POINTER_TILES: Tiles = {
    64: ((64, 64), (64, 128), (128, 64), (128, 128), (256, 64)),
    128: ((64, 64), (128, 64), (128, 128), (256, 64)),
    256: ((128, 64),),
}
GROUPS = (4, 8, 16, 32)

# What goes together: tiles, numbers of stages, warps and programs per SM.
Family = tuple[Kernel, Tiles, tuple[int, ...], tuple[int, ...], tuple[int, ...]]

# Accumulators per thread: more than half of its 255 registers spill; with few, half the warps do as well.
MOST_ACCUMULATORS = 128
LEAST_ACCUMULATORS_OF_8_WARPS = 32


def candidates(
    architecture: str, *, m: int | None = None, tma: bool = True, quick: bool = False
) -> Iterator[MatmulConfig]:
    """Yield the configurations that may be fastest on an architecture and fit its shared memory.

    Args:
        architecture: ``"sm_90"``, ``"gfx942"``, …
        m: rows (tokens) of the matmul, which rules out tiles far from its height; None: of any matmul.
        tma: whether the matmul's output allows TMA.
        quick: about an eighth of them: one group height, and only as many stages as fit.

    Raises:
        ValueError: architecture is no name of that form.
    """
    limits = served(shipped_table(architecture)[1], architecture)
    short: Family = ("pointer", SHORT_TILES, (2, 3, 4, 5), (4, 8), (1,))
    if limits.tma and tma:
        families: tuple[Family, ...] = (
            ("warp_specialized", WARP_SPECIALIZED_TILES, (3, 4, 5, 6), (8,), (1,)),
            ("tma", TMA_TILES, (3, 4, 5), (4, 8), (1, 2)),
            short,
        )
    else:
        families = (("pointer", POINTER_TILES, (2, 3, 4, 5), (4, 8), (1,)), short)
    for kernel, tiles, stages, warps, programs in families:
        for block_m, num_warps, ctas_per_sm in itertools.product(tiles, warps, programs):
            if m is not None and not min(m, 64) <= block_m <= max(m, 64):
                continue
            if kernel == "tma" and block_m >= 64 and num_warps * 16 > block_m:
                continue  # wgmma gives each warp 16 rows; more warps share columns, and the outputs change layout
            for block_n, block_k in tiles[block_m]:
                accumulators = block_m * block_n // (32 * num_warps)
                fewest = LEAST_ACCUMULATORS_OF_8_WARPS if num_warps == 8 else 0
                if not fewest <= accumulators <= MOST_ACCUMULATORS:
                    continue
                sizes = block_m, block_n, block_k
                configs = [MatmulConfig(kernel, *sizes, 8, count, num_warps, ctas_per_sm) for count in stages]
                fitting = [config for config in configs if _fits(config, limits.shared_memory_kib * 1024)]
                if quick:
                    yield from fitting[-1:]
                else:
                    for config, group_m in itertools.product(fitting, _groups(m, block_m)):
                        yield replace(config, group_m=group_m)


def shared_memory(config: MatmulConfig, out_bytes: int) -> int:
    """Return the bytes of shared memory of one program, as Triton 3.9 takes it, less some barriers.

    TMA: the operands of every stage, and half a tile of outputs to be stored. Warp-specialized: the operands, the
    epilogue's vectors, and 32 bytes at least of every row of outputs. Pointers: one stage less, the operands of the
    last being on their way to registers; their outputs go where the operands were. (sm_100 keeps every stage, and all
    candidates still fit it.)
    """
    operands = (config.block_m + config.block_n) * config.block_k
    if not config.tma:
        return (config.num_stages - 1) * operands
    if config.kernel == "warp_specialized":
        return config.num_stages * operands + 256 + 16 * config.block_n + 64 * config.block_m
    return config.num_stages * operands + config.block_m * config.block_n // 2 * out_bytes


def _fits(config: MatmulConfig, limit: int) -> bool:
    """One program must run with float32 outputs too; several share an SM with 16-bit ones."""
    return (
        shared_memory(config, out_bytes=4) <= limit and config.ctas_per_sm * shared_memory(config, out_bytes=2) <= limit
    )


def _groups(m: int | None, block_m: int) -> tuple[int, ...]:
    """Return the group heights that differ: one above the matmul's block rows is the same as the next."""
    if m is None:
        return GROUPS
    block_rows = -(-m // block_m)
    enough = next((group for group in GROUPS if group >= block_rows), GROUPS[-1])
    return tuple(group for group in GROUPS if group <= enough)
