"""A layer's training step on the CPU, in float32: ratios to nn.Linear in the same run.

python benchmarks/bench_cpu.py
"""

from functools import partial

import torch

from measure import (
    Bench,
    Contestant,
    OutputFlag,
    SecondsFlag,
    TinyFlag,
    find,
    new_app,
    new_table,
    speed_up,
    spread,
    text,
)
from peers import RECIPES, convert, gradients
from shapes import Shape

app = new_app()


@app.command(help="A layer's float32 training step on the CPU.")
def main(seconds: SecondsFlag = 30.0, tiny: TinyFlag = False, output: OutputFlag = None) -> None:
    bench = Bench("bench_cpu", device="cpu", seconds=seconds, tiny=tiny, output=output, for_cpu=True)
    shape = Shape(16, 32, 48) if tiny else Shape(2048, 1024, 4096)
    x = torch.randn(shape.tokens, shape.in_features, requires_grad=True)
    grad = torch.randn(shape.tokens, shape.out_features)

    def build(name: str) -> list[partial[object]]:
        layer = convert(torch.nn.Sequential(torch.nn.Linear(shape.in_features, shape.out_features)), name)[0]
        return [partial(gradients, layer, x, grad)]

    records = bench.compare([Contestant(name, partial(build, name)) for name in RECIPES], shape=shape)
    rows = []
    for record in records:
        record |= speed_up(record, find(records, name="linear"))
        figures = text(record["median_ms"], "{:.1f}"), text(record["speed_up"], "{:.2f} ×"), spread(record)
        rows.append((record["name"], *figures))
    numbers = ("ms", "over\nnn.Linear", "10th to 90th\npercentile")
    bench.report(new_table(f"{shape}, forward and backward", ("layer",), numbers, rows))
    bench.finish()


if __name__ == "__main__":
    app()
