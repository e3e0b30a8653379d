"""One layer's training step, and the memory that it keeps, against nn.Linear and torchao.

    python benchmarks/bench_linear.py

A step is forward and backward with all three gradients. torchao's layers are compiled, as its
documentation uses them. In a CUDA graph a step is free of CPU overhead. Speed-ups are over
nn.Linear in a graph for what runs in a graph, and over eager nn.Linear for everything else.

Amdahl's limit of "switchback" is the speed-up if nothing but its parts took time: each
quantization, matmul and sum, measured alone in the same rounds.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from measure import SPEED_UP, Bench, Candidate, Mode, copies, find, run
from peers import RECIPES, TORCHAO_FLOAT8, TORCHAO_INT8, compile_in_place, new_layer
from results_file import Record
from shapes import LAYERS, MATMULS, SMALL, TINY, Shape
from torch_switchback import ops
from torch_switchback.analysis.layer_steps import Inputs, add_comparison, random_inputs, training_step

# These take longest to compile, so they are compiled for few shapes.
SLOW_TO_COMPILE = ("linear", "switchback", TORCHAO_INT8)
COMPILED_SHAPES = (MATMULS[2], SMALL, *TINY)
PART = "part: "


def steps_of(shape: Shape) -> list[tuple[str, Mode]]:
    """Return the candidates of a shape: name and mode."""
    steps: list[tuple[str, Mode]] = [(name, "eager") for name in RECIPES]
    # All recipes for the small layer, which is bound by CPU overhead in eager mode.
    steps += [(name, "graph") for name in (RECIPES if shape == SMALL else ("linear", "switchback"))]
    steps += [(name, "compiled") for name in TORCHAO_FLOAT8]
    return steps + [(name, "compiled") for name in (SLOW_TO_COMPILE if shape in COMPILED_SHAPES else ())]


def parts(shape: Shape, inputs: Inputs, device: torch.device) -> list[Candidate]:
    """Return every part of the step of "switchback", each alone in a CUDA graph."""
    sizes = (shape.out_features, shape.in_features)
    count = copies(2 * sizes[0] * sizes[1], device)
    weights = [torch.randn(sizes, device=device, dtype=torch.bfloat16) for _ in range(count)]
    bias = torch.randn(shape.out_features, device=device, dtype=torch.bfloat16)
    ones = torch.ones(1, shape.tokens, device=device, dtype=torch.bfloat16)
    absmax = ops.quantize_global(weights[0])[1]
    xs, grads = [x.detach() for x, _ in inputs], [grad for _, grad in inputs]

    def matmul(a: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], object]:
        (a_int8, a_absmax), (b_int8, _) = ops.quantize_rowwise(a), ops.quantize_global(weight)
        return partial(ops.int8_matmul_mixed_dequantize, a_int8, b_int8.t(), a_absmax, absmax, bias, a.dtype)

    builds: dict[str, Callable[[], Sequence[Callable[[], object]]]] = {
        "quantize_rowwise(X)": lambda: [partial(ops.quantize_rowwise, x) for x in xs],
        "quantize_rowwise(G)": lambda: [partial(ops.quantize_rowwise, grad) for grad in grads],
        "quantize_global(W)": lambda: [partial(ops.quantize_global, weight) for weight in weights],
        "quantize_transpose_by_absmax(W)": lambda: [
            partial(ops.quantize_transpose_by_absmax, weight, absmax) for weight in weights
        ],
        "output": lambda: [matmul(x, weights[0], bias) for x in xs],
        "grad_input": lambda: [matmul(grad, weights[0].t(), None) for grad in grads],
        "grad_weight": lambda: [partial(torch.mm, grad.t(), x) for x, grad in zip(xs, grads, strict=True)],
        "grad_bias": lambda: [partial(torch.mm, ones, grad) for grad in grads],
    }
    return [Candidate(PART + name, build, "graph") for name, build in builds.items()]


def measure(bench: Bench, shape: Shape) -> list[Record]:
    set_bytes = 2 * shape.tokens * (shape.in_features + shape.out_features)
    inputs = random_inputs(*shape, copies(set_bytes, bench.device), bench.device, torch.bfloat16)

    def build(name: str, mode: Mode) -> nn.Module:
        layer = new_layer(name, shape, bench.device)
        compile_in_place(layer, mode, tiny=bench.tiny)
        return layer

    candidates = [training_step(name, partial(build, name, mode), inputs, mode=mode) for name, mode in steps_of(shape)]
    first_compiled = next(index for index, candidate in enumerate(candidates) if candidate.mode == "compiled")
    candidates[first_compiled:first_compiled] = parts(shape, inputs, bench.device)  # what compiles comes last
    measured = bench.compare(candidates, shape=shape)
    records = [record for record in measured if not record["name"].startswith(PART)]
    add_comparison(records, linear="linear")
    add_limit(records, [record for record in measured if record["name"].startswith(PART)])
    return records


def add_limit(records: list[Record], parts: list[Record]) -> None:
    """Add Amdahl's limit of "switchback", and the share that a step reached, to its records."""
    linear = find(records, name="linear", mode="graph")
    if linear is None or any("median_ms" not in part for part in parts):
        return
    parts_ms = sum(part["median_ms"] for part in parts)
    for record in records:
        if record["name"] == "switchback" and "median_ms" in record:
            record["limit"] = linear["median_ms"] / parts_ms
            record["share_of_limit"] = parts_ms / record["median_ms"]


COLUMNS = {
    "name": ("layer", "{}"),
    "mode": ("mode", "{}"),
    "median_ms": ("ms", "{:.3f}"),
    **SPEED_UP,
    "saved_bytes": ("bytes kept", "{:,d}"),
    "limit": ("Amdahl's limit", "{:.2f} ×"),
    "share_of_limit": ("reached", "{:.0%}"),
}


def main(argv: list[str] | None = None) -> None:
    run("bench_linear", measure, cases=LAYERS, tiny=TINY, columns=COLUMNS, seconds=2.0, budget=200.0, argv=argv)


if __name__ == "__main__":
    main()
