"""What operations launch, launched again for arguments of a kind that they had before.

What a launcher works out, and Triton after it, depends on its arguments' shapes, not on where they lie: it is worked
out once, and then only addresses are put in their places. The rest would take longer than the launches.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ._rehearsal import rehearse
from ._repeat import Kernel, Repetition, Trace, aligned

Kind = tuple[tuple[Any, ...], list[int | None]]

# What torch.compile's code allocates by: past the dispatcher.
empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)

MOST_REPLAYS = 10_000  # a few a layer shape and batch size; forgotten all at once before they could grow without bound
ALIGNMENT = 512  # bytes, what PyTorch's allocator aligns memory to


class Call(NamedTuple):
    function: Any
    """It takes tensors or, a Kernel, their addresses."""
    args: tuple[Any, ...]

    @property
    def is_kernel(self) -> bool:
        return isinstance(self.function, Kernel)


class _Recording(threading.local):
    """What has been called and allocated in this thread so far, if it is recorded."""

    calls: list[Call] | None = None
    memory: list[Tensor]


_recording = _Recording()
_sizes: set[tuple[Any, ...]] = set()
"""Of functions and their arguments, whose kernels have been compiled."""
_replays: dict[tuple[Any, ...], Callable[[tuple[Any, ...], list[int | None]], Any]] = {}


@contextmanager
def _recorded() -> Iterator[tuple[list[Call], list[Tensor]]]:
    """What is called and allocated in this thread from here on."""
    calls: list[Call] = []
    memory: list[Tensor] = []
    _recording.calls, _recording.memory = calls, memory
    try:
        yield calls, memory
    finally:
        _recording.calls, _recording.memory = None, []  # what is done with must not be kept


def is_recording() -> bool:
    return _recording.calls is not None


def note(function: Callable[..., object], *args: Any) -> None:
    """``function(*args)`` has been called: to be called again, with other tensors or, a kernel, their addresses."""
    if _recording.calls is not None:
        _recording.calls.append(Call(function, args))


def note_memory(*tensors: Tensor) -> None:
    """These have been allocated, contiguous: to be allocated again."""
    if _recording.calls is not None:
        _recording.memory.extend(tensors)


def zero(tensor: Tensor) -> None:
    tensor.zero_()
    note(Tensor.zero_, tensor)


def scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory [shape] on another tensor's device, for what one launch leaves to the next."""
    tensor = like.new_empty(shape, dtype=dtype)
    note_memory(tensor)
    return tensor


def widened(x: Tensor, cols: int) -> Tensor:
    """A contiguous copy of x [rows, at most cols] with zeros behind each row: [rows, cols]."""
    copy = scratch(x, x.shape[0], cols, dtype=x.dtype)
    _copy_rows(x, x.shape, x.stride(), copy)
    note(_copy_rows, x, x.shape, x.stride(), copy)
    return copy


def _copy_rows(x: Tensor, shape: Sequence[int], stride: Sequence[int], copy: Tensor) -> None:
    """Of an x that begins where it did, but may be another view when this is called again."""
    inner = shape[1]
    if inner < copy.shape[1]:
        copy[:, inner:].zero_()
    copy[:, :inner].copy_(x.as_strided(shape, stride))


def kind_of(args: tuple[Any, ...]) -> Kind | None:
    """All of a function's arguments that decides what it launches, and where their tensors lie.

    None if one of these is not the memory it stands for, a subclass or a pending negation, or has none, as PyTorch's
    zeros without memory and the gradients of several backwards at once (``is_grads_batched``).
    """
    kind: list[Any] = []
    addresses: list[int | None] = []
    for arg in args:
        if not isinstance(arg, Tensor):
            kind.append(arg)
            addresses.append(None)
            continue
        if (type(arg) is not Tensor and type(arg) is not Parameter) or arg.is_neg():
            return None
        try:
            address = arg.data_ptr()
        except RuntimeError:
            return None
        if not address and arg.numel():
            return None
        kind.append((arg.dtype, arg.get_device(), arg.shape, arg.stride(), address % 16))
        addresses.append(address)
    return tuple(kind), addresses


def run(function: Callable[..., Any], args: tuple[Any, ...], kind: Kind | None) -> Any:
    """``function(*args)``, or the launches that it made for arguments of the same kind, and what it returns.

    Whatever it does to tensors it must do through ``launch``, :func:`zero` and :func:`widened`, by its arguments alone,
    or :func:`note`, of whole tensors; and say what it allocates (:func:`note_memory`, :func:`scratch`), which a replay
    allocates before it begins and frees when it ends. The first argument is a tensor, on the current device. Within
    another such function it is a part of that. It is called every time, for arguments of this kind, if it copied one in
    another way, if two began at one place, or if it returned anything but Nones and tensors that it was given or had
    allocated.
    """
    if kind is None or is_recording():
        return function(*args)
    key, addresses = (function, kind[0]), kind[1]
    replay = _replays.get(key)
    if replay is not None:
        return replay(args, addresses)
    size = function, _size_of(kind)
    if size not in _sizes and args[0].is_cuda:
        with _recorded():  # so that what runs within it is a part of it
            rehearse(function, args)
        _sizes.add(size)
    with _recorded() as (calls, memory):
        results = function(*args)
    try:
        replay = Repetition(_trace_of(args, calls, memory, results))
    except LookupError:
        replay = functools.partial(_call, function)
    if len(_replays) >= MOST_REPLAYS:
        _replays.clear()
        _sizes.clear()
    _replays[key] = replay
    return results


def _size_of(kind: Kind) -> tuple[Any, ...]:
    """Of arguments, what decides which kernels are compiled for them, or nearly so."""
    return tuple(
        what if address is None else (*what[:2], *((n.bit_length(), n % 16 == 0) for n in what[2]))
        for what, address in zip(*kind, strict=True)
    )


def _call(function: Callable[..., Any], args: tuple[Any, ...], addresses: list[int | None]) -> Any:
    return function(*args)


def _trace_of(args: tuple[Any, ...], calls: list[Call], memory: list[Tensor], results: Any) -> Trace:
    """Calls, of arguments and of memory that was allocated, by the numbers of these. No tensor is kept.

    Memory is one block but for what is returned or is used by anything else than a kernel.

    Raises:
        LookupError: it cannot be told which of the tensors a call had, or what a result is.
    """
    is_single = isinstance(results, Tensor)
    results = (results,) if is_single else results
    used = [*results, *[_base(arg) for call in calls if not call.is_kernel for arg in call.args]]
    places = {tensor.data_ptr() for tensor in used if isinstance(tensor, Tensor)}
    tensors = [tensor for tensor in memory if tensor.data_ptr() in places]
    in_block = [tensor for tensor in memory if tensor.data_ptr() not in places]
    allocators = [_allocator(args[0].device, tensor.shape, tensor.dtype) for tensor in tensors]
    offsets, size = _laid_out(in_block)
    known = [*args, *tensors]
    if in_block:
        allocators.append(_allocator(args[0].device, (size,), torch.uint8))
        known += [None, *in_block]
    return Trace(
        arg_count=len(args),
        allocators=allocators,
        offsets=offsets,
        steps=[_step(call, known) for call in calls],
        results=[None if result is None else _index(result, known) for result in results],
        is_single=is_single,
    )


def _allocator(device: torch.device, shape: Sequence[int], dtype: torch.dtype) -> Callable[[], Tensor]:
    """What allocates such a contiguous tensor on a device, which is the current one."""
    if device.type == "cuda" and empty_strided_cuda is not None:
        strides = torch.empty(shape, device="meta").stride()
        return functools.partial(empty_strided_cuda, tuple(shape), strides, dtype)
    return functools.partial(torch.empty, shape, dtype=dtype, device=device)


def _laid_out(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each is in one block of memory, and the bytes of the block."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += aligned(tensor.nbytes, ALIGNMENT)
    return offsets, end


def _base(arg: Any) -> Any:
    """An argument, or the tensor that it describes."""
    return arg.base if hasattr(arg, "block_shape") else arg


class _Address(int):
    """What the base of a descriptor must be, and no more."""

    def data_ptr(self) -> int:
        return self


def _step(call: Call, known: Sequence[Any]) -> Callable[[Sequence[Any]], None]:
    """A call as one of all tensors, a kernel's of all addresses. It keeps none of those it is made from."""
    function, is_kernel = call.function, call.is_kernel
    template = list(call.args)
    places: list[tuple[int, int]] = []  # which argument is which tensor,
    views: list[tuple[int, torch.dtype]] = []  # of which dtype instead of its own,
    descriptors: list[tuple[int, int, Any, dict[str, Any]]] = []  # which is the descriptor of which, and of what kind
    for place, arg in enumerate(call.args):
        tensor = _base(arg)
        if not isinstance(tensor, Tensor):
            continue
        template[place], number = None, _number(tensor, known)
        if tensor is not arg:
            descriptors.append((place, number, type(arg), {**vars(arg), "base": None}))
            continue
        places.append((place, number))
        if arg.dtype != known[number].dtype and not is_kernel:
            views.append((place, arg.dtype))

    def step(values: Sequence[Any]) -> None:
        args = template.copy()
        for place, number in places:
            args[place] = values[number]
        for place, dtype in views:
            args[place] = args[place].view(dtype)
        for place, number, kind, fields in descriptors:
            args[place] = descriptor = object.__new__(kind)
            descriptor.__dict__.update(fields)
            descriptor.base = _Address(values[number]) if is_kernel else values[number]
        function(*args)

    return Kernel(step, function.overlaps) if is_kernel else step


def _number(tensor: Tensor, known: Sequence[Any]) -> int:
    """Which of the known this is, or is a view of from its beginning on.

    Raises:
        LookupError: none, or there are several.
    """
    place = tensor.data_ptr()
    there = [number for number, one in enumerate(known) if isinstance(one, Tensor) and one.data_ptr() == place]
    if len(there) != 1:
        raise LookupError(f"{len(there)} tensors begin at {place}")
    return there[0]


def _index(tensor: Tensor, known: Sequence[Any]) -> int:
    """Which of the known this very one is.

    Raises:
        LookupError: none.
    """
    for number, one in enumerate(known):
        if one is tensor:
            return number
    raise LookupError("a result is neither an argument nor allocated here")
