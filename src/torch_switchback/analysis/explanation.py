"""Explain what runs in each layer of a model, and where a layer falls back."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._text import grouped, table
from ..config import strategy_of
from ..convert import _REPORT, ConvertedLayer
from ..filters import never_faster
from ..functional import Prepared, linear
from ..nn import SwitchBackLinear
from ..tuning import MatmulConfig, MatmulShape
from .layer_calls import Call, architecture_of, describe, device_of, every_layer_called, layer_calls

HEADERS = ("layer", "strategy", "tokens", "in", "out", "dtype", "output", "grad_input", "grad_weight", "remarks")


class FallbackError(RuntimeError):
    """A layer does not run as it was meant to."""


@dataclass(frozen=True)
class Matmul:
    """Holds one of a layer's three matmuls, [m, k] × [k, n]."""

    name: str
    m: int
    n: int
    k: int
    kernel: str
    """A kernel of this library, or the function of PyTorch's that runs instead."""
    tile: MatmulConfig | None
    """Tile configuration of the kernel; None if PyTorch chooses it."""
    fallback: str
    """Why a slower way was taken; empty if none was."""

    def __str__(self) -> str:
        if self.tile is None:
            return self.kernel
        return f"{self.kernel} {self.tile.block_m}×{self.tile.block_n}×{self.tile.block_k}"


@dataclass(frozen=True)
class ExplainedLayer:
    """Holds a linear layer and its largest call, or a module that the conversion's report names beside them."""

    fqn: str
    strategy: str
    in_features: int
    out_features: int
    calls: int
    tokens: int | None
    """Tokens of the largest call; None if the layer was not called."""
    dtype: str
    """Dtype of the computation, such as "bfloat16"."""
    matmuls: tuple[Matmul, ...]
    """Matmuls of a SwitchBackLinear that was called and runs in int8; empty for any other layer."""
    fallback: str
    """Why the layer, or some of its matmuls, takes a slower way; empty if none does."""
    reason: str
    """Why the layer's largest call does not run in int8; empty if it does."""
    flop: int
    """2 · tokens · in · out, summed over its calls."""
    int8_flop: int
    """The same, of the calls that run in int8."""


@dataclass(frozen=True)
class Explanation:
    """Holds a row for every linear layer, nn.Linear too. Printed, it is a table with one row for identical blocks."""

    device: str
    never_faster: str
    """Why int8 is faster for no layer on this device; empty if it may be."""
    layers: tuple[ExplainedLayer, ...]

    @property
    def fallbacks(self) -> tuple[ExplainedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.fallback)

    @property
    def int8_share(self) -> float:
        """Return the share of the layers' weight elements that are multiplied in int8."""
        sizes = [(layer.in_features * layer.out_features, bool(layer.matmuls)) for layer in self.layers]
        return sum(size for size, in_int8 in sizes if in_int8) / max(1, sum(size for size, _ in sizes))

    @property
    def int8_flop_share(self) -> float:
        """Return the share of the floating-point operations of the layers' calls that runs in int8."""
        return sum(layer.int8_flop for layer in self.layers) / max(1, sum(layer.flop for layer in self.layers))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            sizes = (layer.tokens, layer.in_features, layer.out_features)
            matmuls = [*layer.matmuls, "", "", ""][:3]
            remarks = layer.fallback or layer.reason
            rows.append((layer.fqn or "(the model)", layer.strategy, *sizes, layer.dtype, *matmuls, remarks))
        in_int8 = sum(bool(layer.matmuls) for layer in self.layers)
        shares = f"{self.int8_share:.0%} of their weights, {self.int8_flop_share:.0%} of their FLOPs"
        summary = f"{in_int8} of {len(self.layers)} layers run in int8, {shares}"
        header = f"{self.device}: {self.never_faster}" if self.never_faster else self.device
        return f"{header}\n{table(HEADERS, grouped(rows))}\n{summary}"


def explain(
    model: nn.Module,
    sample_input: Any = None,
    *,
    tokens: int | None = None,
    strict: bool = False,
    device: torch.device | str | None = None,
) -> Explanation:
    """Say how each layer of a converted model computes: strategy, kernels and tiles, and what falls back and why.

    On a GPU the forward and backward of each distinct layer run once, which finds kernels that do not compile there.

    These are fall-backs:

    - a plainer kernel than the tuned one
    - an output that TMA cannot store, on a GPU that has TMA
    - operands that are copied because of their width
    - a CPU without exact ``torch._int_mm``
    - a SwitchBackLinear that the model does not call; it may use the weight directly, or not for this input

    Args:
        model: converted, in part or not at all; run once on the sample, in evaluation mode and without gradients.
        sample_input: a tensor, a tuple of arguments or a mapping of keywords for the model. Under autocast, call this
            function under autocast too.
        tokens: instead of a sample, how many tokens each layer is to be taken to see; the model is not run then, and
            may be on the meta device.
        strict: whether a fall-back is an error.
        device: where the layers of a model on the meta device would run: by default the GPU if there is one.

    Returns:
        A row for every linear layer, converted or not, and for what else the conversion's report names. Printed, it is
        a table, with one row for identical blocks and the shares of the weights and of the FLOPs that are in int8.

    Raises:
        FallbackError: strict, and there is a fall-back; it names all of them.
        TypeError: model is no module, or sample_input is something else.
        ValueError: not exactly one of sample_input and tokens is given, or tokens is not positive.
    """
    where = device_of(model, device)
    converted = _converted(model)
    tried: set[Any] = set()
    rows = []
    for fqn, (layer, calls) in layer_calls(model, sample_input, tokens).items():
        call = max(calls, key=lambda call: call.tokens, default=None)
        strategy, fallback, reason = type(layer).__name__, "", ""
        matmuls: tuple[Matmul, ...] = ()
        if isinstance(layer, SwitchBackLinear):
            strategy = strategy_of(layer.config, is_prepared=layer.is_prepared)
            if call is None:
                fallback = "not called: the model uses its weight directly, or not for this input"
            elif not call.in_int8:
                reason = f"computes as nn.Linear: fewer tokens than its min_tokens={layer.config.min_tokens}"
            else:
                key = (call, layer.config, layer.in_features, layer.out_features, layer.is_prepared)
                with every_layer_called(layer):  # or asking for a parametrized weight may change its buffers
                    if where.type == "cuda" and key not in tried:
                        _try(layer, call, where)
                        tried.add(key)
                    matmuls = tuple(_matmuls(layer, call, where))
                fallback = "; ".join(f"{matmul.name}: {matmul.fallback}" for matmul in matmuls if matmul.fallback)
        else:
            reason = (fqn in converted and converted[fqn].reason) or "not converted"
        seen, dtype = (None, "") if call is None else call[:2]
        sizes = (layer.in_features, layer.out_features, len(calls))
        flop, int8_flop = (
            2 * layer.in_features * layer.out_features * sum(call.tokens for call in some)
            for some in (calls, [call for call in calls if call.in_int8])
        )
        rows.append(ExplainedLayer(fqn, strategy, *sizes, seen, dtype, matmuls, fallback, reason, flop, int8_flop))
    linear = {row.fqn for row in rows}
    for fqn, other in converted.items():
        if fqn not in linear and other.config is None:
            sizes = (other.in_features, other.out_features, 0)
            rows.append(ExplainedLayer(fqn, other.kind, *sizes, None, "", (), "", other.reason, 0, 0))
    explanation = Explanation(describe(where), never_faster(architecture_of(where)), tuple(rows))
    if strict and explanation.fallbacks:
        lines = [f"{layer.fqn or 'the model'}: {layer.fallback}" for layer in explanation.fallbacks]
        raise FallbackError("explain: " + "; ".join(lines))
    return explanation


def _converted(model: nn.Module) -> dict[str, ConvertedLayer]:
    """Return what the reports of a model's conversion, and of its parts', say, by fully qualified name."""
    return {
        f"{prefix}.{row.fqn}".strip(".").replace("_orig_mod.", ""): row
        for prefix, module in model.named_modules()
        if _REPORT in vars(module)
        for row in vars(module)[_REPORT].layers
    }


def _matmuls(layer: SwitchBackLinear, call: Call, device: torch.device) -> Iterator[Matmul]:
    tokens, inputs, outputs, config = call.tokens, layer.in_features, layer.out_features, layer.config
    padded_inputs, padded_outputs = (_padded(features, config.rotate_features) for features in (inputs, outputs))
    dtype = getattr(torch, call.dtype)
    yield _int8_matmul("output", MatmulShape(tokens, outputs, padded_inputs), dtype, device)
    yield _int8_matmul("grad_input", MatmulShape(tokens, inputs, padded_outputs), dtype, device)
    if layer.is_prepared or not layer.weight.requires_grad:
        return
    if config.grad_weight == "int8":
        shape = MatmulShape(outputs, inputs, _padded(tokens, config.rotate_tokens))
        yield _int8_matmul("grad_weight", shape, layer.weight.dtype, device)
    else:
        yield Matmul("grad_weight", outputs, inputs, tokens, f"torch.mm {call.dtype}", None, "")


def _padded(inner: int, rotation: int | None) -> int:
    """Return an inner dimension in whole blocks of a rotation."""
    return -(-inner // (rotation or 1)) * (rotation or 1)


def _int8_matmul(name: str, shape: MatmulShape, out_dtype: torch.dtype, device: torch.device) -> Matmul:
    m, n, k = shape
    if device.type != "cuda":
        from ..ops.int8_matmul import cpu_path

        kernel, reason = cpu_path(k)
        return Matmul(name, m, n, k, kernel, None, reason)
    from ..kernels.device import architecture
    from ..kernels.int8_matmul import chosen
    from ..kernels.launch import VECTOR
    from ..tuning._tables import served, shipped_table

    row_bytes, gpu = n * out_dtype.itemsize, architecture(device)
    fits_tma = row_bytes % VECTOR == 0
    config, reason = chosen(gpu, m, n, k, fits_tma=fits_tma)
    reasons = [reason] if reason else []
    if not reason and not fits_tma and served(shipped_table(gpu)[1], gpu).tma:
        reasons.append(f"TMA stores rows in units of {VECTOR} bytes, not of {row_bytes}")
    if k % VECTOR:
        reasons.append(f"operands are copied, as their rows of {k} bytes are no multiples of {VECTOR}")
    return Matmul(name, m, n, k, config.kernel, config, ", and ".join(reasons))


def _try(layer: SwitchBackLinear, call: Call, device: torch.device) -> None:
    """Run a layer forward and backward, on random inputs of the call's shape."""
    dtype = getattr(torch, call.dtype)
    x = torch.randn(call.tokens, layer.in_features, device=device, dtype=dtype, requires_grad=True)
    # Random as well: the layer's own may be on the meta device, or be cut up by fully_shard.
    if layer.is_prepared:
        weight = torch.randint(-127, 128, layer.weight_int8.shape, device=device, dtype=torch.int8)
        prepared = Prepared(torch.rand(layer.weight_absmax.shape, device=device))
    else:
        sizes, dtype, trains = (layer.out_features, layer.in_features), layer.weight.dtype, layer.weight.requires_grad
        weight, prepared = torch.randn(sizes, device=device, dtype=dtype, requires_grad=trains), None
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        y = linear(x, weight, None, layer.config, prepared)
        torch.autograd.grad(y, [tensor for tensor in (x, weight) if tensor.requires_grad], torch.ones_like(y))
