"""The prepared state of a layer: its weight replaced by int8 values, and state_dicts with either of the two."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import extensions
from .config import SwitchBackConfig
from .functional import quantize_weight
from .ops import dequantize_rowwise

_PREPARED = "weight_int8", "weight_absmax"
_OF_BITSANDBYTES = "W_int8", "state_W"
_NO_WEIGHT = (
    "{} has no weight while it is prepared, only weight_int8 and weight_absmax: prepare_for_training() gives it one "
    "back, and revert_switchback(model) makes it nn.Linear"
)


class PreparedWeight(nn.Module):
    """A linear layer's weight that can be quantized for good, and back. The layer is this and an nn.Linear."""

    in_features: int
    out_features: int
    config: SwitchBackConfig
    weight: torch.Tensor
    weight_int8: torch.Tensor  # while prepared, as are the next two
    weight_absmax: torch.Tensor
    _weight_requires_grad: bool
    _weight_dtype: torch.dtype | None = None
    """The dtype of the weight that has been replaced; None while there is one. It alone says which of the two holds."""

    @property
    def is_prepared(self) -> bool:
        """Return whether the weight has been replaced by its int8 values."""
        return self._weight_dtype is not None

    def __getattr__(self, name: str) -> Any:
        """Return what is registered, as nn.Module does, and say where the weight of a prepared layer is."""
        parameters = self.__dict__.get("_parameters")  # first, and here: every forward reads two of them
        if parameters is not None and name in parameters:
            return parameters[name]
        if name == "weight" and self.is_prepared:
            raise AttributeError(_NO_WEIGHT.format(type(self).__name__))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Drop the cache with a weight: FSDP2 puts a gathered one often in the same memory, at the same version."""
        if name == "weight":
            if self.is_prepared:
                raise AttributeError(_NO_WEIGHT.format(type(self).__name__))
            self.__dict__.pop("_weight_cache", None)
        super().__setattr__(name, value)

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
        if reason := self._why_not_prepared():
            raise RuntimeError(f"prepare_for_eval: {reason}")
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
        with torch.inference_mode(False), torch.no_grad():
            absmax = self.weight_absmax.expand(self.weight_int8.shape[0]).contiguous()
            weight = dequantize_rowwise(self.weight_int8, absmax, torch.float32).to(self._weight_dtype)
            self._become_unprepared(weight)

    def _become_prepared(self, qdata: torch.Tensor, absmax: torch.Tensor) -> None:
        dtype, self._weight_requires_grad = self.weight.dtype, self.weight.requires_grad
        self.__dict__.pop("_weight_cache", None)
        del self.weight
        self._weight_dtype = dtype
        self.register_buffer("weight_int8", qdata)
        self.register_buffer("weight_absmax", absmax)

    def _become_unprepared(self, weight: torch.Tensor) -> None:
        parameter = nn.Parameter(weight, requires_grad=self._weight_requires_grad)
        del self.weight_int8, self.weight_absmax, self._weight_dtype, self._weight_requires_grad
        others = dict(self._parameters)
        self._parameters.clear()  # the weight comes first again: optimizers tell parameters by their order
        self.weight = parameter
        self._parameters |= others

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PreparedWeight":
        """Move buffers between devices, but keep their dtypes through ``.half()``, ``.bfloat16()`` and ``.type()``."""
        self.__dict__.pop("_weight_cache", None)
        if not self.is_prepared:
            return super()._apply(fn, recurse)
        qdata, absmax = self.weight_int8, self.weight_absmax
        super()._apply(fn, recurse)
        if self.weight_int8.dtype != qdata.dtype:
            self.weight_int8 = qdata.to(self.weight_int8.device)
        if self.weight_absmax.dtype != absmax.dtype:
            self.weight_absmax = absmax.to(self.weight_absmax.device)
        self._weight_dtype = fn(absmax.new_empty(0, dtype=self._weight_dtype)).dtype
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
        """Take a training state_dict or a prepared one, whichever of the two this layer is.

        nn.Linear does the plain case, and copies what fits before it complains of what does not. Where int8 values
        come or go, all is checked first, and nothing is copied if anything does not fit.
        """
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            for hook in hooks.values():  # run here, as they may rename or reshape what decides
                hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            found = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
            becomes_prepared = not found.keys().isdisjoint(_PREPARED)
            if problems := list(self._problems(found, prefix, becomes_prepared)):
                error_msgs.extend(problems)
                return
            weight = self._parameters.get("weight")
            if weight is not None and "weight" in found and local_metadata.get("assign_to_params_buffers"):
                state_dict[f"{prefix}weight"] = extensions.distributed.wrap_like(found["weight"], weight)
            with torch.inference_mode(False):  # whose tensors no later training could use
                if becomes_prepared and weight is not None:
                    qdata = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device=weight.device)
                    absmax = qdata.new_empty(self.config.scales_of(self.out_features), dtype=torch.float32)
                    self._become_prepared(qdata, absmax)
                elif "weight" in found and self.is_prepared:
                    self._become_unprepared(torch.empty_like(self.weight_int8, dtype=self._weight_dtype))
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._load_state_dict_pre_hooks = hooks

    def _problems(self, found: dict[str, Any], prefix: str, becomes_prepared: bool) -> Iterator[str]:
        """Yield why the int8 values cannot come, or go, as a state_dict asks."""
        if becomes_prepared and found.keys() & {"weight", *_PREPARED} != {*_PREPARED}:
            yield f"mismatch for {prefix}weight: it comes alone, or its int8 values and their absmax do."
        elif becomes_prepared and self.config.rotate_features is not None:
            yield f"mismatch for {prefix}weight: it comes as int8 values, which rotate_features cannot use."
        elif becomes_prepared and not self.is_prepared and (reason := self._why_not_prepared()):
            yield f"mismatch for {prefix}weight: it comes as int8 values, and {reason}"
        elif not becomes_prepared and not found.keys().isdisjoint(_OF_BITSANDBYTES):
            yield (
                f"{prefix}weight was prepared for evaluation by bitsandbytes: take a state_dict from before that, and "
                "call prepare_for_eval() here."
            )
        if not becomes_prepared and not (self.is_prepared and "weight" in found):
            return
        features = self.out_features, self.in_features
        shapes: dict[str, tuple[int, ...]] = {"weight": features, "weight_int8": features}
        shapes["weight_absmax"] = (self.config.scales_of(self.out_features),)
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if tensor is not None and name not in self._non_persistent_buffers_set:
                shapes.setdefault(name, tuple(tensor.shape))
        dtypes = {"weight_int8": torch.int8, "weight_absmax": torch.float32}
        for name in shapes.keys() & found.keys():
            tensor = found[name]
            if not isinstance(tensor, torch.Tensor):
                yield f"type mismatch for {prefix}{name}: expected torch.Tensor, got {type(tensor).__name__}."
            elif tuple(tensor.shape) != shapes[name]:
                yield (
                    f"size mismatch for {prefix}{name}: copying a param with shape {tensor.shape} from checkpoint, "
                    f"the shape in current model is {torch.Size(shapes[name])}."
                )
            elif tensor.dtype != dtypes.get(name, tensor.dtype):
                yield f"dtype mismatch for {prefix}{name}: got {tensor.dtype}, the layer has {dtypes[name]}."

    def _why_not_prepared(self) -> str:
        """Return why the weight cannot be replaced by int8 values, or ""."""
        weight = self._parameters.get("weight")
        if weight is None:
            return "weight is no parameter of this layer: parametrized, or pruned?"
        if hasattr(weight, "device_mesh"):
            return "weight is sharded over processes; load its state into a plain model"
        return ""
