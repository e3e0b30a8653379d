"""The tensors that FSDP2 gathers as int8, by its all-gather extensions: a shard of a weight, and the weight gathered.

FSDP2 asks a :class:`ShardWeight` what to gather: the int8 values of each rank's shard, quantized by the absmax over
all shards, so that they are part of the whole weight's. What it gathers becomes the :class:`GatheredWeight` that the
layer computes with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..config import SwitchBackConfig
from ..ops import dequantize_rowwise, quantize_by_absmax, quantize_columnwise_and_transpose
from .absmax import WeightAbsmax, WeightShard, find_absmaxes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

_ATEN = torch.ops.aten
_OPS = torch.ops.torch_switchback


class ShardWeight(torch.Tensor):
    """A weight, or a rank's shard of one, which FSDP2 all-gathers as int8. Everything else sees the tensor it wraps."""

    _data: torch.Tensor
    _absmax: WeightAbsmax

    @staticmethod
    def __new__(cls, data: torch.Tensor, absmax: WeightAbsmax) -> ShardWeight:
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
        # PyTorch's own reads the elements, which a compiler's fake data does not have.
        return f"{type(self).__name__}({self._data!r}, scaling={self._absmax.scaling!r})"

    def __tensor_flatten__(self) -> tuple[list[str], WeightAbsmax]:
        return ["_data"], self._absmax

    @staticmethod
    def __tensor_unflatten__(inner: Any, absmax: WeightAbsmax, size: Any, stride: Any) -> ShardWeight:
        # Compiled code makes its outputs so, all with what it was traced with, whatever weight it is called with.
        return ShardWeight(inner["_data"], absmax.copy())

    @classmethod
    def __metadata_guard__(cls, traced: WeightAbsmax, absmax: WeightAbsmax) -> bool:
        """Return whether Dynamo may run what it traced with another weight: only how they are scaled counts."""
        return traced == absmax

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is _ATEN.copy_.default and isinstance(args[0], ShardWeight):
            return _copy(*args)
        if func is _ATEN.detach.default:
            # The same data: its version counter sees what is written past wrappers.
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
        """Return this rank's int8 values, padded to the largest shard, and the absmax of the whole weight."""
        if outer_size != self._absmax.shape:
            raise RuntimeError(
                f"all_gather='int8': a weight of shape {tuple(self._absmax.shape)} has become {tuple(outer_size)}; "
                "convert_to_switchback goes after parallelize_module and before fully_shard"
            )
        shard = WeightShard(self._data, self._absmax, mesh, 0)
        absmax = self._absmax.get(self._data)
        if absmax is None:
            (absmax,) = find_absmaxes([shard])
        qdata = quantize_by_absmax(self._data, absmax[shard.rows] if absmax.numel() > 1 else absmax)
        missing_rows = shard.padded_rows - qdata.shape[0]
        if missing_rows:
            qdata = nn.functional.pad(qdata, (0, 0, 0, missing_rows))
        return (qdata,), absmax

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor],
        metadata: torch.Tensor,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[GatheredWeight, tuple[torch.Tensor]] | None:
        """Return the weight that the layer computes with; given out, only set its absmax."""
        (qdata,) = all_gather_outputs
        if out is None:
            return GatheredWeight(qdata, metadata, param_dtype), (qdata,)
        local_part(out)._absmax = metadata
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
    """Return target.copy_(source). Whether an absmax is known must be the same on all ranks, or some wait for others.

    FSDP2 moves uneven shards, and those alone, to new zeros that are padded; so the absmax moves along.
    """
    absmax = source._absmax.get(source._data) if isinstance(source, ShardWeight) else None
    is_first = target._absmax.writes == 0
    target._data.copy_(_unwrapped(source), non_blocking)
    _count_write(target)
    if is_first:
        target._absmax.set(absmax, target._data)
    return target


def _count_write(weight: ShardWeight) -> None:
    weight._absmax.writes += 1


class GatheredWeight(torch.Tensor):
    """A weight [out, in] of which a rank has the int8 values and the absmax.

    Quantizing it gives those back, so a SwitchBackLinear computes with them as it would with a plain weight; its
    gradient is plain, in the dtype that FSDP2's policy says. No other operation may read it.
    """

    _qdata: torch.Tensor
    _absmax: torch.Tensor

    @staticmethod
    def __new__(cls, qdata: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> GatheredWeight:
        self = torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, strides=qdata.stride(), dtype=dtype, device=qdata.device
        )
        self._qdata, self._absmax = qdata, absmax
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self._qdata!r}, {self._absmax!r}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["_qdata", "_absmax"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: Any, dtype: torch.dtype, size: Any, stride: Any) -> GatheredWeight:
        return GatheredWeight(inner["_qdata"], inner["_absmax"], dtype)

    def dequantize(self) -> torch.Tensor:
        """Return the plain weight that the int8 values stand for."""
        return dequantize_rowwise(self._qdata, self._absmax.expand(self.shape[0]).contiguous(), self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        weight = args[0]
        if isinstance(weight, GatheredWeight):
            if func in _QUANTIZERS:
                return _QUANTIZERS[func](*args)
            if func in _GATHERED_VIEWS:
                return GatheredWeight(func(weight._qdata, *args[1:], **kwargs), weight._absmax, weight.dtype)
            if func in _FACTORIES:
                return func(weight._qdata, *args[1:], **{"dtype": weight.dtype} | kwargs)
        raise NotImplementedError(
            f"{func} on a weight that was gathered as int8: only SwitchBackLinear computes with it; "
            "leave the layer out of the conversion, or set all_gather='high_precision'"
        )


def _qdata_and_absmax(weight: GatheredWeight, scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    if weight._absmax.numel() != scales:
        raise ValueError(
            f"the weight was gathered with {weight._absmax.numel()} absmaxes, the layer's config wants {scales}; "
            "with all_gather='int8' the weight scaling stays as it was converted"
        )
    return weight._qdata, weight._absmax


_QUANTIZERS: dict[Any, Callable[..., Any]] = {
    _OPS.quantize_global.default: lambda weight: _qdata_and_absmax(weight, 1),
    _OPS.quantize_rowwise.default: lambda weight: _qdata_and_absmax(weight, weight.shape[0]),
    _OPS.quantize_by_absmax.default: lambda weight, absmax: weight._qdata,
    _OPS.quantize_transpose_by_absmax.default: lambda weight, absmax: _OPS.transpose_int8(weight._qdata),
    _OPS.quantize_columnwise_and_transpose.default: lambda weight: quantize_columnwise_and_transpose(
        dequantize_rowwise(weight._qdata, weight._absmax, torch.float32)
    ),
}
_GATHERED_VIEWS = {_ATEN.alias.default, _ATEN.as_strided.default, _ATEN.detach.default, _ATEN.view.default}
_FACTORIES = {_ATEN.empty_like.default, _ATEN.new_empty.default, _ATEN.new_zeros.default, _ATEN.zeros_like.default}


def wrap(weight: Any, config: SwitchBackConfig) -> torch.Tensor:
    """Return a weight as FSDP2 is to shard it, given a plain one or a DTensor that tensor parallelism has made."""
    local = local_part(weight)
    if local is weight:
        return ShardWeight(weight, WeightAbsmax(config.weight_scaling, weight.shape))
    group, rows_are_whole = weight.device_mesh.get_group(), weight.placements[0].is_shard(0)
    spans = not (config.weight_scaling == "rowwise" and rows_are_whole)
    absmax = WeightAbsmax(config.weight_scaling, local.shape, group if spans else None, tensor_parallel_dims=1)
    return _in_place_of(weight, ShardWeight(local, absmax))


def unwrap(weight: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor, or DTensor of plain tensors, that a state_dict has in a weight's place.

    It shares memory. Who gets it may write to it, so the weight's absmax is forgotten, on every rank alike.
    """
    local = local_part(weight)
    if not isinstance(local, ShardWeight):
        return weight
    local._absmax.set(None, local._data)
    return _in_place_of(weight, local._data)


def wrap_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or DTensor, in a weight's place: wrapped if the weight is."""
    wrapped, local = local_part(weight), local_part(tensor)
    if not isinstance(wrapped, ShardWeight) or isinstance(local, ShardWeight):
        return tensor
    return _in_place_of(tensor, ShardWeight(local, wrapped._absmax.copy()))


def local_part(tensor: Any) -> Any:
    """Return a DTensor's part on this rank, or any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def _in_place_of(tensor: Any, local: torch.Tensor) -> torch.Tensor:
    """Return local or, if tensor is a DTensor, a DTensor like it whose part on this rank is local."""
    if local_part(tensor) is tensor:
        return local
    return type(tensor).from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
