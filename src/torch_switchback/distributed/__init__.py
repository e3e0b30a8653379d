"""The layer under torch.distributed: FSDP2 with weights that travel as int8, and tensor parallelism.

Importing it registers both with the core. It imports no torch.distributed.tensor until a DTensor is met.
"""

from typing import Any

import torch

from .. import extensions
from ..config import SwitchBackConfig
from .fsdp import precompute_absmax_for_fsdp, sharded_by, undo_int8_all_gather, use_int8_all_gather
from .fsdp_weights import unwrap, wrap_like

__all__ = ["precompute_absmax_for_fsdp"]


def _linear(x: Any, weight: Any, bias: Any, config: SwitchBackConfig) -> torch.Tensor:
    from .tensor_parallel import switchback_linear

    return switchback_linear(x, weight, bias, config)


extensions.distributed = extensions.DistributedTensors(
    linear=_linear,
    unwrap=unwrap,
    wrap_like=wrap_like,
    use_int8_all_gather=use_int8_all_gather,
    undo_int8_all_gather=undo_int8_all_gather,
    sharded_by=sharded_by,
)
