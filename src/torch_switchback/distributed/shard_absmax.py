"""The absmaxes of weights that FSDP2 has cut up, over all their shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from .absmax import absmax_bits, all_reduce_max, foreach_absmax_bits

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .fsdp_weights import ShardWeight


class Shard(NamedTuple):
    """A rank's shard among those of a mesh dimension."""

    weight: ShardWeight
    mesh: DeviceMesh
    mesh_dim: int

    @property
    def padded_rows(self) -> int:
        """Rows of the largest shard, which FSDP2 wants of each."""
        rows, cols = self.weight._absmax.shape
        is_cut_by_rows = self.weight.shape[1] == cols
        return -(-rows // self.mesh.size(self.mesh_dim)) if is_cut_by_rows else rows

    @property
    def rows(self) -> slice:
        """Those of the whole weight that this shard has, or has parts of."""
        is_cut_by_rows = self.padded_rows < self.weight._absmax.shape[0]
        start = self.mesh.get_local_rank(self.mesh_dim) * self.padded_rows if is_cut_by_rows else 0
        return slice(start, start + self.weight.shape[0])

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Whose shards one absmax covers."""
        tensor_parallel = self.weight._absmax.tensor_parallel
        return self.mesh.get_group(self.mesh_dim), *(() if tensor_parallel is None else (tensor_parallel,))

    def place(self, local: torch.Tensor) -> torch.Tensor:
        """Absmaxes of this shard's rows among zeros for the others'."""
        bits = local.new_zeros(self.weight._absmax.shape[0])
        bits[self.rows] = local
        return bits


@torch.inference_mode(False)  # what an evaluation leaves here must serve the next training step
@torch.no_grad()
def find_absmaxes(shards: list[Shard]) -> list[torch.Tensor]:
    """The absmaxes of weights over all their shards, kept with the weights; one all-reduce for all of them."""
    globally = iter(foreach_absmax_bits([s.weight._data for s in shards if s.weight._absmax.scaling == "global"]))
    bits = [
        next(globally) if s.weight._absmax.scaling == "global" else s.place(absmax_bits(s.weight._data, dim=1))
        for s in shards
    ]
    together = torch.cat(bits).to(shards[0].mesh.device_type)  # from where CPUOffloadPolicy keeps the shards
    absmaxes = all_reduce_max(together, shards[0].groups).split([len(part) for part in bits])
    for shard, absmax in zip(shards, absmaxes, strict=True):
        shard.weight._absmax.set(absmax, shard.weight._data)
    return list(absmaxes)
