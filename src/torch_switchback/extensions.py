"""Hold the functions that the core calls for tensors of torch.distributed, and for models of other libraries.

The core does not import ``distributed`` and ``integrations``, which register themselves here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import SwitchBackConfig


@dataclass(frozen=True)
class DistributedTensors:
    """Functions for DTensors and for weights that FSDP2 gathers as int8."""

    linear: Callable[[Any, Any, Any, SwitchBackConfig], torch.Tensor]
    """Compute the layer on DTensors, given x, weight, bias or None, and config."""
    unwrap: Callable[[torch.Tensor], torch.Tensor]
    """Return the plain tensor that a state_dict has in a weight's place."""
    wrap_like: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Return a tensor of a state_dict, given the weight whose place it takes; wrapped if that is."""
    use_int8_all_gather: Callable[[nn.Module, Mapping[nn.Module, SwitchBackConfig]], None]
    """Have FSDP2 gather the weights of a model's layers as int8, where their config asks for it."""
    undo_int8_all_gather: Callable[[nn.Module], None]
    """Undo use_int8_all_gather."""
    sharded_by: Callable[[nn.Module], str]
    """Return the name of what shards a module's parameters, or ""."""


distributed: DistributedTensors

observers: list[Callable[[nn.Module], None]] = []
"""Functions to call with a model whose layers were converted, prepared or put back, and with a layer that was prepared.
"""


def layers_changed(module: nn.Module) -> None:
    """Tell the observers of a model whose layers were converted, prepared or put back, or of a layer."""
    for observer in observers:
        observer(module)
