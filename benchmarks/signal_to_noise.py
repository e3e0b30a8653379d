"""Signal to noise of the three matmuls of a layer on several kinds of data: INT8 beside float8; and of frozen layers.

    python benchmarks/signal_to_noise.py

The script runs on the CPU, whose int8 values and matmuls are bit for bit the GPU's. Signal to noise
is in dB, against float64. float8 is e4m3, exact except for the rounding of the operands.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import results_file
from measure import RESULTS
from results_file import Record
from torch_switchback import SwitchBackConfig, SwitchBackLinear, switchback_linear

SIZE = 2048  # tokens and features of the output and of grad_input
IN, OUT = 2048, 256  # features of grad_weight
Draw = Callable[[int, int, torch.Generator], Tensor]  # tokens, features
Matmul = Callable[[Tensor, Tensor], Tensor]


def gaussian(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    return torch.randn(tokens, features, generator=draw)


def layer_norm(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    """Draw normalized rows times a gain per channel, log-normal with sigma 0.4."""
    gain = (0.4 * torch.randn(features, generator=draw)).exp()
    return torch.nn.functional.layer_norm(gaussian(tokens, features, draw), (features,)) * gain


def post_gelu(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    return torch.nn.functional.gelu(gaussian(tokens, features, draw))


def student_t3(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    """Draw a normal variable over the root of a mean of three squares."""
    squares = torch.stack([gaussian(tokens, features, draw).square() for _ in range(3)]).mean(0)
    return gaussian(tokens, features, draw) / squares.sqrt()


def outlier_channels(tokens: int, features: int, draw: torch.Generator) -> Tensor:
    """Draw Gaussian values of which 0.1 % of the channels are 50 times as large."""
    x = gaussian(tokens, features, draw)
    x[:, : max(1, features // 1000)] *= 50
    return x


def log_normal_tokens(sigma: float, tokens: int, features: int, draw: torch.Generator) -> Tensor:
    """Draw rows that differ in size, as gradients do."""
    return gaussian(tokens, features, draw) * (sigma * torch.randn(tokens, 1, generator=draw)).exp()


INPUTS: dict[str, Draw] = {
    "Gaussian": gaussian,
    "LayerNorm outputs": layer_norm,
    "post-GELU": post_gelu,
    "Student t₃": student_t3,
    "0.1 % of channels × 50": outlier_channels,
}
GRADIENTS: dict[str, Draw] = {
    "Gaussian": gaussian,
    "tokens log-normal σ = 1": partial(log_normal_tokens, 1.0),
    "tokens log-normal σ = 2": partial(log_normal_tokens, 2.0),
}
ROWS: list[tuple[str, str, Draw]] = [
    *(("output", name, draw) for name, draw in INPUTS.items()),
    ("grad_input", "tokens log-normal σ = 2", GRADIENTS["tokens log-normal σ = 2"]),
]

FROZEN: dict[str, tuple[Draw, Draw]] = {  # X [tokens, in], and Wᵀ [in, out]
    "Gaussian": (gaussian, gaussian),
    "0.1 % of X's channels × 50": (outlier_channels, gaussian),
    "0.1 % of W's output rows × 50": (gaussian, outlier_channels),
}
FROZEN_RECIPES = ("switchback", "rowwise", "rowwise_rotated_features")


def float8(values: Tensor, dim: int | None = None) -> Tensor:
    """Round to e4m3 with one absmax, or with one for each row (dim=1) or column (dim=0)."""
    absmax = values.abs().max() if dim is None else values.abs().amax(dim, keepdim=True)
    scale = absmax.float() / torch.finfo(torch.float8_e4m3fn).max
    return (values.float() / scale).to(torch.float8_e4m3fn).double() * scale


def int8_output(rows: Tensor, weight: Tensor, config: SwitchBackConfig) -> Tensor:
    return switchback_linear(rows, weight, config=config)


def int8_grad_input(rows: Tensor, weight: Tensor, config: SwitchBackConfig) -> Tensor:
    """Return rows @ weight.t() as the grad_input of a layer with the weight weight.t()."""
    x = torch.zeros(len(rows), weight.shape[0], dtype=rows.dtype, requires_grad=True)
    return torch.autograd.grad(switchback_linear(x, weight.t().contiguous(), config=config), x, rows)[0]


def int8_grad_weight(x: Tensor, grad: Tensor, rotate_tokens: int | None) -> Tensor:
    weight = torch.zeros(grad.shape[1], x.shape[1], requires_grad=True)
    config = SwitchBackConfig(grad_weight="int8", rotate_tokens=rotate_tokens)
    return torch.autograd.grad(switchback_linear(x, weight, config=config), weight, grad)[0]


GRAD_WEIGHT_FORMATS: dict[str, Matmul] = {
    "bf16": lambda x, grad: grad.t() @ x,
    "int8, not rotated": partial(int8_grad_weight, rotate_tokens=None),
    "int8, 64 tokens rotated": partial(int8_grad_weight, rotate_tokens=64),
    "int8, 128 tokens rotated": partial(int8_grad_weight, rotate_tokens=128),
    "float8 tensorwise": lambda x, grad: float8(grad).t() @ float8(x),
    "float8 columnwise": lambda x, grad: float8(grad, 0).t() @ float8(x, 0),
}


def row_formats(matmul: str) -> dict[str, Matmul]:
    int8 = int8_output if matmul == "output" else int8_grad_input
    return {
        "int8, global": partial(int8, config=SwitchBackConfig()),
        "int8, rowwise": partial(int8, config=SwitchBackConfig("rowwise")),
        "float8 tensorwise": lambda rows, weight: float8(rows) @ float8(weight).t(),
        "float8 rowwise": lambda rows, weight: float8(rows, 1) @ float8(weight, 1).t(),
    }


def decibels(actual: Tensor, exact: Tensor, dim: int | None = None) -> Tensor:
    noise = (actual.double() - exact).norm(dim=dim)
    return 20 * torch.log10(exact.norm(dim=dim) / noise)


def rows_snr(matmul: str, data: str, draw_rows: Draw, size: int = SIZE) -> Record:
    """Measure rows times a Gaussian weight: the whole tensor, and what 99 % of its rows exceed."""
    draw = torch.Generator().manual_seed(0)
    rows, weight = draw_rows(size, size, draw).bfloat16(), gaussian(size, size, draw).bfloat16()
    crest = rows.abs().amax(1).float() / rows.float().square().mean(1).sqrt()
    record: Record = {"matmul": matmul, "data": data, "crest": crest.median().item(), "snr": {}, "worst_rows": {}}
    exact = rows.double() @ weight.double().t()
    for name, compute in row_formats(matmul).items():
        actual = compute(rows, weight)
        record["snr"][name] = round(decibels(actual, exact).item(), 1)
        worst = decibels(actual, exact, 1).kthvalue(max(1, size // 100))[0].item()
        record["worst_rows"][name] = round(worst, 1)
    return record


def grad_weight_snr(x_name: str, grad_name: str, tokens: int, in_features: int = IN) -> Record:
    """Measure Gᵀ X of G [tokens, OUT] and X [tokens, in_features] in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    x = INPUTS[x_name](tokens, in_features, draw).bfloat16()
    grad = GRADIENTS[grad_name](tokens, OUT, draw).bfloat16()
    exact = grad.double().t() @ x.double()
    found = {name: decibels(matmul(x, grad), exact).item() for name, matmul in GRAD_WEIGHT_FORMATS.items()}
    record: Record = {"matmul": "grad_weight", "x": x_name, "grad": grad_name, "tokens": tokens}
    return record | {"snr": {name: round(value, 1) for name, value in found.items()}}


def frozen_snr(data: str, size: int = SIZE) -> list[Record]:
    """Measure output and grad_input of a layer that keeps nothing but its int8 values, with a Gaussian G."""
    draw = torch.Generator().manual_seed(0)
    draw_x, draw_weight = FROZEN[data]
    x, weight = draw_x(size, size, draw).bfloat16(), draw_weight(size, size, draw).t().bfloat16()
    grad = gaussian(size, size, draw).bfloat16()
    exact = {"frozen output": x.double() @ weight.double().t(), "frozen grad_input": grad.double() @ weight.double()}
    records: dict[str, Record] = {matmul: {"matmul": matmul, "data": data, "snr": {}} for matmul in exact}
    for name in FROZEN_RECIPES:
        layer = SwitchBackLinear(size, size, bias=False, dtype=torch.bfloat16, config=name).requires_grad_(False)
        layer.weight.copy_(weight)
        layer.prepare_for_eval()
        y = layer(x.requires_grad_())
        for matmul, actual in zip(exact, (y, *torch.autograd.grad(y, x, grad)), strict=True):
            records[matmul]["snr"][name] = round(decibels(actual.detach(), exact[matmul]).item(), 1)
    return list(records.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the signal to noise of a layer's matmuls on the CPU.")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; shows only that the script runs")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/cpu/signal_to_noise.json")
    arguments = parser.parse_args(argv)
    path = arguments.output or (None if arguments.tiny else RESULTS / "cpu" / "signal_to_noise.json")
    run = results_file.provenance("cpu")
    records = [rows_snr(*row, size=64 if arguments.tiny else SIZE) for row in ROWS]
    for data in FROZEN:
        records += frozen_snr(data, size=64 if arguments.tiny else SIZE)
    for x in INPUTS:
        for grad in GRADIENTS:
            records += [grad_weight_snr(x, grad, tokens) for tokens in ((256,) if arguments.tiny else (2048, 8192))]
    for record in records:
        print(record)
    if path is not None:
        results_file.save(path, run, records)


if __name__ == "__main__":
    main()
