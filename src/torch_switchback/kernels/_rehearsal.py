"""All kernels that a function launches compiled at the same time, before it launches the first of them.

One after the other, each at its launch, they would take the sum of their times: seconds, in a layer's first step.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch


class _Rehearsal(threading.local):
    """What would have been launched in this thread so far: kernels, and what Triton returned to compile them by."""

    launches: list[tuple[Any, Any]] | None = None


_rehearsal = _Rehearsal()


def is_rehearsal() -> bool:
    return _rehearsal.launches is not None


def warm_up(kernel: Any, *args: Any, **options: Any) -> None:
    """Begin to compile a kernel for a launch. What fails is passed over: the launch will say why."""
    assert _rehearsal.launches is not None
    with suppress(Exception):
        _rehearsal.launches.append((kernel, kernel.warmup(*args, **options)))


def rehearse(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Make ``function(*args)`` ready to launch; the first argument is a CUDA tensor, on the current device.

    It is called with launches that only compile (:func:`warm_up`), and does all else as ever: to memory that it
    allocates itself.
    """
    try:
        import triton
    except ImportError:
        return
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None or triton.knobs.runtime.interpret or torch.cuda.is_current_stream_capturing():
        return

    def load(kernel: Any, compiled: Any) -> None:
        try:
            with torch.cuda.device(args[0].device):
                compiled[1, 1, 1]  # has its launcher compiled, which Triton writes in C
        except Exception:
            kernel.device_caches.clear()  # what is half loaded must not be launched

    def compile_and_load() -> None:
        with ThreadPoolExecutor() as executor:
            with mode(executor, ignore_errors=True), _noted() as launches:  # it waits: no part of the rehearsal
                function(*args)
            ready = {}
            for kernel, compiled in launches:
                if hasattr(compiled, "result"):
                    compiled = compiled.result(ignore_errors=True)
                    if compiled is None:
                        kernel.device_caches.clear()  # which keeps the error, and so whatever the callers have
                if compiled is not None:
                    ready[compiled] = kernel
            with suppress(Exception):  # an executor takes nothing more once the interpreter ends
                list(executor.map(load, ready.values(), ready))

    # Of its own: no other mode of Triton's is active in it, and this one, if interrupted, in no other.
    contextvars.Context().run(compile_and_load)


@contextmanager
def _noted() -> Iterator[list[tuple[Any, Any]]]:
    launches: list[tuple[Any, Any]] = []
    _rehearsal.launches = launches
    try:
        yield launches
    finally:
        _rehearsal.launches = None
