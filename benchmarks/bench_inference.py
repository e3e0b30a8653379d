"""A prepared layer with few tokens, as in generation, against nn.Linear in bfloat16.

    python benchmarks/bench_inference.py

Without gradients and in CUDA graphs. A call reads the whole weight, so the calls cycle through
copies of the layer whose weights overflow the L2 cache together.
"""

from functools import partial

import torch

from measure import SPEED_UP, Bench, Candidate, Cycle, copies, find, ratio, run, speed_up
from peers import new_layer
from results_file import Record
from shapes import INFERENCE, TINY, Shape

WEIGHT_BYTES = {"linear": 2, "switchback": 1, "rowwise": 1}  # per element
CALLS_PER_COPY = 8  # so that the calls of a graph take far longer than its launch


def build(name: str, shape: Shape, device: torch.device) -> Cycle:
    weight_bytes = WEIGHT_BYTES[name] * shape.in_features * shape.out_features
    layers = [new_layer(name, shape, device) for _ in range(copies(weight_bytes, device))]
    x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=torch.bfloat16)
    if name != "linear":
        for layer in layers:
            layer.prepare_for_eval()
    return [partial(torch.no_grad()(layer), x) for layer in layers] * CALLS_PER_COPY


def measure(bench: Bench, shape: Shape) -> list[Record]:
    candidates = [Candidate(name, partial(build, name, shape, bench.device), "graph") for name in WEIGHT_BYTES]
    records = bench.compare(candidates, shape=shape)
    for record in records:
        record |= speed_up(record, find(records, name="linear"))
        moved = WEIGHT_BYTES[record["name"]] * shape.in_features * shape.out_features
        record["weight_gb_per_s"] = ratio(moved / 1e6, record.get("median_ms"))
    return records


COLUMNS = {
    "name": ("layer", "{}"),
    "median_ms": ("ms", "{:.4f}"),
    **SPEED_UP,
    "weight_gb_per_s": ("GB/s of weight", "{:.0f}"),
}


def main(argv: list[str] | None = None) -> None:
    run("bench_inference", measure, cases=INFERENCE, tiny=TINY, columns=COLUMNS, seconds=0.4, budget=25.0, argv=argv)


if __name__ == "__main__":
    main()
