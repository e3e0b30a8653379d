"""Transformers: a Trainer callback that converts and monitors, and a quantizer for ``from_pretrained``.

Trainer(model, callbacks=[SwitchBackCallback(monitor_every=100)], …)
AutoModelForCausalLM.from_pretrained(path, quantization_config=SwitchBackQuantizationConfig())

``save_pretrained`` writes the int8 values of layers that ``torch_switchback.prepare_for_eval(model)`` prepared.
``from_pretrained`` reads them where this module has been imported, and raises elsewhere.

Layers that are prepared one by one, or by ``load_state_dict``, are saved so too if convert_to_switchback was called on
this object. If it was copied, unpickled or built with SwitchBackLinear, call prepare_for_eval(model) first, or what is
saved reloads with random weights.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import SwitchBackConfig, SwitchBackLinear, convert_to_switchback, revert_switchback
from ..analysis.monitor import Monitor, Writer
from ._peer import peer

with peer("transformers", "transformers>=5,<6"):
    from transformers import PreTrainedModel, TrainerCallback, TrainerState
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin

_METHOD = "switchback"


class SwitchBackCallback(TrainerCallback):
    """Converts the Trainer's model as soon as the Trainer is made, and logs what quantizing costs it.

    Args:
        monitor_every: steps from one sample of :class:`torch_switchback.analysis.monitor.Monitor` to the next; 0: none.
        monitor_layers: glob patterns of the layers to sample.
        writer: gets the samples; without one they are entries of ``trainer.state.log_history``, which checkpoints keep.
        conversion: keyword arguments of :func:`torch_switchback.convert_to_switchback`: config, module_filter_fn.

    Raises:
        ValueError: monitor_layers or writer come without monitor_every.
    """

    def __init__(
        self,
        *,
        monitor_every: int = 0,
        monitor_layers: str | Sequence[str] = "*",
        writer: Writer | None = None,
        **conversion: Any,
    ) -> None:
        if not monitor_every and (writer is not None or monitor_layers != "*"):
            raise ValueError("SwitchBackCallback: monitor_layers and writer need monitor_every above 0, got 0")
        self._every, self._layers, self._writer = monitor_every, monitor_layers, writer
        self._conversion = conversion
        self._monitor: Monitor | None = None

    def on_init_end(self, *_: Any, model: nn.Module, **others: Any) -> None:
        convert_to_switchback(model, **self._conversion)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, *, model: nn.Module, **others: Any) -> None:
        if not any(isinstance(module, SwitchBackLinear) for module in model.modules()):
            convert_to_switchback(model, **self._conversion)  # model_init has made another one
        self.on_train_end()  # an interrupted train() has no end
        if self._every:
            writer = self._writer or _LogHistory(state)
            self._monitor = Monitor(model, every=self._every, layers=self._layers, writer=writer)

    def on_step_end(self, *_: Any, **others: Any) -> None:
        if self._monitor is not None:
            self._monitor.step()

    def on_train_end(self, *_: Any, **others: Any) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


class _LogHistory:
    """A monitor's writer that makes one entry per sample, as the Trainer's own logs are."""

    def __init__(self, state: TrainerState) -> None:
        self._state = state

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        history = self._state.log_history
        if not history or history[-1].get("switchback_step") != step:
            history.append({"switchback_step": step, "step": self._state.global_step, "epoch": self._state.epoch})
        history[-1][tag] = value


@register_quantization_config(_METHOD)
class SwitchBackQuantizationConfig(QuantizationConfigMixin):
    """Describes a model's conversion in its config.json. The checkpoint stays nn.Linear's unless layers are prepared.

    Args:
        config: :func:`torch_switchback.convert_to_switchback`'s.
        modules_to_not_convert: names, as Transformers matches them, of layers that stay nn.Linear; None: what
            convert_to_switchback leaves alone by itself.
        layers: what save_pretrained fills in where layers are prepared, instead of the two before: the names of all
            SwitchBackLinear layers by configuration, and which of them the checkpoint has as int8 values.
        quant_method: what config.json says beside the others.

    Raises:
        TypeError: modules_to_not_convert is a str.
        ValueError: layers come with one of the two before.
    """

    def __init__(
        self,
        config: Any = None,
        modules_to_not_convert: list[str] | None = None,
        *,
        layers: list[dict[str, Any]] | None = None,
        quant_method: str = _METHOD,
    ) -> None:
        if isinstance(modules_to_not_convert, str):  # whose letters Transformers would match
            raise TypeError(f"modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}")
        if layers is not None and (config is not None or modules_to_not_convert is not None):
            raise ValueError(
                f"layers goes without config={config!r} and modules_to_not_convert={modules_to_not_convert!r}"
            )
        self.quant_method = quant_method
        self.config = _decoded(config)
        self.modules_to_not_convert = modules_to_not_convert
        self.layers = layers

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"config": _encoded(self.config)}


def _encoded(config: Any) -> Any:
    """Return a config, or a mapping of layers to configs, in JSON's types."""
    if isinstance(config, SwitchBackConfig):
        return dataclasses.asdict(config)
    if isinstance(config, Mapping):
        return {pattern: _encoded(value) for pattern, value in config.items()}
    return config


def _decoded(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    if config and config.keys() <= {field.name for field in dataclasses.fields(SwitchBackConfig)}:
        return SwitchBackConfig(**config)
    return {pattern: _decoded(value) for pattern, value in config.items()}


@register_quantizer(_METHOD)
class SwitchBackHfQuantizer(HfQuantizer):
    """Converts a model before its weights are loaded, and saves the int8 values of prepared layers.

    Training and saving a model without prepared layers are those of nn.Linear.
    """

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True
    _set_aside: tuple[list[Any] | None, ...] = ()
    """The model's weight conversions, once a checkpoint with int8 values has been saved or loaded without them."""

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        asked = self.quantization_config
        if asked.layers is not None:
            _make_layers(model, asked.layers)
            return
        conversion: dict[str, Any] = {"config": asked.config}
        if (skipped := asked.modules_to_not_convert) is not None:
            conversion["module_filter_fn"] = lambda _, fqn: should_convert_module(fqn, skipped)
        convert_to_switchback(model, **conversion)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.quantization_config.layers is not None:
            self._set_aside = (None,)  # for Transformers' own

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Describe prepared layers in the model's config, and return their state for save_pretrained.

        A placeholder stands for each weight. As it has another shape, ``from_pretrained`` raises where nothing reads
        this config, instead of drawing random weights.

        Raises:
            ValueError: the layers are in PEFT's, whose names no model without adapters has.
        """
        prepared = {fqn: layer for fqn, layer in _layers(model).items() if layer.is_prepared}
        if not prepared:
            follow_prepared_layers(model)
        if not prepared or getattr(model, "_hf_peft_config_loaded", False):  # of add_adapter: saved are adapters alone
            return None, {}
        if adapted := next((fqn for fqn in prepared if "base_layer" in fqn.split(".")), None):
            raise ValueError(
                f"save_pretrained: {adapted} has an adapter; save the PeftModel, or call its unload() first"
            )
        model.config.quantization_config = SwitchBackQuantizationConfig(layers=_listed(model))
        # Transformers would undo what it did to a checkpoint's weights, such as cutting q, k and v out of one matrix.
        # Int8 values and their absmax are not put together so.
        self._set_aside = self._set_aside or (getattr(model, "_weight_conversions", None),)
        model._weight_conversions = []
        state = dict(model.state_dict())
        state |= {f"{fqn}.weight": torch.zeros(1, dtype=torch.int8) for fqn in prepared}
        notes = {
            fqn: {"dtype": str(layer._weight_dtype).removeprefix("torch."), "in_features": layer.in_features}
            for fqn, layer in prepared.items()
        }
        return state, {"torch_switchback": json.dumps(notes)}  # which `torch-switchback export --back` reads

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """Revert the model, in the dtype that it has if no other is asked for."""
        self.remove_quantization_config(revert_switchback(model))
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        super().remove_quantization_config(model)
        self.put_back_conversions(model)

    def put_back_conversions(self, model: PreTrainedModel) -> None:
        """Have save_pretrained write weights under the names of the checkpoint that they came from."""
        for conversions in self._set_aside:
            model._weight_conversions = conversions
        self._set_aside = ()


def follow_prepared_layers(model: nn.Module) -> None:
    """Have save_pretrained write int8 values where layers are prepared, else the weights that nn.Linear has.

    Every Transformers model that is, or is in, the given one gets a SwitchBackHfQuantizer for it, or loses it. A model
    that was loaded with a SwitchBackQuantizationConfig keeps its own until it is reverted.

    Warns:
        UserWarning: another library has quantized the model, and saves it without the int8 values.
    """
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        quantizer, layers = getattr(part, "hf_quantizer", None), _layers(part).values()
        if any(layer.is_prepared for layer in layers):
            if quantizer is None:
                part.hf_quantizer = SwitchBackHfQuantizer(SwitchBackQuantizationConfig(layers=[]))
            elif not isinstance(quantizer, SwitchBackHfQuantizer):
                why = f"{type(part).__name__} has a {type(quantizer).__name__}"
                warnings.warn(f"save_pretrained loses the int8 values of prepared layers: {why}", stacklevel=5)
        elif isinstance(quantizer, SwitchBackHfQuantizer):
            if not layers or quantizer.quantization_config.layers is not None:
                quantizer.remove_quantization_config(part)
            else:
                part.config.quantization_config = quantizer.quantization_config
                quantizer.put_back_conversions(part)


def _layers(model: nn.Module) -> dict[str, SwitchBackLinear]:
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, SwitchBackLinear)}


def _listed(model: nn.Module) -> list[dict[str, Any]]:
    """Return the names of a model's layers in JSON's types, by configuration and by whether they are prepared."""
    groups: dict[tuple[SwitchBackConfig, bool], list[str]] = {}
    for fqn, layer in _layers(model).items():
        groups.setdefault((layer.config, layer.is_prepared), []).append(fqn)
    listed = []
    for (config, prepared), names in groups.items():
        exact = dataclasses.replace(config, min_tokens=config.min_tokens or 0)  # convert_to_switchback fills in a None
        listed.append({"config": _encoded(exact), "prepared": prepared, "names": names})
    return listed


def _make_layers(model: PreTrainedModel, listed: list[dict[str, Any]]) -> None:
    """Give a model without weights the layers that :func:`_listed` found in another, or in a part or whole of it."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    configs: dict[str, SwitchBackConfig] = {}
    prepared: list[str] = []
    for group in listed:
        for name in group["names"]:
            fqn = next((each for each in (name, name.removeprefix(prefix), prefix + name) if each in modules), None)
            if fqn is not None:
                configs[fqn] = SwitchBackConfig(**group["config"])
                if group["prepared"]:
                    prepared.append(fqn)
    convert_to_switchback(model, config=configs, module_filter_fn=lambda _, fqn: fqn in configs)
    for fqn in prepared:
        layer = model.get_submodule(fqn)
        layer.prepare_for_eval()
        layer._is_hf_initialized = True  # a model's _init_weights would ask for its weight
    placeholders = {rf"(^|\.){re.escape(name.removeprefix(prefix))}\.weight$" for name in prepared}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *placeholders}
