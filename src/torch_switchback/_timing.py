"""Interleaved timing of candidates, and which difference counts.

Power and clocks move results by 15 % between runs. Candidates are therefore measured interleaved,
in one process, and only their ratios carry over to another machine.
"""

import gc
import itertools
import math
import random
import statistics
import time
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
SKIPPED = "skipped: no time was left (--budget)"


class Candidate(NamedTuple):
    """One candidate of a comparison."""

    name: str
    build: Callable[[], Cycle]  # an exception is recorded as the candidate's result
    mode: Mode = "eager"  # "graph" captures the whole cycle in one CUDA graph; build sees to the other modes
    turn_ms: float = SHORT_MS  # in each round the call is repeated until it takes this long


class Runner:
    """A candidate that is built and warm, and its record."""

    def __init__(self, candidate: Candidate, record: Record, device: torch.device) -> None:
        self.device, self.record = device, record
        self.turns: list[float] = []  # milliseconds per call
        is_cuda = device.type == "cuda"
        allocated = torch.cuda.memory_allocated() if is_cuda else 0
        cycle = candidate.build()
        self.calls: Iterator[Callable[[], object]] = itertools.cycle(cycle)
        self.calls_in_one = 1
        for call in cycle:
            call()
        if is_cuda and candidate.mode == "graph":
            self.capture(cycle)
        elif is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            next(self.calls)()
            torch.cuda.synchronize()
            self.record["peak_bytes"] = torch.cuda.max_memory_allocated() - allocated  # above the shared inputs
        once_ms = elapsed_ms(self.calls, 1, device)
        if once_ms < candidate.turn_ms:
            once_ms = elapsed_ms(self.calls, 5, device) / 5
        self.repeats = max(1, math.ceil(candidate.turn_ms / once_ms)) if is_cuda else 1
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

    def take_turn(self) -> None:
        if "reason" not in self.record:
            try:
                self.turns.append(
                    elapsed_ms(self.calls, self.repeats, self.device) / (self.repeats * self.calls_in_one)
                )
            except Exception as error:
                self.record["reason"] = reason_of(error)

    def finish(self) -> None:
        if "reason" not in self.record:
            turns = self.record["turns"] = self.turns[WARM_UP_ROUNDS:]
            tenths = statistics.quantiles(turns, n=10, method="inclusive")
            self.record |= {"median_ms": statistics.median(turns), "p10_ms": tenths[0], "p90_ms": tenths[-1]}
            self.record["rounds"] = len(turns)


def compare(
    candidates: Iterable[Candidate], *, seconds: float, device: torch.device, deadline: float = math.inf
) -> list[Record]:
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
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.freeze()
    try:
        round_ms = sum(runner.turn_ms for runner in runners) or 1.0
        shuffle, order = random.Random(0).shuffle, runners.copy()
        for _ in range(WARM_UP_ROUNDS + max(MIN_ROUNDS, int(seconds * 1e3 / round_ms))):
            shuffle(order)  # a turn starts with the clocks that the turn before it left
            for runner in order:
                runner.take_turn()
    finally:
        if freezes:
            gc.unfreeze()
    for runner in runners:
        runner.finish()
    return records


def interleaved(
    clocks: Mapping[Key, Callable[[], float]], rounds: int, advance: Callable[[], object] = lambda: None
) -> dict[Key, float]:
    """Return the median of some measurements per candidate, taken A B C A B C …, so that clock drift hits all alike."""
    times: dict[Key, list[float]] = {candidate: [] for candidate in clocks}
    for _ in range(rounds):
        for candidate, clock in clocks.items():
            times[candidate].append(clock())
            advance()
    return {candidate: statistics.median(measured) for candidate, measured in times.items()}


def elapsed_ms(calls: Iterator[Callable[[], object]], repeats: int, device: torch.device) -> float:
    """Return the milliseconds of so many calls in a row.

    ``triton.testing.do_bench`` does not serve for whole layers: it clears the L2 cache in front of each call, behind
    which up to 60 µs of CPU overhead hide, and it needs a GPU.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        for call in itertools.islice(calls, repeats):
            call()
        return (time.perf_counter() - begin) * 1e3
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if repeats > 1:  # a call in front keeps the GPU busy while the CPU issues the timed ones
        next(calls)()
    start.record()
    for call in itertools.islice(calls, repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def speed_up(record: Record, over: Record | None) -> Record:
    """Return the speed-up of a candidate over another: median and spread over the rounds."""
    if over is None or "turns" not in record or "turns" not in over:
        return {}
    ratios = [theirs / ours for theirs, ours in zip(over["turns"], record["turns"], strict=True)]
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return {"speed_up": statistics.median(ratios), "speed_up_p10": tenths[0], "speed_up_p90": tenths[-1]}


def copies(set_bytes: int, device: torch.device) -> int:
    """Return how many sets of inputs of so many bytes exceed twice the L2 cache together."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return 1 + 2 * l2_bytes // set_bytes


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
