"""A layer's training step: how long it takes, and what it keeps for its backward."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._timing import SUSTAINED_MS, Candidate, Cycle, Mode, Record, compare, speed_up
from .saved_bytes import saved_bytes

TURN_MS = 20.0  # of a layer in each round: long enough that launching and clock ticks vanish
Kept = dict[tuple[str, Mode], int]


def random_inputs(
    tokens: int, in_features: int, out_features: int, copies: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of X [tokens, in], which requires a gradient, and G [tokens, out]."""

    def new(width: int) -> Tensor:
        return torch.randn(tokens, width, device=device, dtype=dtype)

    return [(new(in_features).requires_grad_(), new(out_features)) for _ in range(copies)]


def training_step(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Sequence[tuple[Tensor, Tensor]],
    *,
    kept: Kept,
    mode: Mode = "eager",
    turn_ms: float = SUSTAINED_MS,
) -> Candidate:
    """Return a layer's forward and backward on each of the inputs, under autocast if its dtype is another than theirs.

    Building the candidate adds the bytes that it keeps for its backward to ``kept``.
    """

    def cycle() -> Cycle:
        layer = build()
        forward = _forward(layer, inputs[0][0])
        wanted = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        steps = [partial(_gradients, forward, wanted, x, grad) for x, grad in inputs]
        steps[0]()  # compiles
        kept[name, mode] = saved_bytes(layer, partial(forward, inputs[0][0]))
        return steps

    return Candidate(name, cycle, mode, turn_ms)


def add_comparison(records: Iterable[Record], kept: Mapping[tuple[str, Mode], int], linear: str) -> None:
    """Add to each record what the step keeps for its backward, and its speed-up over nn.Linear.

    Args:
        linear: nn.Linear's name. What runs in a CUDA graph is compared with nn.Linear in a graph, everything else
            with eager nn.Linear.
    """
    records = list(records)
    base = {record["mode"]: record for record in records if record["name"] == linear}
    for record in records:
        mode: Mode = "graph" if record["mode"] == "graph" else "eager"
        record |= speed_up(record, base.get(mode))
        saved, before = kept.get((record["name"], record["mode"])), kept.get((linear, mode))
        record["saved_bytes"] = saved
        record["saved_over_linear"] = saved / before if saved is not None and before else None


def compare_layers(
    layers: Mapping[str, tuple[Callable[[], nn.Module], Mode]],
    inputs: Sequence[tuple[Tensor, Tensor]],
    *,
    seconds: float,
    advance: Callable[[], object] = lambda: None,
) -> list[Record]:
    """Measure training steps of layers interleaved, and compare each with the first, which is nn.Linear.

    Args:
        layers: a function that builds the layer or raises, and the mode, by name.
        inputs: pairs of X [tokens, in] and G [tokens, out].
        seconds: about so long in all, after a first call of each, which may compile.
        advance: called after each layer is built and warm.
    """
    kept: Kept = {}

    def candidates() -> Iterator[Candidate]:
        for name, (build, mode) in layers.items():
            yield training_step(name, build, inputs, kept=kept, mode=mode, turn_ms=TURN_MS)
            advance()

    with torch.enable_grad(), torch.autocast(inputs[0][0].device.type, enabled=False):
        records = compare(candidates(), seconds=seconds, device=inputs[0][0].device)
    add_comparison(records, kept, linear=next(iter(layers)))
    return records


def measure_layers(
    layers: Mapping[str, nn.Linear], x: Tensor, *, seconds: float, cuda_graph: bool = False
) -> tuple[dict[str, float], dict[str, int]]:
    """Return the milliseconds of each layer's forward and backward, and the bytes that it keeps between the two.

    Args:
        layers: by name, nn.Linear first; each is called with x, under autocast if its parameters have another dtype.
        x: [tokens, in_features]; its gradient is wanted.
        seconds: about so long in all.
        cuda_graph: whether to capture each step in a CUDA graph, which leaves out CPU overhead.

    Raises:
        RuntimeError: a layer's step fails.
    """
    (linear, *_) = layers.values()
    inputs = [(x, torch.randn(*x.shape[:-1], linear.out_features, device=x.device, dtype=x.dtype))]
    mode: Mode = "graph" if cuda_graph else "eager"
    candidates = {name: (partial(_itself, layer), mode) for name, layer in layers.items()}
    records = compare_layers(candidates, inputs, seconds=seconds)
    for record in records:
        if "reason" in record:
            raise RuntimeError(f"{record['name']}: {record['reason']}")
    milliseconds = {record["name"]: record["median_ms"] for record in records}
    return milliseconds, {record["name"]: record["saved_bytes"] for record in records}


def _itself(layer: nn.Module) -> nn.Module:
    return layer


def _forward(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    dtype = next(layer.parameters()).dtype
    if dtype == x.dtype:
        return layer

    def under_autocast(x: Tensor) -> Tensor:
        # Autocast's cache would keep a weight's copy from one step for the next, and from a CUDA graph's memory.
        with torch.autocast(x.device.type, dtype=x.dtype, cache_enabled=False):
            return layer(x)

    return under_autocast


def _gradients(
    forward: Callable[[Tensor], Tensor], wanted: Sequence[Tensor], x: Tensor, grad_output: Tensor
) -> tuple[Any, ...]:
    return torch.autograd.grad(forward(x), (x, *wanted), grad_output)
