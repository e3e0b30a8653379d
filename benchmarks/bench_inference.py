"""A prepared layer with few tokens, as in generation, against nn.Linear in bfloat16.

    python benchmarks/bench_inference.py

Without gradients and in CUDA graphs. A call reads all of the weight, so the copies of each layer's weight that take
turns overflow the L2 cache.
"""

from functools import partial

import torch

from measure import (
    Bench,
    BudgetFlag,
    Contestant,
    Cycle,
    DeviceFlag,
    OutputFlag,
    QuickFlag,
    SecondsFlag,
    TinyFlag,
    copies,
    find,
    new_app,
    new_table,
    ratio,
    speed_up,
    spread,
    text,
)
from peers import new_layer
from shapes import INFERENCE, TINY, Shape

app = new_app()
WEIGHT_BYTES = {"linear": 2, "switchback": 1, "rowwise": 1}  # an element
CALLS_A_COPY = 8  # so that a graph's calls take far longer than its launch


def build(name: str, shape: Shape, device: torch.device) -> Cycle:
    weight_bytes = WEIGHT_BYTES[name] * shape.in_features * shape.out_features
    layers = [new_layer(name, shape, device) for _ in range(copies(weight_bytes, device))]
    x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=torch.bfloat16)
    if name != "linear":
        for layer in layers:
            layer.prepare_for_eval()
    return [partial(torch.no_grad()(layer), x) for layer in layers] * CALLS_A_COPY


@app.command(help="Prepared layers with few tokens, in CUDA graphs, against nn.Linear.")
def main(
    device: DeviceFlag = "cuda",
    seconds: SecondsFlag = 0.4,
    budget: BudgetFlag = 25.0,
    quick: QuickFlag = False,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
) -> None:
    bench = Bench(
        "bench_inference", device=device, seconds=seconds, budget=budget, quick=quick, tiny=tiny, output=output
    )
    for shape in bench.cases(INFERENCE, TINY):
        records = bench.compare(
            [Contestant(name, partial(build, name, shape, bench.device), "graph") for name in WEIGHT_BYTES], shape=shape
        )
        baseline = find(records, name="linear")
        rows = []
        for record in records:
            record |= speed_up(record, baseline)
            moved = WEIGHT_BYTES[record["name"]] * shape.in_features * shape.out_features
            record["weight_gb_per_s"] = ratio(moved / 1e6, record["median_ms"])
            rows.append(
                (
                    record["name"],
                    text(record["median_ms"], "{:.4f}"),
                    text(record["speed_up"], "{:.2f} ×"),
                    spread(record),
                    text(record["weight_gb_per_s"], "{:.0f}"),
                )
            )
        numbers = ("ms", "over\nnn.Linear", "10th to 90th\npercentile", "GB/s of\nweight")
        bench.report(new_table(f"{shape}, prepared", ("layer",), numbers, rows))
    bench.finish()


if __name__ == "__main__":
    app()
