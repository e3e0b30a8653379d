"""How every operation reaches PyTorch: one schema, one fake, a reference in plain PyTorch and a Triton launcher."""

import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ..kernels import CannotCompile  # which does not import Triton
from ..kernels.device import current_device

LIBRARY = torch.library.Library("torch_switchback", "DEF")

not_compiled: dict[str, str] = {}
"""Operation name -> why its kernel cannot run in this process. The reference runs instead."""

dispatched = SimpleNamespace()
"""Operations by name, called through PyTorch's dispatcher."""

direct = SimpleNamespace()
"""The CUDA implementations by name. Skipping the dispatcher saves 3 to 5 µs per call (H200 host)."""


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    kernels: str,
) -> Callable[..., Any]:
    """Register an operation, and return it.

    Args:
        schema: the operation's signature in torch.library's language. Its first argument is a tensor.
        fake: from the operation's arguments to its empty outputs. The launcher fills the same outputs, so the two
            cannot differ in shape, dtype or layout.
        reference: the operation in plain PyTorch. It runs on the CPU, and on CUDA where the kernel cannot. Kernels
            equal it bit for bit, except where an operation's docstring says otherwise.
        kernels: the module of ``torch_switchback.kernels`` with the launcher, which has the operation's name and takes
            its arguments and then its outputs. The first CUDA call imports it, and Triton.
    """
    name = schema.partition("(")[0]
    reference = torch.no_grad()(reference)  # or autograd would track what it does to a parameter in place
    cuda = _cuda_implementation(name, kernels, fake, reference)
    # needs_fixed_stride_order: the compiler must hand over the very strides that the program had.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"torch_switchback::{name}", fake, lib=LIBRARY)
    operation = getattr(torch.ops.torch_switchback, name).default
    setattr(dispatched, name, operation)
    setattr(direct, name, cuda)
    return operation


def can_skip_dispatcher(*tensors: torch.Tensor | None) -> bool:
    """Return whether ``direct`` and ``dispatched`` cannot be told apart in a pass on these tensors.

    The dispatcher serves compiling, tracing, modes, transforms such as vmap, profiling, and tensors that are more than
    their memory: subclasses, those with a pending negation, and zeros without storage.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for tensor in tensors:
        if tensor is not None and not (
            tensor.is_cuda
            and type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and not tensor.is_neg()
            and not tensor._is_zerotensor()
        ):
            return False
    return True


def _cuda_implementation(
    name: str, kernels: str, fake: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Return an operation for CUDA tensors: its kernel, or the reference if the kernel cannot run.

    Warns (once per operation) of the latter: the result is the same, the time is not.
    """
    launcher: Callable[..., None] | None = None

    def run(*args: Any) -> Any:
        nonlocal launcher
        device = args[0].get_device()
        if device != current_device():
            with torch.cuda.device(device):
                return run(*args)
        if name in not_compiled:  # trying again would take seconds, at every call
            return reference(*args)
        try:
            if launcher is None:
                launcher = getattr(importlib.import_module(f"torch_switchback.kernels.{kernels}"), name)
            outputs = fake(*args)
            if isinstance(outputs, tuple):
                launcher(*args, *outputs)
            else:
                launcher(*args, outputs)
            return outputs
        except (CannotCompile, ImportError) as error:
            not_compiled[name] = str(error)
            warnings.warn(
                f"torch_switchback runs {name} in plain PyTorch, slowly: its kernel cannot run: {error}", stacklevel=2
            )
            return reference(*args)

    return run
