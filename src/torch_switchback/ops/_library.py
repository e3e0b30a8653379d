"""How every operation reaches PyTorch: one schema, one allocator, a CPU meaning and a Triton launcher."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..kernels import _replay  # which does not import Triton

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

    def launched(args: tuple[Any, ...], kind: _replay.Kind | None) -> Any:
        nonlocal run
        if run is None:
            run = _on_cuda(name, kernels, allocate, meaning)
        return _on_its_device(args[0], run, args, kind)

    def cuda(*args: Any) -> Any:
        return launched(args, _replay.kind_of(args))

    # needs_fixed_stride_order: the compiler must hand over the very strides that the program had.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, meaning, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"torch_switchback::{name}", allocate, lib=LIBRARY)
    dispatched = getattr(torch.ops.torch_switchback, name).default

    def direct(*args: Any) -> Any:
        if _may_reach_kernels(args[0]) and (kind := _replay.kind_of(args)) is not None:
            return launched(args, kind)
        return dispatched(*args)

    return Operation(dispatched, direct)


def as_one(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, a function of nothing but operations: on CUDA their launches are looked up once together.

    What it may do is what :func:`.kernels._replay.run` says. Operations one by one take the host twice as long.
    """
    if _may_reach_kernels(args[0]) and (kind := _replay.kind_of(args)) is not None:
        return _on_its_device(args[0], _replay.run, function, args, kind)
    return function(*args)


def _on_its_device(x: torch.Tensor, run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)`` with x's device as the current one."""
    device = x.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(*args)
    return run(*args)


def _may_reach_kernels(x: torch.Tensor) -> bool:
    """Whether nothing but what x and its like are stands between an operation on them and its kernel."""
    return x.is_cuda and not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


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
        from ..kernels._launch import CannotCompile
    except ImportError as error:
        give_way(error)
        return lambda args, kind: meaning(*args)

    def launch(*args: Any) -> Any:
        results = allocate(*args)
        outputs = results if isinstance(results, tuple) else (results,)
        _replay.note_memory(*outputs)
        launcher(*args, *outputs)
        return results

    def run(args: tuple[Any, ...], kind: _replay.Kind | None) -> Any:
        if name in not_compiled:  # trying again would take seconds, at every call
            return meaning(*args)
        try:
            return _replay.run(launch, args, kind)
        except CannotCompile as error:
            give_way(error)
            return meaning(*args)

    return run
