"""The prepared state of a layer: its weight replaced by int8 values, and state_dicts with either of the two."""

import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from . import extensions
from .config import SwitchBackConfig
from .functional import Transposed, quantize_weight
from .ops import dequantize_rowwise
from .ops._validation import check_float
from .ops.prepared_weight import dequantize_rotated
from .scaling import scaling_for
from .weight_cache import version_of
from .weight_readers import leave_read_layers

Model = TypeVar("Model", bound=nn.Module)

INT8_STATE = "weight_int8", "weight_absmax", "weight_rotation"
CACHES = "_weight_cache", "_transposed"  # attributes of a layer that no copy, pickle or reverted layer has
_OF_BITSANDBYTES = "W_int8", "state_W"
_NO_WEIGHT = (
    "{} has no weight while it is prepared, only weight_int8 and weight_absmax: prepare_for_training() gives it one "
    "back, and revert_switchback(model) makes it nn.Linear. For PEFT, unfreeze_base(model) gives it back, and inside "
    "adapters_over_int8(model) adapters can be added without it"
)


def int8_state(weight: Tensor, config: SwitchBackConfig) -> dict[str, Tensor]:
    """Return the entries that take the place of ``weight`` in the state_dict of a prepared layer.

    Args:
        weight: [out, in], float16, bfloat16 or float32.
        config: the layer's.

    Returns:
        ``weight_int8``: int8 [out, in], with in rounded up to whole blocks if the layer rotates its features.
        ``weight_absmax``: float32, (1,) or (out,). ``weight_rotation``: int64 scalar, how many features a rotation
        mixes; only if the layer rotates its features.

    Raises:
        TypeError: the weight has another dtype.
    """
    qdata, absmax = quantize_weight(weight, config)
    state = {"weight_int8": qdata, "weight_absmax": absmax}
    if config.rotate_features is not None:
        state["weight_rotation"] = torch.tensor(config.rotate_features, device=qdata.device)
    return state


def float_weight(qdata: Tensor, absmax: Tensor, block: int | None, in_features: int, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] that the entries of :func:`int8_state` stand for, dequantized.

    Args:
        block: how many features are rotated together, or None.
    """
    if block is not None:
        weight = dequantize_rotated(qdata, absmax, block)[:, :in_features]
    else:
        weight = dequantize_rowwise(qdata, absmax.expand(qdata.shape[0]).contiguous(), torch.float32)
    return weight.to(dtype).contiguous()


class _KeptTranspose(NamedTuple):
    """The transpose of a prepared layer's int8 values: replaced as a whole, because threads may share a layer."""

    transposed: Transposed
    weight_int8: Tensor
    absmax: Tensor
    version: tuple[Any, ...]
    memory: tuple[Tensor, Tensor]  # aliases of the two, so that no other tensor gets their addresses


class PreparedWeight(nn.Module):
    """A linear layer's weight that can be quantized for good, and back. The layer is this and an nn.Linear."""

    in_features: int
    out_features: int
    config: SwitchBackConfig
    weight: torch.Tensor
    weight_int8: torch.Tensor  # while prepared, as are the next four
    weight_absmax: torch.Tensor
    weight_rotation: torch.Tensor  # if the config has rotate_features
    _weight_requires_grad: bool
    _former_weight: Callable[[], Tensor | None] | None = None  # returns it while something holds it
    _weight_dtype: torch.dtype | None = None
    """The dtype of the weight that has been replaced; None while there is one. It alone says which of the two holds."""
    _transposed: _KeptTranspose | None = None
    """Transpose that cache_quantized_weight keeps. No buffer: copies, state_dicts and exported programs have none."""

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
        """Drop what is cached of a weight, or by a config, that is replaced.

        FSDP2 puts a gathered weight often in the same memory, at the same version.
        """
        if name == "weight":
            if self.is_prepared:
                raise AttributeError(_NO_WEIGHT.format(type(self).__name__))
            self.__dict__.pop("_weight_cache", None)
        elif name == "config":
            self.__dict__.pop("_transposed", None)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a weight that the forward would not use."""
        if name == "weight" and self.is_prepared:
            raise AttributeError(_NO_WEIGHT.format(type(self).__name__))
        super().register_parameter(name, param)

    def prepare_for_eval(self) -> None:
        """Quantize the weight for good: less time and memory, and the bits of every output that was int8 before.

        The input still gets its gradient, the weight none. Calling it again does nothing.
        :meth:`prepare_for_training` undoes it. The weight's memory is freed unless something else, such as an
        optimizer, holds the parameter; :func:`torch_switchback.prepare_for_eval` frees it then too.

        Raises:
            RuntimeError: the weight is not a parameter of this layer but computed from others, or is a DTensor.
            TypeError: the weight is not float16, bfloat16 or float32.
        """
        if self.is_prepared:
            return
        if reason := self._why_not_prepared():
            raise RuntimeError(f"prepare_for_eval: {reason}")
        check_float("prepare_for_eval", "weight", self.weight)
        with torch.inference_mode(False), torch.no_grad():
            state = int8_state(self.weight, self.config)
        self._become_prepared(state)

    def prepare_for_training(self) -> None:
        """Undo :meth:`prepare_for_eval`: a ``weight``, dequantized, in the dtype it had.

        It is the same parameter object if something, such as an optimizer or a module that shares it, still holds that,
        and gets the dequantized values whatever has been written to it meanwhile. It requires a gradient if it did, as
        ``requires_grad_()`` does not reach it while the layer is prepared. What was rounded away stays away (at most
        absmax / 254 per element). On an unprepared layer it does nothing.
        """
        if not self.is_prepared:
            return
        assert self._weight_dtype is not None
        sizes = self.config.rotate_features, self.in_features  # not weight_rotation, which has no value on meta
        with torch.inference_mode(False), torch.no_grad():
            self._become_unprepared(float_weight(self.weight_int8, self.weight_absmax, *sizes, self._weight_dtype))

    def _freeze_former_weight(self) -> None:
        """Have the weight of a prepared layer require no gradient when :meth:`prepare_for_training` brings it back."""
        self._weight_requires_grad = False
        if self._former_weight is not None and (weight := self._former_weight()) is not None:
            weight.requires_grad_(False)

    def _transposed_for(self, x: Any, weight_int8: Tensor, absmax: Tensor) -> Transposed | None:
        """Return the kept transpose, or None. An eager call with a backward computes it if needed, and keeps it.

        Compiled code can neither do that nor compare versions: it uses what is kept of these very tensors.
        """
        kept = self._transposed
        if kept is not None and not (kept.weight_int8 is weight_int8 and kept.absmax is absmax):
            kept = None  # functional_call, Accelerate and parametrizations put others in their place
        if torch.compiler.is_compiling():
            return kept.transposed if kept is not None and kept.transposed[0].device == weight_int8.device else None
        if not isinstance(x, Tensor) or torch._C._are_functorch_transforms_active():
            return None
        if weight_int8.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # the graph would read the memory after the transpose is renewed
        if kept is not None and kept.version == version_of(weight_int8, absmax):
            return kept.transposed
        return self._keep_transpose() if x.requires_grad and torch.is_grad_enabled() else None

    def _keep_transpose(self) -> Transposed | None:
        """Compute, keep and return the transpose. Return None for inference tensors, which have no version."""
        self._transposed = None  # its memory serves the next
        weight_int8, absmax = self.weight_int8, self.weight_absmax
        if weight_int8.is_inference() or absmax.is_inference():
            return None
        version = version_of(weight_int8, absmax)
        with torch.inference_mode(False), torch.no_grad():
            qdata, own_absmax = scaling_for(self.config, weight_int8, absmax).transpose_prepared(weight_int8, absmax)
        # Dynamo refuses a tensor that comes twice.
        transposed = qdata, None if own_absmax is absmax else own_absmax
        if type(qdata) is Tensor:  # not one of a FakeTensorMode
            memory = weight_int8.detach(), absmax.detach()
            self._transposed = _KeptTranspose(transposed, weight_int8, absmax, version, memory)
        return transposed

    def _prepared_tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the names of what takes the place of the weight, with shapes and dtypes."""
        block = self.config.rotate_features
        columns = self.in_features if block is None else -(-self.in_features // block) * block
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_int8": ((self.out_features, columns), torch.int8),
            "weight_absmax": ((self.config.scales_of(self.out_features),), torch.float32),
        }
        return tensors if block is None else tensors | {"weight_rotation": ((), torch.int64)}

    def _become_prepared(self, state: Mapping[str, Tensor]) -> None:
        weight = self.weight
        self.__dict__.pop("_weight_cache", None)
        del self.weight
        self._weight_dtype, self._weight_requires_grad = weight.dtype, weight.requires_grad
        self._former_weight = TensorWeakRef(weight)
        for name, tensor in state.items():
            self.register_buffer(name, tensor)
        extensions.layers_changed(self)

    def _become_unprepared(self, weight: Tensor) -> None:
        parameter = None if self._former_weight is None else self._former_weight()
        # As in nn.Module._apply: the data of a parameter cannot go to the meta device, or come from there.
        if parameter is None or not torch._has_compatible_shallow_copy_type(parameter, weight):
            parameter = nn.Parameter(weight, requires_grad=self._weight_requires_grad)
        else:
            _replace_data(parameter, weight)
        self._transposed = None
        for name in (*self._prepared_tensors(), "_weight_dtype", "_weight_requires_grad"):
            delattr(self, name)
        self.__dict__.pop("_former_weight", None)
        others = dict(self._parameters)
        self._parameters.clear()  # the weight comes first again: optimizers tell parameters by their order
        self.weight = parameter
        self._parameters |= others

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PreparedWeight":
        """Move buffers between devices, but keep their dtypes through ``.half()``, ``.bfloat16()`` and ``.type()``."""
        self.__dict__.pop("_weight_cache", None)
        if not self.is_prepared:
            return super()._apply(fn, recurse)
        former = {name: getattr(self, name) for name in self._prepared_tensors()}
        super()._apply(fn, recurse)
        for name, tensor in former.items():
            cast = getattr(self, name)
            if cast.dtype != tensor.dtype:
                setattr(self, name, tensor.to(cast.device))
        self._weight_dtype = fn(former["weight_absmax"].new_empty(0, dtype=self._weight_dtype)).dtype
        if self._transposed is not None:
            self._keep_transpose()
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
            _drop_placeholder(state_dict, f"{prefix}weight")
            found = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
            becomes_prepared = not found.keys().isdisjoint(INT8_STATE)
            if problems := list(self._problems(found, prefix, becomes_prepared)):
                error_msgs.extend(problems)
                return
            weight = self._parameters.get("weight")
            if weight is not None and "weight" in found and local_metadata.get("assign_to_params_buffers"):
                state_dict[f"{prefix}weight"] = extensions.distributed.wrap_like(found["weight"], weight)
            with torch.inference_mode(False):  # whose tensors no later training could use
                if becomes_prepared and weight is not None:
                    self._become_prepared(
                        {
                            name: torch.empty(shape, dtype=dtype, device=weight.device)
                            for name, (shape, dtype) in self._prepared_tensors().items()
                        }
                    )
                elif "weight" in found and self.is_prepared:
                    warnings.warn(
                        "load_state_dict: a float weight takes the place of a prepared layer's int8 values; call "
                        "prepare_for_eval(model), or freeze_base(model) for PEFT, again to keep only int8",
                        stacklevel=2,
                    )
                    features = self.out_features, self.in_features
                    self._become_unprepared(self.weight_int8.new_empty(features, dtype=self._weight_dtype))
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if self._transposed is not None:
                self._keep_transpose()
        finally:
            self._load_state_dict_pre_hooks = hooks

    def _problems(self, found: dict[str, Any], prefix: str, becomes_prepared: bool) -> Iterator[str]:
        """Yield why the int8 values cannot come, or go, as a state_dict asks."""
        int8, rotation = self._prepared_tensors(), self.config.rotate_features
        names = found.keys() & {"weight", *INT8_STATE}
        if becomes_prepared and ("weight" in names or not {"weight_int8", "weight_absmax"} <= names):
            yield (
                f"mismatch for {prefix}weight: a prepared layer needs weight_int8 and weight_absmax, and no weight; "
                f"got {', '.join(sorted(names))}."
            )
        elif becomes_prepared and (given := _rotation_of(found)) not in (rotation, "any"):
            yield f"mismatch for {prefix}weight: it comes with rotate_features={given}, the layer has {rotation}."
        elif becomes_prepared and not self.is_prepared and (reason := self._why_not_prepared()):
            yield f"mismatch for {prefix}weight: it comes as int8 values, and {reason}"
        elif not becomes_prepared and not found.keys().isdisjoint(_OF_BITSANDBYTES):
            yield (
                f"{prefix}weight was prepared for evaluation by bitsandbytes: take a state_dict from before that, and "
                "call prepare_for_eval() here."
            )
        if not becomes_prepared and not (self.is_prepared and "weight" in found):
            return
        is_sharded = any(hasattr(parameter, "device_mesh") for parameter in self._parameters.values())
        if not becomes_prepared and is_sharded and self._weight_requires_grad:
            yield f"mismatch for {prefix}weight: it would train, and fully_shard does not know it; load it before that."
        shapes = {"weight": (self.out_features, self.in_features)} | {name: shape for name, (shape, _) in int8.items()}
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if tensor is not None and name not in self._non_persistent_buffers_set:
                shapes.setdefault(name, tuple(tensor.shape))
        dtypes = {name: dtype for name, (_, dtype) in int8.items()}
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
        if weight.dim() != 2:
            return (
                "weight is freed: prepare_for_training() of the model that shares it, and was prepared, brings it back"
            )
        return ""


def prepare_for_eval(model: Model) -> Model:
    """Quantize the weights of a model's SwitchBackLinear layers for good, and free them: 1 byte per element is left.

    Outputs that were int8 keep their bits. Layers still pass gradients to their inputs, but none to their weights, and
    are int8 for any number of tokens. An optimizer may keep the parameters: they have no memory and no gradient until
    :func:`prepare_for_training` gives both back to the same objects.

    Args:
        model: any module with SwitchBackLinear layers. Modules outside of it that share their weights would lose them.
            If it is refused, it is unchanged.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no SwitchBackLinear.
        RuntimeError: a layer's weight is shared with another module, computed from others, or a DTensor; or
            DistributedDataParallel holds the layer.
        TypeError: a weight is not float16, bfloat16 or float32.
    """
    layers = {fqn: module for fqn, module in model.named_modules() if isinstance(module, PreparedWeight)}
    if not layers:
        raise ValueError("prepare_for_eval: model has no SwitchBackLinear; call convert_to_switchback before")
    layers = leave_read_layers("prepare_for_eval", model, layers)
    refuse_weights("prepare_for_eval", model, layers)
    prepare_layers(model, layers.values())
    return model


def prepare_for_training(model: Model) -> Model:
    """Undo :func:`prepare_for_eval`: each layer gets a weight, dequantized, in the dtype it had.

    What was rounded away stays away, at most absmax / 254 per element. A parameter that an optimizer or another owner
    has kept is the same object as before. Layers that are not prepared stay as they are.

    Args:
        model: any module.

    Returns:
        The same model.

    Raises:
        RuntimeError: in the model, DistributedDataParallel or FSDP holds a layer whose weight is to train, and would
            not average its gradient.
    """
    layers = {fqn: module for fqn, module in model.named_modules() if isinstance(module, PreparedWeight)}
    refuse_to_train_wrapped("prepare_for_training", model, layers)
    for layer in layers.values():
        layer.prepare_for_training()
    extensions.layers_changed(model)
    return model


def refuse_to_train_wrapped(caller: str, model: nn.Module, layers: Mapping[str, PreparedWeight]) -> None:
    """Raise if a layer's weight would come back to train under a wrapper that averages gradients and does not know it.

    Only wrappers in the model are found.
    """
    parts = _parts_by_wrapper(model)
    for fqn, layer in layers.items():
        wrapper = next((name for name in parts if layer in parts[name]), None)
        if wrapper is not None and layer.is_prepared and layer._weight_requires_grad:
            raise RuntimeError(
                f"{caller}: {fqn or 'the layer'}: call it before {wrapper} wraps the model, which averages no gradient "
                "of a weight that comes later"
            )


def refuse_weights(caller: str, model: nn.Module, layers: Mapping[str, PreparedWeight]) -> None:
    """Raise if the weight of one of these layers, by name, cannot be freed."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    under_ddp = _parts_by_wrapper(model)["DistributedDataParallel"]
    for fqn, layer in layers.items():
        if layer.is_prepared:
            continue
        reason = layer._why_not_prepared()
        if not reason and owners[id(layer.weight)] > 1:
            reason = "weight is shared with another module, which would lose it"
        elif layer in under_ddp:
            reason = "call it before DistributedDataParallel wraps the model"
        if reason:
            raise RuntimeError(f"{caller}: {fqn or 'the layer'}: {reason}")
        check_float(caller, f"{fqn}.weight".lstrip("."), layer.weight)


def _parts_by_wrapper(model: nn.Module) -> defaultdict[str, set[nn.Module]]:
    """Return the modules in the wrappers of a model that average gradients, by what wrapped them."""
    parts: defaultdict[str, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        if wrapper := "DistributedDataParallel" if is_ddp else extensions.distributed.sharded_by(module):
            parts[wrapper].update(module.modules())
    return parts


def keep_transposes(model: nn.Module) -> None:
    """Keep the transposes of prepared layers whose config says so, for compiled code, which keeps none itself."""
    for layer in model.modules():
        if isinstance(layer, PreparedWeight) and layer.is_prepared and layer.config.cache_quantized_weight:
            layer._keep_transpose()


def prepare_layers(model: nn.Module, layers: Iterable[PreparedWeight]) -> None:
    """Prepare a model's layers that :func:`refuse_weights` has let pass. Free their weights, whoever holds them."""
    for layer in layers:
        if layer.is_prepared:
            continue
        weight = layer.weight
        layer.prepare_for_eval()
        weight.grad = None
        _replace_data(weight, weight.new_empty(0))
        layer._former_weight = partial(_itself, weight)  # held for its hooks, as it costs no memory
    extensions.layers_changed(model)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _replace_data(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter another memory, so that a graph which has saved the former one raises."""
    parameter.data = data
    torch.autograd.graph.increment_version(parameter)


def _drop_placeholder(state_dict: dict[str, Any], name: str) -> None:
    """Remove what stands for a prepared layer's weight where Transformers saved it: one int8 value, and no matrix."""
    tensor = state_dict.get(name)
    if isinstance(tensor, Tensor) and tensor.dtype == torch.int8 and tensor.shape == (1,):
        del state_dict[name]


def _rotation_of(found: Mapping[str, Any]) -> int | str | None:
    """Return the block by which int8 values of a state_dict are rotated, None, or "any" if only its shape is known."""
    rotation = found.get("weight_rotation")
    if rotation is None:
        return None
    is_number = isinstance(rotation, Tensor) and rotation.numel() == 1 and not rotation.is_meta
    return int(rotation) if is_number else "any"
