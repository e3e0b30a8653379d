"""Timing, memory, provenance and the flags that all benchmarks share.

Power and clocks move results by 15 % between runs, so competitors are measured in turns, in one process, and only their
ratios carry over to another machine; a turn feels the clocks that the one before it left, so each round takes them in
another order. A speed-up is the median of the ratios in each round.
"""

import gc
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from demo import environment

Cycle = Sequence[Callable[[], object]]  # calls of one competitor, each on its own inputs, to be made in turn
Mode = Literal["eager", "one thread", "compiled", "reduce-overhead", "graphed", "graph", "host"]
Record = dict[str, Any]  # a Measured as the JSON has it, with labels

SAMPLE_MS = 10.0  # long enough that launching and clock ticks vanish
SUSTAINED_MS = 120.0  # long enough that the power limit sets the clocks, as in training
WARM_UP_ROUNDS = 2  # not counted: clocks and temperature settle
MIN_ROUNDS = 5
SKIPPED = "skipped: no time was left for it (--budget)"

DeviceFlag = Annotated[str, typer.Option("--device", help="cuda or cpu; cpu needs --tiny")]
SecondsFlag = Annotated[float, typer.Option("--seconds", min=0.0, help="of measurement for each comparison")]
BudgetFlag = Annotated[
    float, typer.Option("--budget", min=0.0, help="about so many seconds in all; competitors not reached are skipped")
]
QuickFlag = Annotated[bool, typer.Option("--quick", help="a third of the shapes, a quarter of the time for each")]
TinyFlag = Annotated[bool, typer.Option("--tiny", help="toy shapes: says only whether everything runs")]
OutputFlag = Annotated[
    Path | None,
    typer.Option("--output", dir_okay=False, help="by default benchmarks/results/GPU/SCRIPT.json; none if --tiny"),
]


def new_app() -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Contestant:
    """One competitor of a comparison."""

    name: str
    build: Callable[[], Cycle]  # may raise: then that is the competitor's result
    mode: Mode = "eager"
    """"graph" captures the whole cycle in one CUDA graph; "compiled", "reduce-overhead", "one thread" (eager, but the
    backward in the forward's thread) and "graphed" (PyTorch's graphed callables, a CUDA graph each for the forward and
    the backward of an eager step) are up to build; of "host" calls the time counts that the host takes to issue them.
    """
    sample_ms: float = SAMPLE_MS
    """A turn repeats the call until it takes this long. Clocks settle under a call within SUSTAINED_MS or so."""


@dataclass
class Measured:
    """A competitor's result: milliseconds a call, or why there is none."""

    name: str
    mode: Mode
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    rounds: int = 0
    calls_per_round: int = 0
    peak_bytes: int | None = None  # CUDA memory of competitor and call at its highest, above the shared inputs
    reason: str | None = None
    samples_ms: list[float] = field(default_factory=list)  # a call's, by round, in the order of the rounds


class _Runner:
    """A competitor, built and warm."""

    def __init__(self, contestant: Contestant, device: torch.device) -> None:
        self.device = device
        self.result = Measured(contestant.name, contestant.mode)
        self._by_device = device.type == "cuda" and contestant.mode != "host"
        allocated = _allocated(device)
        cycle = contestant.build()
        self._calls: Iterator[Callable[[], object]] = itertools.cycle(cycle)
        self._calls_in_one = 1  # a replayed graph makes the whole cycle's
        for call in cycle:
            call()
        if contestant.mode == "graph" and device.type == "cuda":
            self._capture(cycle)
        else:
            self._measure_peak(allocated)
        rehearsal_ms = self._time(1)
        if rehearsal_ms < contestant.sample_ms:
            rehearsal_ms = self._time(5) / 5
        self._repeats = max(1, math.ceil(contestant.sample_ms / rehearsal_ms)) if device.type == "cuda" else 1
        self.result.calls_per_round = self._repeats * self._calls_in_one
        self.sample_ms = rehearsal_ms * self._repeats

    def _capture(self, cycle: Cycle) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                for call in cycle:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Kept, so that the calls write different memory too; and the calls, which hold what the graph reads.
            self._graphed = cycle, [call() for call in cycle]
        self._calls = itertools.repeat(graph.replay)
        self._calls_in_one = len(cycle)

    def _measure_peak(self, allocated: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            next(self._calls)()
            torch.cuda.synchronize()
            self.result.peak_bytes = torch.cuda.max_memory_allocated() - allocated

    def _time(self, repeats: int) -> float:
        """Milliseconds of so many calls in a row.

        A call before them keeps the device busy meanwhile, so that calls are timed as in a long row of them: by
        the device if the host can run ahead of it, else by the host.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self._by_device:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if repeats > 1:  # one long call does not feel its launch
                next(self._calls)()
            start.record()
            for call in itertools.islice(self._calls, repeats):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        begun = time.perf_counter()
        for call in itertools.islice(self._calls, repeats):
            call()
        return (time.perf_counter() - begun) * 1e3

    def sample(self) -> None:
        self.result.samples_ms.append(self._time(self._repeats) / self.result.calls_per_round)

    def finish(self) -> None:
        samples = self.result.samples_ms = self.result.samples_ms[WARM_UP_ROUNDS:]
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        self.result.median_ms, self.result.rounds = statistics.median(samples), len(samples)
        self.result.p10_ms, self.result.p90_ms = tenths[0], tenths[-1]


def compare(
    contestants: Iterable[Contestant],
    *,
    seconds: float,
    device: torch.device,
    deadline: float = math.inf,
) -> list[Measured]:
    """Time competitors in turns for about so many seconds, after building and warming up each.

    Medians over the rounds, with the 10th and 90th percentile as spread. A competitor that raises, or whose turn to be
    built comes after the deadline (of time.monotonic()), is a result with the reason in it.
    """
    runners: list[_Runner] = []
    results: list[Measured] = []
    for contestant in contestants:
        _free_memory(device)
        if time.monotonic() > deadline:
            results.append(Measured(contestant.name, contestant.mode, reason=SKIPPED))
            continue
        try:
            runners.append(_Runner(contestant, device))
            results.append(runners[-1].result)
        except Exception as error:  # a peer can fail in any way
            results.append(Measured(contestant.name, contestant.mode, reason=reason_of(error)))
    # Of a training run's one model Python's garbage collector finds less to walk over than all of these left.
    gc.collect()
    gc.freeze()
    a_round_ms = sum(runner.sample_ms for runner in runners)
    rounds = max(MIN_ROUNDS, int(seconds * 1e3 / a_round_ms)) if runners else 0
    shuffle = random.Random(0).shuffle
    order = list(range(len(runners)))
    for _ in range(WARM_UP_ROUNDS + rounds):
        shuffle(order)
        for index in order:  # not by a name that would outlive the loop and keep the last one's memory
            _sample(runners[index])
    gc.unfreeze()
    while runners:
        if runners[-1].result.reason is None:
            runners[-1].finish()
        runners.pop()
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        torch.compiler.reset()
    _free_memory(device)
    return results


def _sample(runner: _Runner) -> None:
    if runner.result.reason is None:
        try:
            runner.sample()
        except Exception as error:
            runner.result.reason = reason_of(error)


def reason_of(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median_ms(records: Iterable[Record], name: str, mode: Mode = "eager") -> float | None:
    """A competitor's milliseconds a call; None if it has none."""
    return next((record["median_ms"] for record in records if (record["name"], record["mode"]) == (name, mode)), None)


def find(records: Iterable[Record], **wanted: object) -> Record | None:
    """The record with these values, if it has a time."""
    for record in records:
        if record["median_ms"] is not None and all(record.get(key) == value for key, value in wanted.items()):
            return record
    return None


def speed_up(record: Record, over: Record | None) -> Record:
    """How many times as fast as another competitor of the same comparison: median and spread over the rounds."""
    if over is None or None in (record["median_ms"], over["median_ms"]):
        return {"speed_up": None, "speed_up_p10": None, "speed_up_p90": None}
    ratios = [theirs / ours for theirs, ours in zip(over["samples_ms"], record["samples_ms"], strict=True)]
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return {"speed_up": statistics.median(ratios), "speed_up_p10": tenths[0], "speed_up_p90": tenths[-1]}


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None if either is missing."""
    return None if numerator is None or denominator is None else numerator / denominator


def copies(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs of so many bytes to cycle through so that together they exceed twice the L2 cache."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return 1 + 2 * l2_bytes // set_bytes


def copy_gb_per_s(device: torch.device, *, tiny: bool) -> float:
    """Bandwidth of a large device-to-device copy, read + written, in 1e9 bytes a second: the ceiling of any kernel."""
    source = torch.randn(2**16 if tiny else 2**29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    (result,) = compare([Contestant("copy", lambda: [lambda: target.copy_(source)])], seconds=0.5, device=device)
    if result.median_ms is None:
        raise RuntimeError(f"the copy that measures the bandwidth failed: {result.reason}")
    return 2 * source.nbytes / result.median_ms / 1e6


class Bench:
    """One run of one script: its flags, its results, and where they go."""

    def __init__(
        self,
        script: str,
        *,
        device: str,
        seconds: float,
        tiny: bool,
        output: Path | None,
        quick: bool = False,
        budget: float = math.inf,
        for_cpu: bool = False,
        **settings: object,
    ) -> None:
        if device not in ("cuda", "cpu"):
            raise typer.BadParameter(f"device must be cuda or cpu, got {device!r}")
        if device == "cpu" and not (tiny or for_cpu):
            raise typer.BadParameter("on the CPU only toy shapes finish; add --tiny")
        if device == "cuda" and not torch.cuda.is_available():
            raise typer.BadParameter("there is no CUDA device; --device cpu --tiny tries the script on the CPU")
        self.device = torch.device(device)
        self.quick, self.tiny = quick, tiny
        self.seconds = 0.0 if tiny else seconds / 4 if quick else seconds
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = 140
        self.results: list[Record] = []
        self._extra: Record = {}
        self._begun = time.monotonic()
        self._end, self._deadline = self._begun + budget, math.inf
        self._provenance = environment(self.device) | {
            "torchao": _torchao_version(),
            "script": f"benchmarks/{script}.py",
            "arguments": {
                "device": device,
                "seconds": seconds,
                "budget": None if math.isinf(budget) else budget,
                "quick": quick,
                "tiny": tiny,
                **settings,
            },
        }
        self.output = output
        if output is None and not tiny:
            gpu = self._provenance["device"].lower().removeprefix("nvidia ").replace(" ", "-")
            self.output = Path(__file__).parent / "results" / gpu / f"{script}.json"
        torch.manual_seed(0)
        if self.device.type == "cuda":
            # cuBLAS keeps the workspace of its first product, which is not to count as the first competitor's.
            warm_up = torch.randn(64, 64, device=self.device, dtype=torch.bfloat16)
            warm_up @ warm_up

    def cases(self, shapes: Sequence[Any], tiny: Sequence[Any]) -> Iterator[Any]:
        """What to measure: all shapes, or with --tiny all toys; with --quick the first third.

        Each case has a fair share of what is left of the budget to build and to measure its competitors.
        """
        chosen = tiny if self.tiny else shapes
        chosen = chosen[: max(1, len(chosen) // 3)] if self.quick else chosen
        for done, case in enumerate(chosen):
            now = time.monotonic()
            self._deadline = now + (self._end - now) / (len(chosen) - done) - self.seconds
            yield case

    def compare(self, contestants: Iterable[Contestant], **labels: object) -> list[Record]:
        """:func:`compare`, the results as records under these labels, which the JSON will hold."""
        results = compare(contestants, seconds=self.seconds, device=self.device, deadline=self._deadline)
        records = [labels | asdict(result) for result in results]
        self.results += records
        return records

    def report(self, *tables: Table, **extra: object) -> None:
        """Print tables and write the JSON as it stands, so that a run that is cut off has left what it measured."""
        for table in tables:
            self.console.print(table)
        self._extra |= extra
        if self.output is not None:
            document = {
                "provenance": self._provenance | {"seconds_taken": round(time.monotonic() - self._begun, 1)},
                **self._extra,
                "results": [{k: v for k, v in record.items() if k != "samples_ms"} for record in self.results],
            }
            self.output.parent.mkdir(parents=True, exist_ok=True)
            partial = self.output.with_suffix(".partial")
            partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(self.output)

    def finish(self) -> None:
        """Say what failed and where the JSON lies. Exits with 1 if one of our own competitors failed."""
        self.report()
        if self.output is not None:
            self.console.print(f"wrote {self.output}", soft_wrap=True)
        failed = [result for result in self.results if result["reason"] is not None]
        for name, reason in dict.fromkeys((result["name"], result["reason"]) for result in failed):
            self.console.print(f"no result for {name}: {reason}", markup=False, highlight=False)
        if any(not is_peer(result["name"]) and result["reason"] != SKIPPED for result in failed):
            raise typer.Exit(1)


def is_peer(name: str) -> bool:
    """Whether a competitor is another library's, which may be missing."""
    return name.startswith("torch")


def _torchao_version() -> str | None:
    try:
        return version("torchao")
    except PackageNotFoundError:
        return None


def new_table(title: str, words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with columns of words on the left and of numbers on the right, under these headers."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    for header in words:
        table.add_column(header, no_wrap=True)
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def text(value: float | None, form: str) -> str:
    """A number in a format such as "{:.2f} ×"; a dash if there is none."""
    return "–" if value is None else form.format(value)


def spread(ratios: Record) -> str:
    """The spread of a :func:`speed_up`, for a table."""
    low, high = ratios.get("speed_up_p10"), ratios.get("speed_up_p90")
    return "–" if low is None or high is None else f"{low:.2f} – {high:.2f}"
