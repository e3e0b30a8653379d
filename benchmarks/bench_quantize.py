"""The quantization kernels against the bandwidth of a copy.

    python benchmarks/bench_quantize.py

Bytes per element are those that the algorithm must move, with a bfloat16 input: 2 read and 1
written; 5 where an absmax over more than a row makes it read twice, 6 where it then writes twice as
well. Of int8 values, a transpose moves 2, and requantizing rotated ones through bfloat16 8. The share
is that of the faster of two copies: of a tensor of the same size, interleaved, and of 1 GiB. Runs are
CUDA graphs, so that CPU overhead does not count.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

from measure import Bench, Candidate, copies, copy_gb_per_s, find, ratio, run
from results_file import Record
from shapes import MATRICES, TINY_MATRICES, Matrix
from torch_switchback import ops
from torch_switchback.ops import prepared_weight
from torch_switchback.ops._library import dispatched

COPY = "copy"
BYTES_PER_ELEMENT = {
    "quantize_rowwise": 3,
    "quantize_global": 5,
    "quantize_global_transpose": 5,
    "quantize_global_with_transpose": 6,
    "quantize_transpose_by_absmax": 3,
    "quantize_columnwise_and_transpose": 5,
    "dequantize_rowwise": 3,
    "quantize_folded_rowwise": 3,
    "transpose_int8": 2,
    "requantize_rotated": 8,
    COPY: 4,
}
ROTATION = 64  # features
large_copy = cache(copy_gb_per_s)


def calls(name: str, xs: list[torch.Tensor]) -> list[Callable[[], object]]:
    """Return one call of an operation for each x [rows, cols]."""
    if name == COPY:
        return [x.clone for x in xs]
    if name == "dequantize_rowwise":
        return [partial(ops.dequantize_rowwise, *ops.quantize_rowwise(x), x.dtype) for x in xs]
    if name == "quantize_transpose_by_absmax":
        return [partial(ops.quantize_transpose_by_absmax, x, ops.quantize_global(x)[1]) for x in xs]
    if name == "quantize_folded_rowwise":
        return [partial(prepared_weight.quantize_folded_rowwise, x, x[0].float()) for x in xs]
    if name == "transpose_int8":
        return [partial(prepared_weight.transpose_int8, ops.quantize_rowwise(x)[0]) for x in xs]
    if name == "requantize_rotated":
        rotated = [dispatched.quantize_rotated_rowwise(x, ROTATION) for x in xs]
        return [partial(prepared_weight.requantize_rotated, *each, ROTATION) for each in rotated]
    return [partial(getattr(ops, name), x) for x in xs]


def measure(bench: Bench, shape: Matrix) -> list[Record]:
    elements = shape.rows * shape.cols  # the int8 input is the smallest, one byte per element
    xs = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(copies(elements, bench.device))]
    candidates = [Candidate(name, partial(calls, name, xs), "graph") for name in BYTES_PER_ELEMENT]
    records = bench.compare(candidates, shape=shape)
    for record in records:
        record["bytes_per_element"] = BYTES_PER_ELEMENT[record["name"]]
        record["gb_per_s"] = ratio(record["bytes_per_element"] * elements / 1e6, record.get("median_ms"))
    own_copy = find(records, name=COPY)
    limit = max(own_copy["gb_per_s"] if own_copy else 0.0, large_copy(bench.device) or 0.0)
    for record in records:
        record["share_of_copy"] = ratio(record["gb_per_s"], limit)
    return records


COLUMNS = {
    "name": ("operation", "{}"),
    "median_ms": ("ms", "{:.4f}"),
    "gb_per_s": ("GB/s", "{:.0f}"),
    "share_of_copy": ("of a copy", "{:.0%}"),
}


def main(argv: list[str] | None = None) -> None:
    cases = {"cases": MATRICES, "tiny": TINY_MATRICES}
    run("bench_quantize", measure, **cases, columns=COLUMNS, seconds=1.0, budget=40.0, argv=argv)


if __name__ == "__main__":
    main()
