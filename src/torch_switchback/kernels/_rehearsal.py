"""All kernels that a function launches compiled at the same time, before it launches the first of them.

One after the other, each at its launch, they would take the sum of their times: seconds, in a layer's first step.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch


class _Rehearsal(threading.local):
    """The kernels that would have been launched in this thread so far, while a function is rehearsed."""

    kernels: list[Any] | None = None


_rehearsal = _Rehearsal()


def is_rehearsal() -> bool:
    return _rehearsal.kernels is not None


def note_kernel(kernel: Any) -> None:
    """A compiled kernel, or what Triton will compile: to be made ready for its launch."""
    assert _rehearsal.kernels is not None
    _rehearsal.kernels.append(kernel)


def rehearse(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Make ``function(*args)`` ready to launch; the first argument is a CUDA tensor, on the current device.

    It is called with launches that only compile, and does all else as ever: to memory that it allocates itself. What
    cannot be compiled is passed over: its launch will say why.
    """
    import triton

    if triton.knobs.runtime.interpret or torch.cuda.is_current_stream_capturing():
        return

    def load(kernel: Any) -> None:
        with suppress(Exception), torch.cuda.device(args[0].device):
            kernel[1, 1, 1]  # loads it, and compiles the launcher that Triton writes in C

    with suppress(Exception), ThreadPoolExecutor() as executor:
        with _noted() as kernels, triton.AsyncCompileMode(executor, ignore_errors=True):
            function(*args)
        compiled = [kernel.result(ignore_errors=True) if hasattr(kernel, "result") else kernel for kernel in kernels]
        list(executor.map(load, {id(kernel): kernel for kernel in compiled if kernel is not None}.values()))


@contextmanager
def _noted() -> Iterator[list[Any]]:
    kernels: list[Any] = []
    _rehearsal.kernels = kernels
    try:
        yield kernels
    finally:
        _rehearsal.kernels = None
