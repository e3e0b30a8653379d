"""``torch-switchback tune``: measure the GPU's INT8 products and write its tuning table."""

import dataclasses
import datetime
import functools
import json as json_module
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from .. import __version__
from ..tuning import MatmulConfig, ProductShape, allows_tma, matmul_config, padded, user_table_path
from ..tuning._tables import Row, Table, read, replace, row_from_json, served, shipped_table, write
from ..tuning.candidates import candidates
from ..tuning.search import FINALISTS, Found, fastest
from .common import JsonFlag, parse_shapes, stop
from .gpu import Gpu, NoGpu

open_gpu = Gpu

# A layer's tokens, in_features and out_features are M, K and N; of an int8 weight gradient K, N and M. Then batches of
# inference and small training steps.
DEFAULT_SHAPES = (
    ProductShape(65536, 5120, 1280),
    ProductShape(65536, 1280, 5120),
    ProductShape(16384, 4096, 4096),
    ProductShape(16384, 14336, 4096),
    ProductShape(16384, 4096, 14336),
    ProductShape(8192, 8192, 8192),
    ProductShape(5120, 1280, 65536),
    ProductShape(1280, 5120, 65536),
    ProductShape(4096, 4096, 16384),
    ProductShape(14336, 4096, 16384),
    ProductShape(4096, 14336, 16384),
    *(ProductShape(m, n, 4096) for n in (4096, 14336) for m in (1, 16, 64, 256, 1024, 4096)),
    # Outputs of an odd width, which TMA cannot store.
    ProductShape(256, 4095, 4096),
    ProductShape(16384, 4095, 4096),
)


@dataclass(frozen=True)
class Finished:
    """A shape's measurement: the row it gives, and what was in force before it."""

    row: Row
    before: MatmulConfig
    before_tflops: float | None  # None: it did not run


def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="M,N,K",
            help="Tune the product [M, K] × [K, N]. For a layer M is the tokens of a step, N its out_features and "
            "K its in_features. Repeatable; by default 25 shapes of common layers, from 1 to 65536 tokens.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Try about an eighth of the configurations.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Write here instead of where the library looks: <architecture>.json in your cache directory.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often the best configurations of a shape are compared.")] = 20,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is measured already.")] = False,
    json: JsonFlag = False,
) -> None:
    """Measure which tiles make INT8 products fastest on your GPU, and remember them.

    Without this, products run with the tiles that the library ships for your GPU's architecture or the nearest lower
    one. With it, they run with the ones measured here: the table goes to your cache directory and wins from the next
    process on. Results stay the same bits, only the time changes. Nothing is ever tuned during training.

    Every configuration is timed once; the best few are then timed in turn, and the one in force is kept unless another
    is 2 % faster. The first run compiles hundreds of kernels: allow some minutes, with nothing else on the GPU. Ctrl-C
    is safe: the same command goes on after the last finished shape. CUDA_VISIBLE_DEVICES chooses the GPU,
    TORCH_SWITCHBACK_CACHE the directory.

    Examples:

    \b
      torch-switchback tune
      torch-switchback tune --quick --shape 8192,4096,1024
    """
    console = Console(stderr=json)
    asked = parse_shapes(shape, "M,N,K", ProductShape) if shape else DEFAULT_SHAPES
    shapes = tuple(dict.fromkeys(each._replace(k=padded(each.k)) for each in asked))  # as products run
    try:
        gpu = open_gpu()
    except NoGpu as error:
        stop("tune", error)
    path = output or user_table_path(gpu.architecture)
    partial = path.with_name(path.name + ".partial")
    provenance = {**gpu.versions, "script": f"torch-switchback {__version__} tune{' --quick' if quick else ''}"}

    table = _read_table(path, gpu.architecture, console)
    finished = {} if fresh else {done.row.shape: done for done in _read_partial(partial) if _same(done.row, provenance)}
    measured = set() if fresh else {row.shape for row in table.rows if _same(row, provenance)}
    pending = [shape for shape in shapes if shape not in finished and shape not in measured]
    console.print(f"{provenance['gpu']}: {len(pending)} of {len(shapes)} shapes to measure", highlight=False)
    if len(pending) < len(shapes):
        console.print("The others are measured, with the same versions; --fresh measures them again.")
    if not pending and not finished:
        if json:
            typer.echo("[]")
        return

    tries = {
        shape: tuple(candidates(gpu.architecture, m=shape.m, tma=allows_tma(shape.n), quick=quick)) for shape in pending
    }
    left_out: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            for number, shape_ in enumerate(pending, 1):
                total = len(tries[shape_]) + 1 + FINALISTS * rounds
                task = progress.add_task(f"{number}/{len(pending)}  {shape_}", total=total)
                try:
                    done, found = _measure(
                        gpu, shape_, tries[shape_], provenance, rounds, functools.partial(progress.advance, task)
                    )
                except RuntimeError as error:  # out of memory, or a candidate broke the CUDA context
                    left_out.append(f"{shape_} is left out: {error}")
                    continue
                if found.skipped:
                    left_out.append(f"{shape_}: {found.skipped} candidates did not run, as {found.reason}")
                progress.update(task, completed=total)
                finished[shape_] = done
                _write_partial(partial, finished.values())
    except KeyboardInterrupt:
        console.print(f"Stopped; {len(finished)} finished shapes are kept and the same command goes on from there.")
        raise typer.Exit(130) from None

    for line in left_out:
        console.print(line[:300], highlight=False, markup=False)
    if not finished:
        raise typer.Exit(1)
    rows = {row.shape: row for row in table.rows} | {shape: done.row for shape, done in finished.items()}
    write(path, dataclasses.replace(table, rows=tuple(rows.values())))
    partial.unlink(missing_ok=True)
    console.print(what_changed(finished.values()))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    if json:
        typer.echo(json_module.dumps([dataclasses.asdict(done) for done in finished.values()], indent=1))


def _measure(
    gpu: Gpu,
    shape: ProductShape,
    tries: tuple[MatmulConfig, ...],
    provenance: Mapping[str, Any],
    rounds: int,
    advance: Callable[[], object],
) -> tuple[Finished, Found]:
    before = matmul_config(gpu.architecture, *shape, tma=allows_tma(shape.n))
    found = fastest(tries, before, gpu.clock(*shape), rounds=rounds, advance=advance)
    measured = {"date": datetime.date.today().isoformat(), "tflops": _tflops(shape, found.milliseconds)}
    before_tflops = None if found.before is None else _tflops(shape, found.before)
    return Finished(Row(*shape, found.config, {**provenance, **measured}), before, before_tflops), found


def what_changed(finished: Iterable[Finished]) -> RichTable:
    """The shapes with their configurations and TFLOP/s, before and now."""
    table = RichTable("M × N × K", "old", "new", box=box.SIMPLE)
    for title in ("old TFLOP/s", "new TFLOP/s", "gain"):
        table.add_column(title, justify="right")
    changed = 0
    for done in finished:
        assert not isinstance(done.row.provenance, str)
        old, new = done.before_tflops, done.row.provenance["tflops"]
        kept = done.row.config == done.before
        changed += not kept
        table.add_row(
            str(done.row.shape),
            _short(done.before),
            "kept" if kept else _short(done.row.config),
            "did not run" if old is None else f"{old:,.1f}",
            f"{new:,.1f}",
            "" if kept or old is None else f"{new / old - 1:+.1%}",
        )
    table.caption = (
        f"{changed} of {table.row_count} shapes changed. Tiles M×N×K, group height, stages, warps, programs."
    )
    return table


def _short(config: MatmulConfig) -> str:
    return (
        f"{config.kernel} {config.block_m}×{config.block_n}×{config.block_k} g{config.group_m} "
        f"s{config.num_stages} w{config.num_warps} p{config.ctas_per_sm}"
    )


def _tflops(shape: ProductShape, milliseconds: float) -> float:
    return float(f"{2 * shape.m * shape.n * shape.k / milliseconds / 1e9:.4g}")


def _same(row: Row, provenance: Mapping[str, Any]) -> bool:
    """Whether a row was measured by this script on this GPU with these versions."""
    return not isinstance(row.provenance, str) and provenance.items() <= row.provenance.items()


def _read_table(path: Path, architecture: str, console: Console) -> Table:
    """The table to add rows to: what lies at path, or an empty one that could be shipped as it is."""
    try:
        return read(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        console.print(f"{path} will be replaced: {error}", highlight=False, markup=False, soft_wrap=True)
    limits = served(shipped_table(architecture)[1], architecture)
    return Table(serves={architecture: limits}, serves_unlisted=False, rows=())


def _read_partial(path: Path) -> list[Finished]:
    """What an interrupted run had finished; nothing if its file cannot be used."""
    try:
        return [
            Finished(row_from_json(done["row"]), MatmulConfig(**done["before"]), done["before_tflops"])
            for done in json_module.loads(path.read_text(encoding="utf-8"))
        ]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return []


def _write_partial(path: Path, finished: Iterable[Finished]) -> None:
    replace(path, json_module.dumps([dataclasses.asdict(done) for done in finished], indent=1))
