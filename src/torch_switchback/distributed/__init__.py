"""The layer under torch.distributed: FSDP2 with weights that travel as int8, and tensor parallelism.

Importing it registers both with the core.
"""

from . import registration  # noqa: F401
from .fsdp import precompute_absmax_for_fsdp

__all__ = ["precompute_absmax_for_fsdp"]
