"""The one place that launches kernels: plans, made once per specialization key, over Triton's launcher.

A plan is a function that runs one operation on all arguments with the same :func:`specialization_key`. Tiles and
compiled kernels are chosen when the plan is made. Running it computes grids and launches. ``kernel[grid](*args)`` takes
28 µs, most of it to find the compiled kernel; a bound launch takes 10 (H200 host, Triton 3.6; docs/performance-log.md).
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from . import CannotCompile
from .device import current_device, current_stream

VECTOR = 16
"""Triton vectorizes along sizes that 16 divides. TMA wants rows of a multiple of 16 bytes, or 16 int8 values."""

INT32_MAX = 2**31 - 1

MAX_PLANS = 10_000
"""A few per layer shape are in use. All are forgotten at once before they could grow without bound."""

RUN_IS_KNOWN = triton.__version__.startswith("3.")
"""True if ``CompiledKernel.run`` takes the arguments that it takes in Triton 3.6 to 3.9."""

Plan = Callable[..., None]
"""It takes an operation's arguments and then its empty outputs, which it fills."""

plans: dict[tuple[Any, ...], Plan] = {}


def plan_for(make: Callable[..., Plan], args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> Plan:
    """Return the plan of an operation for the specialization key of its arguments, and make it if there is none.

    Args:
        make: from the arguments and the outputs to a plan.
        args: the operation's arguments, on the current device.
        outputs: its outputs, contiguous and aligned as PyTorch's allocator does.

    Raises:
        CannotCompile: Triton cannot compile or load a kernel.
        torch.OutOfMemoryError: there is no GPU memory to load one.
    """
    knobs = triton.knobs
    if knobs.runtime.add_stages_inspection_hook is not None:  # changes how kernels are compiled, maybe at every call
        return make(*args, *outputs)
    key = (
        make,
        current_device(),
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
        specialization_key(args),
    )
    plan = plans.get(key)
    if plan is None:
        plan = make(*args, *outputs)
        if len(plans) >= MAX_PLANS:
            plans.clear()
        plans[key] = plan
    return plan


def specialization_key(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what decides which kernels an operation launches on these arguments, and how they are compiled.

    The first argument's rows are usually tokens, whose number changes from call to call: only its power of two and
    whether 16 divides it count. Of other matrices the whole shape does, and of all tensors the strides. Vectors have as
    many elements as a matrix has rows or columns. Two calls with the same key launch kernels with the same key in
    Triton's own cache.
    """
    first = args[0]
    shape, elements = first.shape, first.numel()
    rows = shape[0] if shape else 1
    key = [
        octave(rows),
        rows & 15 == 0,
        octave(elements),
        elements > INT32_MAX,
        rows > INT32_MAX - 128,  # rows padded to a rotation's block may pass it
        shape[1] if len(shape) == 2 else shape[1:],
        first.dtype,
        first.stride(),
        first.data_ptr() & 15,
    ]
    for arg in args[1:]:
        if isinstance(arg, torch.Tensor):
            size = arg.numel() == 1 if arg.dim() == 1 else arg.shape
            key.append((arg.dtype, size, arg.stride(), arg.data_ptr() & 15))
        else:
            key.append(arg)
    return tuple(key)


def bind(kernel: Any, args: tuple[Any, ...], **options: Any) -> Callable[..., None]:
    """Compile a kernel, or load it from Triton's cache, and return a function that launches it.

    Args:
        kernel: a ``triton.jit`` function whose constexpr parameters come last.
        args: values of all other parameters, with the specialization that later launches will have.
        options: its constexprs, and Triton's options, such as ``num_warps``. A kernel whose ``PDL_WAIT`` is set is
            launched early. No kernel is compiled with fused multiply-adds: the bitwise guarantees rest on that.

    Returns:
        ``launch(grid, *args)``, where grid is three numbers of programs. An empty grid runs nothing. The current device
        must be the one of now; the stream is the current one.

    Raises:
        CannotCompile: Triton cannot compile or load the kernel.
        torch.OutOfMemoryError: there is no GPU memory to load it.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter, which compiles nothing

        def interpret(grid: tuple[int, int, int], *args: Any) -> None:
            if 0 not in grid:
                kernel[grid](*args, **options)

        return interpret

    if options.get("PDL_WAIT"):
        options["launch_pdl"] = True
    options["enable_fp_fusion"] = False
    compiled = _compile(kernel, args, options)
    if compiled is None:  # a hook of Triton's compiles instead, and wants to see every launch
        return lambda grid, *args: kernel[grid](*args, **options)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    constexprs = tuple(options[name] for name in kernel.arg_names[len(args) :])
    device, knobs = current_device(), triton.knobs.runtime

    def launch(grid: tuple[int, int, int], *args: Any) -> None:
        if 0 in grid:
            return
        try:
            is_hooked = knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls
        except AttributeError:  # a hook in place of Triton's chain of hooks
            is_hooked = True
        if is_hooked or not RUN_IS_KNOWN:
            compiled[grid](*args, *constexprs)
        else:  # the same, without the 4 µs for absent hooks and for the stream
            run(*grid, current_stream(device), function, metadata, None, None, None, *args, *constexprs)

    return launch


def _compile(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return Triton's compiled kernel, loaded onto the current device, or None if a hook of Triton's said so."""
    try:
        compiled = kernel.warmup(*args, grid=(1, 1, 1), **options)
        if hasattr(compiled, "result"):  # a future under Triton's AsyncCompileMode
            compiled = compiled.result()
        if compiled is not None:
            compiled._init_handles()
        return compiled
    except (CompilationError, OutOfResources) as error:
        raise CannotCompile(f"{kernel.__name__} with {options}: {type(error).__name__}: {error}") from error
    except Exception as error:  # Triton has no common base class for what its cache, its launcher and the driver raise
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise CannotCompile(
            f"{kernel.__name__} with {options}: {type(error).__name__}: {error}. If Triton's cache "
            f"{triton.knobs.cache.dir} is damaged or read-only, remove it or set TRITON_CACHE_DIR"
        ) from error


def octave(n: int) -> int:
    """Return log2 of the power of two that n is rounded up to, or -1 for 0."""
    return (n - 1).bit_length() if n else -1


def ceil_div(n: int, divisor: int) -> int:
    """Return n / divisor rounded up. triton.cdiv does the same but takes microseconds per call."""
    return -(-n // divisor)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n. triton.next_power_of_2 takes microseconds per call."""
    return 1 << max(n - 1, 0).bit_length()
