"""Search for the fastest configuration of a matmul. The caller brings the clock."""

import datetime
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .._timing import WORTH_CHANGING, interleaved, reason_of
from . import allows_tma, matmul_config
from ._tables import MatmulConfig, MatmulShape, Row

FINALISTS = 6

Clock = Callable[[MatmulConfig], float]  # the median milliseconds of a launch; raises if it cannot run


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
    """Measure every candidate once, then the best ones interleaved, so that clock drift hits all alike.

    Args:
        candidates: the configurations to choose from.
        current: the configuration in force, measured to the end and kept unless another is 2 % faster.
        clock: measures a configuration.
        rounds: how often the best are measured, at least 1; their medians decide.
        advance: called after each measurement.

    Raises:
        RuntimeError: no configuration ran.
    """
    first: dict[MatmulConfig, float] = {}
    skipped, reason = 0, ""
    for config in dict.fromkeys((current, *candidates)):
        try:
            first[config] = clock(config)
        except Exception as error:  # whatever Triton, its backend or the driver raise for what they cannot run
            skipped += 1
            reason = reason_of(error)
        advance()
    if not first:
        raise RuntimeError(f"none of {skipped} configurations ran; the last: {reason}")

    finalists = sorted(first, key=first.__getitem__)[:FINALISTS]
    if current in first and current not in finalists:
        finalists[-1] = current
    times = interleaved({config: partial(clock, config) for config in finalists}, rounds, advance)
    medians = {config: statistics.median(turns) for config, turns in times.items()}
    winner = min(medians, key=medians.__getitem__)
    before = medians.get(current)
    if before is not None and before < WORTH_CHANGING * medians[winner]:
        winner = current
    return Found(winner, medians[winner], before, skipped, reason)


@dataclass(frozen=True)
class Tuned:
    """The outcome for a shape: the row that it gives, and the configuration that was in force."""

    row: Row
    before: MatmulConfig
    tflops: float
    before_tflops: float | None  # None: it did not run
    note: str  # candidates that did not run

    @property
    def kept(self) -> bool:
        return self.row.config == self.before


def tune_shape(
    architecture: str,
    shape: MatmulShape,
    tries: Iterable[MatmulConfig],
    clock: Clock,
    provenance: Mapping[str, Any],
    *,
    rounds: int,
    advance: Callable[[], object] = lambda: None,
) -> Tuned:
    """Search the fastest configuration for a shape, and return it as a row of a table. See :func:`fastest`."""
    current = matmul_config(architecture, *shape, tma=allows_tma(shape.n))
    found = fastest(tries, current, clock, rounds=rounds, advance=advance)
    gflop = 2e-9 * shape.m * shape.n * shape.k
    tflops = float(f"{gflop / found.milliseconds:.4g}")
    before_tflops = None if found.before is None else float(f"{gflop / found.before:.4g}")
    row = Row(*shape, found.config, {**provenance, "date": datetime.date.today().isoformat(), "tflops": tflops})
    note = f"{shape}: {found.skipped} candidates did not run, as {found.reason}" if found.skipped else ""
    return Tuned(row, current, tflops, before_tflops, note)


def is_measured(row: Row, provenance: Mapping[str, Any]) -> bool:
    """Return whether a row was measured by the same script on the same GPU with the same versions."""
    return not isinstance(row.provenance, str) and provenance.items() <= row.provenance.items()
