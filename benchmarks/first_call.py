"""Seconds of the first forward and backward on each of some shapes, in this order, as JSON. bench_host.py runs it.

python benchmarks/first_call.py cuda
"""

import json
import sys
import time
from contextlib import contextmanager

import torch

from measure import Record
from peers import new_layer, random_inputs
from shapes import PRODUCTS, SMALL, TINY, Shape

# The first is of a model like the others'; unaligned shapes take another kernel.
SHAPES = (SMALL, *PRODUCTS[:5], Shape(333, 1000, 1000), Shape(77, 257, 131), Shape(1, 4096, 4096))


@contextmanager
def count_compiled(counts: list[str], device: torch.device):
    """Append the name of every kernel that Triton compiles inside."""
    if device.type == "cpu":
        yield
        return
    from triton import knobs

    def hook(*, fn, **_) -> None:
        counts.append(fn.name)

    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = hook
        yield


def seconds(call, device: torch.device) -> tuple[float, object]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def first_call(shape: Shape, device: torch.device) -> Record:
    """SwitchBack's, after nn.Linear's, so that loading PyTorch's own libraries does not count."""
    ((x, grad),) = random_inputs(shape, 1, device)
    linear = new_layer("linear", shape, device)
    torch.autograd.grad(linear(x), (x, *linear.parameters()), grad)
    layer = new_layer("switchback", shape, device)
    compiled: list[str] = []
    with count_compiled(compiled, device):
        forward_s, y = seconds(lambda: layer(x), device)
        backward_s, _ = seconds(lambda: torch.autograd.grad(y, (x, *layer.parameters()), grad), device)
    return {"shape": shape, "forward_s": forward_s, "backward_s": backward_s, "compiled": len(compiled)}


if __name__ == "__main__":
    where = torch.device(sys.argv[1])
    print(json.dumps([first_call(shape, where) for shape in (TINY if "--tiny" in sys.argv else SHAPES)]))
