"""A layer's training step: how long it takes, and how many bytes it keeps for its backward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._timing import SUSTAINED_MS, Candidate, Cycle, Mode, Record, compare, speed_up

TURN_MS = 20.0  # of a layer in each round: long enough that launching and clock ticks vanish
Inputs = Sequence[tuple[Tensor, Tensor]]


def random_inputs(
    tokens: int, in_features: int, out_features: int, copies: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Return pairs of X [tokens, in], which requires a gradient, and G [tokens, out]."""
    new = partial(torch.randn, device=device, dtype=dtype)
    return [(new(tokens, in_features, requires_grad=True), new(tokens, out_features)) for _ in range(copies)]


def training_step(
    name: str, build: Callable[[], nn.Module], inputs: Inputs, *, mode: Mode = "eager", turn_ms: float = SUSTAINED_MS
) -> Candidate:
    """Return a layer's forward and backward on each of the inputs, under autocast if its dtype is another than theirs.

    ``saved_bytes`` in its record is what the layer keeps for its backward.
    """
    notes: Record = {}

    def cycle() -> Cycle:
        layer = build()
        forward = _forward(layer, inputs[0][0])
        wanted = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        steps = [partial(_gradients, forward, wanted, x, grad) for x, grad in inputs]
        steps[0]()  # compiles
        notes["saved_bytes"] = saved_bytes(layer, partial(forward, inputs[0][0]))
        return steps

    return Candidate(name, cycle, mode, turn_ms, notes)


def compare_layers(
    layers: Mapping[str, tuple[Callable[[], nn.Module], Mode]],
    inputs: Inputs,
    *,
    seconds: float,
    advance: Callable[[], object] = lambda: None,
) -> list[Record]:
    """Measure training steps of layers interleaved, and compare each with the first, which is nn.Linear.

    Args:
        layers: a function that builds the layer or raises, and the mode, by name.
        inputs: pairs of X and G, as from :func:`random_inputs`.
        seconds: about so long in all, after a first call of each, which may compile.
        advance: called after each layer is built and warm.
    """

    def candidates() -> Iterator[Candidate]:
        for name, (build, mode) in layers.items():
            yield training_step(name, build, inputs, mode=mode, turn_ms=TURN_MS)
            advance()

    with torch.enable_grad(), torch.autocast(inputs[0][0].device.type, enabled=False):
        records = compare(candidates(), seconds=seconds, device=inputs[0][0].device)
    add_comparison(records, linear=next(iter(layers)))
    return records


def add_comparison(records: Sequence[Record], linear: str) -> None:
    """Add to each record its speed-up over the nn.Linear of this name, and the ratio of what both keep.

    What runs in a CUDA graph is compared with nn.Linear in a graph, everything else with eager nn.Linear.
    """
    by_mode = {record["mode"]: record for record in records if record["name"] == linear}
    for record in records:
        base = by_mode.get("graph" if record["mode"] == "graph" else "eager")
        record |= speed_up(record, base)
        saved, before = record.get("saved_bytes"), base and base.get("saved_bytes")
        record["saved_over_linear"] = saved / before if saved is not None and before else None


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes that a module's forward keeps for its backward, beside the parameters; views count once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in _plain_tensors(tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        # A node that keeps its own output, as tanh does, would hold it and be held by it for good.
        return tensor if tensor.grad_fn is None else tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    for parameter in module.parameters():
        for part in _plain_tensors(parameter):
            storages.pop(part.untyped_storage().data_ptr(), None)
    del outputs  # kept so far, so that no memory was freed and counted twice
    return sum(storages.values())


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor itself, or what a subclass that wraps others is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def _forward(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    if next(layer.parameters()).dtype == x.dtype:
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
