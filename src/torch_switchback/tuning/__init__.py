"""Choose the tiles of a matmul from measured data: one table per architecture, each row with what measured it."""

import functools
import math
import warnings

from ._tables import MatmulConfig, MatmulShape, Row, read, served, shipped_table, user_table_path

__all__ = [
    "MatmulConfig",
    "MatmulShape",
    "allows_tma",
    "matmul_config",
    "matmul_table",
    "octave",
    "padded",
    "user_table_path",
]


def matmul_config(architecture: str, m: int, n: int, k: int, *, tma: bool = True) -> MatmulConfig:
    """Return the configuration measured nearest to a matmul [m, k] × [k, n], distances taken in octaves.

    Args:
        architecture: ``"sm_90"``, ``"gfx942"``, …
        m: rows (tokens), taken up to the next power of two so that a changing batch changes little.
        n: columns.
        k: inner dimension, taken up to whole vectors, as matmuls run it.
        tma: whether the output's alignment allows TMA. If not, only rows without it count; if so, only those whose
            own output allowed it, for the others never had the choice.

    Raises:
        ValueError: architecture is no name of that form.
    """

    def distance(row: tuple[tuple[int, int, int], MatmulConfig]) -> float:
        (row_m, row_n, row_k), _ = row
        return abs(octave(row_m) - octave(m)) + octaves_between(row_n, n) + octaves_between(row_k, padded(k))

    def octaves_between(a: int, b: int) -> float:
        return abs(math.log2(a) - math.log2(max(b, 1)))

    rows = (row for row in matmul_table(architecture) if (allows_tma(row[0][1]) if tma else not row[1].tma))
    return min(rows, key=distance)[1]


def padded(k: int) -> int:
    """Return an inner dimension as matmuls run it: in rows of whole 16 bytes, with zeros behind."""
    return -(-k // 16) * 16


@functools.cache
def matmul_table(architecture: str) -> tuple[tuple[tuple[int, int, int], MatmulConfig], ...]:
    """Return the rows ((M, N, K), config) in force for an architecture: the user's, then the shipped ones.

    A user's row replaces the shipped row of its bucket of M, N and K alone: tuning one shape must not decide them all.
    A row of another K than matmuls run is of a version that read such operands byte by byte, and is left aside.

    Warns (once per architecture and process) of a user's table that cannot be used, and of an architecture that no
    shipped table lists while the user has none either.

    Raises:
        ValueError: architecture is neither like ``"sm_90"`` nor like ``"gfx942"``.
    """
    name, shipped = shipped_table(architecture)
    user = _user_rows(architecture, tma=served(shipped, architecture).tma)
    if not user and architecture not in {name, *shipped.serves}:
        warnings.warn(
            f"torch_switchback has no tuning table for {architecture} and uses {name}'s; "
            "`torch-switchback tune` measures this GPU",
            stacklevel=2,
        )
    rows: dict[tuple[int, int, int], Row] = {}
    for row in (*user, *shipped.rows):
        if row.k == padded(row.k):
            rows.setdefault((octave(row.m), row.n, row.k), row)
    return tuple(((row.m, row.n, row.k), row.config) for row in rows.values())


def _user_rows(architecture: str, *, tma: bool) -> tuple[Row, ...]:
    path = user_table_path(architecture)
    try:
        rows = read(path).rows
        if not tma and any(row.config.tma for row in rows):
            raise ValueError(f"{architecture} runs no rows with tma")
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, ValueError) as error:
        warnings.warn(f"torch_switchback does not use the tuning table {path}: {error}", stacklevel=3)
        return ()
    return rows


def allows_tma(n: int) -> bool:
    """Return whether rows of n 16-bit outputs are multiples of 16 bytes, as TMA wants. Those of operands always are."""
    return n % 8 == 0


def octave(m: int) -> int:
    """Return log2 of the power of two that m is rounded up to."""
    return (max(m, 1) - 1).bit_length()
