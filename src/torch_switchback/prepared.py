"""The prepared state of a layer: its weight replaced by int8 values, and state_dicts with either of the two."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import extensions
from .config import SwitchBackConfig
from .functional import quantize_weight
from .ops import dequantize_rowwise

Entry = tuple[tuple[int, ...], torch.dtype | None]  # shape and dtype; None: any float, to be cast
_PREPARED = "weight_int8", "weight_absmax"
_OF_BITSANDBYTES = "W_int8", "state_W"


class PreparedWeight(nn.Module):
    """A linear layer's weight that can be quantized for good, and back. The layer is this and an nn.Linear."""

    in_features: int
    out_features: int
    config: SwitchBackConfig
    weight: torch.Tensor
    weight_int8: torch.Tensor  # while prepared, as are the next three
    weight_absmax: torch.Tensor
    _weight_dtype: torch.dtype
    _weight_requires_grad: bool

    @property
    def is_prepared(self) -> bool:
        """Return whether the weight has been replaced by its int8 values."""
        return self.weight is None

    def prepare_for_eval(self) -> None:
        """Quantize the weight for good and free it: the same output bit for bit, less time and memory.

        The input still gets its gradient, the weight none. Calling it again does nothing.
        :meth:`prepare_for_training` undoes it.

        Raises:
            RuntimeError: the weight is not a parameter of this layer but computed from others, or is a DTensor.
            TypeError: the weight is not float16, bfloat16 or float32.
            ValueError: the layer rotates its features.
        """
        if self.is_prepared:
            return
        if self._parameters.get("weight") is None:
            raise RuntimeError("prepare_for_eval: weight is no parameter of this layer: parametrized, or pruned?")
        if hasattr(self.weight, "device_mesh"):
            raise RuntimeError("prepare_for_eval: weight is sharded over processes; load its state into a plain model")
        with torch.inference_mode(False), torch.no_grad():
            qdata, absmax = quantize_weight(self.weight, self.config)
        self._become_prepared(qdata, absmax)

    def prepare_for_training(self) -> None:
        """Undo :meth:`prepare_for_eval`: a new ``weight`` parameter, dequantized, in the dtype it had.

        What was rounded away stays away (at most absmax / 254 per element), and an optimizer must be given the
        new parameter. A weight that was tied to another module's is no longer. On an unprepared layer it does nothing.
        """
        if not self.is_prepared:
            return
        absmax = self.weight_absmax.expand(self.out_features).contiguous()
        self._become_unprepared(dequantize_rowwise(self.weight_int8, absmax, torch.float32).to(self._weight_dtype))

    def _become_prepared(self, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        self._weight_dtype, self._weight_requires_grad = self.weight.dtype, self.weight.requires_grad
        self.weight = None  # type: ignore[assignment]
        self.__dict__.pop("_weight_cache", None)
        self.register_buffer("weight_int8", qdata)
        self.register_buffer("weight_absmax", absmax)

    def _become_unprepared(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=self._weight_requires_grad)
        del self.weight_int8, self.weight_absmax, self._weight_dtype, self._weight_requires_grad

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PreparedWeight":
        """Move buffers between devices, but keep their dtypes through ``.half()``, ``.bfloat16()`` and ``.type()``."""
        self.__dict__.pop("_weight_cache", None)
        before = {name: self._buffers.get(name) for name in ("weight_int8", "weight_absmax")}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:  # type: ignore[union-attr]
                self._buffers[name] = buffer.to(self._buffers[name].device)  # type: ignore[union-attr]
        if self.is_prepared:
            self._weight_dtype = fn(self.weight_absmax.new_empty(0, dtype=self._weight_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"  # not there while prepared, and of a parametrized layer
        if name in destination and not keep_vars:
            destination[name] = extensions.distributed.unwrap(destination[name])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take a training state_dict or a prepared one, whichever of the two this layer is; or leave it as it is.

        nn.Linear copies what fits before it complains of what does not. Here nothing is copied then.
        """
        found = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        becomes_prepared = not found.keys().isdisjoint(_PREPARED)
        expected = self._expected_state(becomes_prepared, becomes_unprepared=self.is_prepared and "weight" in found)
        problems = [
            f"{what} mismatch for {prefix}{name}: got {got}, the layer has {has}."
            for name in expected.keys() & found.keys()
            for what, got, has in _mismatches(found[name], *expected[name])
        ]
        if becomes_prepared and found.keys() & {"weight", *_PREPARED} != {*_PREPARED}:
            problems.append(f"mismatch for {prefix}weight: it comes alone, or its int8 values and their absmax do.")
        elif becomes_prepared and self.config.rotate_features is not None:
            problems.append(f"mismatch for {prefix}weight: it comes as int8 values, which rotate_features cannot use.")
        elif not found.keys().isdisjoint(_OF_BITSANDBYTES):
            problems.append(
                f"{prefix}weight was prepared for evaluation by bitsandbytes: take a state_dict from before that, and "
                "call prepare_for_eval() here."
            )
        if problems:
            error_msgs.extend(problems)
            return
        if local_metadata.get("assign_to_params_buffers") and not becomes_prepared and f"{prefix}weight" in state_dict:
            name = f"{prefix}weight"
            state_dict[name] = extensions.distributed.wrap_like(state_dict[name], self.weight)
        if becomes_prepared and not self.is_prepared:
            device = self.weight.device
            self._become_prepared(
                *(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in (expected[n] for n in _PREPARED))
            )
        elif self.is_prepared and not becomes_prepared and "weight" in found:
            self._become_unprepared(torch.empty_like(self.weight_int8, dtype=self._weight_dtype))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _expected_state(self, becomes_prepared: bool, becomes_unprepared: bool) -> dict[str, Entry]:
        """Shapes and dtypes of what a state_dict has for this layer, once prepared or once not."""
        state = {**self._parameters, **self._buffers}
        expected = {
            name: (tuple(tensor.shape), None if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in state.items()
            if tensor is not None and name not in self._non_persistent_buffers_set
        }
        weight: dict[str, Entry] = {}
        shape = self.out_features, self.in_features
        if becomes_prepared:
            absmaxes = self.config.scales_of(self.out_features)
            weight = {"weight_int8": (shape, torch.int8), "weight_absmax": ((absmaxes,), torch.float32)}
        elif becomes_unprepared:
            weight = {"weight": (shape, None)}
        else:
            return expected
        return {name: entry for name, entry in expected.items() if name not in ("weight", *_PREPARED)} | weight


def _mismatches(found: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is wrong with a state_dict's entry: of what, what it is, what it must be."""
    if not isinstance(found, torch.Tensor):
        yield "type", type(found).__name__, "torch.Tensor"
    elif tuple(found.shape) != shape:
        yield "size", tuple(found.shape), shape
    elif found.dtype != dtype and not (dtype is None and found.is_floating_point()):
        yield "dtype", found.dtype, dtype or "a float"
