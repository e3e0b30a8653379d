"""One absmax over what several processes hold: of any tensors, and of the weights that FSDP2 has cut up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ..config import WeightScaling

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def absmax_bits(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Return the largest |x| as the int32 bits of a float32: (1,) over all of x, or along dim; 0 over nothing."""
    if x.numel() == 0:
        size = 1 if dim is None else x.shape[1 - dim]
        return torch.zeros(size, dtype=torch.int32, device=x.device)
    # The infinity norm keeps NaN, and reads x once without a copy of |x|.
    return to_bits(torch.linalg.vector_norm(x, float("inf"), dim).reshape(-1))


def foreach_absmax_bits(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return :func:`absmax_bits` over all of each tensor, in a few launches together."""
    filled = [x for x in tensors if x.numel()]
    bits = iter(to_bits(torch.stack([*torch._foreach_norm(filled, float("inf"))])).split(1) if filled else [])
    return [next(bits) if x.numel() else absmax_bits(x) for x in tensors]


def to_bits(absmax: torch.Tensor) -> torch.Tensor:
    """Return the bits of float32 magnitudes: integers that order like them, with Inf and then NaN on top."""
    return absmax.float().view(torch.int32) & 0x7FFFFFFF


def all_reduce_max(bits: torch.Tensor, groups: Iterable[dist.ProcessGroup]) -> torch.Tensor:
    """Return the absmax, float32, over all processes of the groups; bits is overwritten.

    As floats a backend's maximum may drop NaN, as integers it cannot.
    """
    for group in groups:
        dist.all_reduce(bits, dist.ReduceOp.MAX, group=group)
    return bits.view(torch.float32)


@dataclass
class WeightAbsmax:
    """Holds how a weight is scaled and, until the weight changes, its absmax. All views of the weight share it.

    Two are equal if they scale alike.
    """

    scaling: WeightScaling
    shape: torch.Size
    """[out, in] of what FSDP2 shards: this rank's part of the weight, if tensor parallelism has cut it up."""
    tensor_parallel: dist.ProcessGroup | None = None
    """The group of the other parts, if one absmax covers them too."""
    tensor_parallel_dims: int = 0
    """Number of dimensions of the sharded weight's mesh that belong to tensor parallelism."""
    writes: int = field(default=0, init=False, compare=False)
    """Number of writes through wrappers. Autograd's version counter does not run below them; it counts other writes."""
    _known: torch.Tensor | None = field(default=None, init=False, compare=False)
    _seen: tuple[int, int] = field(default=(-1, -1), init=False, compare=False)

    def copy(self) -> WeightAbsmax:
        """Return an unknown absmax, for a weight in other memory."""
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: Any) -> WeightAbsmax:
        """Copy for a model's copy and for Dynamo's guards: a process group has no copies."""
        return self.copy()

    def set(self, absmax: torch.Tensor | None, data: torch.Tensor) -> None:
        self._known, self._seen = absmax, (self.writes, data._version)

    def get(self, data: torch.Tensor) -> torch.Tensor | None:
        return self._known if self._seen == (self.writes, data._version) else None


class WeightShard(NamedTuple):
    """A rank's shard of a weight, among those of a mesh dimension."""

    data: torch.Tensor
    absmax: WeightAbsmax
    mesh: DeviceMesh
    mesh_dim: int

    @property
    def padded_rows(self) -> int:
        """Rows of the largest shard, which FSDP2 wants of each."""
        rows, cols = self.absmax.shape
        return math.ceil(rows / self.mesh.size(self.mesh_dim)) if self.data.shape[1] == cols else rows

    @property
    def rows(self) -> slice:
        """Return the rows of the whole weight that this shard holds, or holds parts of."""
        is_cut_by_rows = self.padded_rows < self.absmax.shape[0]
        start = self.padded_rows * self.mesh.get_local_rank(self.mesh_dim) if is_cut_by_rows else 0
        return slice(start, start + self.data.shape[0])

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Whose shards one absmax covers."""
        groups = self.mesh.get_group(self.mesh_dim), self.absmax.tensor_parallel
        return tuple(group for group in groups if group is not None)

    def absmax_bits_of_rows(self) -> torch.Tensor:
        """Return one absmax per row of the whole weight: this shard's, and 0 for the rows of others."""
        bits = torch.zeros(self.absmax.shape[0], dtype=torch.int32, device=self.data.device)
        bits[self.rows] = absmax_bits(self.data, dim=1)
        return bits


@torch.inference_mode(False)  # what an evaluation leaves here must serve the next training step
@torch.no_grad()
def find_absmaxes(shards: list[WeightShard]) -> list[torch.Tensor]:
    """Return the absmaxes of weights over all their shards, and keep them; one all-reduce for all of them."""
    of_all = iter(foreach_absmax_bits([shard.data for shard in shards if shard.absmax.scaling == "global"]))
    bits = [next(of_all) if shard.absmax.scaling == "global" else shard.absmax_bits_of_rows() for shard in shards]
    together = torch.cat(bits).to(shards[0].mesh.device_type)  # from where CPUOffloadPolicy keeps the shards
    absmaxes = all_reduce_max(together, shards[0].groups).split([len(part) for part in bits])
    for shard, absmax in zip(shards, absmaxes, strict=True):
        shard.absmax.set(absmax, shard.data)
    return list(absmaxes)
