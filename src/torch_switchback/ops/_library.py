"""How every operation reaches PyTorch: one schema, one allocator, a CPU meaning and a Triton launcher."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("torch_switchback", "DEF")


def define(
    schema: str,
    *,
    allocate: Callable[..., Any],
    cpu: Callable[..., Any],
    kernels: str,
) -> Any:
    """Register an operation and return its callable overload.

    Args:
        schema: the operation's signature in torch.library's language.
        allocate: from the operation's arguments to its empty outputs. It serves as the fake and hands the
            launcher its outputs, so the two cannot differ in shape, dtype or layout.
        cpu: the operation's meaning in plain torch. The kernels must equal it bit for bit.
        kernels: the module of ``torch_switchback.kernels`` whose function of the operation's name takes the
            arguments and then the outputs. It is imported, and Triton with it, by the first CUDA call.
    """
    name = schema.partition("(")[0]
    launcher: Callable[..., None] | None = None

    def cuda(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(f"torch_switchback.kernels.{kernels}"), name)
        device: torch.device = args[0].device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return _fill(launcher, allocate, args)
        return _fill(launcher, allocate, args)

    # needs_fixed_stride_order: the compiler must hand over the very strides that the program had.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"torch_switchback::{name}", allocate, lib=LIBRARY)
    return getattr(torch.ops.torch_switchback, name).default


def _fill(launcher: Callable[..., None], allocate: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    outputs = allocate(*args)
    launcher(*args, *(outputs if isinstance(outputs, tuple) else (outputs,)))
    return outputs
