"""The layer under torch.distributed: FSDP2 with weights that travel as int8, and tensor parallelism."""

from .fsdp import precompute_absmax_for_fsdp

__all__ = ["precompute_absmax_for_fsdp"]
