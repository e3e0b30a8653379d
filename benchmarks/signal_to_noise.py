"""Signal to noise of the output and of grad_input on several kinds of data: SwitchBack's strategies beside float8.

python benchmarks/signal_to_noise.py

Runs on the CPU, whose codes and products are bit for bit the GPU's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from measure import Bench, OutputFlag, TinyFlag, new_app, new_table
from torch_switchback import SwitchBackConfig, switchback_linear

app = new_app()
SIZE = 2048

Product = Callable[[Tensor, Tensor], Tensor]  # of rows [SIZE, SIZE] and a weight [out, in] in bfloat16


def gaussian(size: int) -> Tensor:
    return torch.randn(size, size)


def layer_norm(size: int) -> Tensor:
    """Normalised rows times a gain a channel, log-normal with sigma 0.4."""
    return torch.nn.functional.layer_norm(gaussian(size), (size,)) * (0.4 * torch.randn(size)).exp()


def post_gelu(size: int) -> Tensor:
    return torch.nn.functional.gelu(gaussian(size))


def log_normal_rows(size: int) -> Tensor:
    return gaussian(size) * (2 * torch.randn(size, 1)).exp()


def student_t3(size: int) -> Tensor:
    """A normal variable over the root of a mean of three squares."""
    return gaussian(size) / torch.randn(3, size, size).square().mean(0).sqrt()


def outlier_channels(size: int) -> Tensor:
    x = gaussian(size)
    x[:, : max(1, size // 1000)] *= 50
    return x


DATA: dict[str, tuple[str, Callable[[int], Tensor]]] = {
    "Gaussian": ("output", gaussian),
    "LayerNorm's outputs": ("output", layer_norm),
    "after GELU": ("output", post_gelu),
    "tokens log-normal, σ = 2": ("grad_input", log_normal_rows),
    "Student t₃": ("output", student_t3),
    "0.1 % of channels × 50": ("output", outlier_channels),
}


def int8(product: str, config: SwitchBackConfig) -> Product:
    def compute(rows: Tensor, weight: Tensor) -> Tensor:
        if product == "output":
            return switchback_linear(rows, weight, config=config)
        x = torch.zeros(len(rows), weight.shape[1], dtype=rows.dtype, requires_grad=True)
        return torch.autograd.grad(switchback_linear(x, weight, config=config), x, rows)[0]

    return compute


def float8(product: str, *, rowwise: bool) -> Product:
    """e4m3 with one absmax for each operand, or one for each row of both; exact but for that."""

    def rounded(values: Tensor) -> Tensor:
        absmax = values.abs().amax(1, keepdim=True) if rowwise else values.abs().max()
        scale = absmax.float() / torch.finfo(torch.float8_e4m3fn).max
        return (values.float() / scale).to(torch.float8_e4m3fn).double() * scale

    def compute(rows: Tensor, weight: Tensor) -> Tensor:
        return rounded(rows) @ rounded(weight if product == "output" else weight.t()).t()

    return compute


def formats(product: str) -> dict[str, Product]:
    return {
        "int8, global": int8(product, SwitchBackConfig()),
        "int8, rowwise": int8(product, SwitchBackConfig("rowwise")),
        "float8 tensorwise": float8(product, rowwise=False),
        "float8 rowwise": float8(product, rowwise=True),
    }


def decibels(actual: Tensor, exact: Tensor) -> dict[str, float]:
    """Over the whole tensor, and what 99 % of its rows are above."""
    noise = actual.double() - exact
    rows = 20 * torch.log10(exact.norm(dim=1) / noise.norm(dim=1))
    snr = 20 * torch.log10(exact.norm() / noise.norm())
    return {"snr": round(snr.item(), 1), "worst_rows": round(rows.kthvalue(max(1, len(rows) // 100))[0].item(), 1)}


@app.command(help="Signal to noise of the output and of grad_input on several kinds of data.")
def main(tiny: TinyFlag = False, output: OutputFlag = None) -> None:
    bench = Bench("signal_to_noise", device="cpu", seconds=0.0, tiny=tiny, output=output, for_cpu=True)
    size = 64 if tiny else SIZE
    table = []
    for name, (product, draw) in DATA.items():
        rows, weight = draw(size).bfloat16(), gaussian(size).bfloat16()
        crest = rows.abs().amax(1).float() / rows.float().square().mean(1).sqrt()
        exact = rows.double() @ (weight.t() if product == "output" else weight).double()
        found = {form: decibels(compute(rows, weight), exact) for form, compute in formats(product).items()}
        labels = {"name": name, "reason": None, "product": product, "crest": round(crest.median().item(), 1)}
        bench.results.append(labels | {"decibels": found})
        table.append((name, product, f"{labels['crest']}", *(f"{each['snr']:.1f}" for each in found.values())))
    bench.report(new_table(f"dB, {size}³", ("data", "product"), ("crest", *found), table))
    bench.finish()


if __name__ == "__main__":
    app()
