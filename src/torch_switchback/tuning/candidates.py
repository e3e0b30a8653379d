"""The configurations worth measuring on an architecture."""

import itertools
from collections.abc import Iterator

from ._tables import Kernel, MatmulConfig, served, shipped_table

Tile = tuple[int, int, int]  # block_m, block_n, block_k
# Tiles, numbers of stages, warps and programs per SM that go together.
Family = tuple[Kernel, tuple[Tile, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]

TMA_TILES = (
    (32, 32, 256),  # too few rows for wgmma, but not for an older instruction behind TMA's loads
    (32, 64, 256),
    (64, 32, 256),
    (64, 64, 128),
    (64, 64, 256),
    (64, 128, 128),
    (64, 256, 128),
    (128, 64, 128),
    (128, 128, 128),
    (128, 256, 128),
    (256, 128, 128),
)
WARP_SPECIALIZED_TILES = ((128, 128, 128), (128, 256, 128), (256, 128, 128))
SHORT_TILES = (  # for a few rows, where wgmma's 64 would be mostly padding
    (16, 32, 256),
    (16, 64, 128),
    (16, 64, 256),
    (16, 128, 128),
    (32, 32, 256),
    (32, 64, 128),
    (32, 64, 256),
    (32, 128, 128),
)
POINTER_TILES = (
    (64, 64, 64),
    (64, 64, 128),
    (64, 128, 64),
    (64, 128, 128),
    (64, 256, 64),
    (128, 64, 64),
    (128, 128, 64),
    (128, 128, 128),
    (128, 256, 64),
    (256, 128, 64),
)
GROUPS = (4, 8, 16, 32)

# Accumulators per thread: more than half of its 255 registers spill; with few, half the warps do as well.
MOST_ACCUMULATORS = 128
LEAST_ACCUMULATORS_OF_8_WARPS = 32


def candidates(
    architecture: str, *, m: int | None = None, tma: bool = True, quick: bool = False
) -> Iterator[MatmulConfig]:
    """Yield the configurations that may be fastest on an architecture and fit its shared memory.

    Args:
        architecture: ``"sm_90"``, ``"gfx942"``, …
        m: rows (tokens) of the matmul, which rules out tiles far from its height; None: of any product.
        tma: whether the matmul's output allows TMA.
        quick: about an eighth of them: one group height, and only as many stages as fit.

    Raises:
        ValueError: architecture is no name of that form.
    """
    limits = served(shipped_table(architecture)[1], architecture)
    short: Family = ("pointer", SHORT_TILES, (2, 3, 4, 5), (4, 8), (1,))
    families: list[Family] = (
        [
            ("warp_specialized", WARP_SPECIALIZED_TILES, (3, 4, 5, 6), (8,), (1,)),
            ("tma", TMA_TILES, (3, 4, 5), (4, 8), (1, 2)),
            short,
        ]
        if limits.tma and tma
        else [("pointer", POINTER_TILES, (2, 3, 4, 5), (4, 8), (1,)), short]
    )
    for kernel, tiles, stages, warps, programs in families:
        for (block_m, block_n, block_k), num_warps, program in itertools.product(tiles, warps, programs):
            accumulators = block_m * block_n // (32 * num_warps)
            if accumulators > MOST_ACCUMULATORS or (num_warps == 8 and accumulators < LEAST_ACCUMULATORS_OF_8_WARPS):
                continue
            if kernel == "tma" and block_m >= 64 and num_warps * 16 > block_m:
                continue  # wgmma gives each warp 16 rows; more warps share columns, and the outputs change layout
            if m is not None and not min(m, 64) <= block_m <= max(m, 64):
                continue
            fitting = []
            for num_stages in stages:
                config = MatmulConfig(kernel, block_m, block_n, block_k, 8, num_stages, num_warps, program)
                if _fits(config, limits.shared_memory_kib * 1024):
                    fitting.append(num_stages)
            for num_stages in fitting[-1:] if quick else fitting:
                for group_m in (8,) if quick else _groups(m, block_m):
                    yield MatmulConfig(kernel, block_m, block_n, block_k, group_m, num_stages, num_warps, program)


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
