"""What Triton hands to the CUDA driver when it launches a kernel.

Structures and functions are those of the CUDA driver API (cuda.h); their fields in its order.
"""

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from typing import Any

import torch

SHOWS_PARAMETERS = 12_040  # the driver's CUDA from which on it says which parameters a kernel has
RELAXED = 2  # a capture that forbids nothing, and a thread that none forbids anything (CU_STREAM_CAPTURE_MODE_RELAXED)
NON_BLOCKING = 1  # a stream that waits for no other (CU_STREAM_NON_BLOCKING)
DESCRIPTOR_BYTES = 128  # sizeof(CUtensorMap)

_EXTENT = [(name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        *_EXTENT,
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("num_attributes", c_uint),
    ]


class Attribute(ctypes.Structure):
    """CUlaunchAttribute"""

    PROGRAMMATIC_STREAM_SERIALIZATION = 6
    _fields_ = [("id", c_int), ("padding", c_int), ("value", c_uint * 16)]


class _KernelNodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2"""

    _fields_ = [
        ("function", c_void_p),
        *_EXTENT,
        ("parameters", POINTER(c_void_p)),
        ("extra", c_void_p),
        ("kernel", c_void_p),
        ("context", c_void_p),
    ]


def read_launch(launch: Callable[[], None]) -> tuple[LaunchConfig, c_void_p, list[bytes]]:
    """The one launch that this makes, which does not run.

    Returns:
        Its configuration, without stream and attributes; its function; each of its parameters.

    Raises:
        RuntimeError: the driver refuses something, or it is not one launch.
    """
    stream, graph, mode = c_void_p(), c_void_p(), c_int(RELAXED)
    with ExitStack() as stack:
        _check("cuThreadExchangeStreamCaptureMode", byref(mode))  # or it would break captures of other threads
        stack.callback(_check, "cuThreadExchangeStreamCaptureMode", byref(mode))
        _check("cuStreamCreate", byref(stream), NON_BLOCKING)
        stack.callback(_check, "cuStreamDestroy_v2", stream)
        _check("cuStreamBeginCapture_v2", stream, RELAXED)
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream.value)):
                launch()
        finally:
            _check("cuStreamEndCapture", stream, byref(graph))
            stack.callback(_check, "cuGraphDestroy", graph)
        nodes, count = (c_void_p * 2)(), c_size_t(2)
        _check("cuGraphGetNodes", graph, nodes, byref(count))
        if count.value != 1:
            raise RuntimeError(f"{count.value} operations where one launch was expected")
        params = _KernelNodeParams()
        _check("cuGraphKernelNodeGetParams_v2", c_void_p(nodes[0]), byref(params))
        function = c_void_p(params.function)
        sizes = enumerate(_sizes_of_parameters(function))
        parameters = [ctypes.string_at(params.parameters[number], size) for number, size in sizes]
    config = LaunchConfig(*(getattr(params, name) for name, _ in _EXTENT))
    return config, function, parameters


def _sizes_of_parameters(function: c_void_p) -> list[int]:
    sizes: list[int] = []
    offset, size = c_size_t(), c_size_t()
    while cuda().cuFuncGetParamInfo(function, c_size_t(len(sizes)), byref(offset), byref(size)) == 0:
        sizes.append(size.value)
    return sizes


def _check(name: str, *args: Any) -> None:
    """Call a function of the driver.

    Raises:
        RuntimeError: it fails.
    """
    error = getattr(cuda(), name)(*args)
    if error:
        raise RuntimeError(f"{name} failed with CUDA's error {error}")


@cache
def cuda() -> Any:
    """The driver's functions."""
    return ctypes.CDLL("libcuda.so.1")


def cuda_of_the_driver() -> int:
    """The newest CUDA that the driver knows, 1000 × its major + 10 × its minor version; 0 if it does not say."""
    version = ctypes.c_int(0)
    try:
        cuda().cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value
