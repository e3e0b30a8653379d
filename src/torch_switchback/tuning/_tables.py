"""The tables' files: what is in one, where the user's lies, and which shipped one serves an architecture."""

import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

# Plain Triton on pointers and on TMA descriptors; Gluon, with warps that load and warps that multiply.
Kernel = Literal["pointer", "tma", "warp_specialized"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


@dataclass(frozen=True)
class MatmulConfig:
    """Tile configuration of an INT8 matmul. It changes the time, not the results.

    Raises:
        ValueError: kernel is none of the three, another field is no positive int, or a block or num_warps is no
            power of two; or warp_specialized with what its two warp groups cannot do.
    """

    kernel: Kernel  # the latter two where the output allows TMA
    block_m: int
    block_n: int
    block_k: int
    group_m: int  # block rows that run side by side, to reuse their operands in L2
    num_stages: int
    num_warps: int  # that multiply
    ctas_per_sm: int = 1  # of the persistent kernels

    @property
    def tma(self) -> bool:
        return self.kernel != "pointer"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "kernel":
                if value not in KERNELS:
                    raise ValueError(f"MatmulConfig: kernel must be one of {', '.join(KERNELS)}, got {value!r}")
            elif type(value) is not int or value < 1:
                raise ValueError(f"MatmulConfig: {name} must be a positive int, got {value!r}")
            elif (name.startswith("block_") or name == "num_warps") and value & (value - 1):
                raise ValueError(f"MatmulConfig: {name} must be a power of two, got {value}")
        if self.kernel == "warp_specialized" and (
            min(self.block_m, self.block_n) < 128 or self.num_warps != 8 or self.ctas_per_sm != 1
        ):
            raise ValueError(
                f"MatmulConfig: warp_specialized takes 8 warps, 1 program and tiles of 128 × 128 at least, got {self}"
            )


class MatmulShape(NamedTuple):
    """[m, k] × [k, n]."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return " × ".join(map(str, self))


@dataclass(frozen=True)
class Row:
    """The configuration for a matmul [m, k] × [k, n]."""

    m: int
    n: int
    k: int
    config: MatmulConfig
    provenance: str | Mapping[str, Any]  # measured: gpu, driver, torch, triton, script, date, tflops; else the reason

    def __post_init__(self) -> None:
        for name, value in (("m", self.m), ("n", self.n), ("k", self.k)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if not isinstance(self.provenance, str | dict):
            raise ValueError(f"provenance must be a text or an object, got {self.provenance!r}")

    @property
    def shape(self) -> MatmulShape:
        return MatmulShape(self.m, self.n, self.k)


@dataclass(frozen=True)
class Served:
    """Describes the hardware that the tiles of an architecture may rely on."""

    shared_memory_kib: int  # for one program
    tma: bool  # whether rows with tma run there; they rely on Hopper's wgmma and its shared memory


@dataclass(frozen=True)
class Table:
    """A table file."""

    serves: Mapping[str, Served]  # the architectures that the rows are meant for
    serves_unlisted: bool  # whether newer architectures that no table lists may use it
    rows: tuple[Row, ...]


def read(path: Path) -> Table:
    """Return the table in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no table.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return Table(
            serves={name: Served(**limits) for name, limits in content.get("serves", {}).items()},
            serves_unlisted=content.get("serves_unlisted", False),
            rows=tuple(
                Row(row["m"], row["n"], row["k"], MatmulConfig(**row["config"]), row["provenance"])
                for row in content["int8_matmul"]
            ),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it holds no table ({type(error).__name__}: {error})") from error


def write(path: Path, table: Table) -> None:
    """Write a table, three lines per row, so that a changed row is a short diff.

    The file is replaced at once: a reader finds the old table or the new one, also if the writer is killed.

    Raises:
        OSError: the file or its folder cannot be written.
    """
    serves = {name: dataclasses.asdict(limits) for name, limits in table.serves.items()}
    rows = ",\n".join(
        f'    {{\n      "m": {row.m}, "n": {row.n}, "k": {row.k},\n'
        f'      "config": {json.dumps(dataclasses.asdict(row.config))},\n'
        f'      "provenance": {json.dumps(row.provenance)}\n    }}'
        for row in table.rows
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(
        f'{{\n  "serves": {json.dumps(serves)},\n  "serves_unlisted": {json.dumps(table.serves_unlisted)},\n'
        f'  "int8_matmul": [\n{rows}\n  ]\n}}\n',
        encoding="utf-8",
    )
    os.replace(new, path)


def user_table_path(architecture: str) -> Path:
    """Return the user's table: in ``TORCH_SWITCHBACK_CACHE``, else in ``torch_switchback`` in the cache directory."""
    folder = os.environ.get("TORCH_SWITCHBACK_CACHE")
    if not folder:
        if sys.platform == "win32":
            cache = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
        else:
            cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(cache, "torch_switchback")
    return Path(folder, f"{architecture}.json")


@functools.cache
def shipped_tables() -> Mapping[str, Table]:
    """Return every shipped table by its file's name, in the order of names."""
    return {path.stem: read(path) for path in sorted(Path(__file__).parent.glob("*[0-9].json"))}


def shipped_table(architecture: str) -> tuple[str, Table]:
    """Return the name and the table for an architecture.

    It is the table of that name, or the one that lists it, or of those that serve unlisted architectures the nearest
    lower one (the lowest, if all are higher).

    Raises:
        ValueError: architecture is neither like ``"sm_90"`` nor like ``"gfx942"``.
    """
    tables = shipped_tables()
    if architecture in tables:
        return architecture, tables[architecture]
    for name, table in tables.items():
        if architecture in table.serves:
            return name, table
    name = nearest(architecture, (name for name, table in tables.items() if table.serves_unlisted))
    return name, tables[name]


def nearest(architecture: str, names: Iterable[str]) -> str:
    """Return the name of the same family that is nearest below an architecture, or its lowest if all are above.

    Raises:
        ValueError: architecture is neither like ``"sm_90"`` nor like ``"gfx942"``.
    """
    family, generation = _generation(architecture)
    known = sorted((_generation(name)[1], name) for name in names if _generation(name)[0] == family)
    lower = [each for each in known if each[0] <= generation]
    return (lower[-1] if lower else known[0])[1]


def served(table: Table, architecture: str) -> Served:
    """Return what an architecture offers: the least of those listed, if the table does not list it."""
    if architecture in table.serves:
        return table.serves[architecture]
    return Served(min(listed.shared_memory_kib for listed in table.serves.values()), tma=False)


def _generation(architecture: str) -> tuple[str, int]:
    """Return family and number: "sm_90" → ("sm_", 0x90), "gfx90a" → ("gfx", 0x90a). As hexadecimal both sort by age."""
    match = re.fullmatch(r"(sm_|gfx)([0-9a-f]+)", architecture)
    if not match:
        raise ValueError(f"architecture must be like 'sm_90' or 'gfx942', got {architecture!r}")
    return match[1], int(match[2], 16)
