"""What torch.utils.flop_counter counts for the products. It imports Triton, so nothing here imports it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import torch

_COUNTER = "torch.utils.flop_counter"


def count_as_mm(*products: str) -> None:
    """Have operations, whose first arguments are [m, k] and [k, n], counted as aten.mm is, once there is a counter."""

    def register() -> None:
        from torch.utils.flop_counter import mm_flop, register_flop_formula

        packets = [getattr(torch.ops.torch_switchback, product) for product in products]
        register_flop_formula(packets, get_raw=True)(mm_flop)

    if _COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))


class _AfterImport(MetaPathFinder):
    """Sees to it that a function is called after the counter has been imported."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
