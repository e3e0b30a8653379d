"""A model whose weights FSDP2 gathers as int8: made so before ``fully_shard``, and back; all absmaxes at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..config import SwitchBackConfig
from .fsdp_weights import GatheredWeight, ShardWeight, local_part
from .shard_absmax import Absmax, Shard, find_absmaxes


def precompute_absmax_for_fsdp(model: nn.Module) -> None:
    """Find the absmaxes of all weights that FSDP2 gathers as int8, in one all-reduce instead of one a weight.

    Call it after each ``optimizer.step()``, on every rank. Without it the result is the same: each all-gather then
    finds the absmax of its own weight first. An absmax serves until its weight changes.

    Args:
        model: converted with ``SwitchBackConfig(all_gather="int8")``, then sharded with ``fully_shard``.

    Raises:
        ValueError: no layer of the model gathers its weight as int8.
    """
    layers = [module for module in model.modules() if _int8_config(module) and module.weight is not None]
    if not layers:
        raise ValueError("precompute_absmax_for_fsdp: no layer was converted with all_gather='int8'")
    together: dict[tuple[dist.ProcessGroup, ...], list[Shard]] = {}
    weights: dict[Any, None] = dict.fromkeys(layer.weight for layer in layers)
    for weight in weights:
        local = local_part(weight)
        if isinstance(local, ShardWeight) and (mesh_dim := _shard_dim(weight)) is not None:
            shard = Shard(local._data, local._absmax, weight.device_mesh, mesh_dim)
            together.setdefault(shard.groups, []).append(shard)
    for shards in together.values():
        find_absmaxes(shards)


def _shard_dim(weight: Any) -> int | None:
    """Of the mesh that a wrapped weight lies on the dimension that FSDP2 shards over; None before fully_shard.

    FSDP2 puts its dimensions before those of tensor parallelism, and of its own the shards' last.
    """
    mesh = getattr(weight, "device_mesh", None)
    dims = 0 if mesh is None else mesh.ndim - local_part(weight)._absmax.tensor_parallel_dims
    return dims - 1 if dims else None


def _int8_config(
    module: nn.Module, configs: Mapping[nn.Module, SwitchBackConfig] | None = None
) -> SwitchBackConfig | None:
    """Of a layer that gathers its weight as int8, or is going to by its config in configs."""
    config = (configs or {}).get(module) or getattr(module, "config", None)
    return config if isinstance(config, SwitchBackConfig) and config.all_gather == "int8" else None


def use_int8_all_gather(model: nn.Module, configs: Mapping[nn.Module, SwitchBackConfig]) -> None:
    """Wrap the weights of layers that are configured so, before ``fully_shard`` cuts them up; if refused, none.

    Args:
        model: whose layers those are.
        configs: what layers that are not converted yet are going to have.

    Raises:
        RuntimeError: fully_shard has been called already, or something besides modules holds such a weight.
        ValueError: such a layer shares its weight with a module that needs it in full.
    """
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise RuntimeError("all_gather='int8': convert_to_switchback goes before fully_shard")
    wanted: list[tuple[nn.Parameter, torch.Tensor, str]] = []
    for weight, places in _places(model).items():
        asked = [_int8_config(place.module, configs) if place.name == "weight" else None for place in places]
        config = next(filter(None, asked), None)
        if config is None or isinstance(local_part(weight), ShardWeight):
            continue
        for place, other in zip(places, asked, strict=True):
            if other != config:
                raise ValueError(
                    f"all_gather='int8': {places[asked.index(config)].fqn} shares its weight with "
                    f"{place.fqn}.{place.name}, which needs it otherwise; leave the layer out with module_filter_fn"
                )
        wanted.append((weight, _wrap(weight.detach(), config), places[0].fqn))
    _put_into_parameters(wanted)


def undo_int8_all_gather(model: nn.Module) -> None:
    """Unwrap the weights again; if refused, none.

    Raises:
        RuntimeError: fully_shard has cut them up, or something besides modules holds one.
    """
    wrapped = {weight: places for weight, places in _places(model).items() if _is_wrapped(weight)}
    for weight, places in wrapped.items():
        if isinstance(local_part(weight), GatheredWeight) or _shard_dim(weight) is not None:
            raise RuntimeError(f"{places[0].fqn}: fully_shard gathers its weight as int8, which cannot be undone")
    _put_into_parameters((weight, unwrap(weight.detach()), places[0].fqn) for weight, places in wrapped.items())


def _is_wrapped(weight: torch.Tensor) -> bool:
    return isinstance(local_part(weight), ShardWeight | GatheredWeight)


class _Place(NamedTuple):
    """Where a parameter is registered."""

    fqn: str
    module: nn.Module
    name: str


def _places(model: nn.Module) -> dict[nn.Parameter, list[_Place]]:
    """All places of each parameter, several where it is shared."""
    places: dict[nn.Parameter, list[_Place]] = {}
    for fqn, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append(_Place(fqn, module, name))
    return places


def _put_into_parameters(tensors: Iterable[tuple[nn.Parameter, torch.Tensor, str]]) -> None:
    """Give parameters other tensors to be, into all of them or none; an optimizer goes on with the same objects.

    Args:
        tensors: of each parameter, with the name of a module that has it.

    Raises:
        RuntimeError: autograd's graph, a view or a weak reference holds one of the parameters.
    """
    with contextlib.ExitStack() as undo:
        for parameter, tensor, fqn in tensors:
            other = nn.Parameter(tensor, parameter.requires_grad)
            try:
                _swap(parameter, other)
            except RuntimeError as error:
                raise RuntimeError(
                    f"all_gather='int8': {fqn}: its weight is held by a view or by the graph of a forward: {error}"
                ) from error
            undo.callback(_swap, parameter, other)
        undo.pop_all()


def _swap(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Exchange all of two parameters but what belongs to the first as an object: gradient, hooks and attributes."""
    grad, hooks, post_hooks = parameter.grad, parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    attributes = {name: value for name, value in vars(parameter).items() if name not in _OF_THE_WRAPPER}
    torch.utils.swap_tensors(parameter, other)
    vars(parameter).update(attributes)
    parameter._backward_hooks, parameter._post_accumulate_grad_hooks = hooks, post_hooks
    parameter.grad = grad


_OF_THE_WRAPPER = {"_data", "_absmax", "_is_param"}


def _wrap(weight: torch.Tensor, config: Any) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(weight, DTensor):
        return ShardWeight(weight, Absmax(config.weight_scaling, weight.shape))
    group, rows_are_whole = weight.device_mesh.get_group(), weight.placements == (Shard(0),)
    spans = not (config.weight_scaling == "rowwise" and rows_are_whole)
    local = weight.to_local()
    absmax = Absmax(config.weight_scaling, local.shape, group if spans else None, tensor_parallel_dims=1)
    return _from_local(ShardWeight(local, absmax), weight)


def _from_local(local: torch.Tensor, like: Any) -> torch.Tensor:
    return type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def unwrap(weight: torch.Tensor) -> torch.Tensor:
    """The plain tensor, or DTensor of plain tensors, that a state_dict has in a weight's place; it shares memory.

    Who gets it may write to it, so the weight's absmax is forgotten, on every rank alike.
    """
    local = local_part(weight)
    if not isinstance(local, ShardWeight):
        return weight
    local._absmax.forget()
    return local._data if local is weight else _from_local(local._data, weight)


def wrap_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A tensor, or DTensor, in a weight's place: wrapped if the weight is."""
    wrapped, local = local_part(weight), local_part(tensor)
    if not isinstance(wrapped, ShardWeight) or isinstance(local, ShardWeight):
        return tensor
    shard = ShardWeight(local, wrapped._absmax.copy())
    return shard if local is tensor else _from_local(shard, tensor)
