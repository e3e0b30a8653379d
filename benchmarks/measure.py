"""Interleaved timing of candidates, and the command line that the benchmarks share.

Power and clocks move results by 15 % between runs. Candidates are therefore measured interleaved,
in one process and in another order each round, and only their ratios carry over to another machine.
A speed-up is the median of the ratios of the rounds.
"""

import argparse
import gc
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import results_file
from results_file import Record

Cycle = Sequence[Callable[[], object]]  # calls of one candidate, each on its own inputs, made one after the other
Mode = Literal["eager", "compiled", "reduce-overhead", "graph"]
Columns = dict[str, tuple[str, str]]  # by key of a record: header and format

RESULTS = Path(__file__).parent / "results"
SHORT_MS = 10.0  # a turn long enough that launch overhead and clock ticks vanish
SUSTAINED_MS = 120.0  # a turn long enough that the power limit sets the clocks, as in training
WARM_UP_ROUNDS = 2  # not counted: clocks and temperature settle
MIN_ROUNDS = 5
SKIPPED = "skipped: no time was left (--budget)"
SPEED_UP: Columns = {
    "speed_up": ("over nn.Linear", "{:.2f} ×"),
    "speed_up_p10": ("10th", "{:.2f}"),
    "speed_up_p90": ("90th percentile", "{:.2f}"),
}


class Candidate(NamedTuple):
    """One candidate of a comparison."""

    name: str
    build: Callable[[], Cycle]  # an exception is recorded as the candidate's result
    mode: Mode = "eager"  # "graph" captures the whole cycle in one CUDA graph; build sees to the other modes
    turn_ms: float = SHORT_MS  # in each round the call is repeated until it takes this long


class Runner:
    """A candidate that is built and warm, and its record."""

    def __init__(self, candidate: Candidate, record: Record, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.record = record
        self.turns: list[float] = []  # milliseconds per call
        allocated = torch.cuda.memory_allocated() if self.is_cuda else 0
        cycle = candidate.build()
        self.calls: Iterator[Callable[[], object]] = itertools.cycle(cycle)
        self.calls_in_one = 1
        for call in cycle:
            call()
        if self.is_cuda and candidate.mode == "graph":
            self.capture(cycle)
        elif self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            next(self.calls)()
            torch.cuda.synchronize()
            self.record["peak_bytes"] = torch.cuda.max_memory_allocated() - allocated  # above the shared inputs
        once_ms = self.time(1)
        if once_ms < candidate.turn_ms:
            once_ms = self.time(5) / 5
        self.repeats = max(1, math.ceil(candidate.turn_ms / once_ms)) if self.is_cuda else 1
        self.turn_ms = once_ms * self.repeats

    def capture(self, cycle: Cycle) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in [*cycle] * 3:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # The outputs are kept so that each call writes other memory, the calls because they hold the inputs.
            self.kept = cycle, [call() for call in cycle]
        self.calls, self.calls_in_one = itertools.repeat(graph.replay), len(cycle)

    def time(self, repeats: int) -> float:
        """Return the milliseconds of so many calls in a row."""
        if not self.is_cuda:
            begin = time.perf_counter()
            for call in itertools.islice(self.calls, repeats):
                call()
            return (time.perf_counter() - begin) * 1e3
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if repeats > 1:  # a call in front keeps the GPU busy while the CPU issues the timed ones
            next(self.calls)()
        start.record()
        for call in itertools.islice(self.calls, repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def take_turn(self) -> None:
        if "reason" not in self.record:
            try:
                self.turns.append(self.time(self.repeats) / (self.repeats * self.calls_in_one))
            except Exception as error:
                self.record["reason"] = reason_of(error)

    def finish(self) -> None:
        if "reason" not in self.record:
            turns = self.record["turns"] = self.turns[WARM_UP_ROUNDS:]
            tenths = statistics.quantiles(turns, n=10, method="inclusive")
            self.record |= {"median_ms": statistics.median(turns), "p10_ms": tenths[0], "p90_ms": tenths[-1]}
            self.record["rounds"] = len(turns)


def compare(candidates: Iterable[Candidate], *, seconds: float, device: torch.device, deadline: float) -> list[Record]:
    """Time candidates interleaved for about so many seconds, after building and warming up each.

    A candidate that raises, or that would be built after the deadline (of time.monotonic()), gets a
    record with the reason. ``turns`` has the time of a call in each round.
    """
    runners: list[Runner] = []
    records: list[Record] = []
    for candidate in candidates:
        free_memory(device)
        records.append({"name": candidate.name, "mode": candidate.mode})
        if time.monotonic() > deadline:
            records[-1]["reason"] = SKIPPED
            continue
        try:
            runners.append(Runner(candidate, records[-1], device))
        except Exception as error:  # another library can fail in any way
            records[-1]["reason"] = reason_of(error)
    # Python's garbage collector must not walk over all of these models; a training run has one.
    gc.collect()
    gc.freeze()
    round_ms = sum(runner.turn_ms for runner in runners) or 1.0
    shuffle, order = random.Random(0).shuffle, runners.copy()
    for _ in range(WARM_UP_ROUNDS + max(MIN_ROUNDS, int(seconds * 1e3 / round_ms))):
        shuffle(order)  # a turn starts with the clocks that the turn before it left
        for runner in order:
            runner.take_turn()
    gc.unfreeze()
    for runner in runners:
        runner.finish()
    runner = order = runners = None  # nothing may keep the memory of the models
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    free_memory(device)
    return records


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def find(records: Iterable[Record], **wanted: object) -> Record | None:
    """Return the first record with these values that has a time, or None."""
    for record in records:
        if record.get("median_ms") is not None and all(record.get(key) == value for key, value in wanted.items()):
            return record
    return None


def speed_up(record: Record, over: Record | None) -> Record:
    """Return the speed-up of a candidate over another: median and spread over the rounds."""
    if over is None or "turns" not in record:
        return {}
    ratios = [theirs / ours for theirs, ours in zip(over["turns"], record["turns"], strict=True)]
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return {"speed_up": statistics.median(ratios), "speed_up_p10": tenths[0], "speed_up_p90": tenths[-1]}


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient, or None if either is missing."""
    return None if numerator is None or denominator is None else numerator / denominator


def copies(set_bytes: int, device: torch.device) -> int:
    """Return how many sets of inputs of so many bytes exceed twice the L2 cache together."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return 1 + 2 * l2_bytes // set_bytes


def copy_gb_per_s(device: torch.device) -> float | None:
    """Return the bandwidth of a copy of 1 GiB, read and written, in GB/s."""
    if device.type == "cpu":
        return None
    from triton.testing import do_bench

    source = torch.empty(2**29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


class Bench:
    """What a benchmark's function for one case gets: where to measure, and how long."""

    def __init__(self, device: str, seconds: float, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.seconds, self.deadline = seconds, math.inf
        torch.manual_seed(0)
        if device == "cuda":
            # cuBLAS keeps the workspace of its first matmul, which must not count as the first candidate's memory.
            warm_up = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
            warm_up @ warm_up

    def compare(self, candidates: Iterable[Candidate], **labels: object) -> list[Record]:
        """Call :func:`compare` and put these labels in front of each record."""
        found = compare(candidates, seconds=self.seconds, device=self.device, deadline=self.deadline)
        return [labels | record for record in found]


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
    argv: Sequence[str] | None = None,
) -> None:
    """Measure every case, print a table of each, and write the results after each.

    Args:
        measure: returns the records of one case.
        tiny: the cases of --tiny, which runs on the CPU.
        columns: what the tables show.
        seconds: of measurement for each comparison, unless --seconds says otherwise.
        budget: seconds for the whole run, unless --budget says otherwise. Cases share it equally.
    """
    parser = argparse.ArgumentParser(description=sys.modules[measure.__module__].__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=seconds, help="of measurement per comparison (%(default)s)")
    parser.add_argument("--budget", type=float, default=budget, help="seconds in all; what is left out is skipped")
    parser.add_argument("--only", default="", help="cases that contain this, such as 4096 or ViT")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU; shows only that the script runs")
    parser.add_argument("--output", type=Path, help=f"by default benchmarks/results/<device>/{script}.json")
    arguments = parser.parse_args(argv)
    if not (arguments.tiny or only_cpu or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --tiny runs on the CPU")
    device = "cpu" if arguments.tiny or only_cpu else "cuda"
    bench = Bench(device, 0.0 if arguments.tiny else arguments.seconds, arguments.tiny)
    source = results_file.provenance(device)
    path = arguments.output
    if path is None and not arguments.tiny:
        path = RESULTS / results_file.folder(source) / f"{script}.json"

    end = time.monotonic() + arguments.budget
    chosen = [case for case in (tiny if arguments.tiny else cases) if arguments.only in str(case)]
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
