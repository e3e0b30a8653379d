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
from typing import Any, NamedTuple

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


class _Known(NamedTuple):
    """What the driver is to get, once it has been read."""

    repeat: Callable[..., Any]
    """Of _repeat.c."""
    address: int
    """The plan's."""
    device: int
    kept: list[Any]
    """The plan, and what it points to."""


class Repetition:
    """A trace, done again: with the driver's launches or, where these cannot be, with Triton's."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._failures = 0 if any(isinstance(step, Kernel) for step in trace.steps) else ATTEMPTS
        self._known: _Known | None = None
        self._is_free = threading.Lock()

    def __call__(self, args: tuple[Any, ...], addresses: list[int | None]) -> Any:
        """Returns what the function did for arguments at other addresses.

        Triton launches where the driver does not do it, while a hook watches launches, such as a profiler's, and while
        another thread has these in hand.
        """
        known = self._known
        if known is None and not _is_hooked() and self._can_be_read():
            known = self._read()
        if known is not None and not _is_hooked():
            stream = torch._C._cuda_getCurrentRawStream(known.device)
            results = known.repeat(known.address, args, addresses, stream)
            if results is not NotImplemented:
                return results
        return self._trace.through_triton(args, addresses)

    def _can_be_read(self) -> bool:
        """Whether the driver launches, reading has not failed too often, and no capture is under way: it takes one."""
        return self._failures < ATTEMPTS and _module() is not None and not torch.cuda.is_current_stream_capturing()

    def _read(self) -> _Known | None:
        """Read the launches, unless another thread does; give up, and say so, if it fails again and again."""
        if not self._is_free.acquire(blocking=False):
            return None
        try:
            if self._known is None:  # it may have been read since this thread looked
                self._known = _read(self._trace)
        except Exception as error:  # whatever another thread does, or a Triton or a driver to come in another way
            self._failures += 1
            if self._failures == ATTEMPTS:
                _warn_of_slow_launches(str(error))
        finally:
            self._is_free.release()
        return self._known


class _Kept(list[Any]):
    """What C points to."""

    def array(self, kind: Any, items: Sequence[Any]) -> Any:
        """An array in C, kept with what its items point to."""
        array = (kind * len(items))(*items)
        self.append((array, items))
        return array


def _read(trace: Trace) -> _Known:
    """
    Raises:
        LookupError: an address that a kernel was launched with is in none of its parameters.
        RuntimeError: the driver refuses something.
    """
    tensor_count = trace.arg_count + len(trace.allocators)
    marks = [FIRST_MARK + number * MARKS_APART for number in range(tensor_count + len(trace.offsets))]
    kept = _Kept()
    steps: list[_Step] = []
    for kind, group in itertools.groupby(trace.steps, type):
        if kind is Kernel:
            launches = kept.array(_Launch, [_launch(kernel, marks, kept) for kernel in group])
            steps.append(_Step(launches=launches, launch_count=len(launches)))
        else:
            steps += [_Step(function=step) for step in group]
    given = [0] * (len(marks) + 1)
    plan = _Plan(
        enqueue_kernel=ctypes.cast(cuda().cuLaunchKernelEx, c_void_p),
        replace_address=ctypes.cast(cuda().cuTensorMapReplaceAddress, c_void_p),
        steps=kept.array(_Step, steps),
        allocators=tuple(trace.allocators),
        offsets=kept.array(c_int64, trace.offsets),
        results=kept.array(c_int64, [-1 if number is None else number for number in trace.results]),
        tensors=kept.array(c_void_p, [None] * tensor_count),
        given=kept.array(c_uint64, given),
        next=kept.array(c_uint64, given),
        step_count=len(steps),
        arg_count=trace.arg_count,
        tensor_count=tensor_count,
        offset_count=len(trace.offsets),
        result_count=len(trace.results),
        given_count=len(given),
        is_single=trace.is_single,
    )
    kept.append(plan)
    return _Known(_module().repeat, ctypes.addressof(plan), torch.cuda.current_device(), kept)


def _launch(kernel: Any, marks: Sequence[int], kept: _Kept) -> "_Launch":
    """A kernel's launch, of which another address is known by each mark, and the stream by the number after them.

    Raises:
        LookupError, RuntimeError: as :func:`_read`.
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
        kept.append(attribute)
    pointers = kept.array(c_void_p, places)
    kept += config, memory
    return _Launch(
        config=ctypes.addressof(config),
        function=function,
        parameters=ctypes.addressof(pointers),
        addresses=kept.array(_Slot, addresses),
        descriptors=kept.array(_Slot, descriptors),
        address_count=len(addresses),
        descriptor_count=len(descriptors),
    )


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
    try:
        from triton.runtime.build import compile_module_from_src

        return compile_module_from_src(Path(__file__).with_name("_repeat.c").read_text(), "torch_switchback_repeat"), ""
    except Exception as error:  # no compiler, a cache that cannot be written, a Triton to come: any
        why = f"_repeat.c does not compile: {type(error).__name__}: {error}"
        _warn_of_slow_launches(why)
        return None, why


@cache
def _warn_of_slow_launches(why: str) -> None:
    warnings.warn(f"torch_switchback launches kernels through Triton, which takes the host longer: {why}", stacklevel=6)
