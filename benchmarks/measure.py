"""The command line and the tables that the benchmarks share. The timing is torch_switchback._timing's."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import results_file
from results_file import Record
from torch_switchback._timing import (
    MIN_ROUNDS,
    SHORT_MS,
    SUSTAINED_MS,
    Candidate,
    Cycle,
    Mode,
    compare,
    copies,
    free_memory,
    reason_of,
    speed_up,
)

__all__ = [  # what the benchmarks take from here; the timing is the package's
    "MIN_ROUNDS",
    "RESULTS",
    "SHORT_MS",
    "SKIPPED",
    "SPEED_UP",
    "SUSTAINED_MS",
    "Bench",
    "Candidate",
    "Columns",
    "Cycle",
    "Mode",
    "compare",
    "copies",
    "copy_gb_per_s",
    "find",
    "free_memory",
    "print_table",
    "ratio",
    "reason_of",
    "run",
    "speed_up",
]

Columns = dict[str, tuple[str, str]]  # by key of a record: header and format

RESULTS = Path(__file__).parent / "results"
NO_TIME = "no time was left (--budget)"
SKIPPED = f"Skipped: {NO_TIME}"  # the reason of a candidate that raised Skipped
SPEED_UP: Columns = {
    "speed_up": ("over nn.Linear", "{:.2f} ×"),
    "speed_up_p10": ("10th", "{:.2f}"),
    "speed_up_p90": ("90th percentile", "{:.2f}"),
}


def find(records: Iterable[Record], **wanted: object) -> Record | None:
    """Return the first record with these values that has a time, or None."""
    for record in records:
        if record.get("median_ms") is not None and all(record.get(key) == value for key, value in wanted.items()):
            return record
    return None


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient, or None if either is missing."""
    return None if numerator is None or denominator is None else numerator / denominator


def copy_gb_per_s(device: torch.device) -> float | None:
    """Return the bandwidth of a copy of 1 GiB, read and written, in GB/s."""
    if device.type == "cpu":
        return None
    from triton.testing import do_bench

    source = torch.empty(2**29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


class Skipped(Exception):
    """A candidate is not built, as the time for its case is over."""


class Bench:
    """Says where to measure and how long, to a benchmark's function for one case."""

    def __init__(self, device: str, seconds: float, tiny: bool, options: argparse.Namespace | None = None) -> None:
        self.device, self.tiny, self.options = torch.device(device), tiny, options
        self.seconds, self.deadline = seconds, math.inf
        torch.manual_seed(0)
        if device == "cuda":
            # cuBLAS keeps the workspace of its first matmul, which must not count as the first candidate's memory.
            warm_up = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
            warm_up @ warm_up

    def compare(self, candidates: Iterable[Candidate], **labels: object) -> list[Record]:
        """Call :func:`compare`, put these labels in front of each record, and free what was compiled."""
        in_time = (candidate._replace(build=partial(self.build_in_time, candidate)) for candidate in candidates)
        found = compare(in_time, seconds=self.seconds, device=self.device)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        free_memory(self.device)
        return [labels | record for record in found]

    def build_in_time(self, candidate: Candidate) -> Cycle:
        """Build a candidate, unless the deadline is over."""
        if time.monotonic() > self.deadline:
            raise Skipped(NO_TIME)
        return candidate.build()


def run(
    script: str,
    measure: Callable[[Bench, Any], list[Record]],
    *,
    cases: Sequence[Any],
    tiny: Sequence[Any],
    columns: Columns,
    seconds: float,
    budget: float = math.inf,
    only_cpu: bool = False,
    options: argparse.ArgumentParser | None = None,
    libraries: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Measure every case, print a table of each, and write the results after each.

    Args:
        measure: returns the records of one case.
        tiny: the cases of --tiny, which runs on the CPU.
        columns: what the tables show.
        seconds: of measurement for each comparison, unless --seconds says otherwise.
        budget: seconds for the whole run, unless --budget says otherwise. Cases share it equally.
        options: further options of the script, which ``bench.options`` has when measure is called.
        libraries: whose versions the results file names, beside those of every script.
    """
    description = sys.modules[measure.__module__].__doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=description, parents=[] if options is None else [options])
    parser.add_argument("--seconds", type=float, default=seconds, help="of measurement per comparison (%(default)s)")
    parser.add_argument("--budget", type=float, default=budget, help="seconds in all; what is left out is skipped")
    parser.add_argument("--only", nargs="+", default=[""], help="cases that contain one of these, such as 4096 or ViT")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU; shows only that the script runs")
    parser.add_argument("--output", type=Path, help=f"by default benchmarks/results/<device>/{script}.json")
    arguments = parser.parse_args(argv)
    if not (arguments.tiny or only_cpu or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --tiny runs on the CPU")
    device = "cpu" if arguments.tiny or only_cpu else "cuda"
    bench = Bench(device, 0.0 if arguments.tiny else arguments.seconds, arguments.tiny, arguments)
    source = results_file.provenance(device) | {library: results_file.installed(library) for library in libraries}
    path = arguments.output
    if path is None and not arguments.tiny:
        path = RESULTS / results_file.folder(source) / f"{script}.json"

    end = time.monotonic() + arguments.budget
    chosen = [case for case in (tiny if arguments.tiny else cases) if any(part in str(case) for part in arguments.only)]
    results: list[Record] = []
    for done, case in enumerate(chosen):
        now = time.monotonic()
        bench.deadline = now + (end - now) / (len(chosen) - done) - bench.seconds
        records = measure(bench, case)
        print_table(str(case), columns, records)
        results += [{key: value for key, value in record.items() if key != "turns"} for record in records]
        if path is not None:
            results_file.save(path, source, results)
    if path is not None:
        print(f"wrote {path}")
    failed = [record for record in results if record.get("reason") not in (None, SKIPPED)]
    for record in failed:
        print(f"no result for {record['name']}: {record['reason']}")
    if not all(is_other_library(record["name"]) for record in failed):
        sys.exit(1)


def is_other_library(name: str) -> bool:
    """Return whether a candidate is another library's, which may be missing or fail."""
    return name.startswith("torch")


def print_table(title: str, columns: Columns, records: Iterable[Record]) -> None:
    """Print these columns of some records; a dash stands for what a record lacks."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    for header, form in columns.values():
        table.add_column(header, justify="left" if form == "{}" else "right", no_wrap=True)
    for record in records:
        values = ((record.get(key), form) for key, (_, form) in columns.items())
        table.add_row(*("–" if value is None else form.format(value) for value, form in values))
    console = Console()
    console.width = console.width if console.is_terminal else 200
    console.print(table)
