"""One absmax over what several processes hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist


def absmax_bits(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The largest |x| as the int32 bits of a float32: (1,) over all of x, or along dim; 0 over nothing."""
    if x.numel() == 0:
        size = 1 if dim is None else x.shape[1 - dim]
        return torch.zeros(size, dtype=torch.int32, device=x.device)
    # The infinity norm keeps NaN, and reads x once without a copy of |x|.
    return to_bits(torch.linalg.vector_norm(x, float("inf"), dim).reshape(-1))


def foreach_absmax_bits(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """:func:`absmax_bits` over all of each tensor, in a few launches together."""
    filled = [x for x in tensors if x.numel()]
    bits = iter(to_bits(torch.stack([*torch._foreach_norm(filled, float("inf"))])).split(1) if filled else [])
    return [next(bits) if x.numel() else absmax_bits(x) for x in tensors]


def to_bits(absmax: torch.Tensor) -> torch.Tensor:
    """Magnitudes as the bits of a float32. As integers they order like the magnitudes, with Inf and then NaN on top."""
    return absmax.float().view(torch.int32) & 0x7FFFFFFF


def all_reduce_max(bits: torch.Tensor, groups: Iterable[dist.ProcessGroup]) -> torch.Tensor:
    """The absmax, float32, over all processes of the groups; bits is overwritten.

    As floats a backend's maximum may drop NaN, as integers it cannot.
    """
    for group in groups:
        dist.all_reduce(bits, dist.ReduceOp.MAX, group=group)
    return bits.view(torch.float32)
