"""Device queries that kernels need. Nothing here imports Triton."""

import functools
from collections.abc import Callable

import torch

# The first CUDA version whose graphs can capture programmatic dependent launches.
PDL_DRIVER = 12_030

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
"""The index of the current CUDA device, or -1 in a CPU build of PyTorch."""

current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
"""Device index -> the handle of its current stream."""


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
        and torch._C._cuda_getDriverVersion() >= PDL_DRIVER  # type: ignore[attr-defined]
    )
