"""Times and bytes, on the GPU and on the CPU."""

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def median_ms(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Milliseconds of one run, the median of several in a row, after one that is not counted."""
    run()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        elapsed = [start.elapsed_time(stop) for start, stop in itertools.pairwise(events)]
    else:
        elapsed = []
        for _ in range(times):
            begun = time.perf_counter()
            run()
            elapsed.append((time.perf_counter() - begun) * 1e3)
    return sorted(elapsed)[times // 2]


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """A run without the host's time: captured in a CUDA graph. It must have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the tensors that a module's forward keeps for its backward, without the parameters; views count once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for part in _plain_tensors(tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    for parameter in module.parameters():
        for part in _plain_tensors(parameter):
            storages.pop(part.untyped_storage().data_ptr(), None)
    del outputs  # kept so far, so that no memory was freed and counted twice
    return sum(storages.values())


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor itself, or what a subclass that wraps others is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor
