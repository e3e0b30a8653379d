"""Tell the core how to treat DTensors and FSDP2's weights. It imports no torch.distributed.tensor until one is met."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import extensions
from ..config import SwitchBackConfig
from . import fsdp


class _DistributedTensors(extensions.DistributedTensors):
    def linear(self, x: Any, weight: Any, bias: Any, config: SwitchBackConfig) -> torch.Tensor:
        from .tensor_parallel import switchback_linear

        return switchback_linear(x, weight, bias, config)

    def unwrap(self, weight: torch.Tensor) -> torch.Tensor:
        return fsdp.unwrap(weight)

    def wrap_like(self, tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fsdp.wrap_like(tensor, weight)

    def use_int8_all_gather(self, model: nn.Module, configs: Mapping[nn.Module, SwitchBackConfig]) -> None:
        fsdp.use_int8_all_gather(model, configs)

    def undo_int8_all_gather(self, model: nn.Module) -> None:
        fsdp.undo_int8_all_gather(model)


extensions.register(_DistributedTensors())
