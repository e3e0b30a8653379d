"""The weight gradient Gᵀ X in int8: when it is worth it, and how its operands are quantized.

Its inner dimension is the tokens. Both operands are rotated along it by the same orthogonal block Hadamard matrix,
which leaves their product as it is, and quantized with one absmax a column (docs/architecture.md).
"""

import functools
import math
import warnings

import torch

from .config import SwitchBackConfig

# Beside the row-wise int8 values, which the other matmuls need anyway, each of a token's in + out values is read once
# more and written once more, and int8 saves half of the time of its in * out products. On an H200 a step of 65536
# tokens, 5120 → 1280, where in * out / (in + out) is 1024, loses 0.44 ms and wins 0.73 (bench_linear.json): equal near
# 610.
LEAST_FEATURES = 768
LEAST_TOKENS = 2048  # fewer leave launches to weigh as much as the arithmetic


def int8_grad_weight_wins(tokens: int, in_features: int, out_features: int) -> bool:
    """Whether an int8 weight gradient [out_features, tokens] × [tokens, in_features] is faster, quantizing included."""
    return tokens >= LEAST_TOKENS and in_features * out_features >= LEAST_FEATURES * (in_features + out_features)


def runs_in_int8(config: SwitchBackConfig, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the forward keeps x's int8 values for an int8 weight gradient; warn once where a layer is too small."""
    if config.grad_weight == "high_precision" or not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    out_features, in_features = weight.shape
    tokens = math.prod(x.shape[:-1])
    if config.grad_weight == "int8_always" or int8_grad_weight_wins(tokens, in_features, out_features):
        return True
    _say_that_it_stays()
    return False


def _say_that_it_stays() -> None:
    _warn_once()


# What torch.compiler.assume_constant_result sets (itself imports Triton): the compiler calls the function as it traces.
_say_that_it_stays._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"grad_weight='int8' stays at high precision where quantizing takes longer than int8 saves: with fewer than "
        f"{LEAST_TOKENS} tokens, and where in * out / (in + out) features are below {LEAST_FEATURES}. "
        "grad_weight='int8_always' does not",
        stacklevel=5,
    )
