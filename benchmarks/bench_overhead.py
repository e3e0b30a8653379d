"""Measure the time per training step that the CPU needs, for SwitchBackLinear and nn.Linear.

    python benchmarks/bench_overhead.py --output benchmarks/results/h200/bench_overhead.json

A step sets all gradients to None and runs forward and backward. Its time is wall time over many
steps, between two synchronizations: with few tokens the GPU waits for the CPU, so this is CPU
overhead. Both layers run in one process on the same inputs, in alternating rounds of about 20 ms. A
ratio above 1 means that SwitchBackLinear is slower.

The script uses public functions only. It measures another checkout with
``PYTHONPATH=<checkout>/src``; runs with different labels share one output file. A run takes at most
150 seconds on a GPU, compilation included.
"""

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import results_file
from torch_switchback import SwitchBackConfig, convert_to_switchback

Step = Callable[[], object]
WARM_UP_STEPS = 40
NAMES = ("linear", "switchback")
FIRST_CALLS = ((2048, 512, 768), (333, 1000, 1000), (2048, 768, 512))  # tokens, in_features, out_features


class Case(NamedTuple):
    tokens: str
    sizes: tuple[int, ...]  # token counts; each step takes the next one
    layers: int
    mode: str  # eager, compiled or graph
    widths: tuple[int, int] = (1024, 4096)


def all_cases() -> list[Case]:
    draw = random.Random(0)
    sizes: dict[str, tuple[int, ...]] = {
        "256": (256,),
        "64 to 320": tuple(draw.randint(64, 320) for _ in range(400)),
        "8192": (8192,),
        "7000 to 9000": tuple(draw.randint(7000, 9000) for _ in range(12)),
    }
    kinds = [(tokens, 1, mode) for tokens in sizes for mode in ("eager", "compiled")]
    kinds += [("256", 1, "graph"), ("8192", 1, "graph")]
    kinds += [("256", 12, "eager"), ("64 to 320", 12, "eager"), ("256", 12, "compiled")]
    return [Case(tokens, sizes[tokens], layers, mode) for tokens, layers, mode in kinds]


def tiny_cases() -> list[Case]:
    return [Case("8", (8,), 2, "eager", (32, 48)), Case("4 to 6", (4, 5, 6), 1, "compiled", (32, 48))]


def new_model(is_switchback: bool, widths: list[int], config: SwitchBackConfig, device: str) -> nn.Module:
    """Return linear layers from each of the widths to the next, in bfloat16 and with a bias."""
    layers = [nn.Linear(*pair, device=device, dtype=torch.bfloat16) for pair in itertools.pairwise(widths)]
    model = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    if is_switchback:
        fields = {"min_tokens": 0} if hasattr(config, "min_tokens") else {}  # which sources to compare with may lack
        convert_to_switchback(model, config=replace(config, **fields), module_filter_fn=lambda module, name: True)
    return model


def new_inputs(sizes: tuple[int, ...], widths: list[int], device: str) -> list[tuple[Tensor, Tensor]]:
    """Return x [tokens, in], which requires a gradient, and G [tokens, out] for each size."""
    x, grad = (torch.randn(max(sizes), width, device=device, dtype=torch.bfloat16) for width in (widths[0], widths[-1]))
    return [(x[:size].detach().requires_grad_(), grad[:size]) for size in sizes]


def new_step(model: nn.Module, inputs: list[tuple[Tensor, Tensor]], compile_options: dict[str, Any] | None) -> Step:
    """Return a training step that takes the next input at each call."""
    parameters, cycle = list(model.parameters()), itertools.cycle(inputs)
    forward = model if compile_options is None else torch.compile(model, fullgraph=True, **compile_options)

    def step() -> None:
        x, grad_output = next(cycle)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        forward(x).backward(grad_output)

    return step


def capture(step: Step) -> Step:
    """Return the replay of a CUDA graph of one step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(step: Step, count: int) -> float:
    """Return the wall time of so many steps."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return time.perf_counter() - begin


def measure(case: Case, config: SwitchBackConfig, device: str, tiny: bool) -> dict[str, Any]:
    """Return microseconds per layer and step, and the ratio of the rounds: [median, min, max]."""
    torch.manual_seed(0)
    widths = [case.widths[index % 2] for index in range(case.layers + 1)]
    inputs = new_inputs(case.sizes, widths, device)
    options = None if case.mode != "compiled" else {"backend": "eager"} if tiny else {}
    steps = {name: new_step(new_model(name == "switchback", widths, config, device), inputs, options) for name in NAMES}
    runs = {name: capture(step) if case.mode == "graph" else step for name, step in steps.items()}
    warm_up = 3 if tiny else WARM_UP_STEPS
    for run in runs.values():
        seconds(run, warm_up)
    per_step = statistics.mean(seconds(run, warm_up) / warm_up for run in runs.values())
    count = 2 if tiny else max(1, round(0.02 / per_step))  # the same steps, and so the same sizes, for both
    gc.collect()
    gc.freeze()
    rounds = [{name: seconds(run, count) / count for name, run in runs.items()} for _ in range(3 if tiny else 12)]
    gc.unfreeze()
    values = {f"{name}_us": [each[name] * 1e6 / case.layers for each in rounds] for name in runs}
    values["ratio"] = [each["switchback"] / each["linear"] for each in rounds]
    statistic = (statistics.median, min, max)
    return {name: [round(of(samples), 3) for of in statistic] for name, samples in values.items()}


def first_calls(config: SwitchBackConfig, device: str) -> list[dict[str, Any]]:
    """Time the first step of each shape, after one of nn.Linear, which loads CUDA's libraries."""
    rows = []
    for tokens, *widths in FIRST_CALLS:
        inputs = new_inputs((tokens,), widths, device)
        linear, switchback = (new_step(new_model(one, widths, config, device), inputs, None) for one in (False, True))
        seconds(linear, 1)
        rows.append(
            {"first_call": f"{tokens} × {widths[0]} → {widths[1]}", "seconds": round(seconds(switchback, 1), 3)}
        )
    return rows


def first_calls_in_new_process() -> list[dict[str, Any]]:
    """Run :func:`first_calls` in a process that finds Triton's cache empty."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--first-calls", *sys.argv[1:]]
        output = subprocess.check_output(command, env=os.environ | {"TRITON_CACHE_DIR": folder}, text=True)
    return json.loads(output.splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    """Return a row for the console."""
    if "first_call" in row:
        return f"first call, {row['first_call']}: {row['seconds']:.2f} s"
    case = f"{row['layers']:2} × {row['tokens']} tokens, {row['mode']}"
    if "error" in row:
        return f"{case:36}{row['error']}"
    median, low, high = row["ratio"]
    times = f"nn.Linear {row['linear_us'][0]:8.1f}   switchback {row['switchback_us'][0]:8.1f}"
    return f"{case:36}{times}   ratio {median:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the time per training step that the CPU needs.")
    parser.add_argument("--label", default="this checkout", help="name of the code that is measured")
    parser.add_argument("--commit", help="commit of the code that is measured")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of SwitchBackConfig as JSON; default {}")
    parser.add_argument("--output", type=Path, help="JSON file; runs with other labels in it are kept")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU; shows only that the script runs")
    parser.add_argument("--first-calls", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny runs on the CPU")
    device, config = "cpu" if arguments.tiny else "cuda", SwitchBackConfig(**arguments.config)
    if arguments.first_calls:
        print(json.dumps(first_calls(config, device)))
        return

    run, rows = results_file.provenance(device) | {"commit": arguments.commit}, []
    print(f"{arguments.label}: {run}\nµs per layer and step, median of the rounds")
    for case in tiny_cases() if arguments.tiny else all_cases():
        row = {"label": arguments.label, "layers": case.layers, "tokens": case.tokens, "mode": case.mode}
        try:
            row |= measure(case, config, device, arguments.tiny)
        except Exception as error:  # the other cases still count
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
        rows.append(row)
        print(line(row), flush=True)
        torch.compiler.reset()
    rows += [{"label": arguments.label} | row for row in first_calls_in_new_process()]
    print(*map(line, rows[-len(FIRST_CALLS) :]), sep="\n")
    if arguments.output is not None:
        results_file.save(arguments.output, run, rows)
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
