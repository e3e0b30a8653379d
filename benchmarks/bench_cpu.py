"""A layer's training step on the CPU, in float32, against nn.Linear.

python benchmarks/bench_cpu.py
"""

from functools import partial

import torch

from measure import SPEED_UP, Bench, Candidate, find, run, speed_up
from peers import RECIPES, convert, gradients
from results_file import Record
from shapes import TINY, Shape


def measure(bench: Bench, shape: Shape) -> list[Record]:
    x = torch.randn(shape.tokens, shape.in_features, requires_grad=True)
    grad = torch.randn(shape.tokens, shape.out_features)

    def build(name: str) -> list[partial[object]]:
        layer = convert(torch.nn.Sequential(torch.nn.Linear(shape.in_features, shape.out_features)), name)[0]
        return [partial(gradients, layer, x, grad)]

    records = bench.compare([Candidate(name, partial(build, name)) for name in RECIPES], shape=shape)
    for record in records:
        record |= speed_up(record, find(records, name="linear"))
    return records


COLUMNS = {"name": ("layer", "{}"), "median_ms": ("ms", "{:.1f}"), **SPEED_UP}


def main(argv: list[str] | None = None) -> None:
    cases = [Shape(2048, 1024, 4096)]
    run("bench_cpu", measure, cases=cases, tiny=TINY, columns=COLUMNS, seconds=30.0, only_cpu=True, argv=argv)


if __name__ == "__main__":
    main()
