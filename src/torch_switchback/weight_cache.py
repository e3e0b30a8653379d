"""The int8 values of a weight, kept between the microbatches of one optimizer step."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .config import SwitchBackConfig
from .scaling import Quantized, scaling_for

_generation = object()
"""A new object after every optimizer step: what a step writes through ``.data`` shows in no version counter."""


@functools.cache
def _watch_optimizers() -> None:
    def begin_generation(*_: Any) -> None:
        global _generation
        _generation = object()

    register_optimizer_step_post_hook(begin_generation)


def version_of(*tensors: Tensor) -> tuple[Any, ...]:
    """Return a key of the values of tensors, and of the stream: on another, what they give may not be ready."""
    device = tensors[0].device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return *((tensor.data_ptr(), tensor._version) for tensor in tensors), stream


class WeightCache:
    """Cache the int8 values of one weight, and of its transpose, until the weight changes."""

    def __init__(self) -> None:
        _watch_optimizers()
        # One tuple (key, alias of the weight, int8 values), replaced as a whole, because threads may share a layer.
        # The alias shares the weight's version counter and keeps its memory alive, so no other tensor can reuse it.
        self._kept: tuple[tuple[Any, ...], Tensor, tuple[Quantized, Quantized | None]] | None = None

    @staticmethod
    def can_hold(weight: Tensor) -> bool:
        """Return whether the cache sees all changes of a weight: only of a parameter that trains.

        Writes to a frozen parameter, by a broadcast or ``.data``, are not seen. While a CUDA graph is captured, nothing
        is cached.
        """
        return (
            type(weight) is torch.nn.Parameter
            and weight.requires_grad
            and not weight.is_inference()
            and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def get(self, weight: Tensor, config: SwitchBackConfig, with_transpose: bool) -> tuple[Quantized, Quantized | None]:
        """Return W quantized and, with_transpose, Wᵀ quantized. Both are kept until W changes."""
        state = (version_of(weight), weight.dtype, config, _generation)
        kept = self._kept
        if kept is not None and kept[0] == state and not (with_transpose and kept[2][1] is None):
            return kept[2]
        kept = self._kept = None  # its memory serves the next
        quantized: tuple[Quantized, Quantized | None]
        with torch.inference_mode(False):  # what an evaluation leaves here must serve the next training step
            scaling = scaling_for(config, weight)
            if with_transpose:
                quantized = scaling.quantize_weight_with_transpose(weight)
            else:
                quantized = scaling.quantize_weight(weight), None
        if type(quantized[0][0]) is Tensor:  # not one of a FakeTensorMode
            self._kept = state, weight.detach(), quantized
        return quantized
