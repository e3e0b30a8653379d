"""A model whose weights FSDP2 gathers as int8: made so before ``fully_shard``, and back; all absmaxes at once."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..config import SwitchBackConfig
from .absmax import WeightShard, find_absmaxes
from .fsdp_weights import GatheredWeight, ShardWeight, local_part, unwrap, wrap


def precompute_absmax_for_fsdp(model: nn.Module) -> None:
    """Find the absmaxes of all weights that FSDP2 gathers as int8, in one all-reduce instead of one per weight.

    Call it after each ``optimizer.step()``, on every rank. After a compiled step it is required, because the
    library cannot see its writes. Otherwise the result is the same without it: each all-gather then finds the absmax of
    its own weight first. An absmax serves until its weight changes.

    Args:
        model: converted with ``SwitchBackConfig(all_gather="int8")``, then sharded with ``fully_shard``.

    Raises:
        ValueError: no layer of the model gathers its weight as int8.
    """
    weights = [each for each in model.parameters() if isinstance(local_part(each), ShardWeight | GatheredWeight)]
    if not weights:
        raise ValueError("precompute_absmax_for_fsdp: no layer was converted with all_gather='int8'")
    together: dict[tuple[dist.ProcessGroup, ...], list[WeightShard]] = defaultdict(list)
    for weight in weights:
        if (shard := _shard_of(weight)) is not None:
            together[shard.groups].append(shard)
    for shards in together.values():
        find_absmaxes(shards)


def _shard_of(weight: Any) -> WeightShard | None:
    """Return this rank's shard of a wrapped weight; None before fully_shard, and while the weight is gathered."""
    local, mesh = local_part(weight), getattr(weight, "device_mesh", None)
    if not isinstance(local, ShardWeight) or mesh is None:
        return None
    # FSDP2 puts its dimensions before those of tensor parallelism, and of its own the shards' last.
    mesh_dim = mesh.ndim - local._absmax.tensor_parallel_dims - 1
    return WeightShard(local._data, local._absmax, mesh, mesh_dim) if mesh_dim >= 0 else None


def sharded_by(module: nn.Module) -> str:
    """Return the name of what shards a module's parameters, or "". It imports neither version of FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        return "fully_shard"
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        return "FullyShardedDataParallel"
    return ""


def use_int8_all_gather(model: nn.Module, configs: Mapping[nn.Module, SwitchBackConfig]) -> None:
    """Wrap the weights of layers that are configured so, or are going to be; if refused, none.

    Raises:
        RuntimeError: fully_shard has been called already, or something besides modules holds such a weight.
        ValueError: such a layer shares its weight with a module that needs it in full.
    """
    if any(sharded_by(module) == "fully_shard" for module in model.modules()):
        raise RuntimeError("all_gather='int8': convert_to_switchback goes before fully_shard")
    names: dict[nn.Parameter, list[str]] = defaultdict(list)  # several where it is shared
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(fqn)
    wrapped: list[tuple[str, nn.Parameter, torch.Tensor]] = []
    for parameter, fqns in names.items():
        found: dict[str, SwitchBackConfig] = {}
        for fqn in fqns:
            owner, _, name = fqn.rpartition(".")
            layer = model.get_submodule(owner)
            config = configs.get(layer) or getattr(layer, "config", None)
            if name == "weight" and isinstance(config, SwitchBackConfig) and config.all_gather == "int8":
                found[fqn] = config
        if not found or isinstance(local_part(parameter), ShardWeight):
            continue
        asking, config = next(iter(found.items()))
        for fqn in fqns:
            if found.get(fqn) != config:
                raise ValueError(
                    f"all_gather='int8': {asking} is also {fqn}, which is needed otherwise; "
                    "leave the layer out with module_filter_fn"
                )
        wrapped.append((fqns[0], parameter, wrap(parameter.detach(), config)))
    _put_into_parameters(wrapped)


def undo_int8_all_gather(model: nn.Module) -> None:
    """Unwrap the weights again; if refused, none.

    Raises:
        RuntimeError: fully_shard has cut them up, or something besides modules holds one.
    """
    plain: list[tuple[str, nn.Parameter, torch.Tensor]] = []
    for fqn, parameter in model.named_parameters():
        local = local_part(parameter)
        if isinstance(local, GatheredWeight) or _shard_of(parameter) is not None:
            raise RuntimeError(f"{fqn}: fully_shard gathers it as int8, which cannot be undone")
        if isinstance(local, ShardWeight):
            plain.append((fqn, parameter, unwrap(parameter.detach())))
    _put_into_parameters(plain)


def _put_into_parameters(tensors: Iterable[tuple[str, nn.Parameter, torch.Tensor]]) -> None:
    """Give parameters, which follow their names, other tensors to be; an optimizer goes on with the same objects.

    It does so for all of them or, if autograd's graph, a view or a weak reference holds one, raises RuntimeError.
    """
    with contextlib.ExitStack() as undo:
        for fqn, parameter, tensor in tensors:
            other = nn.Parameter(tensor, parameter.requires_grad)
            try:
                _swap(parameter, other)
            except RuntimeError as error:
                raise RuntimeError(
                    f"all_gather='int8': {fqn} is held by a view or by the graph of a forward: {error}"
                ) from error
            undo.callback(_swap, parameter, other)
        undo.pop_all()


def _swap(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Exchange all of two parameters but what belongs to the first as an object: gradient, hooks and attributes."""
    grad, hooks, post_hooks = parameter.grad, parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    of_the_wrapper = {"_data", "_absmax", "_is_param"}
    attributes = {name: value for name, value in vars(parameter).items() if name not in of_the_wrapper}
    torch.utils.swap_tensors(parameter, other)
    vars(parameter).update(attributes)
    parameter._backward_hooks, parameter._post_accumulate_grad_hooks = hooks, post_hooks
    parameter.grad = grad
