"""A layer's training step on the CPU, in float32: ratios to nn.Linear in the same run.

python benchmarks/bench_cpu.py
"""

from functools import partial

import torch

from measure import Bench, Contestant, OutputFlag, SecondsFlag, TinyFlag, median_ms, new_app, new_table, ratio, text
from peers import RECIPES, convert, gradients
from shapes import Shape

app = new_app()


@app.command(help="A layer's float32 training step on the CPU.")
def main(seconds: SecondsFlag = 30.0, tiny: TinyFlag = False, output: OutputFlag = None) -> None:
    bench = Bench("bench_cpu", device="cpu", seconds=seconds, quick=False, tiny=tiny, output=output, for_cpu=True)
    shape = Shape(16, 32, 48) if tiny else Shape(2048, 1024, 4096)
    x = torch.randn(shape.tokens, shape.in_features, requires_grad=True)
    grad = torch.randn(shape.tokens, shape.out_features)

    def build(name: str) -> list[partial[object]]:
        layer = convert(torch.nn.Sequential(torch.nn.Linear(shape.in_features, shape.out_features)), name)[0]
        return [partial(gradients, layer, x, grad)]

    records = bench.compare([Contestant(name, partial(build, name)) for name in RECIPES], shape=shape, what="step")
    rows = []
    for record in records:
        record["speed_up"] = ratio(median_ms(records, "linear"), record["median_ms"])
        rows.append((record["name"], text(record["median_ms"], "{:.1f}"), text(record["speed_up"], "{:.2f} ×")))
    bench.finish(new_table(f"{shape}, forward and backward", ("layer",), ("ms", "over\nnn.Linear"), rows))


if __name__ == "__main__":
    app()
