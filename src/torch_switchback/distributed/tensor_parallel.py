"""Tensor parallelism: the layer on DTensors, as ``parallelize_module`` makes them.

Every absmax is that of the whole tensor, so every rank's int8 values are its part of a single process's. Where an
absmax spans the shards, an all-reduce finds it (W [out, in] with N ranks, G the output's gradient, → how it is cut):

    weight            X            Y            spans the shards
    Shard(0), column  whole        by features  W's global absmax; a column's of W; a row's of G
    Shard(1), row     by features  partial sum  W's global absmax; a row's of W; a row's of X
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..config import SwitchBackConfig
from ..functional import Call, SwitchBackFunction
from ..scaling import Quantized, Scaling, scaling_for
from .absmax import absmax_bits, all_reduce_max
from .fsdp_weights import GatheredWeight


def switchback_linear(x: Any, weight: Any, bias: Any, config: SwitchBackConfig) -> DTensor:
    """Apply :func:`torch_switchback.switchback_linear` to DTensors on one mesh of one dimension.

    Args:
        x: DTensor (*, in_features), redistributed to what the weight's placement asks for.
        weight: DTensor [out_features, in_features], Shard(0), Shard(1) or Replicate().
        bias: DTensor [out_features], Shard(0) with such a weight, otherwise Replicate(); or None.

    Returns:
        DTensor (*, out_features): Shard(-1), Partial() or Replicate(), in the order of the weight's placements.

    Raises:
        TypeError: one of the tensors is no DTensor, or the weight has been quantized for good.
        ValueError: their meshes differ or have several dimensions, a placement is another, or the config asks for an
            int8 weight gradient or rotated features.
    """
    op = "switchback_linear"
    for name, tensor in {"weight": weight, "x": x, "bias": bias}.items():
        if tensor is None:
            continue
        if not isinstance(tensor, DTensor):
            raise TypeError(
                f"{op}: x, weight and bias must all be DTensors or none, {name} is a {type(tensor).__name__}; "
                "parallelize_module (ColwiseParallel, RowwiseParallel) and fully_shard see to it"
            )
        if tensor.device_mesh != weight.device_mesh or tensor.device_mesh.ndim != 1:
            raise ValueError(
                f"{op}: x, weight and bias must be on one mesh of one dimension, {name} is on {tensor.device_mesh}, "
                f"weight on {weight.device_mesh}"
            )
    if weight.dtype == torch.int8:
        raise TypeError(f"{op}: a layer that was prepared for evaluation cannot be tensor-parallel")
    if config.grad_weight != "high_precision":
        raise ValueError(f"{op}: grad_weight={config.grad_weight!r} is not available for tensor-parallel layers")
    if config.rotate_features is not None:
        raise ValueError(f"{op}: rotate_features={config.rotate_features} is not available for tensor-parallel layers")
    mesh, (placement,) = weight.device_mesh, weight.placements
    by_features = Shard(x.ndim - 1)
    placements: tuple[Placement, Placement, Placement]
    if placement == Shard(0):
        placements = Replicate(), by_features, Shard(0)
    elif placement == Shard(1):
        placements = by_features, Partial(), Replicate()
    elif placement == Replicate():
        placements = Replicate(), Replicate(), Replicate()
    else:
        raise ValueError(f"{op}: weight must be placed as Shard(0), Shard(1) or Replicate(), got {placement}")
    x_placement, y_placement, bias_placement = placements
    if bias is not None and bias.placements != (bias_placement,):
        raise ValueError(f"{op}: with weight {placement}, bias must be {bias_placement}, got {bias.placements[0]}")

    # Each rank of a column-parallel layer has the gradient of X that its own features give.
    x_grad = Partial() if placement == Shard(0) else x_placement
    local_x = x.redistribute(placements=[x_placement]).to_local(grad_placements=[x_grad])
    local_weight, local_bias = weight.to_local(), None if bias is None else bias.to_local()
    scaling = scaling_for(config, x)
    if placement != Replicate():
        scaling = ShardedScaling(scaling, config, placement, local_weight, mesh.get_group())
    call = Call(config, None, scaling, False)
    y = SwitchBackFunction.apply(local_x, local_weight, None, None, None, local_bias, call)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, mesh, [y_placement], run_check=False, shape=shape, stride=stride)


class ShardedScaling(Scaling):
    """A scheme whose absmaxes are those of the whole tensors, found by an all-reduce where they span the shards.

    It is made of base, the scheme for whole tensors, and of this rank's part of a weight, Shard(0) or Shard(1).
    """

    def __init__(
        self,
        base: Scaling,
        config: SwitchBackConfig,
        placement: Placement,
        weight: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(base.ops)
        self.base, self.group = base, group
        self.quantize_weight, self.matmul = base.quantize_weight, base.matmul
        self.transpose_spans = False
        by_rows = placement == Shard(1)  # each rank has some of the inner dimension of the output's matmul
        if by_rows:
            self.quantize_input, self.matmul = self.quantize, self.matmul_term
        else:
            self.quantize_grad = self.quantize
        if isinstance(weight, GatheredWeight):  # FSDP2 has gathered it by the absmax of all of it
            return
        if config.weight_scaling == "global":
            self.quantize_weight = partial(self.quantize, dim=None)
        elif by_rows:
            self.quantize_weight = self.quantize
        else:
            self.transpose_spans = True

    def quantize(self, x: torch.Tensor, dim: int | None = 1) -> Quantized:
        """Quantize this rank's part of x by the absmax of each whole row or, if dim is None, by that of all of x."""
        absmax = all_reduce_max(absmax_bits(x, dim), [self.group])
        return self.ops.quantize_by_absmax(x, absmax), absmax

    def quantize_weight_transpose(self, weight: torch.Tensor, absmax: torch.Tensor) -> Quantized:
        if self.transpose_spans:
            return self.quantize(weight.t())
        return self.base.quantize_weight_transpose(weight, absmax)

    def matmul_term(
        self, a: Any, b: Any, state_x: Any, state_w: Any, bias: Any, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Compute this rank's term of the output, a sum over the group. Only the first rank adds the bias."""
        bias = bias if self.group.rank() == 0 else None
        return self.base.matmul(a, b, state_x, state_w, bias, out_dtype)
