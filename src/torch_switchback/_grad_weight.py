"""Decide whether an int8 weight gradient Gᵀ X is faster than one in high precision (docs/architecture.md)."""

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
    """Return whether int8 makes [out_features, tokens] × [tokens, in_features] faster, quantizing included."""
    return tokens >= LEAST_TOKENS and in_features * out_features >= LEAST_FEATURES * (in_features + out_features)


def runs_in_int8(config: SwitchBackConfig, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the forward keeps x's int8 values for an int8 weight gradient. Warn once of a layer too small."""
    if config.grad_weight == "high_precision" or not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    out_features, in_features = weight.shape
    wins = int8_grad_weight_wins(math.prod(x.shape[:-1]), in_features, out_features)
    if not wins:
        _say_that_it_stays()
    return wins


@functools.cache
def _warn_once() -> None:
    rule = f"fewer than {LEAST_TOKENS} tokens, or in * out / (in + out) features below {LEAST_FEATURES}"
    warnings.warn(f"grad_weight='int8' stays at high precision where int8 is not faster: {rule}", stacklevel=5)


def _say_that_it_stays() -> None:
    _warn_once()


# What torch.compiler.assume_constant_result sets (itself imports Triton): the compiler calls the function as it traces.
_say_that_it_stays._dynamo_marked_constant = True  # type: ignore[attr-defined]
