"""Where the host's time in an eager step goes, and how long first calls take.

    python benchmarks/bench_host.py

Microseconds a call that the host takes to issue the work, with so few tokens that the device keeps up; then whole steps
with enough tokens for the device to matter; then first calls in a new process with an empty Triton cache.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from measure import (
    Bench,
    BudgetFlag,
    Contestant,
    DeviceFlag,
    Mode,
    OutputFlag,
    Record,
    SecondsFlag,
    TinyFlag,
    copies,
    find,
    new_app,
    new_table,
    ratio,
    speed_up,
    spread,
    text,
)
from peers import gradients, new_layer, random_inputs, training_step
from shapes import SMALL, TINY, Shape
from torch_switchback import ops
from torch_switchback.ops import direct

app = new_app()
FEW_TOKENS = 64
SAMPLE_MS = 2.0  # calls in a row, so few that the device's queue never fills and makes the host wait
Calls = dict[str, Callable[[], object]]

# The operations of a step with global scaling, and the modules of their launchers.
LAUNCHERS = {
    "quantize_rowwise": "quantize_rowwise",
    "quantize_global": "quantize_global",
    "quantize_transpose_by_absmax": "quantize_global",
    "int8_matmul_mixed_dequantize": "int8_matmul",
}


class Nothing(torch.autograd.Function):
    """What autograd takes by itself: returns tensors that are there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, None


def layer_calls(name: str, shape: Shape, device: torch.device) -> Calls:
    layer = new_layer(name, shape, device)
    ((x, grad),) = random_inputs(shape, 1, device)
    calls: Calls = {
        "forward, no gradient": partial(torch.no_grad()(layer), x),
        "forward": partial(layer, x),
        "forward + backward": partial(gradients, layer, x, grad),
    }
    if name != "linear":
        y = layer(x)  # alive as long as the call: what the forward saved goes with it
        # As the engine calls it: with gradients enabled it would be a backward that may be differentiated again.
        calls["backward, without autograd's engine"] = torch.no_grad()(lambda: y.grad_fn.apply(grad))
    return calls


def autograd_calls(shape: Shape, device: torch.device) -> Calls:
    layer = new_layer("linear", shape, device)
    ((x, grad),) = random_inputs(shape, 1, device)
    y = layer(x).detach()
    inputs = (x, layer.weight, layer.bias)
    return {
        "forward": lambda: Nothing.apply(*inputs, y),
        "forward + backward": lambda: torch.autograd.grad(Nothing.apply(*inputs, y), inputs, grad),
    }


def operation_calls(shape: Shape, device: torch.device) -> dict[str, Calls]:
    """For each operation its layers from the public function down to the compiled kernel's own launch."""
    x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=torch.bfloat16)
    weight = torch.randn(shape.out_features, shape.in_features, device=device, dtype=torch.bfloat16)
    (x_codes, x_absmax), (codes, absmax) = ops.quantize_rowwise(x), ops.quantize_global(weight)
    arguments: dict[str, tuple[Any, ...]] = {
        "quantize_rowwise": (x,),
        "quantize_global": (weight,),
        "quantize_transpose_by_absmax": (weight, absmax),
        "int8_matmul_mixed_dequantize": (x_codes, codes.t(), x_absmax, absmax, None, x.dtype),
    }
    return {name: levels(name, args, device) for name, args in arguments.items()}


def levels(name: str, args: tuple[Any, ...], device: torch.device) -> Calls:
    outputs = getattr(ops, name)(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    calls: Calls = {
        "public": partial(getattr(ops, name), *args),
        "unchecked, undispatched": partial(getattr(direct, name), *args),
        "its outputs' allocation": lambda: [args[0].new_empty(out.shape, dtype=out.dtype) for out in outputs],
    }
    if device.type == "cpu":
        return calls
    launcher = getattr(importlib.import_module(f"torch_switchback.kernels.{LAUNCHERS[name]}"), name)
    with recorded_launches() as launches:
        launcher(*args, *outputs)
    calls["its launcher, as at first"] = partial(launcher, *args, *outputs)
    calls["its launches, made again"] = made_again(launcher, (*args, *outputs))
    return calls | launch_calls(launches)


def made_again(launcher: Callable[..., None], args: tuple[Any, ...]) -> Callable[[], object]:
    """What a launcher launches, looked up by its arguments."""
    from torch_switchback.kernels import _replay

    def launched(*args: Any) -> tuple[()]:
        launcher(*args)
        return ()

    return lambda: _replay.run(launched, args, _replay.kind_of(args))


@contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, ...]]]:
    """(kernel, grid, args, options) of every launch inside, which run as well."""
    from torch_switchback.kernels import _launch

    launches: list[tuple[Any, ...]] = []

    def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        launches.append((kernel, grid, args, options))
        _launch.launch(kernel, grid, *args, **options)

    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("torch_switchback.kernels.") and module is not _launch and hasattr(module, "launch"):
                patches.enter_context(mock.patch.object(module, "launch", launch))
        yield launches


def launch_calls(launches: list[tuple[Any, ...]]) -> Calls:
    """An operation's launches as Triton and as the compiled kernel makes them, and descriptors."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tritons, compiled, descriptors = [], [], []
    for kernel, grid, args, options in launches:
        grid = (*grid, 1, 1)[:3]
        tritons.append(partial(kernel[grid], *args, enable_fp_fusion=False, **options))
        constants = [options[name] for name in kernel.arg_names[len(args) :]]
        compiled.append(partial(tritons[-1]()[grid], *args, *constants))
        found = [arg for arg in args if isinstance(arg, TensorDescriptor)]
        descriptors += [partial(TensorDescriptor.from_tensor, one.base, one.block_shape) for one in found]

    def all_of(calls: list[Callable[[], object]]) -> Callable[[], object]:
        return lambda: [call() for call in calls]

    calls = {
        f"launch, Triton's ({len(tritons)})": all_of(tritons),
        f"launch, compiled kernel's ({len(tritons)})": all_of(compiled),
    }
    return calls | ({f"TensorDescriptor, Triton's ({len(descriptors)})": all_of(descriptors)} if descriptors else {})


def measure_calls(bench: Bench, shape: Shape) -> None:
    few = shape._replace(tokens=min(FEW_TOKENS, shape.tokens))
    a, b = (torch.randn(64, 64, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    groups: dict[str, Calls] = {
        "nn.Linear": layer_calls("linear", few, bench.device),
        "SwitchBackLinear": layer_calls("switchback", few, bench.device),
        "an autograd.Function that does nothing": autograd_calls(few, bench.device),
        **operation_calls(few, bench.device),
        "PyTorch": {"torch.mm": partial(torch.mm, a, b), "sum over the tokens": partial(torch.sum, a, 0)},
    }
    rows = []
    for group, calls in groups.items():
        records = bench.compare(
            [Contestant(name, lambda call=call: [call], "host", SAMPLE_MS) for name, call in calls.items()],
            what="call",
            group=group,
            shape=few,
        )
        for index, record in enumerate(records):
            record["microseconds"] = ratio(record["median_ms"], 1e-3)
            times = (text(ratio(record[key], 1e-3), "{:.1f}") for key in ("median_ms", "p10_ms", "p90_ms"))
            rows.append((group if index == 0 else "", record["name"], *times))
    bench.report(new_table(f"host, {few}", ("of", "call"), ("µs", "10th\npercentile", "90th"), rows))


def measure_steps(bench: Bench, shape: Shape) -> None:
    set_bytes = 2 * shape.tokens * (shape.in_features + shape.out_features)
    inputs = random_inputs(shape, copies(set_bytes, bench.device), bench.device)
    entries: list[tuple[str, Mode]] = [
        (name, mode)
        for mode in ("eager", "one thread", "graphed", "graph")
        for name in ("linear", "switchback", "switchback-mem-efficient")
    ]
    records = bench.compare(
        [training_step(name, mode, shape, inputs, tiny=bench.tiny) for name, mode in entries], what="step", shape=shape
    )
    rows = []
    for record in records:
        record |= speed_up(record, find(records, name="linear", mode="graph" if record["mode"] == "graph" else "eager"))
        figures = text(record["median_ms"], "{:.3f}"), text(record["speed_up"], "{:.2f} ×"), spread(record)
        rows.append((record["name"], record["mode"], *figures))
    numbers = ("ms", "over nn.Linear,\neager or graph", "10th to 90th\npercentile")
    bench.report(new_table(f"{shape}, forward and backward", ("layer", "mode"), numbers, rows))


def first_calls(device: torch.device, *, tiny: bool) -> list[Record]:
    """What first_call.py prints, run in a process that finds nothing compiled."""
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run(
            [sys.executable, Path(__file__).with_name("first_call.py"), device.type, *(["--tiny"] if tiny else [])],
            env=os.environ | {"TRITON_CACHE_DIR": folder},
            capture_output=True,
            text=True,
        )
    if finished.returncode != 0:
        return [{"shape": None, "reason": finished.stderr.strip().rpartition("\n")[2][:300]}]
    return json.loads(finished.stdout.splitlines()[-1])


@app.command(help="Where the host's time in an eager step goes, and how long first calls take.")
def main(
    device: DeviceFlag = "cuda",
    seconds: SecondsFlag = 0.5,
    budget: BudgetFlag = 45.0,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
) -> None:
    bench = Bench("bench_host", device=device, seconds=seconds, budget=budget, tiny=tiny, output=output)
    for shape in bench.cases([SMALL], TINY):
        measure_calls(bench, shape)
        measure_steps(bench, shape)
    firsts = first_calls(bench.device, tiny=tiny)
    rows = [
        (
            str(Shape(*one["shape"])),
            text(one["forward_s"], "{:.3f}"),
            text(one["backward_s"], "{:.3f}"),
            text(one["compiled"], "{:d}"),
        )
        for one in firsts
        if one["shape"] is not None
    ]
    numbers = ("forward, s", "backward, s", "kernels\ncompiled")
    title = "first calls in a new process, in this order, Triton's cache empty"
    bench.report(new_table(title, ("shape",), numbers, rows), first_calls=firsts)
    bench.finish()


if __name__ == "__main__":
    app()
