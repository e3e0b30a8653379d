"""INT8 matmuls with fused dequantization against cuBLAS and CUTLASS in bf16, int8 and float8.

    python benchmarks/bench_matmul.py

X is [tokens, in], W is [out, in], both Gaussian and quantized beforehand. A matmul is X Wᵀ in
bfloat16 (int32 from torch._int_mm, which leaves out the dequantization). All are timed interleaved
in short turns, and the main ones again in turns so long that the clocks settle under that matmul
alone ("sustained").
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from measure import SHORT_MS, SUSTAINED_MS, Bench, Candidate, copies, find, ratio, run, speed_up
from results_file import Record
from shapes import MATMULS, TINY, Shape
from torch_switchback import ops

Matmul = Callable[[Tensor, Tensor], Callable[[], object]]  # from X and W in bf16 to the call that is timed


def bf16(x: Tensor, w: Tensor) -> Callable[[], object]:
    return partial(torch.mm, x, w.t())


def switchback(x: Tensor, w: Tensor) -> Callable[[], object]:
    (a, absmax_a), (b, absmax_b) = ops.quantize_rowwise(x), ops.quantize_global(w)
    return partial(ops.int8_matmul_mixed_dequantize, a, b.t(), absmax_a, absmax_b, None, x.dtype)


def rowwise(x: Tensor, w: Tensor) -> Callable[[], object]:
    (a, absmax_a), (b, absmax_b) = ops.quantize_rowwise(x), ops.quantize_rowwise(w)
    return partial(ops.int8_matmul_rowwise_dequantize, a, b.t(), absmax_a, absmax_b, None, x.dtype)


def int_mm(x: Tensor, w: Tensor) -> Callable[[], object]:
    return partial(torch._int_mm, ops.quantize_rowwise(x)[0], ops.quantize_rowwise(w)[0].t())


def to_float8(x: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in e4m3, and the fp32 factor that undoes its scaling, in absmax's shape."""
    scale = absmax.float() / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


def scaled_mm_tensorwise(x: Tensor, w: Tensor) -> Callable[[], object]:
    (a, scale_a), (b, scale_b) = (to_float8(t, t.abs().max()) for t in (x, w))
    return partial(torch._scaled_mm, a, b.t(), scale_a, scale_b, out_dtype=x.dtype, use_fast_accum=True)


def scaled_mm_rowwise(x: Tensor, w: Tensor) -> Callable[[], object]:
    (a, scale_a), (b, scale_b) = (to_float8(t, t.abs().amax(1, keepdim=True)) for t in (x, w))
    return partial(torch._scaled_mm, a, b.t(), scale_a, scale_b.t(), out_dtype=x.dtype, use_fast_accum=True)


CANDIDATES: dict[str, Matmul] = {
    "bf16": bf16,
    "switchback": switchback,
    "rowwise": rowwise,
    "torch._int_mm": int_mm,
    "torch._scaled_mm tensorwise": scaled_mm_tensorwise,
    "torch._scaled_mm rowwise": scaled_mm_rowwise,
}
SUSTAINED = ("bf16", "switchback", "torch._scaled_mm rowwise")


def measure(bench: Bench, shape: Shape) -> list[Record]:
    tokens, inner, outer = shape
    operands = [
        (
            torch.randn(tokens, inner, device=bench.device, dtype=torch.bfloat16),
            torch.randn(outer, inner, device=bench.device, dtype=torch.bfloat16) / inner**0.5,
        )
        for _ in range(copies((tokens + outer) * inner, bench.device))
    ]

    def build(matmul: Matmul) -> list[Callable[[], object]]:
        return [matmul(x, w) for x, w in operands]

    results: list[Record] = []
    for pace, names, turn_ms in (("interleaved", CANDIDATES, SHORT_MS), ("sustained", SUSTAINED, SUSTAINED_MS)):
        candidates = [Candidate(name, partial(build, CANDIDATES[name]), turn_ms=turn_ms) for name in names]
        records = bench.compare(candidates, shape=shape, pace=pace)
        ours = find(records, name="switchback")
        for record in records:
            record["tflop_per_s"] = ratio(shape.flop / 1e9, record.get("median_ms"))
            if ours is not None and "turns" in record:
                record |= {f"switchback_{key}": value for key, value in speed_up(ours, record).items()}
        results += records
    return results


COLUMNS = {
    "name": ("matmul", "{}"),
    "pace": ("pace", "{}"),
    "median_ms": ("ms", "{:.3f}"),
    "tflop_per_s": ("TFLOP/s", "{:.0f}"),
    "switchback_speed_up": ("switchback over it", "{:.2f} ×"),
    "switchback_speed_up_p10": ("10th", "{:.2f}"),
    "switchback_speed_up_p90": ("90th percentile", "{:.2f}"),
}


def main(argv: list[str] | None = None) -> None:
    run("bench_matmul", measure, cases=MATMULS, tiny=TINY, columns=COLUMNS, seconds=1.5, budget=75.0, argv=argv)


if __name__ == "__main__":
    main()
