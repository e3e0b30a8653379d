"""An operation's launches, made again for arguments of a kind that it had before.

What a launcher works out, and Triton after it, depends on its arguments' shapes, not on where they lie: it is worked
out once, and then only tensors are put in their places. The rest would take longer than the launches.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

MOST_REPLAYS = 10_000  # a few a layer shape and batch size; forgotten all at once before they could grow without bound

Call = tuple[Callable[..., object], tuple[Any, ...]]


class _Recording(threading.local):
    """What the launcher that runs in this thread has called so far, if it is recorded."""

    calls: list[Call] | None = None
    scratch: list[torch.Tensor]


_recording = _Recording()
_replays: dict[tuple[Any, ...], "_Replay"] = {}


@contextmanager
def _recorded() -> Iterator[tuple[list[Call], list[torch.Tensor]]]:
    """What is called in this thread from here on, and the scratch memory that it takes."""
    calls: list[Call] = []
    memory: list[torch.Tensor] = []
    _recording.calls, _recording.scratch = calls, memory
    try:
        yield calls, memory
    finally:
        _recording.calls, _recording.scratch = None, []  # what is done with must not be kept


def note(function: Callable[..., object], *args: Any) -> None:
    """A launcher has called ``function(*args)``: to be called again, with other tensors."""
    if _recording.calls is not None:
        _recording.calls.append((function, args))


def zero(tensor: torch.Tensor) -> None:
    tensor.zero_()
    note(torch.Tensor.zero_, tensor)


def scratch(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory [shape] on another tensor's device, for what one launch leaves to the next."""
    tensor = like.new_empty(shape, dtype=dtype)
    if _recording.calls is not None:
        _recording.scratch.append(tensor)
    return tensor


def widened(x: torch.Tensor, cols: int) -> torch.Tensor:
    """A contiguous copy of x [rows, at most cols] with zeros behind each row: [rows, cols]."""
    copy = scratch(x, x.shape[0], cols, dtype=x.dtype)
    _copy_rows(x, x.shape, x.stride(), copy)
    note(_copy_rows, x, x.shape, x.stride(), copy)
    return copy


def _copy_rows(x: torch.Tensor, shape: Sequence[int], stride: Sequence[int], copy: torch.Tensor) -> None:
    """Of an x that begins where it did, but may be another view when this is called again."""
    inner = shape[1]
    if inner < copy.shape[1]:
        copy[:, inner:].zero_()
    copy[:, :inner].copy_(x.as_strided(shape, stride))


def run(launcher: Callable[..., None], args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    """``launcher(*args, *outputs)``, or the launches that it made for arguments of the same kind.

    What a launcher does to tensors it must do through ``launch``, :func:`zero` (of whole tensors), :func:`scratch` and
    :func:`widened`, by its arguments alone. It is called every time if it copies an argument in another way, or if two
    arguments begin at one place.
    """
    kind = (
        launcher,
        *[
            (arg.dtype, arg.get_device(), arg.shape, arg.stride(), arg.data_ptr() % 16)
            if isinstance(arg, torch.Tensor)
            else arg
            for arg in args
        ],
    )
    replay = _replays.get(kind)
    if replay is not None:
        replay(args + outputs)
        return
    with _recorded() as (calls, memory):
        launcher(*args, *outputs)
    try:
        replay = _Replay(args + outputs, memory, calls)
    except LookupError:
        return
    if len(_replays) >= MOST_REPLAYS:
        _replays.clear()
    _replays[kind] = replay


class _Replay:
    """Calls, to be made again with other tensors in the places of those that they were recorded with.

    Raises:
        LookupError: it cannot be told which of the tensors a call had.
    """

    def __init__(self, known: Sequence[Any], memory: Sequence[torch.Tensor], calls: Sequence[Call]) -> None:
        tensors = [*known, *memory]
        self._scratch = [(tensor.shape, tensor.dtype) for tensor in memory]
        self._steps = [_step(function, args, tensors) for function, args in calls]

    def __call__(self, known: tuple[Any, ...]) -> None:
        tensors = [*known, *[scratch(known[0], *shape, dtype=dtype) for shape, dtype in self._scratch]]
        for step in self._steps:
            step(tensors)


def _step(
    function: Callable[..., object], args: Sequence[Any], tensors: Sequence[Any]
) -> Callable[[Sequence[Any]], None]:
    """A call as one of tensors by their number. It keeps none of those it is made from."""
    template = list(args)
    places: list[tuple[int, int]] = []  # which argument is which tensor,
    views: list[tuple[int, torch.dtype]] = []  # of which dtype instead of its own,
    descriptors: list[tuple[int, int, Any, dict[str, Any]]] = []  # which is the descriptor of which, and of what kind
    for place, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            number = _number(arg, tensors)
            places.append((place, number))
            if arg.dtype != tensors[number].dtype:
                views.append((place, arg.dtype))
            template[place] = None
        elif hasattr(arg, "block_shape"):
            descriptors.append((place, _number(arg.base, tensors), type(arg), {**vars(arg), "base": None}))
            template[place] = None

    def step(tensors: Sequence[Any]) -> None:
        args = template.copy()
        for place, number in places:
            args[place] = tensors[number]
        for place, dtype in views:
            args[place] = args[place].view(dtype)
        for place, number, kind, fields in descriptors:
            args[place] = descriptor = object.__new__(kind)
            descriptor.__dict__.update(fields)
            descriptor.base = tensors[number]
        function(*args)

    return step


def _number(tensor: torch.Tensor, tensors: Sequence[Any]) -> int:
    """Which of the tensors this is, or is a view of from its beginning on.

    Raises:
        LookupError: none, or there are several.
    """
    place = tensor.data_ptr()
    there = [number for number, one in enumerate(tensors) if isinstance(one, torch.Tensor) and one.data_ptr() == place]
    if len(there) != 1:
        raise LookupError(f"{len(there)} tensors begin at {place}")
    return there[0]
