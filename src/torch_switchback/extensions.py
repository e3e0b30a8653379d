"""Hold the functions that the core calls for tensors of torch.distributed.

The core does not import ``distributed``, which registers itself here.
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


distributed: DistributedTensors
