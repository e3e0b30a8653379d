"""Measure the CPU time of an operation's parts: PyTorch's dispatcher, the plan, allocation, the launch.

    python benchmarks/bench_launch.py --output benchmarks/results/h200/bench_launch.json

Each part is called repeatedly at 256 tokens of a layer 1024 → 4096, whose kernels are shorter than
their launches. The clock stops before the GPU is waited for. Rounds of all parts are interleaved.
``bench_overhead.py`` measures whole steps of layers; this script says what they consist of.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import results_file
from torch_switchback.kernels import int8_matmul, launch, quantize_rowwise
from torch_switchback.kernels.device import empty
from torch_switchback.ops._library import LIBRARY, direct, dispatched
from torch_switchback.tuning import MatmulConfig

TOKENS, IN_FEATURES, OUT_FEATURES = 256, 1024, 4096
CALLS, ROUNDS = 100, 15
POINTER = MatmulConfig("pointer", 64, 128, 128, group_m=8, num_stages=3, num_warps=4)
TMA = MatmulConfig("tma", 128, 128, 128, group_m=8, num_stages=3, num_warps=4, ctas_per_sm=2)


class Identity(torch.autograd.Function):
    """An autograd Function that does nothing, with as many arguments as the layer's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, absmax: None, bias: torch.Tensor, call: object) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, None, None, None, None


def parts() -> dict[str, Callable[[], object]]:
    """Return a call of each part, by what it is."""
    torch.manual_seed(0)
    device, dtype = "cuda", torch.bfloat16
    x = torch.randn(TOKENS, IN_FEATURES, device=device, dtype=dtype)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, device=device, dtype=dtype)
    bias = torch.randn(OUT_FEATURES, device=device, dtype=dtype)
    grad = torch.randn(TOKENS, OUT_FEATURES, device=device, dtype=dtype)
    x_int8, x_absmax = direct.quantize_rowwise(x)
    grad_int8, grad_absmax = direct.quantize_rowwise(grad)
    weight_int8, weight_absmax = direct.quantize_global(weight)
    out = empty(x, (TOKENS, OUT_FEATURES), dtype)
    linear_args = x_int8, x_absmax, weight, bias, False, dtype
    grad_args = grad_int8, grad_absmax, weight, weight_absmax, False, dtype
    requiring = x.detach().requires_grad_()

    LIBRARY.define("nothing(Tensor x) -> Tensor")
    LIBRARY.impl("nothing", lambda _: out, "CUDA")
    LIBRARY.impl("nothing", torch.library.fallthrough_kernel, "Autograd")
    nothing = torch.ops.torch_switchback.nothing.default

    tile = quantize_rowwise.row_tile(IN_FEATURES)
    operands = (x, x_int8, x_absmax, TOKENS, IN_FEATURES, IN_FEATURES, 1)
    options = tile._asdict() | {"enable_fp_fusion": False}
    kernel, grid = quantize_rowwise.quantize_rowwise_kernel, (TOKENS // tile.BLOCK_ROWS, 1, 1)
    bound = launch.bind(kernel, operands, **tile._asdict())
    compiled, constants = kernel.warmup(*operands, grid=grid, **options), tile[: len(kernel.arg_names) - len(operands)]
    matmul = (x_int8, weight_int8.t(), x_absmax, weight_absmax, bias, dtype, out)
    matmuls = {
        name: int8_matmul.plan_int8_matmul(*matmul, absmax_per_col=False, config=config)
        for name, config in (("pointers", POINTER), ("TMA descriptors", TMA))
    }
    return {
        "torch.nn.functional.linear": lambda: F.linear(x, weight, bias),
        "torch.mm": lambda: torch.mm(grad.t(), x),
        "sum over rows": lambda: grad.sum(0),
        "autograd Function that does nothing, forward and backward": lambda: Identity.apply(
            requiring, weight, None, bias, None
        ).backward(x),
        "tensor through the dispatcher": lambda: x.new_empty((TOKENS, IN_FEATURES), dtype=torch.int8),
        "tensor past the dispatcher": lambda: empty(x, (TOKENS, IN_FEATURES), torch.int8),
        "operation that does nothing, dispatched": lambda: nothing(x),
        "specialization key of quantize_rowwise": lambda: launch.specialization_key((x,)),
        "specialization key of int8_linear": lambda: launch.specialization_key(linear_args),
        "kernel[grid](*args)": lambda: kernel[grid](*operands, **options),
        "compiled[grid](*args)": lambda: compiled[grid](*operands, *constants),
        "bound launch": lambda: bound(grid, *operands),
        **{f"matmul on {name}": lambda multiply=multiply: multiply(*matmul) for name, multiply in matmuls.items()},
        "quantize_rowwise, direct": lambda: direct.quantize_rowwise(x),
        "quantize_rowwise, dispatched": lambda: dispatched.quantize_rowwise(x),
        "int8_linear, direct": lambda: direct.int8_linear(*linear_args),
        "int8_linear, dispatched": lambda: dispatched.int8_linear(*linear_args),
        "int8_linear_grad_input, direct": lambda: direct.int8_linear_grad_input(*grad_args),
        "int8_linear_grad_input, dispatched": lambda: dispatched.int8_linear_grad_input(*grad_args),
    }


def microseconds(call: Callable[[], object]) -> float:
    """Return the CPU time of a call: the mean over a round."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the CPU time of an operation's parts.")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    run, calls = results_file.provenance("cuda"), parts()
    for call in calls.values():
        microseconds(call)
    rounds = [{name: microseconds(call) for name, call in calls.items()} for _ in range(ROUNDS)]
    rows = []
    for name in calls:
        samples = [one[name] for one in rounds]
        rows.append({"label": name, "us": [round(of(samples), 2) for of in (statistics.median, min, max)]})
        print(f"{name:60}{rows[-1]['us'][0]:8.2f} µs  ({min(samples):.2f} to {max(samples):.2f})", flush=True)
    if arguments.output:
        results_file.save(arguments.output, run, rows)


if __name__ == "__main__":
    main()
