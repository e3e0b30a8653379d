"""Hooks of the core for tensors of torch.distributed. It does not import ``distributed``, which registers here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import SwitchBackConfig


class DistributedTensors:
    """Treat DTensors and weights that FSDP2 shards. This class knows plain tensors alone."""

    def linear(self, x: Any, weight: Any, bias: Any, config: SwitchBackConfig) -> torch.Tensor:
        """Compute the layer on DTensors."""
        raise TypeError("switchback_linear: x and weight must not be DTensors: torch_switchback.distributed is missing")

    def unwrap(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the plain tensor that a state_dict has in a weight's place."""
        return weight

    def wrap_like(self, tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return a tensor of a state_dict as the weight whose place it takes."""
        return tensor

    def use_int8_all_gather(self, model: nn.Module, configs: Mapping[nn.Module, SwitchBackConfig]) -> None:
        """Have FSDP2 gather the weights of a model's layers as int8, where their config asks for it."""
        raise RuntimeError("all_gather='int8': torch_switchback.distributed is missing")

    def undo_int8_all_gather(self, model: nn.Module) -> None:
        """Undo :meth:`use_int8_all_gather`."""


distributed = DistributedTensors()


def register(implementation: DistributedTensors) -> None:
    """Use an implementation that knows more tensors."""
    global distributed
    distributed = implementation
