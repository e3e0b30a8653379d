"""How long layers' training steps take, and what they keep for their backward."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from .._timing import graphed, in_turns, median_ms
from .saved_bytes import saved_bytes

TURN_MS = 20.0  # of a layer before the next one's turn: long enough that launching and clock ticks vanish
LEAST_ROUNDS, MOST_ROUNDS = 3, 50


def measure_layers(
    layers: Mapping[str, nn.Module], x: torch.Tensor, *, seconds: float, cuda_graph: bool = False
) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds of each layer's forward and backward, and bytes that it keeps between the two.

    Args:
        layers: by name; each is called with x, under autocast if its parameters have another dtype.
        x: [tokens, in_features]; its gradient is wanted.
        seconds: about so long in all, in turns, after a first call of each, which may compile.
        cuda_graph: whether to capture each step in a CUDA graph, which leaves out the host's time.
    """
    saved = {name: saved_bytes(layer, partial(_forward, layer, x)) for name, layer in layers.items()}
    steps: dict[str, Callable[[], object]] = {name: partial(_step, layer, x) for name, layer in layers.items()}
    for step in steps.values():
        step()
    if cuda_graph and x.is_cuda:
        steps = {name: graphed(step) for name, step in steps.items()}
    return measure(steps, x.device, seconds), saved


def measure(steps: Mapping[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each step, taken in turns for about so many seconds."""
    once = {name: median_ms(step, 1, device) for name, step in steps.items()}
    times = {name: max(1, int(TURN_MS / ms)) for name, ms in once.items()}
    a_round = sum((times[name] + 1) * ms for name, ms in once.items()) / 1e3
    rounds = min(max(LEAST_ROUNDS, int(seconds / a_round)), MOST_ROUNDS)
    return in_turns({name: partial(median_ms, step, times[name], device) for name, step in steps.items()}, rounds)


def _forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    other = next(layer.parameters()).dtype != x.dtype
    # Autocast's cache would keep a weight's copy from one step for the next, and from a CUDA graph's memory.
    autocast = torch.autocast(x.device.type, dtype=x.dtype if other else None, enabled=other, cache_enabled=False)
    with torch.enable_grad(), autocast:
        return layer(x)


def _step(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = _forward(layer, x)
    trained = (parameter for parameter in layer.parameters() if parameter.requires_grad)
    return torch.autograd.grad(y, (x, *trained), y.detach())
