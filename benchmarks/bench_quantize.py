"""How near the quantising kernels come to the speed of memory.

    python benchmarks/bench_quantize.py

Bytes an element are those that the algorithm must move, with a bfloat16 input: 2 read and 1 written; 5 where an absmax
over more than a row makes it read twice, 6 where it then writes twice as well. Their share is that of the faster of two
copies: of a tensor of the same size in the same turns, and of a large one. Runs are CUDA graphs, so
that CPU overhead does not count.
"""

from collections.abc import Callable
from functools import partial

import torch

from measure import (
    Bench,
    BudgetFlag,
    Contestant,
    DeviceFlag,
    OutputFlag,
    QuickFlag,
    SecondsFlag,
    TinyFlag,
    copies,
    copy_gb_per_s,
    median_ms,
    new_app,
    new_table,
    ratio,
    text,
)
from shapes import MATRICES, TINY_MATRICES
from torch_switchback import ops

app = new_app()
COPY = "copy"
BYTES_AN_ELEMENT = {
    "quantize_rowwise": 3,
    "quantize_global": 5,
    "quantize_global_transpose": 5,
    "quantize_global_with_transpose": 6,
    "quantize_transpose_by_absmax": 3,
    "quantize_columnwise_and_transpose": 5,
    "dequantize_rowwise": 3,
    COPY: 4,
}
OPERATIONS = tuple(BYTES_AN_ELEMENT)


def calls(name: str, xs: list[torch.Tensor]) -> list[Callable[[], object]]:
    """One call of an operation for each x [rows, cols]."""
    if name == COPY:
        return [x.clone for x in xs]
    if name == "dequantize_rowwise":
        return [partial(ops.dequantize_rowwise, *ops.quantize_rowwise(x), x.dtype) for x in xs]
    operation = getattr(ops, name)
    if name == "quantize_transpose_by_absmax":
        return [partial(operation, x, ops.quantize_global(x)[1]) for x in xs]
    return [partial(operation, x) for x in xs]


@app.command(help="The quantising kernels against the bandwidth of a copy.")
def main(
    device: DeviceFlag = "cuda",
    seconds: SecondsFlag = 1.0,
    budget: BudgetFlag = 40.0,
    quick: QuickFlag = False,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
) -> None:
    bench = Bench(
        "bench_quantize", device=device, seconds=seconds, budget=budget, quick=quick, tiny=tiny, output=output
    )
    large_copy = copy_gb_per_s(bench.device, tiny=tiny)
    bench.report(copy_gb_per_s=large_copy)
    for shape in bench.cases(MATRICES, TINY_MATRICES):
        elements = shape[0] * shape[1]
        # The int8 codes are the smallest input, a byte an element.
        xs = [
            torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(copies(elements, bench.device))
        ]
        records = bench.compare(
            [Contestant(name, partial(calls, name, xs), "graph") for name in OPERATIONS], shape=shape
        )
        copies_gb_per_s = [
            ratio(BYTES_AN_ELEMENT[COPY] * elements / 1e6, median_ms(records, COPY, "graph")),
            large_copy,
        ]
        ceiling = max(speed for speed in copies_gb_per_s if speed is not None)
        rows = []
        for record in records:
            name, time, size = record["name"], record["median_ms"], BYTES_AN_ELEMENT[record["name"]]
            record["bytes_an_element"] = size
            record["gb_per_s"] = ratio(size * elements / 1e6, time)
            record["share_of_copy"] = ratio(record["gb_per_s"], ceiling)
            rows.append(
                (
                    name,
                    text(time, "{:.4f}"),
                    text(record["gb_per_s"], "{:.0f}"),
                    text(record["share_of_copy"], "{:.0%}"),
                )
            )
        bench.report(new_table(f"{shape[0]} × {shape[1]}", ("operation",), ("ms", "GB/s", "of a copy"), rows))
    bench.finish()


if __name__ == "__main__":
    app()
