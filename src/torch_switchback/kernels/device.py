"""Device queries that kernels need. Nothing here imports Triton."""

import ctypes
import functools
from collections.abc import Callable

import torch

# The first CUDA version whose graphs can capture programmatic dependent launches.
PDL_DRIVER = 12_030

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
"""The index of the current CUDA device, or -1 in a CPU build of PyTorch."""

current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
"""Device index -> the handle of its current stream."""


_empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous tensor on the device of another, uninitialized.

    For a plain CUDA tensor, whose device must be the current one, it skips PyTorch's dispatcher as torch.compile's code
    does: 3.2 µs instead of 5.7 (H200 host; docs/performance-log.md).
    """
    if like.is_cuda and type(like) in (torch.Tensor, torch.nn.Parameter) and _empty_strided_cuda is not None:
        if len(shape) == 2:
            rows, cols = shape
            return _empty_strided_cuda((rows, cols), (cols, 1), dtype)  # tuples alone: it refuses a torch.Size
        if len(shape) == 1:
            return _empty_strided_cuda((shape[0],), (1,), dtype)
    return like.new_empty(shape, dtype=dtype)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors, or 1 for the CPU, where Triton interprets kernels."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the name that a device has in the tuning tables, such as ``"sm_90"`` or ``"gfx942"``."""
    if device.type == "cpu":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def driver_version() -> int:
    """Return the newest CUDA that the driver supports, as 1000 × major + 10 × minor, or 0 if it does not say."""
    version = ctypes.c_int(0)  # PyTorch 2.11 has no function for it
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Return whether a kernel may start before the one ahead of it ends, also in CUDA graphs.

    See "programmatic dependent launch" in the CUDA programming guide. It hides about 1 µs between two kernels. Hopper
    only: newer GPUs have not been measured, and on sm_120 graph capture is reported to fail (sglang issue 18596).
    """
    return (
        device.type == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(device) == (9, 0)
        and driver_version() >= PDL_DRIVER
    )
