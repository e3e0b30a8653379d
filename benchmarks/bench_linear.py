"""One layer's training step, the memory that it keeps, and the limit that its parts set.

    python benchmarks/bench_linear.py

A step is forward and backward with all three gradients, in turns as long as the clocks take to settle. torchao's layers
are measured as its documentation uses them, compiled. In one CUDA graph a step is free of the host. Speed-ups are over
nn.Linear in a graph for what runs in one, and over nn.Linear in eager mode for everything else.

Amdahl's limit of a strategy is the speed-up if nothing but its parts took time: each quantisation, product and sum,
measured alone in the same rounds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from measure import (
    Bench,
    BudgetFlag,
    Contestant,
    Cycle,
    DeviceFlag,
    Mode,
    OutputFlag,
    QuickFlag,
    Record,
    SecondsFlag,
    TinyFlag,
    copies,
    find,
    median_ms,
    new_app,
    new_table,
    ratio,
    speed_up,
    spread,
    text,
)
from peers import RECIPES, TORCHAO_FLOAT8, TORCHAO_INT8, random_inputs, training_step
from shapes import LAYERS, PRODUCTS, SMALL, TINY, Shape
from torch_switchback import SwitchBackConfig, ops
from torch_switchback.ops import direct

app = new_app()
STRATEGIES = {name: config for name, config in RECIPES.items() if config is not None}
# Compiled for these shapes only, as that takes them longest; torchao's float8 is for all.
SLOW_TO_COMPILE = ("linear", "switchback", TORCHAO_INT8)
COMPILED_SHAPES = (PRODUCTS[2], SMALL, *TINY)
PART = "part: "
ROTATE_TOKENS = SwitchBackConfig().rotate_tokens or 64
ROTATE_FEATURES = STRATEGIES["rowwise-rotated-features"].rotate_features


def competitors(shape: Shape, *, compile_all: bool) -> list[tuple[str, Mode]]:
    entries: list[tuple[str, Mode]] = [(name, "eager") for name in RECIPES]
    # Of the small layer every strategy: in eager mode it is bound by the host.
    entries += [(name, "graph") for name in (RECIPES if shape == SMALL else ("linear", "switchback"))]
    entries += [(name, "compiled") for name in TORCHAO_FLOAT8]
    if compile_all or shape in COMPILED_SHAPES:
        entries += [(name, "compiled") for name in SLOW_TO_COMPILE]
    return entries


def parts_of(config: SwitchBackConfig) -> list[str]:
    """What a strategy's step consists of."""
    rowwise, int8 = config.weight_scaling == "rowwise", config.grad_weight != "high_precision"
    product = "rowwise" if rowwise else "mixed"
    if config.rotate_features is not None:
        names = ["quantize_rotated_rowwise(X)", f"output, {product}", "quantize_rotated_rowwise(G)"]
        names += [f"grad_input, {product}", "grad_weight, 16 bit", "grad_bias"]
        return [*names, "quantize_rotated_rowwise(W)", "quantize_rotated_columnwise_and_transpose(W)"]
    quantize = "quantize_rowwise_and_rotated_columnwise" if int8 else "quantize_rowwise"
    names = [f"{quantize}(X)", f"output, {product}", f"{quantize}(G)", f"grad_input, {product}"]
    names += [f"grad_weight, {'int8' if int8 else '16 bit'}", "grad_bias"]
    if config.mem_efficient and not int8:
        names.append("dequantize_rowwise(X)")
    if rowwise:
        return [*names, "quantize_rowwise(W)", "quantize_columnwise_and_transpose(W)"]
    return [*names, "quantize_global(W)", "quantize_transpose_by_absmax(W)"]


def parts(shape: Shape, inputs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> list[Contestant]:
    """Every part of every strategy, each alone in a CUDA graph."""
    sizes = (shape.out_features, shape.in_features)
    weights = [
        torch.randn(sizes, device=device, dtype=torch.bfloat16) for _ in range(copies(2 * sizes[0] * sizes[1], device))
    ]
    bias = torch.randn(shape.out_features, device=device, dtype=torch.bfloat16)
    xs, grads = [x.detach() for x, _ in inputs], [grad for _, grad in inputs]
    absmax = ops.quantize_global(weights[0])[1]

    def mixed(a: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], object]:
        (a_codes, a_absmax), (b_codes, _) = ops.quantize_rowwise(a), ops.quantize_global(weight)
        return partial(ops.int8_matmul_mixed_dequantize, a_codes, b_codes.t(), a_absmax, absmax, bias, a.dtype)

    def rowwise(a: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], object]:
        (a_codes, a_absmax), (b_codes, b_absmax) = ops.quantize_rowwise(a), ops.quantize_rowwise(weight)
        return partial(ops.int8_matmul_rowwise_dequantize, a_codes, b_codes.t(), a_absmax, b_absmax, bias, a.dtype)

    def int8_grad_weight(x: Tensor, grad: Tensor) -> Callable[[], object]:
        (a_codes, a_absmax), (b_codes, b_absmax) = (
            ops.quantize_columnwise_and_transpose(t, rotate_tokens=ROTATE_TOKENS) for t in (grad, x)
        )
        return partial(ops.int8_matmul_rowwise_dequantize, a_codes, b_codes.t(), a_absmax, b_absmax, None, x.dtype)

    builds: dict[str, Callable[[], Cycle]] = {
        "quantize_rowwise(X)": lambda: [partial(ops.quantize_rowwise, x) for x in xs],
        "quantize_rowwise(G)": lambda: [partial(ops.quantize_rowwise, grad) for grad in grads],
        "quantize_rowwise_and_rotated_columnwise(X)": lambda: [
            partial(ops.quantize_rowwise_and_rotated_columnwise, x, ROTATE_TOKENS) for x in xs
        ],
        "quantize_rowwise_and_rotated_columnwise(G)": lambda: [
            partial(ops.quantize_rowwise_and_rotated_columnwise, grad, ROTATE_TOKENS) for grad in grads
        ],
        "quantize_rotated_rowwise(X)": lambda: [partial(ops.quantize_rowwise, x, ROTATE_FEATURES) for x in xs],
        "quantize_rotated_rowwise(G)": lambda: [partial(ops.quantize_rowwise, grad, ROTATE_FEATURES) for grad in grads],
        "quantize_rotated_rowwise(W)": lambda: [
            partial(ops.quantize_rowwise, weight, ROTATE_FEATURES) for weight in weights
        ],
        "quantize_rotated_columnwise_and_transpose(W)": lambda: [
            partial(ops.quantize_columnwise_and_transpose, weight, ROTATE_FEATURES) for weight in weights
        ],
        "dequantize_rowwise(X)": lambda: [
            partial(ops.dequantize_rowwise, *ops.quantize_rowwise(x), torch.bfloat16) for x in xs
        ],
        "quantize_global(W)": lambda: [partial(ops.quantize_global, weight) for weight in weights],
        "quantize_transpose_by_absmax(W)": lambda: [
            partial(ops.quantize_transpose_by_absmax, weight, absmax) for weight in weights
        ],
        "quantize_rowwise(W)": lambda: [partial(ops.quantize_rowwise, weight) for weight in weights],
        "quantize_columnwise_and_transpose(W)": lambda: [
            partial(ops.quantize_columnwise_and_transpose, weight) for weight in weights
        ],
        "output, mixed": lambda: [mixed(x, weights[0], bias) for x in xs],
        "output, rowwise": lambda: [rowwise(x, weights[0], bias) for x in xs],
        "grad_input, mixed": lambda: [mixed(grad, weights[0].t(), None) for grad in grads],
        "grad_input, rowwise": lambda: [rowwise(grad, weights[0].t(), None) for grad in grads],
        "grad_weight, 16 bit": lambda: [partial(torch.mm, grad.t(), x) for x, grad in zip(xs, grads, strict=True)],
        "grad_weight, int8": lambda: [int8_grad_weight(x, grad) for x, grad in zip(xs, grads, strict=True)],
        "grad_bias": lambda: [partial(direct.column_sums, grad, grad.dtype) for grad in grads],
    }
    wanted = dict.fromkeys(part for config in STRATEGIES.values() for part in parts_of(config))
    return [Contestant(PART + name, builds[name], "graph") for name in wanted]


def limit(records: list[Record], name: str, config: SwitchBackConfig) -> Record:
    """Amdahl's limit of a strategy over nn.Linear, and the shares of it that its steps reached."""
    times = {record["name"]: record["median_ms"] for record in records if record["name"].startswith(PART)}
    own = [times[PART + part] for part in parts_of(config)]
    sum_ms = None if None in own else sum(own)
    return {
        "name": name,
        "sum_of_parts_ms": sum_ms,
        "limit": ratio(median_ms(records, "linear", "graph"), sum_ms),
        "share_reached": ratio(sum_ms, median_ms(records, name)),
        "share_reached_in_a_graph": ratio(sum_ms, median_ms(records, name, "graph")),
    }


@app.command(help="One layer's training step, its parts and the memory that it keeps.")
def main(
    device: DeviceFlag = "cuda",
    seconds: SecondsFlag = 2.0,
    budget: BudgetFlag = 200.0,
    quick: QuickFlag = False,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
    only: Annotated[str, typer.Option("--only", help="shapes that contain this, as in 4096 or 65536")] = "",
    compile_all: Annotated[
        bool, typer.Option("--compile-all", help="compile every layer for every shape: some minutes more")
    ] = False,
) -> None:
    bench = Bench(
        "bench_linear",
        device=device,
        seconds=seconds,
        budget=budget,
        quick=quick,
        tiny=tiny,
        output=output,
        only=only,
        compile_all=compile_all,
    )
    shapes = [shape for shape in LAYERS if only in str(shape)]
    limits: list[Record] = []
    for shape in bench.cases(shapes, TINY):
        inputs = random_inputs(
            shape, copies(2 * shape.tokens * (shape.in_features + shape.out_features), bench.device), bench.device
        )
        kept: dict[tuple[str, Mode], int] = {}
        steps = [
            training_step(name, mode, shape, inputs, kept=kept, tiny=tiny)
            for name, mode in competitors(shape, compile_all=compile_all)
        ]
        first_peer = next(index for index, step in enumerate(steps) if step.mode == "compiled")
        steps[first_peer:first_peer] = parts(shape, inputs, bench.device)  # what compiles comes last, if time is short
        records = bench.compare(steps, shape=shape)
        rows = []
        for record in records:
            name, mode = record["name"], record["mode"]
            is_part = name.startswith(PART)
            baseline = None if is_part else find(records, name="linear", mode="graph" if mode == "graph" else "eager")
            record |= speed_up(record, baseline)
            record["saved_bytes"] = kept.get((name, mode))
            record["saved_over_linear"] = ratio(record["saved_bytes"], kept.get(("linear", "eager")))
            rows.append(
                (
                    name,
                    mode,
                    text(record["median_ms"], "{:.3f}"),
                    text(record["speed_up"], "{:.2f} ×"),
                    spread(record),
                    text(record["saved_bytes"], "{:,d}"),
                )
            )
        numbers = ("ms", "over\nnn.Linear", "10th to 90th\npercentile", "bytes kept for\nthe backward")
        table = new_table(f"{shape}, forward and backward", ("layer", "mode"), numbers, rows)

        found = [limit(records, name, config) for name, config in STRATEGIES.items()]
        limits += [{"shape": shape, **one} for one in found]
        rows = [
            (
                one["name"],
                text(one["sum_of_parts_ms"], "{:.3f}"),
                text(one["limit"], "{:.2f} ×"),
                text(one["share_reached"], "{:.0%}"),
                text(one["share_reached_in_a_graph"], "{:.0%}"),
            )
            for one in found
        ]
        numbers = ("parts, ms", "limit", "reached", "in a\nCUDA graph")
        bench.report(table, new_table("Amdahl's limit", ("strategy",), numbers, rows), limits=limits)
    bench.finish()


if __name__ == "__main__":
    app()
