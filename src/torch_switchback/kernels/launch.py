"""The one place that launches kernels: a cache of compiled kernels in front of Triton's launcher.

``kernel[grid](*args)`` takes 16 µs of CPU time, most of it to find the compiled kernel. A lookup by
:func:`specialization_key` and Triton's launcher behind it take 7 µs (H200 host, Triton 3.6; docs/performance.md).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from . import CannotCompile
from .device import current_device, current_stream

VECTOR = 16
"""Triton vectorizes along sizes that 16 divides. TMA wants rows of a multiple of 16 bytes, or 16 int8 values."""

INT32_MAX = 2**31 - 1

compiled_kernels: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}
"""Specialization key -> compiled kernel and the values of its constexpr parameters.

It is bounded: keys hold no sizes, only what Triton specializes on.
"""


def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: Any) -> None:
    """Run a kernel on the current device and stream. An empty grid runs nothing.

    Args:
        kernel: a ``triton.jit`` function whose constexpr parameters come last.
        grid: the number of programs along one to three axes.
        args: the values of all other parameters in order: tensors, tensor descriptors and ints.
        constants: a NamedTuple of the constexpr parameters in order, followed by Triton's options, such as
            ``num_warps``. Kernels are compiled without fused multiply-adds, on which the bitwise guarantees rest.

    Raises:
        CannotCompile: Triton cannot compile or load the kernel.
        torch.OutOfMemoryError: there is no GPU memory to load it.
    """
    if 0 in grid:
        return
    key, values = specialization_key(kernel, args, constants)
    cached = compiled_kernels.get(key)
    knobs = triton.knobs.runtime
    if cached is None or knobs.add_stages_inspection_hook is not None:
        compiled = _compile_and_run(kernel, grid, args, constants)
        if isinstance(compiled, CompiledKernel):
            compiled_kernels[key] = compiled, tuple(constants[: len(kernel.arg_names) - len(args)])
        return
    compiled, constexprs = cached
    grid_x, grid_y, grid_z = (*grid, 1, 1)[:3]
    if _has_calls(knobs.launch_enter_hook) or _has_calls(knobs.launch_exit_hook):
        compiled[grid_x, grid_y, grid_z](*args, *constexprs)
        return
    # What compiled[grid](*args) does, without the 5 µs that it spends on absent hooks and on looking up the stream.
    compiled.run(
        grid_x,
        grid_y,
        grid_z,
        current_stream(key[0]),
        compiled.function,
        compiled.packed_metadata,
        None,  # launch metadata and the two hooks
        None,
        None,
        *values,
        *constexprs,
    )


def specialization_key(kernel: Any, args: Sequence[Any], constants: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """Return what selects a compiled kernel, and args with addresses in place of tensors.

    Two launches with the same key have the same key in Triton's own cache. The reverse need not hold: a miss here only
    costs a lookup there.
    """
    knobs = triton.knobs
    # Hashing a kernel takes Triton microseconds. Its id will do, as the compiled kernel keeps it alive.
    key = [current_device(), id(kernel), constants, knobs.runtime.debug, knobs.compilation.instrumentation_mode]
    values = []
    for arg in args:
        if type(arg) is int:
            key.append((arg == 1, arg % 16 == 0, arg > INT32_MAX))
            values.append(arg)
        elif isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            key.append(arg.dtype)
            key.append(address % 16 == 0)
            values.append(address)
        else:  # a tensor descriptor
            key.append((arg.base.dtype, *arg.block_shape, getattr(arg, "layout", None)))
            values.append(arg)
    return tuple(key), values


def _compile_and_run(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: Any) -> Any:
    """Have Triton compile a kernel, or load it from its cache on disk, and run it."""
    options = constants._asdict()
    if options.get("PDL_WAIT"):
        options["launch_pdl"] = True
    if not isinstance(kernel, JITFunction):  # the interpreter, which compiles nothing
        return kernel[grid](*args, **options)
    try:
        compiled = kernel[grid](*args, **options, enable_fp_fusion=False)
        return compiled.result() if hasattr(compiled, "result") else compiled  # a future under AsyncCompileMode
    except (CompilationError, OutOfResources) as error:
        raise CannotCompile(f"{kernel.__name__} with {constants}: {type(error).__name__}: {error}") from error
    except Exception as error:  # Triton has no common base class for what its cache, its launcher and the driver raise
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise CannotCompile(
            f"{kernel.__name__} with {constants}: {type(error).__name__}: {error}. If Triton's cache "
            f"{triton.knobs.cache.dir} is damaged or read-only, remove it or set TRITON_CACHE_DIR"
        ) from error


def _has_calls(hook: Any) -> bool:
    """Return whether a launch hook does anything: by default Triton has a chain of hooks that is empty."""
    return bool(getattr(hook, "calls", hook))


def ceil_div(n: int, divisor: int) -> int:
    """Return n / divisor rounded up. triton.cdiv does the same but takes microseconds per call."""
    return -(-n // divisor)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n. triton.next_power_of_2 takes microseconds per call."""
    return 1 << max(n - 1, 0).bit_length()
