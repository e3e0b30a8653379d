"""Search for the fastest configuration of a matmul. The caller brings the clock."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from .._timing import WORTH_CHANGING, interleaved
from ._tables import MatmulConfig

FINALISTS = 6
LAUNCHES = 5  # a measurement

Clock = Callable[[MatmulConfig, int], float]  # (config, launches) → milliseconds of one launch; raises if it cannot run


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    config: MatmulConfig
    milliseconds: float
    before: float | None  # milliseconds of the current configuration; None if it did not run
    skipped: int  # candidates that did not compile or launch
    reason: str  # of the last of them


def fastest(
    candidates: Iterable[MatmulConfig],
    current: MatmulConfig,
    clock: Clock,
    *,
    rounds: int,
    advance: Callable[[], object] = lambda: None,
) -> Found:
    """Measure every candidate once, then the best interleaved, A B C A B C …, so that clock drift hits all alike.

    Args:
        candidates: the configurations to choose from.
        current: the configuration in force, measured to the end and kept unless another is 2 % faster.
        clock: the median time of some launches.
        rounds: how often the best are measured, at least 1; their medians decide.
        advance: called after each measurement.

    Raises:
        RuntimeError: no configuration ran.
    """
    first: dict[MatmulConfig, float] = {}
    skipped, reason = 0, ""
    for config in dict.fromkeys((current, *candidates)):
        try:
            first[config] = clock(config, LAUNCHES)
        except Exception as error:  # whatever Triton, its backend or the driver raise for what they cannot run
            skipped += 1
            reason = f"{type(error).__name__}: {error}"
        advance()
    if not first:
        raise RuntimeError(f"none of {skipped} configurations ran; the last: {reason}")

    finalists = sorted(first, key=first.__getitem__)[:FINALISTS]
    if current in first and current not in finalists:
        finalists[-1] = current
    medians = interleaved({config: partial(clock, config, LAUNCHES) for config in finalists}, rounds, advance)
    winner = min(medians, key=medians.__getitem__)
    before = medians.get(current)
    if before is not None and before < WORTH_CHANGING * medians[winner]:
        winner = current
    return Found(winner, medians[winner], before, skipped, reason)
