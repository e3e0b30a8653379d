"""What a forward keeps for its backward, in bytes."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


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
