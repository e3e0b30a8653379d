"""Decide from how many tokens on a layer's training step is faster in int8 than in 16 bit."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..config import SwitchBackConfig
from ._tables import nearest

WORTH = 1.02  # int8 has to be this much faster


@dataclass(frozen=True)
class Rates:
    """Describes how fast a kind of device runs the parts of a layer's training step.

    Those of the H200 are fitted to a sweep (benchmarks/bench_break_even.py). Other GPUs are taken to reach the same
    shares of what their datasheets say.
    """

    high_precision_tflops: float
    int8_tops: float
    gb_per_s: float  # of the quantizers, read and written
    kernel_us: float  # from one kernel to the next, beside its work
    cpu_us: float  # CPU time of an int8 step for each of its matmuls, on a slow host
    provenance: str


class Work(NamedTuple):
    """Counts what a training step of a layer consists of."""

    high_precision_flop: float
    int8_flop: float
    quantized_bytes: float
    kernels: int

    def microseconds(self, rates: Rates) -> float:
        return (
            self.high_precision_flop / rates.high_precision_tflops / 1e6
            + self.int8_flop / rates.int8_tops / 1e6
            + self.quantized_bytes / rates.gb_per_s / 1e3
            + self.kernels * rates.kernel_us
        )


def work(
    tokens: int, in_features: int, out_features: int, config: SwitchBackConfig | None, *, trains: bool = True
) -> Work:
    """Return the work of a layer's forward and backward; config None stands for nn.Linear.

    Args:
        tokens: rows of X.
        in_features: columns of X.
        out_features: columns of G = dL/dY.
        config: how the layer computes; None: as nn.Linear.
        trains: whether the weight has a gradient.
    """
    flop = 2.0 * tokens * in_features * out_features
    if config is None:
        matmuls = 3 if trains else 2
        return Work(matmuls * flop, 0.0, 0.0, matmuls)
    # X and G are read in 16 bit and written as int8. W is so twice, and read once more for its absmax.
    activations, weight = tokens * (in_features + out_features), in_features * out_features
    quantized_bytes, kernels = 3.0 * activations + 8.0 * weight, 7 if trains else 6
    if not trains:
        return Work(0.0, 2 * flop, quantized_bytes, kernels)
    if config.grad_weight == "int8":  # X and G once more, along the tokens: once for the absmax, once to quantize
        return Work(0.0, 3 * flop, quantized_bytes + 6.0 * activations, kernels + 2)
    if config.mem_efficient:  # X is dequantized
        quantized_bytes, kernels = quantized_bytes + 3.0 * tokens * in_features, kernels + 1
    return Work(flop, 2 * flop, quantized_bytes, kernels)


def min_tokens(
    rates: Rates, in_features: int, out_features: int, config: SwitchBackConfig, *, trains: bool = True
) -> int | None:
    """Return from how many tokens on int8 is worth it, or None if at no number.

    It is worth it if the GPU's time is 2 % shorter, and nn.Linear keeps the GPU busy for longer than the CPU needs to
    launch the int8 step: a model whose GPU waits for the CPU gains nothing from faster matmuls.
    """
    start, slope = _line(rates, in_features, out_features, None, trains)
    int8_start, int8_slope = _line(rates, in_features, out_features, config, trains)
    gain = slope - WORTH * int8_slope
    if gain <= 0:
        return None
    busy = cpu_us(rates, trains=trains)
    return math.ceil(max(0.0, (WORTH * int8_start - start) / gain, (busy - start) / slope))


def cpu_us(rates: Rates, *, trains: bool) -> float:
    """Return the CPU time of a layer's int8 step on a slow host, in microseconds."""
    return rates.cpu_us * (3 if trains else 2)


def _line(
    rates: Rates, in_features: int, out_features: int, config: SwitchBackConfig | None, trains: bool
) -> tuple[float, float]:
    """Return a step's microseconds without tokens, and what each token adds."""
    start, one = (
        work(tokens, in_features, out_features, config, trains=trains).microseconds(rates) for tokens in (0, 1)
    )
    return start, one - start


def rates_of(architecture: str) -> Rates:
    """Return the rates of an architecture such as ``"sm_90"``, or of the nearest one that is listed, or of ``"cpu"``.

    Raises:
        ValueError: architecture is neither ``"cpu"`` nor like ``"sm_90"`` nor like ``"gfx942"``.
    """
    listed = _listed()
    return listed[architecture if architecture in listed else nearest(architecture, listed.keys() - {"cpu"})]


@functools.cache
def _listed() -> dict[str, Rates]:
    rows = json.loads(Path(__file__).with_name("break_even.json").read_text(encoding="utf-8"))
    return {architecture: Rates(**row) for architecture, row in rows.items()}
