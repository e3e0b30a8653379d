"""Programs written for bitsandbytes' SwitchBackLinear, which bitsandbytes 0.50 deleted, run unchanged."""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import conventions

_LAYERS = (
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "StandardLinear",
)
_PACKAGES = ("bitsandbytes", "bitsandbytes.nn", "bitsandbytes.triton")

# The modules that bitsandbytes had, and what a program imported from each.
_MODULES = {
    "bitsandbytes.triton.dequantize_rowwise": ("dequantize_rowwise",),
    "bitsandbytes.triton.int8_matmul_mixed_dequanitze": ("int8_matmul_mixed_dequanitze",),
    "bitsandbytes.triton.int8_matmul_mixed_dequantize": ("int8_matmul_mixed_dequantize",),
    "bitsandbytes.triton.int8_matmul_rowwise_dequantize": ("int8_matmul_rowwise_dequantize",),
    "bitsandbytes.triton.quantize_columnwise_and_transpose": ("quantize_columnwise_and_transpose",),
    "bitsandbytes.triton.quantize_global": ("quantize_global", "quantize_global_transpose"),
    "bitsandbytes.triton.quantize_rowwise": ("quantize_rowwise",),
    "bitsandbytes.triton.triton_utils": ("is_triton_available",),
    "bitsandbytes.nn.triton_based_modules": conventions.__all__,
}


def install_as_bitsandbytes() -> None:
    """Make ``bitsandbytes.nn.SwitchBackLinear`` and its kernels importable, served by this library.

    Call it in each process, spawned ones too, before the program imports from ``bitsandbytes.nn``,
    ``bitsandbytes.nn.triton_based_modules`` or ``bitsandbytes.triton``. If bitsandbytes is installed it is imported and
    all its other parts stay as they are; if not, modules of those names are made.
    """
    # First, since a bitsandbytes of up to 0.45 may import its own of these, which need a Triton of its time.
    for name, members in _MODULES.items():
        _serve(sys.modules.get(name) or _make_module(name), members)
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            _make_module(name)
        importlib.import_module(name)
    _serve(sys.modules["bitsandbytes.nn"], _LAYERS)
    for name in (*_PACKAGES[1:], *_MODULES):
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[name])


def _serve(module: ModuleType, members: Iterable[str]) -> None:
    for member in members:
        setattr(module, member, getattr(conventions, member))


def _make_module(name: str) -> ModuleType:
    """Return an empty package, known to the import system."""
    module = ModuleType(name, f"{name}, provided by torch_switchback")
    module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    sys.modules[name] = module
    return module
