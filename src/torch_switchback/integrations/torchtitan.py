"""torchtitan: a quantization converter for its model configurations.

model_registry("8B", converters=[SwitchBackLinearConverter.Config(conversion={"config": SwitchBackConfig("rowwise")})])
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from .. import SwitchBackConfig, SwitchBackLinear, convert_to_switchback
from ._peer import peer

with peer("torchtitan", "torchtitan>=0.3,<0.4"):
    from torchtitan.components.quantization import QuantizationConverter
    from torchtitan.models.common.linear import Linear
    from torchtitan.protocols.module import Module


class SwitchBackTitanLinear(SwitchBackLinear, Module):
    """SwitchBackLinear, built, initialized and sharded as torchtitan does; it reverts to torchtitan's Linear."""

    reverts_to = Linear

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        switchback: SwitchBackConfig

    def __init__(self, config: Config) -> None:
        super().__init__(config.in_features, config.out_features, bias=config.bias, config=config.switchback)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Module.parallelize keeps this bound method for good: through it revert_switchback must have its effect too.
        return super().forward(input) if isinstance(self, SwitchBackLinear) else Linear.forward(self, input)


class SwitchBackLinearConverter(QuantizationConverter):
    """Replaces the linear layers of a model's configuration, before the model is built."""

    @dataclass(kw_only=True, slots=True)
    class Config(QuantizationConverter.Config):
        conversion: dict[str, Any] = field(default_factory=dict)
        """Keyword arguments of :func:`torch_switchback.convert_to_switchback`: config, module_filter_fn. The filter
        sees nn.Linear layers on the meta device, under the names they will have."""

    def __init__(self, config: Config) -> None:
        self._conversion = config.conversion

    def convert(self, model_config: Module.Config) -> Module.Config:
        """Return the configuration with SwitchBackTitanLinear.Config for what convert_to_switchback converts.

        Raises:
            ValueError: all_gather is "int8", which torchtitan's meta-device initialization does not carry.
        """
        # Only exact Linear: its other kinds have a forward of their own.
        linears = [found for found in model_config.traverse(Linear.Config) if type(found[1]) is Linear.Config]
        skeleton = nn.Module()
        for fqn, linear, *_ in linears:
            _add(skeleton, fqn, nn.Linear(linear.in_features, linear.out_features, linear.bias, device="meta"))
        convert_to_switchback(skeleton, **self._conversion)
        for fqn, linear, parent, attribute in linears:
            layer = skeleton.get_submodule(fqn)
            if not isinstance(layer, SwitchBackLinear):
                continue
            if layer.config.all_gather == "int8":
                raise ValueError(f"SwitchBackLinearConverter: {fqn}: all_gather must be 'high_precision', got 'int8'")
            kept = {each.name: getattr(linear, each.name) for each in fields(linear) if each.init}
            converted = SwitchBackTitanLinear.Config(**kept, switchback=layer.config)
            if isinstance(parent, list):
                parent[attribute] = converted
            else:
                setattr(parent, attribute, converted)
        return model_config


def _add(root: nn.Module, fqn: str, module: nn.Module) -> None:
    """Put a module at a fully qualified name, with empty ones above it."""
    *path, name = fqn.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(name, module)
