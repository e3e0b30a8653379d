"""Compile kernels for a GPU that is not there, with the arguments that a launcher passes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from torch_switchback.tuning import _tables

# All architectures that a shipped table lists, and what the table says of them (CUDA programming guide, table of
# compute capabilities; CDNA 3 ISA guide).
_SERVED = {name: limits for table in _tables.shipped_tables().values() for name, limits in table.serves.items()}
TARGETS = {
    name: GPUTarget("cuda", int(name.removeprefix("sm_")), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
    for name in _SERVED
}
SHARED_MEMORY = {name: limits.shared_memory_kib * 1024 for name, limits in _SERVED.items()}  # of one program

_TYPES = {
    torch.int8: "i8",
    torch.int32: "i32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
_OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "launch_pdl"}


@dataclass
class Launch:
    """A launch as recorded: the kernel and what was passed to it."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(repr=False)

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in self.kwargs.items() if name in _OPTIONS}

    def specialization(self) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
        """Return what Triton compiles for: the arguments' types, the constants among them, and what 16 divides."""
        bound = dict(zip(self.kernel.arg_names, self.args, strict=False))
        bound |= {name: value for name, value in self.kwargs.items() if name in self.kernel.arg_names}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = bound[parameter.name]
            kind, divisible = _specialize(value, parameter)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[(index,)] = value
            elif divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes

    def compile(self, target: GPUTarget) -> Any:
        source_type = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        source = source_type(self.kernel, *self.specialization())
        return triton.compile(source, target=target, options=self.options)


def _specialize(value: Any, parameter: Any) -> tuple[str, bool]:
    """The type that Triton gives an argument, and whether it may count on 16 dividing it."""
    if hasattr(value, "block_shape"):
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # Gluon's descriptors have one
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>", False
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
    if parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
        return "constexpr", False
    assert type(value) is int
    return "i32" if value < 2**31 else "i64", value % 16 == 0 and not parameter.do_not_specialize


def record(make: Callable[..., Callable[..., None]], *args: Any, **options: Any) -> list[Launch]:
    """Return the launches that a plan for CPU tensors makes, none of them run."""
    launches = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not warmup:
            launches.append(Launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        make(*args, **options)(*args)
    return launches
