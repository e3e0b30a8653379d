"""Signal to noise of the weight gradient Gᵀ X on every kind of data that hurts: int8, rotated and not, beside float8.

    python benchmarks/grad_weight_snr.py

Runs on the CPU, whose codes and products are bit for bit the GPU's.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from measure import Bench, OutputFlag, TinyFlag, new_app, new_table
from torch_switchback import SwitchBackConfig, switchback_linear

app = new_app()
GATE = 33.0  # dB
IN, OUT = 2048, 256
OUTLIERS = 2  # channels: 0.1 % of 2048


def gaussian(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    return torch.randn(tokens, features, generator=draw)


def layer_norm_outputs(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    """Normalised rows times a gain a channel, log-normal with sigma 0.4."""
    gain = (0.4 * torch.randn(features, generator=draw)).exp()
    return torch.nn.functional.layer_norm(gaussian(tokens, features, draw), (features,)) * gain


def post_gelu(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    return torch.nn.functional.gelu(gaussian(tokens, features, draw))


def student_t3(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    """A normal variable over the root of a mean of three squares."""
    squares = torch.stack([gaussian(tokens, features, draw).square() for _ in range(3)]).mean(0)
    return gaussian(tokens, features, draw) / squares.sqrt()


def outlier_channels(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    x = gaussian(tokens, features, draw)
    x[:, :OUTLIERS] *= 50
    return x


def log_normal_tokens(sigma: float, tokens: int, features: int, draw: torch.Generator) -> Tensor:
    """Gradients whose tokens differ in size."""
    return gaussian(tokens, features, draw) * (sigma * torch.randn(tokens, 1, generator=draw)).exp()


Distribution = Callable[[int, int, torch.Generator], Tensor]
INPUTS: dict[str, Distribution] = {
    "Gaussian": gaussian,
    "LayerNorm outputs": layer_norm_outputs,
    "post-GELU": post_gelu,
    "Student t₃": student_t3,
    f"{OUTLIERS} channels × 50": outlier_channels,
}
GRADIENTS: dict[str, Distribution] = {
    "Gaussian": gaussian,
    "tokens log-normal σ = 1": partial(log_normal_tokens, 1.0),
    "tokens log-normal σ = 2": partial(log_normal_tokens, 2.0),
}
CASES = [(x, grad, tokens) for x in INPUTS for grad in GRADIENTS for tokens in (2048, 8192)]


class Format(NamedTuple):
    product: Callable[[Tensor, Tensor], Tensor]  # of X [tokens, in] and G [tokens, out] in bfloat16
    ours: bool = False


def int8_product(x: Tensor, grad: Tensor, *, rotate_tokens: int | None) -> Tensor:
    weight = torch.zeros(grad.shape[1], x.shape[1], requires_grad=True)
    config = SwitchBackConfig(grad_weight="int8_always", rotate_tokens=rotate_tokens)
    return torch.autograd.grad(switchback_linear(x, weight, config=config), weight, grad)[0]


def float8_product(x: Tensor, grad: Tensor, *, columnwise: bool) -> Tensor:
    """e4m3 with one absmax for a tensor, or one for each of its columns; exact but for that."""

    def rounded(values: Tensor) -> Tensor:
        absmax = values.abs().amax(0) if columnwise else values.abs().max()
        scale = absmax.float() / torch.finfo(torch.float8_e4m3fn).max
        return (values.float() / scale).to(torch.float8_e4m3fn).double() * scale

    return rounded(grad).t() @ rounded(x)


FORMATS = {
    "bf16": Format(lambda x, grad: grad.t() @ x),
    "int8, not rotated": Format(partial(int8_product, rotate_tokens=None)),
    "int8, 64 tokens rotated": Format(partial(int8_product, rotate_tokens=64), ours=True),
    "int8, 128 tokens rotated": Format(partial(int8_product, rotate_tokens=128), ours=True),
    "float8 tensorwise": Format(partial(float8_product, columnwise=False)),
    "float8 columnwise": Format(partial(float8_product, columnwise=True)),
}


def measure_case(x_name: str, grad_name: str, tokens: int, in_features: int = IN) -> dict[str, float]:
    """dB by format, against float64."""
    draw = torch.Generator().manual_seed(0)
    x = INPUTS[x_name](tokens, in_features, draw).bfloat16()
    grad = GRADIENTS[grad_name](tokens, OUT, draw).bfloat16()
    exact = grad.double().t() @ x.double()
    return {
        name: 20 * torch.log10(exact.norm() / (form.product(x, grad).double() - exact).norm()).item()
        for name, form in FORMATS.items()
    }


def passes(snr: dict[str, float]) -> bool:
    """Whether what we recommend is above the gate and above float8."""
    gate = max(GATE, *(value for name, value in snr.items() if name.startswith("float8")))
    return all(snr[name] >= gate for name, form in FORMATS.items() if form.ours)


@app.command(help="Signal to noise of the weight gradient on every kind of data.")
def main(tiny: TinyFlag = False, output: OutputFlag = None) -> None:
    bench = Bench("grad_weight_snr", device="cpu", seconds=0.0, tiny=tiny, output=output, for_cpu=True)
    rows = []
    for x, grad, tokens in CASES[:1] if tiny else CASES:
        snr = measure_case(x, grad, tokens)
        bench.results.append(
            {"name": f"{x}, {grad}", "reason": None, "x": x, "grad": grad, "tokens": tokens}
            | {"snr": {name: round(value, 1) for name, value in snr.items()}, "passes": passes(snr)}
        )
        rows.append((x, grad, str(tokens), *(f"{value:.1f}" for value in snr.values())))
    bench.report(
        new_table("grad_weight, dB", ("X", "G"), ("tokens", *(name.replace(" ", "\n") for name in FORMATS)), rows)
    )
    bench.finish()


if __name__ == "__main__":
    app()
