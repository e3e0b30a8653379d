"""INT8 products with fused dequantisation against cuBLAS and CUTLASS in bf16, int8 and float8.

    python benchmarks/bench_matmul.py

X is [tokens, in], W is [out, in], both Gaussian, quantised beforehand; a product is X Wᵀ in bfloat16 (int32 from
torch._int_mm, which leaves the dequantisation to do). Each is timed in short turns with all others ("interleaved"), and
the main ones in turns long enough for the clocks to settle under that product alone ("sustained").
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from measure import (
    SAMPLE_MS,
    SUSTAINED_MS,
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
    find,
    new_app,
    new_table,
    ratio,
    speed_up,
    spread,
    text,
)
from shapes import PRODUCT_ROLES, PRODUCTS, TINY, Shape
from torch_switchback import ops

app = new_app()
Product = Callable[[Tensor, Tensor], Callable[[], object]]  # X and W in bf16 -> the call to time

# Dense tensor-core peaks of the datasheets, TFLOP/s (or TOPS).
PEAKS = {
    "NVIDIA H200": {"bf16": 989, "8 bit": 1979},
    "NVIDIA H100 80GB HBM3": {"bf16": 989, "8 bit": 1979},
}
FLOAT8_MAX = 448.0  # of e4m3


def bf16(x: Tensor, w: Tensor) -> Callable[[], object]:
    return partial(torch.mm, x, w.t())


def switchback(x: Tensor, w: Tensor) -> Callable[[], object]:
    (a, absmax_a), (b, absmax_b) = ops.quantize_rowwise(x), ops.quantize_global(w)
    return partial(ops.int8_matmul_mixed_dequantize, a, b.t(), absmax_a, absmax_b, None, x.dtype)


def switchback_rowwise(x: Tensor, w: Tensor) -> Callable[[], object]:
    (a, absmax_a), (b, absmax_b) = ops.quantize_rowwise(x), ops.quantize_rowwise(w)
    return partial(ops.int8_matmul_rowwise_dequantize, a, b.t(), absmax_a, absmax_b, None, x.dtype)


def int_mm(x: Tensor, w: Tensor) -> Callable[[], object]:
    a, b = ops.quantize_rowwise(x)[0], ops.quantize_rowwise(w)[0]
    return partial(torch._int_mm, a, b.t())


def to_float8(x: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3 and the fp32 factor that undoes its scaling, of absmax's shape."""
    scale = absmax.float() / FLOAT8_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def scaled_mm_tensorwise(x: Tensor, w: Tensor) -> Callable[[], object]:
    (a, scale_a), (b, scale_b) = (to_float8(t, t.abs().max()) for t in (x, w))
    return partial(torch._scaled_mm, a, b.t(), scale_a, scale_b, out_dtype=x.dtype, use_fast_accum=True)


def scaled_mm_rowwise(x: Tensor, w: Tensor) -> Callable[[], object]:
    (a, scale_a), (b, scale_b) = (to_float8(t, t.abs().amax(1, keepdim=True)) for t in (x, w))
    return partial(torch._scaled_mm, a, b.t(), scale_a, scale_b.t(), out_dtype=x.dtype, use_fast_accum=True)


OURS = "switchback"
CONTESTANTS: dict[str, Product] = {
    "bf16": bf16,
    OURS: switchback,
    "rowwise": switchback_rowwise,
    "torch._int_mm": int_mm,
    "torch._scaled_mm tensorwise": scaled_mm_tensorwise,
    "torch._scaled_mm rowwise": scaled_mm_rowwise,
}


SUSTAINED = ("bf16", OURS, "torch._scaled_mm rowwise")


def random_operands(shape: Shape, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """X [tokens, in] and W [out, in] in bf16, as many pairs as their int8 codes need to overflow the L2 cache."""
    tokens, inner, outer = shape
    pairs = copies((tokens + outer) * inner, device)
    return [
        (
            torch.randn(tokens, inner, device=device, dtype=torch.bfloat16),
            torch.randn(outer, inner, device=device, dtype=torch.bfloat16) / inner**0.5,
        )
        for _ in range(pairs)
    ]


@app.command(help="INT8 products with fused dequantisation against those of PyTorch in bf16, int8 and float8.")
def main(
    device: DeviceFlag = "cuda",
    seconds: SecondsFlag = 1.5,
    budget: BudgetFlag = 75.0,
    quick: QuickFlag = False,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
) -> None:
    bench = Bench("bench_matmul", device=device, seconds=seconds, budget=budget, quick=quick, tiny=tiny, output=output)
    bench.report(
        copy_gb_per_s=copy_gb_per_s(bench.device, tiny=tiny),
        datasheet_tflop_per_s=PEAKS.get(torch.cuda.get_device_name()) if bench.device.type == "cuda" else None,
    )
    for shape in bench.cases(PRODUCTS, TINY):
        operands = random_operands(shape, bench.device)

        def build(product: Product, operands: list[tuple[Tensor, Tensor]] = operands) -> list[Callable[[], object]]:
            return [product(x, w) for x, w in operands]

        for pace, names, sample_ms in (("interleaved", CONTESTANTS, SAMPLE_MS), ("sustained", SUSTAINED, SUSTAINED_MS)):
            records = bench.compare(
                [Contestant(name, partial(build, CONTESTANTS[name]), sample_ms=sample_ms) for name in names],
                shape=shape,
                roles=PRODUCT_ROLES.get(shape),
                pace=pace,
            )
            ours = find(records, name=OURS)
            rows = []
            for record in records:
                record["tflop_per_s"] = ratio(shape.flop / 1e9, record["median_ms"])
                over = {} if ours is None else speed_up(ours, record)
                record |= {f"switchback_{name}": value for name, value in over.items()}
                rows.append(
                    (
                        record["name"],
                        text(record["median_ms"], "{:.3f}"),
                        text(record["tflop_per_s"], "{:.0f}"),
                        text(over.get("speed_up"), "{:.2f} ×"),
                        spread(over),
                    )
                )
            numbers = ("ms", "TFLOP/s", "switchback's\nspeed-up over it", "10th to 90th\npercentile")
            bench.report(new_table(f"{shape}, {pace}", ("product",), numbers, rows))
    bench.finish()


if __name__ == "__main__":
    app()
