"""How near the quantising kernels come to the speed of memory.

    python benchmarks/bench_quantize.py

Bytes an element are those that the algorithm must move, with a bfloat16 input: 2 read and 1 written; 5 where an absmax
over more than a row makes it read twice; 6 where it writes the codes plain and transposed. Runs are CUDA graphs: the
host's share of a call is bench_linear's subject.
"""

from collections.abc import Callable
from functools import partial

import torch

from measure import (
    Bench,
    Contestant,
    DeviceFlag,
    OutputFlag,
    QuickFlag,
    SecondsFlag,
    TinyFlag,
    copies,
    new_app,
    new_table,
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
    seconds: SecondsFlag = 3.0,
    quick: QuickFlag = False,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
) -> None:
    bench = Bench("bench_quantize", device=device, seconds=seconds, quick=quick, tiny=tiny, output=output)
    tables = []
    for shape in bench.choose(MATRICES, TINY_MATRICES):
        elements = shape[0] * shape[1]
        # The int8 codes are the smallest input, a byte an element.
        xs = [
            torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(copies(elements, bench.device))
        ]
        records = bench.compare(
            [Contestant(name, partial(calls, name, xs), "graph") for name in BYTES_AN_ELEMENT], shape=shape
        )
        gb_per_s = {
            record["name"]: BYTES_AN_ELEMENT[record["name"]] * elements / record["median_ms"] / 1e6
            for record in records
            if record["median_ms"] is not None
        }
        rows = []
        for record in records:
            speed = gb_per_s.get(record["name"])
            share = None if speed is None or COPY not in gb_per_s else speed / gb_per_s[COPY]
            record |= {"bytes_an_element": BYTES_AN_ELEMENT[record["name"]], "gb_per_s": speed, "share_of_copy": share}
            rows.append(
                (
                    record["name"],
                    text(record["median_ms"], "{:.4f}"),
                    text(speed, "{:.0f}"),
                    text(share, "{:.0%}"),
                )
            )
        tables.append(new_table(f"{shape[0]} × {shape[1]}", ("operation",), ("ms", "GB/s", "of a copy"), rows))
    bench.finish(*tables)


if __name__ == "__main__":
    app()
