"""Lightning: precision plugins that convert the model and compute the rest of it under autocast.

Trainer(plugins=SwitchBackPrecision("bf16-mixed", "cuda"))
Fabric(plugins=FabricSwitchBackPrecision("bf16-mixed", "cuda"))
"""

from typing import Any

from torch import nn

from .. import convert_to_switchback
from ._peer import peer

with peer("lightning", "lightning>=2.6,<3"):
    from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
    from lightning.pytorch.plugins import MixedPrecision


class _Converting:
    """Lightning's MixedPrecision, which takes precision, device and scaler, and the arguments of convert_to_switchback.

    Lightning calls :meth:`convert_module` before it wraps the model, and whenever it runs it.
    """

    def __init__(self, precision: Any, device: str, scaler: Any = None, **conversion: Any) -> None:
        super().__init__(precision, device, scaler)  # type: ignore[call-arg]
        self._conversion = conversion

    def convert_module(self, module: nn.Module) -> nn.Module:
        module = super().convert_module(module)  # type: ignore[misc]
        return convert_to_switchback(module, **self._conversion)


class SwitchBackPrecision(_Converting, MixedPrecision):
    __doc__ = f"For ``lightning.pytorch.Trainer``: {_Converting.__doc__}"


class FabricSwitchBackPrecision(_Converting, FabricMixedPrecision):
    __doc__ = f"For ``lightning.fabric.Fabric``: {_Converting.__doc__}"
