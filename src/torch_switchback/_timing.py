"""How long something takes on a device, how contestants take turns, and which difference counts."""

import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

WORTH_CHANGING = 1.02  # a winner less ahead than this is noise: keep what is there

Contestant = TypeVar("Contestant", bound=Hashable)


def median_ms(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Milliseconds of one run, the median of several in a row, after one that is not counted."""
    run()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        elapsed = [start.elapsed_time(stop) for start, stop in itertools.pairwise(events)]
    else:
        elapsed = []
        for _ in range(times):
            begun = time.perf_counter()
            run()
            elapsed.append((time.perf_counter() - begun) * 1e3)
    return sorted(elapsed)[times // 2]


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """A run without the host's time: captured in a CUDA graph. It must have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def in_turns(
    clocks: Mapping[Contestant, Callable[[], float]], rounds: int, advance: Callable[[], object] = lambda: None
) -> dict[Contestant, float]:
    """The median of some measurements of each contestant, taken A B C A B C …, so that clock drift hits all alike."""
    times: dict[Contestant, list[float]] = {contestant: [] for contestant in clocks}
    for _ in range(rounds):
        for contestant, clock in clocks.items():
            times[contestant].append(clock())
            advance()
    return {contestant: statistics.median(measured) for contestant, measured in times.items()}
