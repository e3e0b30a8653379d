"""When int8 all-gathers pay: bytes and seconds per step of FSDP2, computed for any GPUs and link.

    python benchmarks/scaling.py --tokens 4096
    python benchmarks/scaling.py --check benchmarks/results/h200/bench_fsdp.json

docs/scaling.md explains the model. --check compares its bytes with those that
benchmarks/bench_fsdp.py counted.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import results_file
from demo import PRESETS
from measure import print_table
from results_file import Record

PROCESSES = (2, 8, 16, 32, 64, 128, 256, 512, 1024)
BANDWIDTHS_GB = (400.0, 100.0, 25.0, 10.0)


class Model(NamedTuple):
    """Counts the elements that FSDP2 shards."""

    weights: int  # of the layers that can gather int8
    others: int  # of the same blocks: biases, norms
    root: int  # what the root holds beside the blocks, gathered once per step
    blocks: int

    @property
    def elements(self) -> int:
        return self.weights + self.others + self.root


def gpt(width: int, depth: int, vocab_size: int = 256) -> Model:
    """Return the sizes of the model in examples/gpt.py."""
    root = 2 * vocab_size * width + width
    return Model(weights=depth * 12 * width**2, others=depth * (9 + 2) * width, root=root, blocks=depth)


class Bytes(NamedTuple):
    """The larger side of a step's collectives: an all-gather's output, a reduce-scatter's input."""

    forward_gather: int
    backward_gather: int
    reduce_scatter: int


def bytes_of(model: Model, *, weight_bytes: int, other_bytes: int, grad_bytes: int) -> Bytes:
    blocks = weight_bytes * model.weights + other_bytes * model.others
    gather = blocks + other_bytes * model.root
    return Bytes(gather, blocks, grad_bytes * model.elements)


class Machine(NamedTuple):
    flops: float  # per second, that one GPU reaches in this model
    bandwidth: float  # bytes per second, as "busbw" of nccl-tests
    latency: float  # seconds per collective and doubling of the number of GPUs


def step_seconds(model: Model, moved: Bytes, machine: Machine, processes: int, tokens: int) -> float:
    """Return the time of a step. A pass takes as long as its matmuls or as its collectives."""

    def collective(size: int) -> float:
        """A ring moves (N - 1) / N of the larger side through every link."""
        transfer = size * (processes - 1) / processes / machine.bandwidth
        return transfer + model.blocks * machine.latency * math.log2(processes) if size else 0.0

    forward = 2 * model.elements * tokens / machine.flops
    backward = collective(moved.backward_gather) + collective(moved.reduce_scatter)
    return max(forward, collective(moved.forward_gather)) + max(2 * forward, backward)


def speed_up(model: Model, machine: Machine, *, processes: int, tokens: int, grad_bytes: int) -> float:
    """Return the speed-up by int8 over bf16 all-gathers if the matmuls take the same time."""
    moved = (bytes_of(model, weight_bytes=size, other_bytes=2, grad_bytes=grad_bytes) for size in (2, 1))
    bf16, int8 = (step_seconds(model, each, machine, processes, tokens) for each in moved)
    return bf16 / int8


def check(document: Record) -> bool:
    """Return whether the results of bench_fsdp have the bytes that the model says."""
    rows = []
    for result in document["results"]:
        preset = PRESETS[result["preset"]]
        high_precision = 2 if preset.bf16 else 4
        weight_bytes = 1 if result["all_gather"] == "int8" else high_precision
        sizes = {"weight_bytes": weight_bytes, "other_bytes": high_precision, "grad_bytes": 4}
        expected = bytes_of(gpt(preset.model.width, preset.model.depth), **sizes)
        for collective, size in (
            ("all-gather", expected.forward_gather + expected.backward_gather),
            ("reduce-scatter", expected.reduce_scatter),
        ):
            counted = sum(n for name, n in result["bytes_per_step"].items() if name.startswith(collective))
            names = {key: result[key] for key in ("label", "recipe", "all_gather")} | {"collective": collective}
            rows.append(names | {"counted": counted, "expected": size})
    columns = {key: (key.replace("_", "-"), "{}") for key in ("label", "recipe", "all_gather", "collective")}
    columns |= {"counted": ("counted", "{:,}"), "expected": ("by the model", "{:,}")}
    print_table("bytes per step", columns, rows)
    return all(row["counted"] == row["expected"] for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compute when int8 all-gathers pay.")
    parser.add_argument("--width", type=int, default=4096, help="of the GPT")
    parser.add_argument(
        "--depth", type=int, default=32, help="of the GPT: 32 blocks of width 4096 have 6.4 G parameters"
    )
    parser.add_argument("--tokens", type=int, help="per GPU and step; by default --batch divided by the GPUs")
    parser.add_argument("--batch", type=int, default=2**22, help="tokens per step on all GPUs together")
    parser.add_argument("--tflops", type=float, default=600, help="that one GPU reaches in this model")
    parser.add_argument("--latency-us", type=float, default=10, help="per collective and doubling of the GPUs")
    parser.add_argument("--grad-bytes", type=int, default=4, help="per element of the reduce-scatter: 4 or 2")
    parser.add_argument("--check", type=Path, metavar="RESULTS", help="compare with these results instead")
    arguments = parser.parse_args(argv)
    if arguments.check is not None:
        sys.exit(not check(results_file.load(arguments.check)))
    model = gpt(arguments.width, arguments.depth)
    rows = []
    for processes in PROCESSES:
        rows.append({"GPUs": processes, "tokens": arguments.tokens or arguments.batch // processes})
        for bandwidth in BANDWIDTHS_GB:
            machine = Machine(arguments.tflops * 1e12, bandwidth * 1e9, arguments.latency_us * 1e-6)
            sizes = {"processes": processes, "tokens": rows[-1]["tokens"], "grad_bytes": arguments.grad_bytes}
            rows[-1][str(bandwidth)] = speed_up(model, machine, **sizes)
    columns = {"GPUs": ("GPUs", "{:d}"), "tokens": ("tokens per GPU", "{:,}")}
    columns |= {str(bandwidth): (f"{bandwidth:g} GB/s", "{:.2f} ×") for bandwidth in BANDWIDTHS_GB}
    parameters = f"{model.elements / 1e9:.1f} G parameters, {arguments.tflops:g} TFLOP/s per GPU"
    print_table(f"speed-up by int8 all-gathers, computed: {parameters}", columns, rows)


if __name__ == "__main__":
    main()
