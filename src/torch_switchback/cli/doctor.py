"""``torch-switchback doctor``: does the library run here, and with which kernels?"""

import json as json_module
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import torch
import typer

from .. import SwitchBackLinear, __version__, ops
from ..ops.int8_matmul import cpu_path
from ..tuning import MatmulConfig, user_table_path
from ..tuning._tables import KERNELS, served, shipped_table
from .common import JsonFlag

# One small configuration of each kernel, that fits every GPU which can run the kernel at all.
CONFIGS = {
    "pointer": MatmulConfig("pointer", 64, 64, 64, 8, num_stages=3, num_warps=4),
    "tma": MatmulConfig("tma", 128, 128, 128, 8, num_stages=3, num_warps=4),
    "warp_specialized": MatmulConfig("warp_specialized", 128, 256, 128, 8, num_stages=3, num_warps=8),
}
OPTIONAL = ("torchao", "matplotlib", "safetensors", "bitsandbytes", "transformers", "peft", "lightning", "accelerate")
Status = Literal["ok", "note", "failed"]


class Finding(NamedTuple):
    name: str
    status: Status
    detail: str


def doctor(json: JsonFlag = False) -> None:
    """Say what is installed, which kernels run on this GPU, and test them against the CPU, in seconds.

    The INT8 products and quantisers must give the very bits that the CPU's definition gives. Without a GPU the CPU's
    own path is tested. Exits with 1 if anything failed; a note is nothing to worry about.

    Examples:

    \b
      torch-switchback doctor
      CUDA_VISIBLE_DEVICES=1 torch-switchback doctor --json
    """
    findings = list(examine())
    failed = [finding for finding in findings if finding.status == "failed"]
    if json:
        typer.echo(json_module.dumps([finding._asdict() for finding in findings], indent=1, ensure_ascii=False))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:<6}  {finding.name:<{width}}  {finding.detail}")
        typer.echo(f"{len(failed)} of {len(findings)} failed" if failed else "all is well")
    raise typer.Exit(1 if failed else 0)


def examine() -> Iterator[Finding]:
    """What there is to say of this machine."""
    yield Finding("torch_switchback", "ok", __version__)
    yield Finding("Python", "ok", platform.python_version())
    yield Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or torch.version.hip or 'none'}")
    yield Finding("triton", *_installed("triton"))
    for package in OPTIONAL:
        yield Finding(package, *_installed(package))
    path, reason = cpu_path(inner=1024)
    yield Finding("CPU products", "note" if reason else "ok", f"{path}{reason and f': {reason}'}")
    yield _test("CPU layer", _layer_on_the_cpu)
    if not torch.cuda.is_available():
        yield Finding("GPU", "note", "PyTorch sees none: layers run on the CPU")
        return
    yield from examine_gpu()


def examine_gpu() -> Iterator[Finding]:
    """What there is to say of the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
    try:
        from ..kernels import launch  # noqa: F401  (imports Triton)
        from ..kernels.device import architecture
    except ImportError as error:
        yield Finding("GPU", "failed", f"{properties.name}, {memory}; the kernels need Triton: {error}")
        return
    name = architecture(device)
    yield Finding("GPU", "ok", f"{properties.name}, {name}, {memory}")
    table_name, table = shipped_table(name)
    own = name in (table_name, *table.serves)
    detail = f"shipped for {table_name}" + ("" if own else f", none for {name}: `torch-switchback tune` measures it")
    if user_table_path(name).exists():
        detail += f"; and yours, {user_table_path(name)}"
    yield Finding("tiles", "ok" if own or user_table_path(name).exists() else "note", detail)
    for kernel in KERNELS:
        if CONFIGS[kernel].tma and not served(table, name).tma:
            yield Finding(f"kernel {kernel}", "note", f"not on {name}")
        else:
            yield _test(f"kernel {kernel}", partial(_product_on_the_gpu, CONFIGS[kernel], device))
    yield _test("quantisers", partial(_quantisers_on_the_gpu, device))
    yield _test("GPU layer", partial(_layer_on_the_gpu, device))


def _installed(package: str) -> tuple[Status, str]:
    try:
        return "ok", version(package)
    except PackageNotFoundError:
        return "note", "not installed"


def _test(name: str, test: Callable[[], bool]) -> Finding:
    try:
        same = test()
    except Exception as error:  # whatever is broken here, say so and go on
        return Finding(name, "failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}")
    return Finding(name, "ok", "as defined") if same else Finding(name, "failed", "other results than the definition's")


def _random(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))


def _layer_on_the_cpu() -> bool:
    """A step against the same products of the codes in float64, which hold them exactly."""
    layer, x = SwitchBackLinear(96, 64, bias=False), _random(80, 96).requires_grad_()
    y = layer(x)
    _, grad_weight = torch.autograd.grad(y.sum(), (x, layer.weight))
    (x_codes, x_absmax), (codes, absmax) = ops.quantize_rowwise(x.detach()), ops.quantize_global(layer.weight.detach())
    exact = (x_codes.double() @ codes.double().t()) * (x_absmax[:, None].double() / 127) * (absmax.double() / 127)
    return bool(torch.allclose(y.double(), exact, rtol=1e-6, atol=0)) and bool(grad_weight.isfinite().all())


def _product_on_the_gpu(config: MatmulConfig, device: torch.device) -> bool:
    from ..kernels.int8_matmul import plan_int8_matmul

    (a, a_absmax), (b, b_absmax) = ops.quantize_rowwise(_random(300, 512)), ops.quantize_global(_random(264, 512))
    expected = ops.int8_matmul_mixed_dequantize(a, b.t(), a_absmax, b_absmax, None, torch.bfloat16)
    out = torch.empty_like(expected, device=device)
    operands = (a.to(device), b.to(device).t(), a_absmax.to(device), b_absmax.to(device))
    args = (*operands, None, out.dtype, out)
    plan_int8_matmul(*args, absmax_per_col=False, config=config)(*args)
    return torch.equal(out.cpu(), expected)


def _quantisers_on_the_gpu(device: torch.device) -> bool:
    x = _random(300, 520)
    quantisers = (ops.quantize_rowwise, ops.quantize_columnwise_and_transpose, ops.quantize_global_with_transpose)
    return all(
        torch.equal(ours.cpu(), expected)
        for quantise in quantisers
        for ours, expected in zip(quantise(x.to(device)), quantise(x), strict=True)
    )


def _layer_on_the_gpu(device: torch.device) -> bool:
    """Output and grad_input of a step, which are the same bits everywhere, and the third time as the first."""
    layer, x = SwitchBackLinear(512, 264, dtype=torch.bfloat16), _random(300, 512).bfloat16()
    grad_output = _random(300, 264).bfloat16()

    def step(where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        layer.to(where)
        inputs = x.to(where).requires_grad_()
        y = layer(inputs)
        (grad_input,) = torch.autograd.grad(y, inputs, grad_output.to(where))
        return y.detach().cpu(), grad_input.cpu()

    expected = step(torch.device("cpu"))
    return all(all(map(torch.equal, step(device), expected)) for _ in range(3))
