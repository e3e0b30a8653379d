"""FSDP2 with weights that travel as int8: all-gather extensions of ``torch.distributed.fsdp.fully_shard``.

A layer's weight becomes a :class:`ShardWeight` before ``fully_shard`` cuts it up. Of it FSDP2 asks what to gather: the
codes of each rank's shard, quantised by the absmax over all shards, so that they are the codes of the whole weight.
What it gathers becomes the :class:`GatheredWeight` that the layer computes with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from ..autograd import requantize_columnwise
from ..config import SwitchBackConfig, WeightScaling
from ..ops import dequantize_rowwise, quantize_by_absmax
from .absmax import absmax_bits, all_reduce_max, foreach_absmax_bits

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

_ATEN = torch.ops.aten
_OPS = torch.ops.torch_switchback


class _Absmax:
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

    def copy(self) -> _Absmax:
        """For a weight in other memory."""
        return _Absmax(*self.how)

    def __deepcopy__(self, memo: Any) -> _Absmax:
        """Of a model's copy, and for Dynamo's guards; a process group has no copies."""
        return self.copy()

    def set(self, absmax: torch.Tensor | None, data: torch.Tensor) -> None:
        self._known, self._seen = absmax, (self.writes, data._version)

    def get(self, data: torch.Tensor) -> torch.Tensor | None:
        return self._known if self._seen == (self.writes, data._version) else None

    def forget(self) -> None:
        self._known = None


class ShardWeight(torch.Tensor):
    """A weight, or a rank's shard of one, which FSDP2 all-gathers as int8. Everything else sees the tensor it wraps."""

    _data: torch.Tensor
    _absmax: _Absmax

    @staticmethod
    def __new__(cls, data: torch.Tensor, absmax: _Absmax) -> ShardWeight:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=data.device,
            pin_memory=data.is_pinned(),
        )
        self._data, self._absmax = data, absmax
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self._data!r}, scaling={self._absmax.scaling!r})"

    def __tensor_flatten__(self) -> tuple[list[str], _Absmax]:
        return ["_data"], self._absmax

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], absmax: _Absmax, size: Any, stride: Any) -> ShardWeight:
        # Compiled code makes its outputs so, all with what it was traced with, whatever weight it is called with.
        return ShardWeight(inner["_data"], absmax.copy())

    @classmethod
    def __metadata_guard__(cls, traced: _Absmax, absmax: _Absmax) -> bool:
        """Whether Dynamo may run what it traced with another weight: how they are scaled is all that counts."""
        return traced.how == absmax.how

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN.copy_.default and isinstance(args[0], ShardWeight):
            return _copy(*args)
        if func is _ATEN.detach.default:
            return ShardWeight(args[0]._data, args[0]._absmax)
        result = func(*_unwrapped(args), **_unwrapped(kwargs))
        for position, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                tree_map_only(ShardWeight, _count_write, written)
                if isinstance(written, ShardWeight):
                    return written
        if func in _VIEWS:
            return tree_map_only(torch.Tensor, lambda data: ShardWeight(data, args[0]._absmax), result)
        if func in _COPIES:
            copy = ShardWeight(result, args[0]._absmax.copy())
            if func in _SAME_VALUES and result.dtype == args[0].dtype:
                copy._absmax.set(args[0]._absmax.get(args[0]._data), result)
            return copy
        return result

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """This rank's codes, padded to the largest shard, and the absmax of the whole weight."""
        if tuple(outer_size) != tuple(self._absmax.shape):
            raise RuntimeError(
                f"all_gather='int8': a weight of shape {tuple(self._absmax.shape)} has become {tuple(outer_size)}; "
                "convert_to_switchback goes after parallelize_module and before fully_shard"
            )
        shard = _Shard(self, mesh, 0)
        absmax = self._absmax.get(self._data)
        if absmax is None:
            (absmax,) = _find_absmaxes([shard])
        codes = quantize_by_absmax(self._data, absmax[shard.rows] if absmax.numel() > 1 else absmax)
        missing = shard.padded_rows - codes.shape[0]
        if missing:
            codes = torch.cat([codes, codes.new_zeros(missing, codes.shape[1])])
        return (codes,), absmax

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor],
        metadata: torch.Tensor,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[GatheredWeight, tuple[torch.Tensor]] | None:
        """The weight that the layer computes with; given out, its codes are in place and only its absmax is set."""
        (codes,) = all_gather_outputs
        if out is None:
            return GatheredWeight(codes, metadata, param_dtype), (codes,)
        _local(out)._absmax = metadata
        return None


_VIEWS = {
    _ATEN.alias.default,
    _ATEN.as_strided.default,
    _ATEN.slice.Tensor,
    _ATEN.split.Tensor,
    _ATEN.split_with_sizes.default,
    _ATEN.view.default,
}
_SAME_VALUES = {_ATEN._pin_memory.default, _ATEN._to_copy.default, _ATEN.clone.default}
_COPIES = {*_SAME_VALUES, _ATEN.empty_like.default, _ATEN.new_zeros.default}


def _unwrapped(values: Any) -> Any:
    return tree_map_only(ShardWeight, lambda weight: weight._data, values)


def _copy(target: ShardWeight, source: torch.Tensor, non_blocking: bool = False) -> ShardWeight:
    """target.copy_(source). Whether an absmax is known must be the same on all ranks, or some wait for the others.

    FSDP2 moves uneven shards, and those alone, to new zeros that are padded; so the absmax moves along.
    """
    absmax = source._absmax.get(source._data) if isinstance(source, ShardWeight) else None
    is_first = target._absmax.writes == 0
    target._data.copy_(_unwrapped(source), non_blocking)
    _count_write(target)
    if is_first and absmax is not None:
        target._absmax.set(absmax, target._data)
    return target


def _count_write(weight: ShardWeight) -> None:
    weight._absmax.writes += 1


class GatheredWeight(torch.Tensor):
    """A weight [out, in] of which a rank has the int8 codes and the absmax.

    Quantising it gives those back, so a SwitchBackLinear computes with them as it would with a plain weight; its
    gradient is plain, in the dtype that FSDP2's policy says. No other operation may read it.
    """

    _codes: torch.Tensor
    _absmax: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> GatheredWeight:
        self = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )
        self._codes, self._absmax = codes, absmax
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self._codes!r}, {self._absmax!r}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["_codes", "_absmax"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> GatheredWeight:
        return GatheredWeight(inner["_codes"], inner["_absmax"], dtype)

    def dequantize(self) -> torch.Tensor:
        """The plain weight that the codes stand for."""
        return dequantize_rowwise(self._codes, self._absmax.expand(self.shape[0]).contiguous(), self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[0]
        if func in _QUANTISERS and isinstance(weight, GatheredWeight):
            return _QUANTISERS[func](*args)
        if func in _GATHERED_VIEWS and isinstance(weight, GatheredWeight):
            return GatheredWeight(func(weight._codes, *args[1:], **kwargs), weight._absmax, weight.dtype)
        if func in _FACTORIES and isinstance(weight, GatheredWeight):
            return func(weight._codes, *args[1:], **{"dtype": weight.dtype} | kwargs)
        raise NotImplementedError(
            f"{func} on a weight that was gathered as int8: only SwitchBackLinear computes with it; "
            "leave the layer out of the conversion, or set all_gather='high_precision'"
        )


def _codes_and_absmax(weight: GatheredWeight, scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    if weight._absmax.numel() != scales:
        raise ValueError(
            f"the weight was gathered with {weight._absmax.numel()} absmaxes, the layer's config wants {scales}; "
            "with all_gather='int8' the weight scaling stays as it was converted"
        )
    return weight._codes, weight._absmax


_QUANTISERS: dict[Any, Callable[..., Any]] = {
    _OPS.quantize_global.default: lambda weight: _codes_and_absmax(weight, 1),
    _OPS.quantize_rowwise.default: lambda weight: _codes_and_absmax(weight, weight.shape[0]),
    _OPS.quantize_by_absmax.default: lambda weight, absmax: weight._codes,
    _OPS.quantize_transpose_by_absmax.default: lambda weight, absmax: weight._codes.t().contiguous(),
    _OPS.quantize_columnwise_and_transpose.default: lambda weight: requantize_columnwise(weight._codes, weight._absmax),
}
_GATHERED_VIEWS = {_ATEN.alias.default, _ATEN.as_strided.default, _ATEN.detach.default, _ATEN.view.default}
_FACTORIES = {_ATEN.empty_like.default, _ATEN.new_empty.default, _ATEN.new_zeros.default, _ATEN.zeros_like.default}


class _Shard(NamedTuple):
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
def _find_absmaxes(shards: list[_Shard]) -> list[torch.Tensor]:
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
    together: dict[tuple[dist.ProcessGroup, ...], list[_Shard]] = {}
    weights: dict[Any, None] = dict.fromkeys(layer.weight for layer in layers)
    for weight in weights:
        local = _local(weight)
        if isinstance(local, ShardWeight) and (mesh_dim := _shard_dim(weight)) is not None:
            shard = _Shard(local, weight.device_mesh, mesh_dim)
            together.setdefault(shard.groups, []).append(shard)
    for shards in together.values():
        _find_absmaxes(shards)


def _shard_dim(weight: Any) -> int | None:
    """Of the mesh that a wrapped weight lies on the dimension that FSDP2 shards over; None before fully_shard.

    FSDP2 puts its dimensions before those of tensor parallelism, and of its own the shards' last.
    """
    mesh = getattr(weight, "device_mesh", None)
    dims = 0 if mesh is None else mesh.ndim - _local(weight)._absmax.tensor_parallel_dims
    return dims - 1 if dims else None


def _local(tensor: Any) -> Any:
    """A DTensor's part on this rank; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


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
        if config is None or isinstance(_local(weight), ShardWeight):
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
        if isinstance(_local(weight), GatheredWeight) or _shard_dim(weight) is not None:
            raise RuntimeError(f"{places[0].fqn}: fully_shard gathers its weight as int8, which cannot be undone")
    _put_into_parameters((weight, unwrap(weight.detach()), places[0].fqn) for weight, places in wrapped.items())


def _is_wrapped(weight: torch.Tensor) -> bool:
    return isinstance(_local(weight), ShardWeight | GatheredWeight)


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
    """Give parameters other tensors to be, into all of them or none; an optimiser goes on with the same objects.

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
        return ShardWeight(weight, _Absmax(config.weight_scaling, weight.shape))
    group, rows_are_whole = weight.device_mesh.get_group(), weight.placements == (Shard(0),)
    spans = not (config.weight_scaling == "rowwise" and rows_are_whole)
    local = weight.to_local()
    absmax = _Absmax(config.weight_scaling, local.shape, group if spans else None, tensor_parallel_dims=1)
    return _from_local(ShardWeight(local, absmax), weight)


def _from_local(local: torch.Tensor, like: Any) -> torch.Tensor:
    return type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def unwrap(weight: torch.Tensor) -> torch.Tensor:
    """The plain tensor, or DTensor of plain tensors, that a state_dict has in a weight's place; it shares memory.

    Who gets it may write to it, so the weight's absmax is forgotten, on every rank alike.
    """
    local = _local(weight)
    if not isinstance(local, ShardWeight):
        return weight
    local._absmax.forget()
    return local._data if local is weight else _from_local(local._data, weight)


def wrap_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A tensor, or DTensor, in a weight's place: wrapped if the weight is."""
    wrapped, local = _local(weight), _local(tensor)
    if not isinstance(wrapped, ShardWeight) or isinstance(local, ShardWeight):
        return tensor
    shard = ShardWeight(local, wrapped._absmax.copy())
    return shard if local is tensor else _from_local(shard, tensor)
