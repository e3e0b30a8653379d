"""Count how many bytes the collectives of a step move."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# The larger side of each, which every rank holds whole: what an all-gather gives, what a reduce-scatter takes.
_LARGER_ARGUMENT = {
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
}


class CollectiveBytes(TorchDispatchMode):
    """While entered, counts bytes by collective and dtype: ``{"all-gather int8": 1234, …}``.

    FSDP2 gathers weights in int8 and biases in 16 bit together, as bytes: "all-gather uint8".
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, argument = _LARGER_ARGUMENT.get(func._schema.name.removeprefix("c10d::"), (None, 0))
            if name is not None:
                tensors = args[argument] if isinstance(args[argument], (list, tuple)) else [args[argument]]
                for tensor in tensors:
                    self.bytes[f"{name} {str(tensor.dtype).removeprefix('torch.')}"] += tensor.nbytes
        return func(*args, **(kwargs or {}))


def total(counted: dict[str, int], collective: str) -> int:
    """Bytes of one collective in all dtypes."""
    return sum(size for name, size in counted.items() if name.startswith(collective))
