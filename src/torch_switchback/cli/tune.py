"""``torch-switchback tune``: measure the GPU's INT8 matmuls and write its tuning table."""

import dataclasses
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer import Option

from .. import __version__
from .._text import table as text_table
from .._timing import reason_of
from ..tuning import MatmulConfig, MatmulShape, allows_tma, padded, user_table_path
from ..tuning._tables import Table, read, served, shipped_table, write
from ..tuning.candidates import candidates
from ..tuning.search import FINALISTS, Clock, Tuned, is_measured, tune_shape
from .common import JsonFlag, Shape, ShapesFlag, Steps, to_json

LAYERS = ((65536, 1280, 5120), (65536, 5120, 1280), (16384, 4096, 4096), (16384, 4096, 14336), (16384, 14336, 4096))
DEFAULT_SHAPES = (
    *(Shape(*layer) for layer in (*LAYERS, (8192, 8192, 8192))),
    *(Shape(out, tokens, inputs) for tokens, inputs, out in LAYERS),  # their int8 weight gradients
    *(Shape(tokens, 4096, out) for out in (4096, 14336) for tokens in (1, 16, 64, 256, 1024, 4096)),
    *(Shape(tokens, 4096, 4095) for tokens in (256, 16384)),  # outputs of an odd width, which TMA cannot store
)
HEADERS = ("M × N × K", "old tile", "new tile", "old TFLOP/s", "new TFLOP/s", "gain")


def tune(
    shape: ShapesFlag = None,
    quick: Annotated[bool, Option("--quick", help="Try about an eighth of the configurations.")] = False,
    output: Annotated[Path | None, Option(dir_okay=False, help="Write here, not where the library looks.")] = None,
    rounds: Annotated[int, Option(min=1, help="How often the best configurations of a shape are compared.")] = 20,
    fresh: Annotated[bool, Option("--fresh", help="Measure again what is measured already.")] = False,
    json: JsonFlag = False,
) -> None:
    """Measure which tiles make INT8 matmuls fastest on your GPU, and remember them.

    Without this, matmuls run with the tiles that the library ships for your GPU's architecture or the nearest lower
    one. With it, they run with the ones measured here: the table goes to your cache directory and wins from the next
    process on. Results stay the same bits, only the time changes. Nothing is ever tuned during training. A layer's
    output is TOKENS,IN,OUT, its input gradient TOKENS,OUT,IN. By default 25 shapes of common layers are tuned.

    Every configuration is timed once; the best few are then timed interleaved, and the one in force is kept unless
    another is 2 % faster. The first run compiles hundreds of kernels: allow some minutes, with nothing else on the
    GPU. Ctrl-C is safe: every finished shape is in the table, and the same command goes on after the last of them.
    CUDA_VISIBLE_DEVICES chooses the GPU, TORCH_SWITCHBACK_CACHE the directory.

    Examples:

    \b
      torch-switchback tune
      torch-switchback tune --quick --shape 8192,1024,4096
    """
    console = Console(stderr=json, highlight=False, markup=False, soft_wrap=True)
    gpu = Gpu()
    path = output or user_table_path(gpu.architecture)
    provenance = {**gpu.versions, "script": f"torch-switchback {__version__} tune{' --quick' if quick else ''}"}
    limits = served(shipped_table(gpu.architecture)[1], gpu.architecture)
    table = Table(serves={gpu.architecture: limits}, serves_unlisted=False, rows=())
    try:
        table = read(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        console.print(f"{path} will be replaced: {error}")
    as_run = (MatmulShape(each.tokens, each.out_features, padded(each.in_features)) for each in shape or DEFAULT_SHAPES)
    shapes = list(dict.fromkeys(as_run))
    measured = set() if fresh else {row.shape for row in table.rows if is_measured(row, provenance)}
    pending = [each for each in shapes if each not in measured]
    others = "; the others are measured, and --fresh measures them again" if measured else ""
    console.print(f"{provenance['gpu']}: {len(pending)} of {len(shapes)} shapes to measure{others}")

    finished: list[Tuned] = []
    with Steps() as steps:
        for number, each in enumerate(pending, 1):
            tries = tuple(candidates(gpu.architecture, m=each.m, tma=allows_tma(each.n), quick=quick))
            steps.begin(f"{number}/{len(pending)}  {each}", total=len(tries) + 1 + FINALISTS * rounds)
            search = partial(tune_shape, gpu.architecture, each, tries, rounds=rounds, advance=steps.advance_step)
            try:
                done = search(clock=gpu.clock(*each), provenance=provenance)
            except RuntimeError as error:  # out of memory, or a candidate broke the CUDA context
                steps.console.print(f"{each} is left out: {reason_of(error)}")
                continue
            finished.append(done)
            if done.note:
                steps.console.print(done.note[:300])
            rows = {row.shape: row for row in table.rows} | {each: done.row}
            table = dataclasses.replace(table, rows=tuple(rows.values()))
            write(path, table)

    if finished:
        changed = sum(not done.kept for done in finished)
        console.print(text_table(HEADERS, [_cells(done) for done in finished]))
        console.print(f"{changed} of {len(finished)} shapes changed; written to {path}")
    if json:
        typer.echo(to_json([dataclasses.asdict(done) for done in finished]))
    if steps.stopped or (pending and not finished):
        raise typer.Exit(130 if steps.stopped else 1)


class Gpu:
    """The current CUDA device. Needs one, and Triton."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} sees no CUDA GPU here: run it on the machine to be tuned")
        import triton

        from ..kernels.device import architecture

        smi = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        driver = re.match(r"\d[\d.]+", smi)
        self.architecture = architecture(torch.device("cuda", torch.cuda.current_device()))
        self.versions = {
            "gpu": torch.cuda.get_device_name(),
            "driver": f"HIP {torch.version.hip}" if torch.version.hip else driver[0] if driver else "unknown",
            "torch": str(torch.__version__),
            "triton": triton.__version__,
        }

    def clock(self, m: int, n: int, k: int) -> Clock:
        """Return the clock of a matmul [m, k] × [k, n] of random int8 values with bfloat16 output.

        do_bench clears the L2 cache in front of each launch: in training the operands come from memory too. Behind
        that the CPU overhead is hidden.
        """
        from triton.testing import do_bench

        from ..kernels.int8_matmul import plan_int8_matmul

        a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for rows in (m, n))
        absmax_a, absmax_b = torch.rand(m, device="cuda"), torch.rand(1, device="cuda")
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        args = (a, b.t(), absmax_a, absmax_b, None, out.dtype, out)

        def clock(config: MatmulConfig) -> float:
            run = plan_int8_matmul(*args, absmax_per_col=False, config=config)
            return do_bench(lambda: run(*args), warmup=1, rep=5, return_mode="median")  # milliseconds

        return clock


def _cells(done: Tuned) -> tuple[object, ...]:
    """Return what stands under HEADERS."""
    old = done.before_tflops and f"{done.before_tflops:,.1f}"
    gain = "" if done.kept or not done.before_tflops else f"{done.tflops / done.before_tflops - 1:+.1%}"
    new = "kept" if done.kept else _short(done.row.config)
    return done.row.shape, _short(done.before), new, old, f"{done.tflops:,.1f}", gain


def _short(config: MatmulConfig) -> str:
    """Return the kernel, tile M×N×K, group height, stages, warps and programs per SM."""
    kernel, block_m, block_n, block_k, *rest = dataclasses.astuple(config)
    return f"{kernel} {block_m}×{block_n}×{block_k} " + " ".join(map("".join, zip("gswp", map(str, rest), strict=True)))
