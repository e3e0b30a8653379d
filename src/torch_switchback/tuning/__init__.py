"""Which tiles a product runs with: measured data, a table an architecture, each row with what measured it."""

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class MatmulConfig:
    """How an INT8 product is cut up. Results do not depend on it, only the time does."""

    tma: bool  # the persistent kernel on TMA descriptors, where the operands allow it; else one tile a program
    block_m: int
    block_n: int
    block_k: int
    group_m: int  # block rows that run side by side, to reuse their operands in L2
    num_stages: int
    num_warps: int
    programs_per_multiprocessor: int = 1  # of the persistent kernel


@functools.cache
def matmul_table(architecture: str) -> tuple[tuple[tuple[int, int, int], MatmulConfig], ...]:
    """The rows ((M, N, K), config) of an architecture's table; of a conservative one if it has none."""
    folder = resources.files(__package__)
    table = folder / f"{architecture}.json"
    if not table.is_file():
        table = folder / ("sm_80.json" if architecture.startswith("sm_") else "gfx942.json")
    rows = json.loads(table.read_text())["int8_matmul"]
    return tuple(((row["m"], row["n"], row["k"]), MatmulConfig(**row["config"])) for row in rows)


def matmul_config(architecture: str, m: int, n: int, k: int) -> MatmulConfig:
    """The configuration measured nearest to a product [m, k] × [k, n], distances taken in octaves.

    Args:
        architecture: ``"sm_90"``, ``"gfx942"``, …
        m: rows (tokens), taken up to the next power of two so that a changing batch changes little.
        n: columns.
        k: inner dimension.
    """
    return _nearest(architecture, (max(m, 1) - 1).bit_length(), n, k)


@functools.cache
def _nearest(architecture: str, log2_m: int, n: int, k: int) -> MatmulConfig:
    shape = (float(log2_m), math.log2(max(n, 1)), math.log2(max(k, 1)))

    def distance(row: tuple[tuple[int, int, int], MatmulConfig]) -> float:
        return sum(abs(math.log2(size) - ours) for size, ours in zip(row[0], shape, strict=True))

    return min(matmul_table(architecture), key=distance)[1]
