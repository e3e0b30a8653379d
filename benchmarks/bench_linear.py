"""One layer's training step, its parts, the memory that it keeps, and inference with few tokens.

    python benchmarks/bench_linear.py

A step is forward and backward with all three gradients. torchao's layers are measured as its documentation uses them,
compiled, and in eager mode as well. In one CUDA graph a step is free of the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from measure import (
    Bench,
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
    median_ms,
    new_app,
    new_table,
    ratio,
    saved_bytes,
    text,
)
from peers import RECIPES, TORCHAO, compile_in_place, convert, gradients
from shapes import INFERENCE, LAYERS, TINY, Shape
from torch_switchback import ops

app = new_app()
PART = "part: "
Inputs = list[tuple[Tensor, Tensor]]  # X [tokens, in] that wants its gradient, and G [tokens, out]


def new_layer(name: str, shape: Shape, device: torch.device) -> nn.Module:
    linear = nn.Linear(shape.in_features, shape.out_features, device=device, dtype=torch.bfloat16)
    return convert(nn.Sequential(linear), name)[0]  # torchao swaps children only


def steps(
    shape: Shape, inputs: Inputs, device: torch.device, *, compile_all: bool, tiny: bool
) -> tuple[list[Contestant], dict[tuple[str, Mode], int]]:
    """The competitors' steps, and what each kept for its backward (bytes), filled in when they are built."""
    kept: dict[tuple[str, Mode], int] = {}

    def build(name: str, mode: Mode) -> Cycle:
        layer = new_layer(name, shape, device)
        compile_in_place(layer, mode, tiny=tiny)
        gradients(layer, *inputs[0])  # compiles
        kept[name, mode] = saved_bytes(layer, inputs[0][0])
        return [partial(gradients, layer, x, grad) for x, grad in inputs]

    entries: list[tuple[str, Mode]] = [(name, "eager") for name in (*RECIPES, *TORCHAO)]
    entries += [(name, "graph") for name in ("linear", "switchback")]
    entries += [(name, "compiled") for name in ((*RECIPES, *TORCHAO) if compile_all else TORCHAO)]
    return [Contestant(name, partial(build, name, mode), mode) for name, mode in entries], kept


def parts(shape: Shape, inputs: Inputs, device: torch.device) -> list[Contestant]:
    """What SwitchBack's default step consists of, each operation alone in a CUDA graph."""
    sizes = (shape.out_features, shape.in_features)
    weights = [
        torch.randn(sizes, device=device, dtype=torch.bfloat16) for _ in range(copies(2 * sizes[0] * sizes[1], device))
    ]
    bias = torch.randn(shape.out_features, device=device, dtype=torch.bfloat16)
    codes, absmax = ops.quantize_global(weights[0])
    transposed_codes = ops.quantize_transpose_by_absmax(weights[0], absmax)
    xs, grads = [x.detach() for x, _ in inputs], [grad for _, grad in inputs]

    def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Callable[[], object]:
        a_codes, a_absmax = ops.quantize_rowwise(a)
        return partial(ops.int8_matmul_mixed_dequantize, a_codes, b.t(), a_absmax, absmax, bias, a.dtype)

    builds: dict[str, Callable[[], Cycle]] = {
        "quantize X": lambda: [partial(ops.quantize_rowwise, x) for x in xs],
        "quantize W": lambda: [partial(ops.quantize_global, weight) for weight in weights],
        "output, int8": lambda: [product(x, codes, bias) for x in xs],
        "quantize G": lambda: [partial(ops.quantize_rowwise, grad) for grad in grads],
        "quantize and transpose W": lambda: [
            partial(ops.quantize_transpose_by_absmax, weight, absmax) for weight in weights
        ],
        "grad_input, int8": lambda: [product(grad, transposed_codes, None) for grad in grads],
        "grad_weight, bf16": lambda: [partial(torch.mm, grad.t(), x) for x, grad in zip(xs, grads, strict=True)],
        "grad_bias": lambda: [partial(bias_gradient, grad) for grad in grads],
    }
    return [Contestant(PART + name, build, "graph") for name, build in builds.items()]


def bias_gradient(grad: Tensor) -> Tensor:
    return grad.sum(0, dtype=torch.float32).to(grad.dtype)


def limit(records: list[Record]) -> dict[str, float | None]:
    """Amdahl's limit: the speed-up over nn.Linear if nothing but our parts took time, and the shares reached."""
    times = [record["median_ms"] for record in records if record["name"].startswith(PART)]
    sum_ms = None if None in times else sum(times)
    return {
        "sum_of_parts_ms": sum_ms,
        "limit": ratio(median_ms(records, "linear"), sum_ms),
        "share_reached": ratio(sum_ms, median_ms(records, "switchback")),
        "share_reached_in_a_graph": ratio(sum_ms, median_ms(records, "switchback", "graph")),
    }


def inference(shape: Shape, device: torch.device) -> list[Contestant]:
    """nn.Linear and the prepared layer, without gradients; each weight's copies overflow the L2 cache."""

    def build(name: str) -> Cycle:
        weight_bytes = shape.in_features * shape.out_features * (2 if name == "linear" else 1)
        layers = [new_layer(name, shape, device) for _ in range(copies(weight_bytes, device))]
        x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=torch.bfloat16)
        for layer in layers:
            if name != "linear":
                layer.prepare_for_eval()
        return [partial(torch.no_grad()(layer), x) for layer in layers]

    return [Contestant(name, partial(build, name), "graph") for name in ("linear", "switchback", "rowwise")]


@app.command(help="One layer's training step, its parts and memory, and inference with few tokens.")
def main(
    device: DeviceFlag = "cuda",
    seconds: SecondsFlag = 4.0,
    quick: QuickFlag = False,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
    compile_all: Annotated[
        bool, typer.Option("--compile-all", help="compile nn.Linear and SwitchBack as well: some minutes")
    ] = False,
) -> None:
    bench = Bench(
        "bench_linear",
        device=device,
        seconds=seconds,
        quick=quick,
        tiny=tiny,
        output=output,
        compile_all=compile_all,
    )
    limits = []
    tables = []
    limit_rows = []

    def report(title: str, records: list[Record]) -> None:
        rows = []
        for record in records:
            mode = "eager" if record["mode"] == "compiled" and not compile_all else record["mode"]
            is_part = record["name"].startswith(PART)
            record["speed_up"] = None if is_part else ratio(median_ms(records, "linear", mode), record["median_ms"])
            rows.append(
                (
                    record["name"],
                    record["mode"],
                    text(record["median_ms"], "{:.3f}"),
                    text(record["speed_up"], "{:.2f} ×"),
                    text(record.get("saved_bytes"), "{:,d}"),
                )
            )
        numbers = ("ms", "over\nnn.Linear", "bytes kept for\nthe backward")
        tables.append(new_table(title, ("layer", "mode"), numbers, rows))

    for shape in bench.choose(LAYERS, TINY):
        set_bytes = 2 * shape.tokens * (shape.in_features + shape.out_features)
        inputs = [
            (
                torch.randn(shape.tokens, shape.in_features, device=device, dtype=torch.bfloat16, requires_grad=True),
                torch.randn(shape.tokens, shape.out_features, device=device, dtype=torch.bfloat16),
            )
            for _ in range(copies(set_bytes, bench.device))
        ]
        contestants, kept = steps(shape, inputs, bench.device, compile_all=compile_all, tiny=tiny)
        records = bench.compare([*contestants, *parts(shape, inputs, bench.device)], shape=shape, what="step")
        for record in records:
            record["saved_bytes"] = kept.get((record["name"], record["mode"]))
        report(f"{shape}, forward and backward", records)
        limits.append({"shape": shape, **limit(records)})
        limit_rows.append(
            (
                str(shape),
                text(limits[-1]["sum_of_parts_ms"], "{:.3f}"),
                text(limits[-1]["limit"], "{:.2f} ×"),
                text(limits[-1]["share_reached"], "{:.0%}"),
                text(limits[-1]["share_reached_in_a_graph"], "{:.0%}"),
            )
        )
    for shape in bench.choose(INFERENCE, TINY):
        report(f"{shape}, inference", bench.compare(inference(shape, bench.device), shape=shape, what="inference"))
    bench.finish(
        *tables,
        new_table("Amdahl's limit", ("shape",), ("parts, ms", "limit", "reached", "in a\nCUDA graph"), limit_rows),
        limits=limits,
    )


if __name__ == "__main__":
    app()
