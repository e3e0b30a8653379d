"""Compiled kernels launched again by the CUDA driver itself, with other addresses in the places of those before.

Triton works out in Python what it hands to the driver, at every launch: for a kernel of three descriptors that takes
several times as long as the launch, and longer still where the interpreter's own code has left the processor's caches,
as it has in autograd's thread. What is handed over differs by addresses alone, so it is read once: off a CUDA graph,
into which Triton launches the kernel with addresses that are none, and which never runs.

Structures and functions are those of the CUDA driver API (cuda.h); their fields in its order.
"""

import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

SHOWS_PARAMETERS = 12_040  # the driver's CUDA from which on it says which parameters a kernel has
RELAXED = 2  # a capture that forbids nothing, and a thread that none forbids anything (CU_STREAM_CAPTURE_MODE_RELAXED)
NON_BLOCKING = 1  # a stream that waits for no other (CU_STREAM_NON_BLOCKING)
DESCRIPTOR_BYTES = 128  # sizeof(CUtensorMap)
ALIGNMENT = 128  # its
ATTEMPTS = 3  # to read launches, as another thread may be in the way

# Addresses that are none: multiples of what any kernel may ask an address to be one of, and nothing else's value.
FIRST_MARK, MARKS_APART = 0x5B1D_0000_0000, 4096


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and its grid."""

    launch: Callable[..., None]
    """By Triton; in place of tensors it takes addresses."""
    overlaps: bool
    """Whether it is launched while the kernel before it still runs."""

    def __call__(self, *args: Any) -> None:
        self.launch(*args)


class Launches:
    """Kernels that are launched one after another, by a list of addresses.

    By Triton where the driver does not do it, while a hook watches launches, such as a profiler's, and while another
    thread has these in hand.
    """

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        """kernels: each takes the list."""
        self._kernels = kernels
        self._is_free = threading.Lock()
        self._device = -1
        self._captured: list[_Captured] | None = None
        self._failures = 0
        self._given: list[Any] | None = None  # the addresses and the stream that the captured launches now have

    def __call__(self, addresses: Sequence[Any]) -> None:
        launched = 0
        if _cuda() is not None and not _is_hooked() and self._is_free.acquire(blocking=False):
            try:
                launched = self._launch(addresses)
            finally:
                self._is_free.release()
        for kernel in self._kernels[launched:]:  # Triton may succeed where the driver did not, or says why it does not
            kernel(addresses)

    def _launch(self, addresses: Sequence[Any]) -> int:
        """How many of the kernels the driver has launched."""
        if self._captured is None:
            if torch.cuda.is_current_stream_capturing():  # no time for another capture
                return 0
            self._device = torch.cuda.current_device()
            self._read(len(addresses))
        if not self._captured:
            return 0
        given = [*addresses, torch._C._cuda_getCurrentRawStream(self._device)]
        if given != self._given:
            self._given = None
            if any(launch.give(given) for launch in self._captured):
                return 0
            self._given = given
        for launched, launch in enumerate(self._captured):
            if launch.enqueue(*launch.arguments):
                return launched
        return len(self._captured)

    def _read(self, count: int) -> None:
        """Capture the launches, which take so many addresses; give up, and say so, if that fails again and again."""
        marks = [FIRST_MARK + number * MARKS_APART for number in range(count)]
        try:
            self._captured = [_Captured(kernel, marks) for kernel in self._kernels]
        except Exception as error:  # whatever another thread does, or a Triton or a driver to come in another way
            self._failures += 1
            if self._failures == ATTEMPTS:
                _warn_of_slow_launches(str(error))
                self._captured = []


def _is_hooked() -> bool:
    """Whether Triton has anyone to tell of launches."""
    enter, leave = _runtime().launch_enter_hook, _runtime().launch_exit_hook  # each a chain, a function or None
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@cache
def _runtime() -> Any:
    """Triton's settings; this module does without Triton until there is something to launch."""
    import triton

    return triton.knobs.runtime


@cache
def _warn_of_slow_launches(why: str) -> None:
    warnings.warn(f"torch_switchback launches kernels through Triton, which takes the host longer: {why}", stacklevel=6)


class _Captured:
    """One kernel's launch. What keeps the kernel loaded is who holds the Kernel."""

    def __init__(self, kernel: Kernel, marks: Sequence[int]) -> None:
        """
        Raises:
            LookupError: a mark that the launch was given is in none of the kernel's parameters.
            RuntimeError: the driver refuses something.
        """
        seen = _Seen(marks)
        config, function, parameters = _read_launch(lambda: kernel(seen))
        numbers = {mark: number for number, mark in enumerate(marks)}
        # A descriptor, too, begins with its address.
        found = [numbers.get(int.from_bytes(value[:8], "little")) for value in parameters]
        if set(found) - {None} != seen.numbers:
            raise LookupError(f"of the addresses {sorted(seen.numbers)} a launch's parameters have {found}")
        size = sum(aligned(len(value), ALIGNMENT) for value in parameters)
        self._memory = ctypes.create_string_buffer(size + ALIGNMENT)
        pointers = (c_void_p * len(parameters))()
        self._addresses: list[tuple[ctypes.c_uint64, int]] = []
        self._descriptors: list[tuple[int, int]] = []
        place = aligned(ctypes.addressof(self._memory), ALIGNMENT)
        for parameter, (value, number) in enumerate(zip(parameters, found, strict=True)):
            ctypes.memmove(place, value, len(value))
            pointers[parameter] = place
            if number is not None and len(value) == DESCRIPTOR_BYTES:
                self._descriptors.append((place, number))
            elif number is not None:
                self._addresses.append((ctypes.c_uint64.from_address(place), number))
            place += aligned(len(value), ALIGNMENT)
        if kernel.overlaps:
            self._attribute = _Attribute(_Attribute.PROGRAMMATIC_STREAM_SERIALIZATION, value=(1,))
            config.attributes, config.num_attributes = ctypes.addressof(self._attribute), 1
        self._config = config
        self._readdress = _WithoutPause(("cuTensorMapReplaceAddress", _cuda()))
        self.enqueue = _cuda().cuLaunchKernelEx
        self.arguments = byref(config), function, pointers, None

    def give(self, given: Sequence[int]) -> bool:
        """The addresses and, at the end, the stream of the next launches. Returns whether it fails."""
        for place, number in self._addresses:
            place.value = given[number]
        self._config.stream = given[-1]
        return any(self._readdress(place, given[number]) for place, number in self._descriptors)


def aligned(n: int, alignment: int) -> int:
    """The least multiple of alignment that is not below n."""
    return -(-n // alignment) * alignment


class _Seen(list[int]):
    """A list that knows which of its items were asked for."""

    def __init__(self, items: Sequence[int]) -> None:
        super().__init__(items)
        self.numbers: set[int] = set()

    def __getitem__(self, number: Any) -> Any:
        self.numbers.add(number)
        return super().__getitem__(number)


_WithoutPause = ctypes.PYFUNCTYPE(c_int, c_void_p, c_void_p)
"""A function so short that other Python threads need not run meanwhile: to wait for them would take longer."""


_EXTENT = [(name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        *_EXTENT,
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("num_attributes", c_uint),
    ]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute"""

    PROGRAMMATIC_STREAM_SERIALIZATION = 6
    _fields_ = [("id", c_int), ("padding", c_int), ("value", c_uint * 16)]


class _KernelNodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2"""

    _fields_ = [
        ("function", c_void_p),
        *_EXTENT,
        ("parameters", ctypes.POINTER(c_void_p)),
        ("extra", c_void_p),
        ("kernel", c_void_p),
        ("context", c_void_p),
    ]


def _read_launch(launch: Callable[[], None]) -> tuple[_LaunchConfig, c_void_p, list[bytes]]:
    """The one launch that this makes, which does not run.

    Returns:
        Its configuration, without stream and attributes; its function; each of its parameters.

    Raises:
        RuntimeError: the driver refuses something, or it is not one launch.
    """
    stream, graph, mode = c_void_p(), c_void_p(), c_int(RELAXED)
    _check("cuThreadExchangeStreamCaptureMode", byref(mode))  # or it would break captures of other threads
    try:
        _check("cuStreamCreate", byref(stream), NON_BLOCKING)
        _check("cuStreamBeginCapture_v2", stream, RELAXED)
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream.value)):
                launch()
        finally:
            _check("cuStreamEndCapture", stream, byref(graph))
        nodes, count = (c_void_p * 2)(), c_size_t(2)
        _check("cuGraphGetNodes", graph, nodes, byref(count))
        if count.value != 1:
            raise RuntimeError(f"{count.value} operations where one launch was expected")
        params = _KernelNodeParams()
        _check("cuGraphKernelNodeGetParams_v2", c_void_p(nodes[0]), byref(params))
        function = c_void_p(params.function)
        sizes = enumerate(_sizes_of_parameters(function))
        parameters = [ctypes.string_at(params.parameters[number], size) for number, size in sizes]
    finally:
        if graph:
            _check("cuGraphDestroy", graph)
        if stream:
            _check("cuStreamDestroy_v2", stream)
        _check("cuThreadExchangeStreamCaptureMode", byref(mode))
    config = _LaunchConfig(*(getattr(params, name) for name, _ in _EXTENT))
    return config, function, parameters


def _sizes_of_parameters(function: c_void_p) -> list[int]:
    sizes: list[int] = []
    offset, size = c_size_t(), c_size_t()
    while _cuda().cuFuncGetParamInfo(function, c_size_t(len(sizes)), byref(offset), byref(size)) == 0:
        sizes.append(size.value)
    return sizes


def _check(name: str, *args: Any) -> None:
    """Call a function of the driver.

    Raises:
        RuntimeError: it fails.
    """
    error = getattr(_cuda(), name)(*args)
    if error:
        raise RuntimeError(f"{name} failed with CUDA's error {error}")


@cache
def _cuda() -> Any:
    """The CUDA driver's functions, or None if Triton makes all launches."""
    return None if why_triton_launches() else ctypes.CDLL("libcuda.so.1")


def why_triton_launches() -> str:
    """Why Triton makes all launches, or "" if the driver repeats them."""
    if os.environ.get("TORCH_SWITCHBACK_DRIVER") == "0":
        return "TORCH_SWITCHBACK_DRIVER=0"
    if torch.version.hip:
        return "ROCm"
    if not torch.cuda.is_available():
        return "no GPU"
    if cuda_of_the_driver() < SHOWS_PARAMETERS:
        return "a driver before CUDA 12.4"
    return ""


def cuda_of_the_driver() -> int:
    """The newest CUDA that the driver knows, 1000 × its major + 10 × its minor version; 0 if it does not say."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value
