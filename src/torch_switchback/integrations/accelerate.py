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
    """An Accelerator whose :meth:`prepare` converts every model before it is moved, wrapped or sharded.

    Accelerate's registry of low-precision backends takes no third parties, hence a subclass.

    Args:
        conversion: keyword arguments of :func:`torch_switchback.convert_to_switchback`.
        arguments: those of Accelerator.
    """

    def __init__(self, *, conversion: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._conversion = dict(conversion or {})

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        for model in args:
            if isinstance(model, nn.Module) and not getattr(model, "_is_accelerate_prepared", False):
                convert_to_switchback(model, **self._conversion)
        return super().prepare(*args, device_placement=device_placement)
