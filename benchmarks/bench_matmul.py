"""INT8 products with fused dequantisation against cuBLAS and CUTLASS in bf16, int8 and float8.

    python benchmarks/bench_matmul.py

X is [tokens, in], W is [out, in], both Gaussian, quantised beforehand; a product is X Wᵀ in bfloat16 (int32 from
torch._int_mm, which leaves the dequantisation to do).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from measure import (
    Bench,
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
    seconds: SecondsFlag = 6.0,
    quick: QuickFlag = False,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
) -> None:
    bench = Bench("bench_matmul", device=device, seconds=seconds, quick=quick, tiny=tiny, output=output)
    bandwidth = copy_gb_per_s(bench.device, tiny=tiny)
    tables = []
    for shape in bench.choose(PRODUCTS, TINY):
        operands = random_operands(shape, bench.device)

        def build(product: Product, operands: list[tuple[Tensor, Tensor]] = operands) -> list[Callable[[], object]]:
            return [product(x, w) for x, w in operands]

        records = bench.compare(
            [Contestant(name, partial(build, product)) for name, product in CONTESTANTS.items()],
            shape=shape,
            roles=PRODUCT_ROLES.get(shape),
        )
        ours = median_ms(records, OURS)
        rows = []
        for record in records:
            tflops = ratio(shape.flop / 1e9, record["median_ms"])
            speed_up = ratio(record["median_ms"], ours)
            record |= {"tflop_per_s": tflops, "switchback_speed_up": speed_up}
            rows.append(
                (
                    record["name"],
                    text(record["median_ms"], "{:.3f}"),
                    text(tflops, "{:.0f}"),
                    text(speed_up, "{:.2f} ×"),
                )
            )
        numbers = ("ms", "TFLOP/s", "switchback's\nspeed-up over it")
        tables.append(new_table(str(shape), ("product",), numbers, rows))
    bench.finish(
        *tables,
        copy_gb_per_s=bandwidth,
        datasheet_tflop_per_s=PEAKS.get(torch.cuda.get_device_name()) if bench.device.type == "cuda" else None,
    )


if __name__ == "__main__":
    app()
