"""When int8 all-gathers pay: FSDP2's bytes and seconds a step, by arithmetic, for any number of GPUs and any link.

    python benchmarks/scaling.py --tokens 4096
    python benchmarks/scaling.py --check benchmarks/results/h200/fsdp.json

docs/scaling.md explains the model. --check compares its bytes with what examples/train_fsdp.py counted.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PROCESSES = (2, 8, 16, 32, 64, 128, 256, 512, 1024)
BANDWIDTHS_GB = (400.0, 100.0, 25.0, 10.0)


@dataclass(frozen=True)
class Model:
    """What FSDP2 shards, in numbers of elements."""

    weights: int  # of the layers that can gather int8
    others: int  # of the same blocks: biases, norms
    root: int  # what the root holds beside the blocks, gathered once a step
    blocks: int

    @property
    def elements(self) -> int:
        return self.weights + self.others + self.root


def gpt(width: int, depth: int, vocab_size: int = 256) -> Model:
    """examples/gpt.py."""
    return Model(
        weights=depth * 12 * width**2,
        others=depth * (9 + 2) * width,
        root=2 * vocab_size * width + width,
        blocks=depth,
    )


@dataclass(frozen=True)
class Bytes:
    """Of a step's collectives, their larger side: what an all-gather gives, a reduce-scatter takes."""

    forward_gather: int
    backward_gather: int
    reduce_scatter: int


def bytes_of(model: Model, *, weight_bytes: int, other_bytes: int, grad_bytes: int, reshard: bool = True) -> Bytes:
    blocks = weight_bytes * model.weights + other_bytes * model.others
    return Bytes(
        forward_gather=blocks + other_bytes * model.root,
        backward_gather=blocks if reshard else 0,
        reduce_scatter=grad_bytes * model.elements,
    )


@dataclass(frozen=True)
class Machine:
    flops: float  # that one GPU reaches in this model, a second
    bandwidth: float  # bytes a second, as "busbw" of nccl-tests
    latency: float  # seconds a collective and doubling of the number of GPUs


def step_seconds(model: Model, moved: Bytes, machine: Machine, *, processes: int, tokens: int) -> float:
    """Forward and backward, each as long as its products or its collectives, whichever takes longer."""
    forward = 2 * model.elements * tokens / machine.flops
    gather = _seconds(moved.forward_gather, model.blocks, machine, processes)
    both = _seconds(moved.backward_gather, model.blocks, machine, processes)
    both += _seconds(moved.reduce_scatter, model.blocks, machine, processes)
    return max(forward, gather) + max(2 * forward, both)


def _seconds(size: int, collectives: int, machine: Machine, processes: int) -> float:
    """A ring moves (N - 1) / N of the larger side through every link."""
    if size == 0:
        return 0.0
    transfer = size * (processes - 1) / processes / machine.bandwidth
    return transfer + collectives * machine.latency * math.log2(processes)


def speed_up(model: Model, machine: Machine, *, processes: int, tokens: int, grad_bytes: int) -> float:
    """Of int8 over bf16 all-gathers, the products taking the same time."""
    bf16, int8 = (
        step_seconds(
            model,
            bytes_of(model, weight_bytes=weight_bytes, other_bytes=2, grad_bytes=grad_bytes),
            machine,
            processes=processes,
            tokens=tokens,
        )
        for weight_bytes in (2, 1)
    )
    return bf16 / int8


def check(document: dict[str, Any], console: Console) -> bool:
    """Whether a results file of examples/train_fsdp.py holds the bytes that the model says."""
    model = gpt(document["preset"]["model"]["width"], document["preset"]["model"]["depth"])
    high_precision = 2 if document["preset"]["bf16"] else 4
    table = _table("bytes a step", ("recipe", "collective"), ("counted", "by the model"))
    agrees = True
    for result in document["results"]:
        predicted = bytes_of(
            model,
            weight_bytes=1 if result["recipe"].endswith("int8") else high_precision,
            other_bytes=high_precision,
            grad_bytes=4,
            reshard=document["provenance"]["reshard_after_forward"],
        )
        for collective, expected in (
            ("all-gather", predicted.forward_gather + predicted.backward_gather),
            ("reduce-scatter", predicted.reduce_scatter),
        ):
            counted = sum(size for name, size in result["bytes_per_step"].items() if name.startswith(collective))
            agrees &= counted == expected
            table.add_row(result["recipe"], collective, f"{counted:,}", f"{expected:,}")
    console.print(table)
    return agrees


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    for header in words:
        table.add_column(header, no_wrap=True)
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def main(
    width: Annotated[int, typer.Option(help="of the GPT")] = 4096,
    depth: Annotated[int, typer.Option(help="of the GPT: 32 blocks of width 4096 are 6.4 G parameters")] = 32,
    tokens: Annotated[int | None, typer.Option(help="a GPU and step; by default --batch divided by the GPUs")] = None,
    batch: Annotated[int, typer.Option(help="tokens of all GPUs and a step")] = 2**22,
    tflops: Annotated[float, typer.Option(help="that one GPU reaches in this model")] = 600,
    latency_us: Annotated[float, typer.Option(help="a collective and doubling of the GPUs")] = 10,
    grad_bytes: Annotated[int, typer.Option(help="an element of the reduce-scatter: 4 or 2")] = 4,
    check_file: Annotated[Path | None, typer.Option("--check", exists=True, help="results to compare with")] = None,
) -> None:
    console = Console()
    if check_file is not None:
        raise typer.Exit(0 if check(json.loads(check_file.read_text()), console) else 1)
    model = gpt(width, depth)
    title = f"speed-up by int8 all-gathers, computed: {model.elements / 1e9:.1f} G parameters, {tflops:g} TFLOP/s a GPU"
    columns = tuple(f"{bandwidth:g} GB/s" for bandwidth in BANDWIDTHS_GB)
    table = _table(title, (), ("GPUs", "tokens a GPU", *columns))
    for processes in PROCESSES:
        own = tokens or batch // processes
        machines = (Machine(tflops * 1e12, bandwidth * 1e9, latency_us * 1e-6) for bandwidth in BANDWIDTHS_GB)
        cells = (
            f"{speed_up(model, machine, processes=processes, tokens=own, grad_bytes=grad_bytes):.2f} ×"
            for machine in machines
        )
        table.add_row(str(processes), f"{own:,}", *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
