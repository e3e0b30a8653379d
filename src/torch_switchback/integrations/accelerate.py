"""Accelerate: an Accelerator that converts the models it prepares.

accelerator = SwitchBackAccelerator(mixed_precision="bf16")
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import convert_to_switchback
from ._peer import peer

with peer("accelerate", "accelerate>=1.10,<2"):
    from accelerate import Accelerator


class SwitchBackAccelerator(Accelerator):
    """An Accelerator that converts every model it prepares, before the model is moved, wrapped or sharded.

    Accelerate's registry of low-precision backends takes no third parties, hence a subclass.

    Args:
        conversion: keyword arguments of :func:`torch_switchback.convert_to_switchback`.
        arguments: those of Accelerator.
    """

    def __init__(self, *, conversion: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._conversion = dict(conversion or {})
        self._preparing = False

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        for each in args:
            if isinstance(each, nn.Module):
                self._convert(each)
        self._preparing = True  # it may call prepare_model, when the model's layers have other names
        try:
            return super().prepare(*args, device_placement=device_placement)
        finally:
            self._preparing = False

    def prepare_model(self, model: nn.Module, *args: Any, **arguments: Any) -> nn.Module:
        if not self._preparing:
            self._convert(model)
        return super().prepare_model(model, *args, **arguments)

    def _convert(self, model: nn.Module) -> None:
        if not getattr(model, "_is_accelerate_prepared", False):
            convert_to_switchback(model, **self._conversion)
