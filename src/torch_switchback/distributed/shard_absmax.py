"""The absmaxes of weights that FSDP2 has cut up, over all their shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ..config import WeightScaling
from .absmax import absmax_bits, all_reduce_max, foreach_absmax_bits

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Absmax:
    """How a weight is scaled and, until the weight changes, its absmax. All views of the weight share it."""

    def __init__(
        self,
        scaling: WeightScaling,
        shape: torch.Size,
        tensor_parallel: dist.ProcessGroup | None = None,
        tensor_parallel_dims: int = 0,
    ) -> None:
        self.scaling = scaling
        self.shape = shape
        """[out, in] of what FSDP2 shards: this rank's part of the weight, if tensor parallelism has cut it up."""
        self.tensor_parallel = tensor_parallel
        """The group of the other parts, if one absmax covers them too."""
        self.tensor_parallel_dims = tensor_parallel_dims
        """How many dimensions of the sharded weight's mesh are tensor parallelism's."""
        self.writes = 0
        """Through wrappers. Autograd's version counter does not run below them, and counts those past them."""
        self._known: torch.Tensor | None = None
        self._seen = (-1, -1)

    @property
    def how(self) -> tuple[WeightScaling, torch.Size, dist.ProcessGroup | None, int]:
        """All but the absmax itself."""
        return self.scaling, self.shape, self.tensor_parallel, self.tensor_parallel_dims

    def copy(self) -> Absmax:
        """For a weight in other memory."""
        return Absmax(*self.how)

    def __deepcopy__(self, memo: Any) -> Absmax:
        """Of a model's copy, and for Dynamo's guards; a process group has no copies."""
        return self.copy()

    def set(self, absmax: torch.Tensor | None, data: torch.Tensor) -> None:
        self._known, self._seen = absmax, (self.writes, data._version)

    def get(self, data: torch.Tensor) -> torch.Tensor | None:
        return self._known if self._seen == (self.writes, data._version) else None

    def forget(self) -> None:
        self._known = None


class Shard(NamedTuple):
    """A rank's shard among those of a mesh dimension."""

    data: torch.Tensor
    absmax: Absmax
    mesh: DeviceMesh
    mesh_dim: int

    @property
    def padded_rows(self) -> int:
        """Rows of the largest shard, which FSDP2 wants of each."""
        rows, cols = self.absmax.shape
        is_cut_by_rows = self.data.shape[1] == cols
        return -(-rows // self.mesh.size(self.mesh_dim)) if is_cut_by_rows else rows

    @property
    def rows(self) -> slice:
        """Those of the whole weight that this shard has, or has parts of."""
        is_cut_by_rows = self.padded_rows < self.absmax.shape[0]
        start = self.mesh.get_local_rank(self.mesh_dim) * self.padded_rows if is_cut_by_rows else 0
        return slice(start, start + self.data.shape[0])

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Whose shards one absmax covers."""
        tensor_parallel = self.absmax.tensor_parallel
        return self.mesh.get_group(self.mesh_dim), *(() if tensor_parallel is None else (tensor_parallel,))

    def place(self, local: torch.Tensor) -> torch.Tensor:
        """Absmaxes of this shard's rows among zeros for the others'."""
        bits = local.new_zeros(self.absmax.shape[0])
        bits[self.rows] = local
        return bits


@torch.inference_mode(False)  # what an evaluation leaves here must serve the next training step
@torch.no_grad()
def find_absmaxes(shards: list[Shard]) -> list[torch.Tensor]:
    """The absmaxes of weights over all their shards, kept with the weights; one all-reduce for all of them."""
    globally = iter(foreach_absmax_bits([s.data for s in shards if s.absmax.scaling == "global"]))
    bits = [next(globally) if s.absmax.scaling == "global" else s.place(absmax_bits(s.data, dim=1)) for s in shards]
    together = torch.cat(bits).to(shards[0].mesh.device_type)  # from where CPUOffloadPolicy keeps the shards
    absmaxes = all_reduce_max(together, shards[0].groups).split([len(part) for part in bits])
    for shard, absmax in zip(shards, absmaxes, strict=True):
        shard.absmax.set(absmax, shard.data)
    return list(absmaxes)
