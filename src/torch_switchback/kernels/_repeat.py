"""Kernels launched again by the CUDA driver itself, with other addresses in the places of those before.

Triton works out in Python what it hands to the driver, at every launch. Only addresses differ, so it is read once, off
a CUDA graph, into which Triton launches the kernel with addresses that are none, and which never runs (_driver.py).
From then on _repeat.c hands it over.
"""

import ctypes
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char, c_int32, c_int64, c_uint64, c_void_p, py_object
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ._driver import DESCRIPTOR_BYTES, SHOWS_PARAMETERS, Attribute, LaunchConfig, cuda, cuda_of_the_driver, read_launch

ATTEMPTS = 3  # to read launches, as another thread may be in the way
ALIGNMENT = 128  # of a descriptor

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


@dataclass(frozen=True)
class Trace:
    """What a function did."""

    arg_count: int
    allocators: Sequence[Callable[[], torch.Tensor]]
    """What allocated tensors."""
    offsets: Sequence[int]
    """In the last of these tensors, in bytes, of what lay in it."""
    steps: Sequence[Callable[[Any], None]]
    """In their order. Kernels take a list of addresses: the arguments' (None for what was no tensor), the allocated
    tensors', those at the offsets. All else takes a list of the tensors, the arguments first."""
    results: Sequence[int | None]
    """Which of these tensors were returned, or Nones."""
    is_single: bool
    """Whether one was returned, and not a tuple."""

    def through_triton(self, args: tuple[Any, ...], addresses: list[int | None]) -> Any:
        """Do it again for other arguments, at these addresses, through Triton."""
        tensors = list(args)
        for allocate in self.allocators:
            tensor = allocate()
            tensors.append(tensor)
            addresses.append(tensor.data_ptr())
        addresses += [addresses[-1] + offset for offset in self.offsets]  # type: ignore[operator]
        for step in self.steps:
            step(addresses if isinstance(step, Kernel) else tensors)
        results = [None if number is None else tensors[number] for number in self.results]
        return results[0] if self.is_single else tuple(results)


class Repetition:
    """A trace, done again: with the driver's launches or, where these cannot be, with Triton's."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._failures = 0 if any(isinstance(step, Kernel) for step in trace.steps) else ATTEMPTS
        self._plan: _Plan | None = None
        self._is_free = threading.Lock()

    def __call__(self, args: tuple[Any, ...], addresses: list[int | None]) -> Any:
        """Returns what the function did for arguments at other addresses.

        Triton launches where the driver does not do it, while a hook watches launches, such as a profiler's, and while
        another thread has these in hand.
        """
        if (self._plan is not None or self._has_been_read()) and not _is_hooked():
            stream = torch._C._cuda_getCurrentRawStream(self._device)
            results = self._repeat(self._address, args, addresses, stream)
            if results is not NotImplemented:
                return results
        return self._trace.through_triton(args, addresses)

    def _has_been_read(self) -> bool:
        """Read the launches, if that can be now; give up, and say so, if it fails again and again."""
        if self._failures == ATTEMPTS or _module() is None or torch.cuda.is_current_stream_capturing():
            return False
        if not self._is_free.acquire(blocking=False):
            return False
        try:
            self._read()
        except Exception as error:  # whatever another thread does, or a Triton or a driver to come in another way
            self._failures += 1
            if self._failures == ATTEMPTS:
                _warn_of_slow_launches(str(error))
        finally:
            self._is_free.release()
        return self._plan is not None

    def _read(self) -> None:
        """
        Raises:
            LookupError: an address that a kernel was launched with is in none of its parameters.
            RuntimeError: the driver refuses something.
        """
        trace = self._trace
        tensor_count = trace.arg_count + len(trace.allocators)
        marks = [FIRST_MARK + number * MARKS_APART for number in range(tensor_count + len(trace.offsets))]
        self._kept: list[Any] = []  # what the launches point to
        steps: list[_Step] = []
        for kind, group in itertools.groupby(trace.steps, type):
            if kind is Kernel:
                launches = self._array(_Launch, [self._launch(kernel, marks) for kernel in group])
                steps.append(_Step(launches=launches, launch_count=len(launches)))
            else:
                steps += [_Step(function=step) for step in group]
        given = [0] * (len(marks) + 1)
        plan = _Plan(
            enqueue_kernel=ctypes.cast(cuda().cuLaunchKernelEx, c_void_p),
            replace_address=ctypes.cast(cuda().cuTensorMapReplaceAddress, c_void_p),
            steps=self._array(_Step, steps),
            allocators=tuple(trace.allocators),
            offsets=self._array(c_int64, trace.offsets),
            results=self._array(c_int64, [-1 if number is None else number for number in trace.results]),
            tensors=self._array(c_void_p, [None] * tensor_count),
            given=self._array(c_uint64, given),
            next=self._array(c_uint64, given),
            step_count=len(steps),
            arg_count=trace.arg_count,
            tensor_count=tensor_count,
            offset_count=len(trace.offsets),
            result_count=len(trace.results),
            given_count=len(given),
            is_single=trace.is_single,
        )
        self._device, self._address = torch.cuda.current_device(), ctypes.addressof(plan)
        self._repeat, self._plan = _module().repeat, plan

    def _launch(self, kernel: Any, marks: Sequence[int]) -> "_Launch":
        """A kernel's launch, of which another address is known by each mark, and the stream by the number after them.

        Raises:
            LookupError, RuntimeError: as :meth:`_read`.
        """
        seen = _Seen(marks)
        config, function, parameters = read_launch(lambda: kernel(seen))
        numbers = {mark: number for number, mark in enumerate(marks)}
        # A descriptor, too, begins with its address.
        found = [numbers.get(int.from_bytes(value[:8], "little")) for value in parameters]
        if set(found) - {None} != seen.numbers:
            raise LookupError(f"of the addresses {sorted(seen.numbers)} a launch's parameters have {found}")
        memory = ctypes.create_string_buffer(sum(aligned(len(value), ALIGNMENT) for value in parameters) + ALIGNMENT)
        place = aligned(ctypes.addressof(memory), ALIGNMENT)
        places = []
        addresses = [_Slot(ctypes.addressof(config) + LaunchConfig.stream.offset, len(marks))]
        descriptors: list[_Slot] = []
        for value, number in zip(parameters, found, strict=True):
            ctypes.memmove(place, value, len(value))
            places.append(place)
            if number is not None:
                (descriptors if len(value) == DESCRIPTOR_BYTES else addresses).append(_Slot(place, number))
            place += aligned(len(value), ALIGNMENT)
        if kernel.overlaps:
            attribute = Attribute(Attribute.PROGRAMMATIC_STREAM_SERIALIZATION, value=(1,))
            config.attributes, config.num_attributes = ctypes.addressof(attribute), 1
            self._kept.append(attribute)
        pointers = self._array(c_void_p, places)
        self._kept += config, memory
        return _Launch(
            config=ctypes.addressof(config),
            function=function,
            parameters=ctypes.addressof(pointers),
            addresses=self._array(_Slot, addresses),
            descriptors=self._array(_Slot, descriptors),
            address_count=len(addresses),
            descriptor_count=len(descriptors),
        )

    def _array(self, kind: Any, items: Sequence[Any]) -> Any:
        """An array in C, kept with what its items point to."""
        array = (kind * len(items))(*items)
        self._kept.append((array, items))
        return array


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


# The structures of _repeat.c, their fields in its order.


class _Slot(ctypes.Structure):
    _fields_ = [("place", c_void_p), ("number", c_int64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("config", c_void_p),
        ("function", c_void_p),
        ("parameters", c_void_p),
        ("addresses", POINTER(_Slot)),
        ("descriptors", POINTER(_Slot)),
        ("address_count", c_int64),
        ("descriptor_count", c_int64),
    ]


class _Step(ctypes.Structure):
    _fields_ = [("function", py_object), ("launches", POINTER(_Launch)), ("launch_count", c_int64)]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("enqueue_kernel", c_void_p),
        ("replace_address", c_void_p),
        ("steps", POINTER(_Step)),
        ("allocators", py_object),
        ("offsets", POINTER(c_int64)),
        ("results", POINTER(c_int64)),
        ("tensors", POINTER(c_void_p)),
        ("given", POINTER(c_uint64)),
        ("next", POINTER(c_uint64)),
        *((f"{name}_count", c_int64) for name in ("step", "arg", "tensor", "offset", "result", "given")),
        ("is_single", c_int32),
        ("is_given", c_int32),
        ("is_busy", c_char),
    ]


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
def _module() -> Any:
    """_repeat.c's, or None if Triton makes all launches."""
    return None if why_triton_launches() else _compiled()[0]


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
    return _compiled()[1]


@cache
def _compiled() -> tuple[Any, str]:
    """_repeat.c as a module, compiled or from Triton's cache; or None, and why."""
    from triton.runtime.build import compile_module_from_src

    try:
        return compile_module_from_src(Path(__file__).with_name("_repeat.c").read_text(), "torch_switchback_repeat"), ""
    except Exception as error:  # no compiler, a cache that cannot be written, a Triton to come: any
        why = f"_repeat.c does not compile: {type(error).__name__}: {error}"
        _warn_of_slow_launches(why)
        return None, why


@cache
def _warn_of_slow_launches(why: str) -> None:
    warnings.warn(f"torch_switchback launches kernels through Triton, which takes the host longer: {why}", stacklevel=6)
