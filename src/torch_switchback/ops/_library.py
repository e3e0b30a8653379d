"""How every operation reaches PyTorch: one schema, one allocator, a CPU meaning and a Triton launcher."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

LIBRARY = torch.library.Library("torch_switchback", "DEF")

not_compiled: dict[str, str] = {}
"""Why an operation's kernel cannot run in this process, by the operation's name: plain torch computes it instead."""


class Operation(NamedTuple):
    """An operation, twice."""

    dispatched: Callable[..., Any]
    """Through PyTorch's dispatcher: what tracing, subclasses and modes need."""
    direct: Callable[..., Any]
    """The same without the dispatcher where no one could tell: it takes longer than a kernel's launch."""


def define(
    schema: str,
    *,
    allocate: Callable[..., Any],
    meaning: Callable[..., Any],
    kernels: str,
) -> Operation:
    """Register an operation.

    Args:
        schema: the operation's signature in torch.library's language; its first argument is a tensor.
        allocate: from the operation's arguments to its empty outputs. It serves as the fake and hands the
            launcher its outputs, so the two cannot differ in shape, dtype or layout.
        meaning: the operation in plain torch: what the CPU runs, and CUDA where the kernel does not compile. The
            kernels must equal it bit for bit, save where an operation says what else it promises.
        kernels: the module of ``torch_switchback.kernels`` whose function of the operation's name takes the
            arguments and then the outputs. It is imported, and Triton with it, by the first CUDA call.
    """
    name = schema.partition("(")[0]
    meaning = torch.no_grad()(meaning)  # else autograd tracks, of a parameter, what plain torch does in place
    run: Callable[..., Any] | None = None

    def cuda(*args: Any) -> Any:
        nonlocal run
        if run is None:
            run = _on_cuda(name, kernels, allocate, meaning)
        device: int = args[0].get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return run(*args)
        return run(*args)

    # needs_fixed_stride_order: the compiler must hand over the very strides that the program had.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, meaning, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"torch_switchback::{name}", allocate, lib=LIBRARY)
    dispatched = getattr(torch.ops.torch_switchback, name).default

    def direct(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not args[0].is_cuda or _is_watched(args):
            return dispatched(*args)
        return cuda(*args)

    return Operation(dispatched, direct)


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether something stands between a call and its kernel: a subclass, a pending negation, a mode or a tracer."""
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if (type(arg) is not torch.Tensor and type(arg) is not nn.Parameter) or arg.is_neg():
            return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def _on_cuda(name: str, kernels: str, allocate: Callable[..., Any], meaning: Callable[..., Any]) -> Callable[..., Any]:
    """An operation for CUDA tensors: its kernel, or its meaning without Triton or where the kernel does not compile.

    Warns (once an operation) of the latter: the result is the same, the time is not.
    """

    def give_way(error: Exception) -> None:
        not_compiled[name] = str(error)
        warnings.warn(
            f"torch_switchback runs {name} in plain PyTorch, slowly: its kernel cannot run: {error}", stacklevel=3
        )

    try:
        launcher = getattr(importlib.import_module(f"torch_switchback.kernels.{kernels}"), name)
        from ..kernels import _replay
        from ..kernels._launch import CannotCompile
    except ImportError as error:
        give_way(error)
        return meaning

    def run(*args: Any) -> Any:
        if name in not_compiled:  # trying again would take seconds, at every call
            return meaning(*args)
        outputs = allocate(*args)
        try:
            _replay.run(launcher, args, outputs if isinstance(outputs, tuple) else (outputs,))
        except CannotCompile as error:
            give_way(error)
            return meaning(*args)
        return outputs

    return run
