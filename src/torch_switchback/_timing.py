"""Interleaved timing of candidates, and which difference counts.

Power and clocks move results by 15 % between runs. Candidates are therefore measured interleaved,
in one process, and only their ratios carry over to another machine.
"""

import gc
import itertools
import math
import os
import random
import statistics
import timeit
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch

Record = dict[str, Any]
Cycle = Sequence[Callable[[], object]]  # calls of one candidate, each on its own inputs, made one after the other
Mode = Literal["eager", "compiled", "reduce-overhead", "graph"]
Key = TypeVar("Key", bound=Hashable)

WORTH_CHANGING = 1.02  # a winner less ahead than this is noise: keep what is there
SHORT_MS = 10.0  # a turn long enough that launch overhead and clock ticks vanish
SUSTAINED_MS = 120.0  # a turn long enough that the power limit sets the clocks, as in training
WARM_UP_ROUNDS = 2  # not counted: clocks and temperature settle
MIN_ROUNDS = 5
TRACEBACK = "TYPER_STANDARD_TRACEBACK"  # the environment variable that typer has for it


class Candidate(NamedTuple):
    """One candidate of a comparison."""

    name: str
    build: Callable[[], Cycle]  # an exception is recorded as the candidate's result
    mode: Mode = "eager"  # "graph" captures the whole cycle in one CUDA graph; build sees to the other modes
    turn_ms: float = SHORT_MS  # in each round the call is repeated until it takes this long
    notes: Mapping[str, Any] = {}  # what build finds out; becomes part of the record


class Runner:
    """A candidate that is built and warm, and its record."""

    def __init__(self, candidate: Candidate, record: Record, device: torch.device) -> None:
        self.device, self.record = device, record
        cycle = candidate.build()
        self.calls: Iterator[Callable[[], object]] = itertools.cycle(cycle)
        self.calls_in_one = 1
        for call in cycle:
            call()
        if device.type == "cuda" and candidate.mode == "graph":
            self.capture(cycle)
        record |= candidate.notes
        once_ms = elapsed_ms(self.calls, 1, device)
        if once_ms < candidate.turn_ms:
            once_ms = elapsed_ms(self.calls, 5, device) / 5
        self.repeats = max(1, math.ceil(candidate.turn_ms / once_ms)) if device.type == "cuda" else 1
        self.turn_ms = once_ms * self.repeats

    def capture(self, cycle: Cycle) -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # the warm-up that PyTorch asks for
            for call in [*cycle] * 3:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # The outputs are kept so that each call writes other memory, the calls because they hold the inputs.
            self.kept = cycle, [call() for call in cycle]
        self.calls, self.calls_in_one = itertools.repeat(graph.replay), len(cycle)

    def clock(self) -> float:
        """Return the milliseconds of a call in one turn, or NaN once a call has failed."""
        if "reason" not in self.record:
            try:
                return elapsed_ms(self.calls, self.repeats, self.device) / (self.repeats * self.calls_in_one)
            except Exception as error:
                self.record["reason"] = reason_of(error)
        return math.nan


def compare(candidates: Iterable[Candidate], *, seconds: float, device: torch.device) -> list[Record]:
    """Time candidates interleaved for about so many seconds, after building and warming up each.

    A candidate that raises gets a record with the reason. ``turns`` has the time of a call in each round.
    """
    runners: list[Runner] = []
    records: list[Record] = []
    for candidate in candidates:
        free_memory(device)
        records.append({"name": candidate.name, "mode": candidate.mode})
        try:
            runners.append(Runner(candidate, records[-1], device))
        except Exception as error:  # another library can fail in any way
            records[-1]["reason"] = reason_of(error)
    round_ms = sum(runner.turn_ms for runner in runners) or 1.0
    rounds = max(MIN_ROUNDS, int(seconds * 1e3 / round_ms))
    times = interleaved({runner: runner.clock for runner in runners}, WARM_UP_ROUNDS + rounds)
    for runner, turns in times.items():
        if "reason" not in runner.record:
            p10, median, p90 = _spread(turns[WARM_UP_ROUNDS:])
            runner.record |= {"turns": turns[WARM_UP_ROUNDS:], "median_ms": median, "p10_ms": p10, "p90_ms": p90}
            runner.record["rounds"] = rounds
    return records


def interleaved(
    clocks: Mapping[Key, Callable[[], float]], rounds: int, advance: Callable[[], object] = lambda: None
) -> dict[Key, list[float]]:
    """Return measurements of each candidate, one per round.

    The order changes from round to round, as a turn starts with the clocks that the turn before it left.
    """
    times: dict[Key, list[float]] = {candidate: [] for candidate in clocks}
    shuffle, order = random.Random(0).shuffle, [*clocks]
    for _ in range(rounds):
        shuffle(order)
        for candidate in order:
            times[candidate].append(clocks[candidate]())
            advance()
    return times


def elapsed_ms(calls: Iterator[Callable[[], object]], repeats: int, device: torch.device) -> float:
    """Return the milliseconds of so many calls in a row, the GPU's if there is one, without garbage collection.

    ``triton.testing.do_bench`` does not serve for whole layers: it clears the L2 cache in front of each call, behind
    which up to 60 µs of CPU overhead hide, and it needs a GPU.
    """
    timer = timeit.Timer(lambda: next(calls)())
    if device.type != "cuda":
        return timer.timeit(repeats) * 1e3
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if repeats > 1:  # a call in front keeps the GPU busy while the CPU issues the timed ones
        next(calls)()
    start.record()
    timer.timeit(repeats)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def speed_up(record: Record, over: Record | None) -> Record:
    """Return the speed-up of a candidate over another: median and spread over the rounds."""
    if over is None or "turns" not in record or "turns" not in over:
        return {}
    ratios = [theirs / ours for theirs, ours in zip(over["turns"], record["turns"], strict=True)]
    p10, median, p90 = _spread(ratios)
    return {"speed_up": median, "speed_up_p10": p10, "speed_up_p90": p90}


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 10th percentile, the median and the 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]


def copies(set_bytes: int, device: torch.device) -> int:
    """Return how many sets of inputs of so many bytes exceed twice the L2 cache together."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return 1 + 2 * l2_bytes // set_bytes


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """Return an error in one line. Its traceback goes to stderr if TYPER_STANDARD_TRACEBACK is set."""
    if os.getenv(TRACEBACK):
        traceback.print_exception(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
