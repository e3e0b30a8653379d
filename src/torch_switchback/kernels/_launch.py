"""The one place that launches kernels, and what it must know of a device."""

import functools
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from ._driver import cuda_of_the_driver
from ._rehearsal import is_rehearsal, warm_up
from ._repeat import Kernel
from ._replay import is_recording, note


class CannotCompile(Exception):
    """A kernel does not compile here, or needs more than the GPU has."""


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run ``kernel[grid](*args, **options)`` with the arithmetic of _numerics.py; an empty grid runs nothing.

    args are all of the kernel's parameters that are not constexpr, in order; options its constexprs, num_warps,
    num_stages and what :func:`waits` says. An operation's later launches for such arguments skip this and Triton's
    analysis (_replay.py).

    Raises:
        CannotCompile: Triton cannot compile or load the kernel.
        torch.OutOfMemoryError: the driver has no memory to load it.
    """
    if 0 in grid:
        return
    grid = (*grid, 1, 1)[:3]
    if is_rehearsal():
        warm_up(kernel, *args, grid=grid, enable_fp_fusion=False, **options)
        return
    compiled = _run(kernel, grid, args, options)
    if compiled is None:  # the interpreter compiles nothing
        note(functools.partial(kernel[grid], **options), *args)
    elif is_recording():
        constants = [options[name] for name in kernel.arg_names[len(args) :]]
        again = compiled[grid]
        note(Kernel(again, options.get("launch_pdl", False)) if can_be_read(compiled) else again, *args, *constants)


def can_be_read(compiled: Any) -> bool:
    """Whether a launch is its parameters and its grid: no cluster, and no memory that Triton allocates each time."""
    usual = {"num_ctas": 1, "launch_cooperative_grid": False, "global_scratch_size": 0, "profile_scratch_size": 0}
    return all((getattr(compiled.metadata, name, value) or value) == value for name, value in usual.items())


def _run(kernel: Any, grid: Sequence[int], args: Sequence[Any], options: dict[str, Any]) -> Any:
    """Compile a kernel or find it in Triton's cache, and run it; past the cache, if that is what is broken."""

    def run() -> Any:
        compiled = kernel[grid](*args, enable_fp_fusion=False, **options)
        # What another thread compiles, or an interrupted rehearsal did, Triton 3.7 hands out wrapped.
        return compiled.result() if hasattr(compiled, "result") else compiled

    if triton.knobs.runtime.interpret:
        return run()
    try:
        return run()
    except (CompilationError, OutOfResources) as error:
        raise CannotCompile(f"{kernel.__name__} with {options}: {type(error).__name__}: {error}") from error
    except Exception as error:  # a folder that cannot be written, a file that is cut off, what a driver refuses: any
        if "out of memory" in str(error):  # the driver's, which loads kernels beside PyTorch's memory
            raise torch.OutOfMemoryError(str(error)) from error
        first_error = error
    try:
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = _own_cache().name
            kernel.device_caches.clear()  # which may hold what could not be loaded
            compiled = run()
    except Exception:
        why = f"{type(first_error).__name__}: {first_error}"
        raise CannotCompile(f"{kernel.__name__} with {options}: {why}") from first_error
    _warn_of_the_cache()
    return compiled


@functools.cache
def _own_cache() -> tempfile.TemporaryDirectory[str]:
    """A cache for this process alone, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="torch_switchback_triton_")


@functools.cache
def _warn_of_the_cache() -> None:
    warnings.warn(
        f"torch_switchback compiles past Triton's cache {triton.knobs.cache.dir}, which cannot be used. Remove it, or "
        "set TRITON_CACHE_DIR",
        stacklevel=5,
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share a kernel's programs; 1 for the CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


CAPTURES_OVERLAPPING = 12_030  # the driver's CUDA from which on a graph has edges for kernels that overlap


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels can begin while the one before still runs: Hopper's, and in CUDA graphs too.

    The one before says when ("programmatic dependent launch" in the CUDA programming guide): a kernel whose results
    the next one waits for takes this as its SIGNALS. It saves the gap between the two, about a microsecond. Newer GPUs
    could, but have not been measured; of sm_120 it is reported that a graph cannot capture it (sglang's #18596).
    """
    return (
        device.type == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(device) == (9, 0)
        and cuda_of_the_driver() >= CAPTURES_OVERLAPPING
    )


def waits(device: torch.device) -> dict[str, bool]:
    """The options of a kernel that begins before the one ahead has ended, and waits for it before it touches memory."""
    return {"WAITS": True, "launch_pdl": True} if overlaps(device) else {"WAITS": False}


@functools.cache
def architecture(device: torch.device) -> str:
    """The tuning table's name for a device: ``"sm_90"``, ``"gfx942"``, …"""
    if device.type == "cpu":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# Triton vectorises by the sizes that 16 divides; 16 codes are also the 16 bytes that rows for TMA are multiples of.
VECTOR = 16

# triton.cdiv and triton.next_power_of_2 serve kernels too and take some microseconds a call on the host.


def ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
