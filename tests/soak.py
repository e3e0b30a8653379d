"""Random steps of random layers for some minutes, each held against its CPU reference.

    python tests/soak.py --minutes 10

A case draws tokens, features, dtypes, strategy, layouts, hostile values, eager or compiled, and every so often asks for
more memory than there is. The output and the input gradient must be the bits that the CPU computes in eager mode, and
an int8 weight gradient to a code of its rotated operands; a 16-bit one is held to the bound of its roundings.
``--seed`` and ``--first`` repeat a case.
"""

import argparse
import math
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

import torch_switchback as ts
from testing import DTYPES, LAYOUTS, STRATEGIES, assert_same, assert_same_int8_grad_weight, gradients, make_layer

MEMORY_SAMPLES = 200
LARGEST = {"cpu": 96, "cuda": 1024}
COMPILED = 0.1  # of the cases: each compiles anew
OUT_OF_MEMORY = 0.05


@dataclass
class Case:
    """A step, all of it drawn from one seed."""

    seed: int
    device: str
    label: dict[str, object] = field(default_factory=dict)

    def run(self) -> None:
        random = Random(self.seed)
        torch.manual_seed(self.seed)
        largest = LARGEST[self.device]
        tokens, in_features, out_features = (self._size(random, largest) for _ in range(3))
        strategy = random.choice(list(STRATEGIES))
        dtype, weight_dtype = random.choice(DTYPES), random.choice(DTYPES)
        layout = random.choice(LAYOUTS)
        compiled = random.random() < COMPILED
        self.label = {
            "shape": (tokens, in_features, out_features),
            "strategy": strategy,
            "dtype": str(dtype),
            "layout": layout.__name__,
            "compiled": compiled,
        }
        bias = random.random() < 0.8
        layer = make_layer(STRATEGIES[strategy], in_features, out_features, dtype=weight_dtype, bias=bias)
        x, grad = layout(tokens, in_features, dtype), random.choice(LAYOUTS[:-1])(tokens, out_features, dtype)
        expected = gradients(layer, x, grad)
        layer.to(self.device)
        forward = layer
        if compiled:
            torch._dynamo.reset()
            forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
        check(Step(layer, forward)(to(self.device, x), to(self.device, grad)), expected, layer, x, grad)

    def _size(self, random: Random, largest: int) -> int:
        """Often a multiple of 16, which has kernels of its own."""
        size = int(largest ** random.random())
        return -(-size // 16) * 16 if random.random() < 0.5 else size


class Step:
    """gradients() of a layer whose forward may be compiled."""

    def __init__(self, layer, forward):
        self.layer, self.forward = layer, forward

    def __call__(self, x, grad):
        x = x.detach().requires_grad_()
        y = self.forward(x)
        return (y.detach(), *torch.autograd.grad(y, (x, *self.layer.parameters()), grad))


def check(actual, expected, layer, x, grad) -> None:
    """Compare bits where they are guaranteed, else hold the step to the bound of its roundings."""
    (y, grad_input, grad_weight, *_), wanted = actual, expected
    assert_same(y, wanted[0])
    assert_same(grad_input, wanted[1])
    if layer.config.grad_weight != "high_precision":
        assert_same_int8_grad_weight(grad_weight, wanted[2], x, grad, layer.config)
        return
    exact_x = x.double()
    if layer.config.mem_efficient:  # what the backward has of X
        exact_x = ts.ops.dequantize_rowwise(*ts.ops.quantize_rowwise(x), x.dtype).double()
    exact = grad.double().t() @ exact_x
    finite = exact.isfinite()
    roundings = [torch.finfo(dtype) for dtype in (x.dtype, layer.weight.dtype)]
    # The operands' float32 sums, in any order, and two roundings: to the product's dtype and to the weight's.
    bound = x.shape[0] * 2**-23 * (grad.double().abs().t() @ exact_x.abs())
    bound += sum(each.eps * (exact.abs() + each.smallest_normal) for each in roundings)
    in_range = finite & (exact.abs() < 60_000)
    assert torch.equal(grad_weight.cpu()[in_range].isfinite(), in_range[in_range])
    assert ((grad_weight.cpu().double() - exact).abs() <= bound)[in_range].all()


def to(device, x):
    """A copy with x's strides and its offset from alignment, which ``x.to`` would not keep."""
    start = x.storage_offset()
    elements = start + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((elements,), (1,), 0).to(device).as_strided(x.shape, x.stride(), start)


def provoke_out_of_memory(device: str) -> None:
    """Run out of memory in the middle of a forward: by a limit on a GPU, by the size alone on a CPU."""
    if device == "cpu":
        x = torch.zeros(1, 1).expand(2**40, 64)
        try:
            ts.SwitchBackLinear(64, 64)(x)
        except (RuntimeError, MemoryError):
            return
        raise AssertionError("there was memory for 2**46 elements")
    layer = ts.SwitchBackLinear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2**15, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * 2**20) / total)
    try:
        layer(x)
    except torch.OutOfMemoryError:
        return
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    raise AssertionError("there was memory for the output")


def allocated(device: str) -> int:
    """Bytes of tensors on the GPU, or of the process on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def soak(device: str, minutes: float, seed: int, first: int = 0, most: float = math.inf) -> dict[str, object]:
    """Cases until the time is over or they are the most: how many, of what, which were wrong, what memory was held."""
    # cuBLAS may round partial sums, else, which no bound here counts.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    start, number = time.monotonic(), first
    counts: Counter[str] = Counter()
    wrong, memory = [], []
    while time.monotonic() - start < 60 * minutes and number - first < most:
        case = Case(seed + number, device)
        try:
            case.run()
        except Exception:  # whatever it is, the run goes on: it counts
            wrong.append({"case": number, **case.label, "error": traceback.format_exc(limit=3)})
            print(f"case {number} of seed {seed}: {wrong[-1]}", file=sys.stderr)
        counts.update(f"{name} {value}" for name, value in case.label.items() if name != "shape")
        if Random(case.seed).random() < OUT_OF_MEMORY:
            provoke_out_of_memory(device)
            counts["out of memory"] += 1
        number += 1
        memory.append(allocated(device))
    kept = memory[:: -(-len(memory) // MEMORY_SAMPLES)]
    return {"seed": seed, "cases": number - first, "wrong": wrong, "counts": dict(counts), "allocated_bytes": kept}


def is_flat(memory: list[int]) -> bool:
    """Return whether the last quarter holds no more than the second did, to 1 MiB: the first warms up."""
    quarter = max(1, len(memory) // 4)
    return max(memory[-quarter:]) <= max(memory[quarter : 2 * quarter]) + 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=LARGEST, default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    flags = parser.parse_args()
    result = soak(flags.device, flags.minutes, flags.seed, flags.first)
    wrong, memory = len(result["wrong"]), result["allocated_bytes"]
    grew = flags.device == "cuda" and not is_flat(memory)
    print(f"{result['cases']} cases, {wrong} wrong, memory {memory[-1]} bytes{', growing' if grew else ''}")
    return int(wrong > 0 or grew)


if __name__ == "__main__":
    sys.exit(main())
