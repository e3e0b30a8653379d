"""The tensors that FSDP2 gathers as int8, by its all-gather extensions: a shard of a weight, and the weight gathered.

Of a :class:`ShardWeight` FSDP2 asks what to gather: the codes of each rank's shard, quantized by the absmax over all
shards, so that they are the codes of the whole weight. What it gathers becomes the :class:`GatheredWeight` that the
layer computes with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from ..config import WeightScaling
from ..ops import dequantize_rowwise, quantize_by_absmax, quantize_columnwise_and_transpose
from .shard_absmax import Shard, find_absmaxes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

_ATEN = torch.ops.aten
_OPS = torch.ops.torch_switchback


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


class ShardWeight(torch.Tensor):
    """A weight, or a rank's shard of one, which FSDP2 all-gathers as int8. Everything else sees the tensor it wraps."""

    _data: torch.Tensor
    _absmax: Absmax

    @staticmethod
    def __new__(cls, data: torch.Tensor, absmax: Absmax) -> ShardWeight:
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

    def __tensor_flatten__(self) -> tuple[list[str], Absmax]:
        return ["_data"], self._absmax

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], absmax: Absmax, size: Any, stride: Any) -> ShardWeight:
        # Compiled code makes its outputs so, all with what it was traced with, whatever weight it is called with.
        return ShardWeight(inner["_data"], absmax.copy())

    @classmethod
    def __metadata_guard__(cls, traced: Absmax, absmax: Absmax) -> bool:
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
        shard = Shard(self, mesh, 0)
        absmax = self._absmax.get(self._data)
        if absmax is None:
            (absmax,) = find_absmaxes([shard])
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

    Quantizing it gives those back, so a SwitchBackLinear computes with them as it would with a plain weight; its
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
        if func in _QUANTIZERS and isinstance(weight, GatheredWeight):
            return _QUANTIZERS[func](*args)
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


def _requantize_columnwise(weight: GatheredWeight) -> tuple[torch.Tensor, torch.Tensor]:
    float_weight = dequantize_rowwise(weight._codes, weight._absmax, torch.float32)
    return quantize_columnwise_and_transpose(float_weight)


_QUANTIZERS: dict[Any, Callable[..., Any]] = {
    _OPS.quantize_global.default: lambda weight: _codes_and_absmax(weight, 1),
    _OPS.quantize_rowwise.default: lambda weight: _codes_and_absmax(weight, weight.shape[0]),
    _OPS.quantize_by_absmax.default: lambda weight, absmax: weight._codes,
    _OPS.quantize_transpose_by_absmax.default: lambda weight, absmax: weight._codes.t().contiguous(),
    _OPS.quantize_columnwise_and_transpose.default: _requantize_columnwise,
}
_GATHERED_VIEWS = {_ATEN.alias.default, _ATEN.as_strided.default, _ATEN.detach.default, _ATEN.view.default}
_FACTORIES = {_ATEN.empty_like.default, _ATEN.new_empty.default, _ATEN.new_zeros.default, _ATEN.zeros_like.default}


def local_part(tensor: Any) -> Any:
    """A DTensor's part on this rank; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)
