"""From how many tokens on a layer's training step is faster in int8.

    python benchmarks/bench_break_even.py
    python benchmarks/bench_break_even.py --fit benchmarks/results/h200/bench_break_even.json

Without a GPU it measures the CPU, in float32. On a GPU each step runs in a CUDA graph in bfloat16, so
that it is the GPU's time alone. Frozen steps have no weight gradient. ``--fit`` prints the rates
that come closest to a results file, which is what torch_switchback/tuning/break_even.json keeps,
and how often a choice by them is wrong.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import results_file
from measure import Bench, copies, run
from peers import RECIPES, new_layer
from results_file import Record
from shapes import Shape
from torch_switchback.analysis.layer_steps import add_comparison, random_inputs, training_step
from torch_switchback.tuning.break_even import WORTH, Rates, Work, min_tokens, work

WIDTHS = (512, 768, 1024, 1280, 2048, 4096, 8192)
TOKENS = tuple(2**exponent for exponent in range(8, 17))
CPU_WIDTHS, CPU_TOKENS = (512, 1024), (16, 128, 1024)
TRAINED = ("linear", "switchback", "switchback_int8_grad_weight")
FROZEN = ("linear", "switchback")
TURN_MS = 5.0
MAX_COPIES = 16  # of the inputs: more would take long to capture
# Steps shorter than this are left out of the fit: launches that no rate describes decide there.
LEAST_MS = 0.15


class Features(NamedTuple):
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.in_features} → {self.out_features}"


def features_of(widths: tuple[int, ...]) -> tuple[Features, ...]:
    """Return square layers of these widths, and both layers of their MLPs."""
    shapes = ((Features(width, width), Features(width, 4 * width), Features(4 * width, width)) for width in widths)
    return tuple(features for three in shapes for features in three if max(features) <= 16384)


def measure(bench: Bench, features: Features) -> list[Record]:
    tokens = (64,) if bench.tiny else CPU_TOKENS if bench.device.type == "cpu" else TOKENS
    return [measure_tokens(bench, Shape(each, *features)) for each in tokens]


def measure_tokens(bench: Bench, shape: Shape) -> Record:
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    set_bytes = 2 * shape.tokens * (shape.in_features + shape.out_features)
    count = min(MAX_COPIES, copies(set_bytes, bench.device))
    inputs = random_inputs(*shape, count, bench.device, dtype)

    def build(name: str, is_frozen: bool) -> nn.Module:
        return new_layer(name, shape, bench.device).to(dtype).requires_grad_(not is_frozen)

    steps = [(name, name, False) for name in TRAINED] + [(f"frozen {name}", name, True) for name in FROZEN]
    records = bench.compare(
        training_step(label, partial(build, name, is_frozen), inputs, mode="graph", turn_ms=TURN_MS)
        for label, name, is_frozen in steps
    )
    add_comparison(records, linear="linear")
    switchback = records[TRAINED.index("switchback")]
    row: Record = {"label": str(Features(*shape[1:])), "tokens": shape.tokens, "name": "switchback"}
    row |= {f"{record['name']}_ms": record.get("median_ms") for record in records}
    row |= {key: value for key, value in switchback.items() if key.startswith("speed_up")}
    row["reason"] = next((record["reason"] for record in records if "reason" in record), None)
    return row


class Step(NamedTuple):
    """A measured step, and what it consists of."""

    milliseconds: float
    work: Work


def steps_of(results: list[Record]) -> Iterator[tuple[str, Features, int, Step, Step]]:
    """Yield each measured int8 step with nn.Linear's: recipe, features, tokens, and both steps."""
    for row in results:
        features, tokens = Features(*map(int, row["label"].split(" → "))), row["tokens"]
        for prefix, names in (("", TRAINED[1:]), ("frozen ", FROZEN[1:])):
            trains = not prefix
            linear = Step(row[f"{prefix}linear_ms"], work(tokens, *features, None, trains=trains))
            for name in names:
                int8 = Step(row[f"{prefix}{name}_ms"], work(tokens, *features, RECIPES[name], trains=trains))
                yield prefix + name, features, tokens, linear, int8


def fit(results: list[Record]) -> Rates:
    """Return the rates with the least mean square of relative errors."""
    steps = {step for *_, linear, int8 in steps_of(results) for step in (linear, int8) if step.milliseconds > LEAST_MS}
    parts = np.array([step.work for step in steps]) / np.array([[step.milliseconds] for step in steps])
    milliseconds, *_ = np.linalg.lstsq(parts, np.ones(len(steps)), rcond=None)
    high_precision, int8, byte, kernel = milliseconds.tolist()  # of one operation, byte and kernel
    errors = parts @ milliseconds - 1
    print(f"{len(steps)} steps, root mean square error {np.sqrt(np.mean(errors**2)):.1%}")
    return Rates(1e-9 / high_precision, 1e-9 / int8, 1e-6 / byte, 1e3 * kernel, 0.0, "")


def print_choices(results: list[Record], rates: Rates) -> None:
    """Print how often a choice by these rates is wrong, for each recipe."""
    worst: dict[str, list[float]] = {}
    for name, features, tokens, linear, int8 in steps_of(results):
        recipe = RECIPES[name.removeprefix("frozen ")]
        least = min_tokens(rates, *features, recipe, trains=not name.startswith("frozen "))
        takes_int8 = least is not None and tokens >= least
        ratio = int8.milliseconds / linear.milliseconds
        # How much slower than the better one: of int8 that was chosen, or of nn.Linear that was kept.
        worst.setdefault(f"{name}, int8", [1.0]).append(ratio if takes_int8 else 1.0)
        worst.setdefault(f"{name}, kept", [1.0]).append(1.0 if takes_int8 else 1 / ratio)
    for choice, ratios in worst.items():
        wrong = sum(ratio > WORTH for ratio in ratios)
        print(f"{choice}: {wrong} of {len(ratios) - 1} lose more than 2 %, at most {max(ratios) - 1:.1%}")


COLUMNS = {
    "tokens": ("tokens", "{}"),
    "linear_ms": ("nn.Linear, ms", "{:.4f}"),
    "switchback_ms": ("switchback", "{:.4f}"),
    "switchback_int8_grad_weight_ms": ("int8 grad_weight", "{:.4f}"),
    "frozen linear_ms": ("frozen nn.Linear", "{:.4f}"),
    "frozen switchback_ms": ("frozen switchback", "{:.4f}"),
}


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--fit", type=Path, help="measure nothing, and fit the rates to this results file")
    arguments, _ = options.parse_known_args(argv)
    if arguments.fit is not None:
        results = results_file.load(arguments.fit)["results"]
        rates = fit(results)
        print(rates)
        print_choices(results, rates)
        return
    only_cpu = not torch.cuda.is_available()
    cases, tiny = features_of(CPU_WIDTHS if only_cpu else WIDTHS), (Features(32, 48),)
    run(
        "bench_break_even",
        measure,
        cases=cases,
        tiny=tiny,
        columns=COLUMNS,
        seconds=0.1,
        budget=300.0,
        only_cpu=only_cpu,
        options=options,
        argv=argv,
    )


if __name__ == "__main__":
    main()
