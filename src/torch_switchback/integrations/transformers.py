"""Transformers: a Trainer callback that converts and monitors, and a quantizer for ``from_pretrained``.

Trainer(model, callbacks=[SwitchBackCallback(monitor_every=100)], …)
AutoModelForCausalLM.from_pretrained(path, quantization_config=SwitchBackQuantizationConfig())
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .. import SwitchBackConfig, SwitchBackLinear, convert_to_switchback, revert_switchback
from ..analysis.monitor import Monitor, Writer
from ._peer import peer

with peer("transformers", "transformers>=5,<6"):
    from transformers import TrainerCallback, TrainerState
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
    """Describes a model's conversion in its config.json. The checkpoint itself stays nn.Linear's.

    Args:
        config: :func:`torch_switchback.convert_to_switchback`'s.
        modules_to_not_convert: names, as Transformers matches them, of layers that stay nn.Linear; None: what
            convert_to_switchback leaves alone by itself.
        quant_method: what config.json says beside the two.

    Raises:
        TypeError: modules_to_not_convert is a str.
    """

    def __init__(
        self, config: Any = None, modules_to_not_convert: list[str] | None = None, *, quant_method: str = _METHOD
    ) -> None:
        if isinstance(modules_to_not_convert, str):  # whose letters Transformers would match
            raise TypeError(f"modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}")
        self.quant_method = quant_method
        self.config = _decoded(config)
        self.modules_to_not_convert = modules_to_not_convert

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
    """Converts a model before its weights are loaded; training and saving it are those of nn.Linear."""

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        skipped = self.quantization_config.modules_to_not_convert
        conversion: dict[str, Any] = {"config": self.quantization_config.config}
        if skipped is not None:
            conversion["module_filter_fn"] = lambda _, fqn: should_convert_module(fqn, skipped)
        convert_to_switchback(model, **conversion)

    def dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        """Revert the model, in the dtype that it has if no other is asked for."""
        self.remove_quantization_config(revert_switchback(model))
        return model if dtype is None else model.to(dtype)
