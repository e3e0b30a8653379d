"""``torch-switchback doctor``: does the library run here, and with which kernels?"""

import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import torch
import typer

from .. import SwitchBackLinear, __version__, ops
from .._text import table
from .._timing import reason_of
from ..filters import never_faster
from ..ops.int8_matmul import cpu_path
from ..tuning import MatmulConfig, user_table_path
from ..tuning._tables import served, shipped_table
from .common import JsonFlag, to_json

# One small configuration of each kernel, that fits every GPU which can run the kernel at all.
CONFIGS = (
    MatmulConfig("pointer", 64, 64, 64, 8, num_stages=3, num_warps=4),
    MatmulConfig("tma", 128, 128, 128, 8, num_stages=3, num_warps=4),
    MatmulConfig("warp_specialized", 128, 256, 128, 8, num_stages=3, num_warps=8),
)
PACKAGES = (
    "triton torchao matplotlib safetensors bitsandbytes transformers peft lightning accelerate torchtitan "
    "open_clip_torch"
).split()


class Finding(NamedTuple):
    name: str
    status: Literal["ok", "note", "failed"]
    detail: str


def doctor(json: JsonFlag = False) -> None:
    """Say what is installed, which kernels run on this GPU, and test them against the CPU, in seconds.

    The INT8 matmuls and quantizers must be bit-identical to the CPU's definition. Without a GPU the CPU's own path is
    tested. Exits with 1 if anything failed; a note is nothing to worry about.

    Examples:

    \b
      torch-switchback doctor
      CUDA_VISIBLE_DEVICES=1 torch-switchback doctor --json
    """
    findings = list(examine())
    failed = sum(finding.status == "failed" for finding in findings)
    if json:
        typer.echo(to_json([finding._asdict() for finding in findings]))
    else:
        typer.echo(table(("status", "what", "detail"), [(each.status, each.name, each.detail) for each in findings]))
        typer.echo(f"{failed} of {len(findings)} failed" if failed else "all is well")
    raise typer.Exit(1 if failed else 0)


def examine() -> Iterator[Finding]:
    """Yield what there is to say of this machine."""
    yield Finding("torch_switchback", "ok", __version__)
    yield Finding("Python", "ok", platform.python_version())
    yield Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or torch.version.hip or 'none'}")
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", version(package))
        except PackageNotFoundError:
            yield Finding(package, "note", "not installed")
    path, reason = cpu_path(inner=1024)
    yield Finding("CPU matmuls", "note" if reason else "ok", f"{path}{reason and f': {reason}'}")
    yield _test("CPU layer", _layer_on_the_cpu)
    if torch.cuda.is_available():
        yield from examine_gpu()
    else:
        yield Finding("GPU", "note", "PyTorch sees none: layers run on the CPU")


def examine_gpu() -> Iterator[Finding]:
    """Yield what there is to say of the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
    try:
        from ..kernels import launch  # noqa: F401  (imports Triton)
        from ..kernels.device import architecture
    except ImportError as error:
        yield Finding("GPU", "failed", f"{properties.name}, {memory}; the kernels need Triton: {error}")
        return
    name = architecture(device)
    reason = never_faster(name)
    yield Finding("GPU", "note" if reason else "ok", f"{properties.name}, {name}, {memory}{reason and f'; {reason}'}")
    table_name, shipped = shipped_table(name)
    own, tuned = name in (table_name, *shipped.serves), user_table_path(name).exists()
    detail = f"shipped for {table_name}" + ("" if own else f", none for {name}: `torch-switchback tune` measures it")
    yield Finding("tiles", "ok" if own or tuned else "note", detail + f"; and yours, {user_table_path(name)}" * tuned)
    for config in CONFIGS:
        if config.tma and not served(shipped, name).tma:
            yield Finding(f"kernel {config.kernel}", "note", f"not on {name}")
        else:
            yield _test(f"kernel {config.kernel}", partial(_matmul_on_the_gpu, config, device))
    for rowwise in (False, True):
        yield _test(f"GPU layer {'rowwise' if rowwise else 'global'}", partial(_layer_on_the_gpu, rowwise, device))


def _test(name: str, test: Callable[[], bool]) -> Finding:
    try:
        same = test()
    except Exception as error:  # whatever is broken here, say so and go on
        return Finding(name, "failed", reason_of(error))
    return Finding(name, "ok", "as defined") if same else Finding(name, "failed", "other results than the definition's")


def _random(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))


def _layer_on_the_cpu() -> bool:
    """Compare a forward with the same matmul of the int8 values in float64, which is exact, and run the backward."""
    layer, x = SwitchBackLinear(96, 64, bias=False), _random(80, 96)
    y = layer(x)
    (grad_weight,) = torch.autograd.grad(y.sum(), layer.weight)
    (x_int8, x_absmax), (w_int8, absmax) = ops.quantize_rowwise(x), ops.quantize_global(layer.weight.detach())
    exact = (x_int8.double() @ w_int8.double().t()) * (x_absmax[:, None].double() / 127) * (absmax.double() / 127)
    return bool(torch.allclose(y.double(), exact, rtol=1e-6, atol=0)) and bool(grad_weight.isfinite().all())


def _matmul_on_the_gpu(config: MatmulConfig, device: torch.device) -> bool:
    from ..kernels.int8_matmul import plan_int8_matmul

    (a, a_absmax), (b, b_absmax) = ops.quantize_rowwise(_random(300, 512)), ops.quantize_global(_random(264, 512))
    expected = ops.int8_matmul_mixed_dequantize(a, b.t(), a_absmax, b_absmax, None, torch.bfloat16)
    out = torch.empty_like(expected, device=device)
    args = (a.to(device), b.to(device).t(), a_absmax.to(device), b_absmax.to(device), None, out.dtype, out)
    plan_int8_matmul(*args, absmax_per_col=False, config=config)(*args)
    return torch.equal(out.cpu(), expected)


def _layer_on_the_gpu(rowwise: bool, device: torch.device) -> bool:
    """Compare output and grad_input with the CPU's, which are the same bits, three times: launches are cached."""
    layer = SwitchBackLinear(520, 264, dtype=torch.bfloat16, vector_wise_quantization=rowwise)
    x, grad_output = _random(300, 520).bfloat16(), _random(300, 264).bfloat16()

    def step(where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = x.to(where).requires_grad_()
        y = layer.to(where)(inputs)
        return y.detach().cpu(), torch.autograd.grad(y, inputs, grad_output.to(where))[0].cpu()

    expected = step(torch.device("cpu"))
    return all(all(map(torch.equal, step(device), expected)) for _ in range(3))
