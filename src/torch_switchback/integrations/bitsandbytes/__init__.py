"""Programs written for bitsandbytes' SwitchBackLinear, which bitsandbytes 0.50 deleted, run unchanged."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from ... import nn, ops

_LAYERS = (
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
)

# The modules that bitsandbytes had, and what a program imported from each.
_MODULES = {
    "bitsandbytes.nn": _LAYERS,
    "bitsandbytes.nn.triton_based_modules": _LAYERS,
    "bitsandbytes.triton": (),
    "bitsandbytes.triton.dequantize_rowwise": ("dequantize_rowwise",),
    "bitsandbytes.triton.int8_matmul_mixed_dequantize": ("int8_matmul_mixed_dequantize",),
    "bitsandbytes.triton.int8_matmul_rowwise_dequantize": ("int8_matmul_rowwise_dequantize",),
    "bitsandbytes.triton.quantize_columnwise_and_transpose": ("quantize_columnwise_and_transpose",),
    "bitsandbytes.triton.quantize_global": ("quantize_global", "quantize_global_transpose"),
    "bitsandbytes.triton.quantize_rowwise": ("quantize_rowwise",),
}


def install_as_bitsandbytes() -> None:
    """Make ``bitsandbytes.nn.SwitchBackLinear`` and its kernels importable, served by this library.

    Call it in each process, spawned ones too, before the program imports from ``bitsandbytes.nn``,
    ``bitsandbytes.nn.triton_based_modules`` or ``bitsandbytes.triton``. If bitsandbytes is installed it is imported and
    all its other parts stay as they are; if not, modules of those names are made.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        _make_module("bitsandbytes")
        _make_module("bitsandbytes.nn")
    else:
        importlib.import_module("bitsandbytes.nn")
    for name, members in _MODULES.items():
        # Older releases have bitsandbytes.triton, whose other modules stay; its kernels no longer import.
        keep = name == "bitsandbytes.nn" or (name == "bitsandbytes.triton" and importlib.util.find_spec(name))
        module = importlib.import_module(name) if keep else _make_module(name)
        for member in members:
            setattr(module, member, getattr(nn if member in _LAYERS else ops, member))


def _make_module(name: str) -> ModuleType:
    """Return an empty package, known to the import system and to its parent."""
    module = ModuleType(name, f"{name}, provided by torch_switchback")
    module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module
