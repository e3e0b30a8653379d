"""Register operations with PyTorch: a schema, a fake, a reference in plain PyTorch, and kernels."""

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
"""The CUDA implementations by name, for tensors on the current device.

Skipping the dispatcher saves 4 to 12 µs per call (docs/performance-log.md).
"""


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    kernels: str,
) -> Callable[..., Any]:
    """Register an operation, fill :data:`direct` and :data:`dispatched` with it, and return it.

    ``ops/__init__.py`` imports every file that defines operations.

    Args:
        schema: the operation's signature in torch.library's language. Its first argument is a tensor.
        fake: from the operation's arguments to its empty outputs. Its kernels fill the same outputs, so the two cannot
            differ in shape, dtype or layout.
        reference: the operation in plain PyTorch. It runs on the CPU, and on CUDA where the kernel cannot. Kernels
            equal it bit for bit, except where an operation's docstring says otherwise.
        kernels: the module of ``torch_switchback.kernels`` whose function ``plan_`` and the operation's name takes its
            arguments and then its outputs, and returns a plan. The first CUDA call imports it, and Triton.
    """
    name = schema.partition("(")[0]
    reference = torch.no_grad()(reference)  # or autograd would track what it does to a parameter in place
    run = _direct_implementation(name, kernels, fake, reference)
    # needs_fixed_stride_order: the compiler must keep the strides that the program had.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, _on_its_device(run), "CUDA")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # outputs require no gradient
    torch.library.register_fake(f"torch_switchback::{name}", fake, lib=LIBRARY)
    operation = getattr(torch.ops.torch_switchback, name).default
    setattr(dispatched, name, operation)
    setattr(direct, name, run)
    return operation


_NO_MODES = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_USUAL_KEYS = frozenset(
    keys.raw_repr() for keys in (_NO_MODES, _NO_MODES | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView))
)
"""The dispatch keys that PyTorch adds to those of tensors when nothing watches: in inference mode, and out of it."""


def can_skip_dispatcher(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Return whether ``direct`` and ``dispatched`` cannot be told apart in a pass on these tensors.

    The dispatcher serves compiling, tracing, dispatch modes, transforms such as vmap, profiling, other devices than the
    current one, and tensors that are more than their memory: subclasses, a pending negation, zeros without storage.
    """
    if (
        torch.compiler.is_compiling()
        or not first.is_cuda  # asked first, as asking for the current device initializes CUDA
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _USUAL_KEYS
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    device = current_device()
    for tensor in (first, *others):
        if tensor is not None and (
            tensor.get_device() != device
            or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.is_neg()
            or tensor._is_zerotensor()
        ):
            return False
    return True


def _direct_implementation(
    name: str, kernels: str, fake: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Return an operation for tensors on the current CUDA device: its kernel, or the reference if that cannot run.

    Warns (once per operation) of the latter: the result is the same, the time is not.
    """
    plan_for: Any = None  # kernels.launch.plan_for, which needs Triton
    make: Any = None

    def run(*args: Any) -> Any:
        nonlocal plan_for, make
        if name in not_compiled:  # trying again would take seconds, at every call
            return reference(*args)
        try:
            if make is None:  # the last to be set, as other threads may be here
                plan_for = importlib.import_module("torch_switchback.kernels.launch").plan_for
                make = getattr(importlib.import_module(f"torch_switchback.kernels.{kernels}"), f"plan_{name}")
            results = fake(*args)
            outputs = results if isinstance(results, tuple) else (results,)
            plan = plan_for(make, args, outputs)
        except (CannotCompile, ImportError) as error:
            not_compiled[name] = str(error)
            warnings.warn(
                f"torch_switchback runs {name} in plain PyTorch, slowly: its kernel cannot run: {error}", stacklevel=2
            )
            return reference(*args)
        plan(*args, *outputs)
        return results

    return run


def _on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes the device of its first argument the current one, and then runs."""

    def cuda(*args: Any) -> Any:
        if args[0].get_device() == current_device():
            return run(*args)
        with torch.cuda.device(args[0].device):
            return run(*args)

    return cuda
