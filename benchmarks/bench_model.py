"""Whole blocks in training: Llama-8B and ViT-H in bfloat16, and a GPT of width 768 with its optimizer step.

    python benchmarks/bench_model.py

Blocks are compiled one by one, as large models are trained: all blocks of a model share one graph, and a competitor
takes seconds to compile instead of minutes. --whole compiles models as one graph; so does "reduce-overhead", PyTorch's
mode of that name, which runs CUDA graphs. Peak memory is a step's: parameters, gradients, activations and, where there
is one, the optimizer's state.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from blocks import LlamaBlock, Stack, ViTBlock, new_on
from demo import GPT, GPTConfig
from measure import (
    SUSTAINED_MS,
    Bench,
    BudgetFlag,
    Contestant,
    Cycle,
    DeviceFlag,
    Mode,
    OutputFlag,
    QuickFlag,
    SecondsFlag,
    TinyFlag,
    find,
    new_app,
    new_table,
    ratio,
    speed_up,
    spread,
    text,
)
from peers import TORCHAO, compile_in_place, convert, gradients

app = new_app()
EAGER = ("linear", "switchback", "switchback-mem-efficient")
COMPILED = (*EAGER, "int8-grad-weight", *TORCHAO)
Step = Callable[[], object]


class Model(NamedTuple):
    """A model, what it is fed, and what a step of it is."""

    name: str
    batch: int
    context: int
    dtype: torch.dtype  # of the parameters
    new: Callable[[], nn.Module]
    new_step: Callable[["Model", torch.device], Callable[[nn.Module], Step]]  # makes the inputs, shared by all
    in_graphs: bool = False  # also compiled into CUDA graphs, as models are whose kernels are too short for the host

    @property
    def tokens(self) -> int:
        return self.batch * self.context


def blocks_step(model: Model, width: int, device: torch.device) -> Callable[[nn.Module], Step]:
    """Forward and backward in bfloat16: the gradients of the input and of all parameters."""
    shape = (model.batch, model.context, width)
    x = torch.randn(shape, device=device, dtype=model.dtype, requires_grad=True)
    grad_output = torch.randn(shape, device=device, dtype=model.dtype)
    return lambda module: partial(gradients, module, x, grad_output)


def gpt_step(model: Model, device: torch.device) -> Callable[[nn.Module], Step]:
    """A training step: loss, backward, AdamW. fp32 weights under bfloat16 autocast."""
    inputs = torch.randint(256, (model.batch, model.context), device=device)
    targets = torch.randint(256, (model.batch, model.context), device=device)

    def new(module: nn.Module) -> Step:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

        def step() -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = F.cross_entropy(module(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    return new


def llama(depth: int, batch: int, context: int, width: int = 4096, **sizes: int) -> Model:
    return Model(
        f"{depth} Llama-8B blocks",
        batch,
        context,
        torch.bfloat16,
        lambda: Stack(depth, lambda: LlamaBlock(context, width, **sizes)),
        lambda model, device: blocks_step(model, width, device),
    )


def vit(depth: int, batch: int, context: int, width: int = 1280, **sizes: int) -> Model:
    return Model(
        f"{depth} ViT-H blocks",
        batch,
        context,
        torch.bfloat16,
        lambda: Stack(depth, lambda: ViTBlock(width, **sizes)),
        lambda model, device: blocks_step(model, width, device),
    )


def gpt(depth: int, batch: int, context: int, width: int, heads: int) -> Model:
    config = GPTConfig(context, width, depth, heads)
    name = f"GPT of width {width}, with optimizer"
    return Model(name, batch, context, torch.float32, lambda: GPT(config), gpt_step, in_graphs=True)


MODELS = (
    gpt(depth=8, batch=32, context=1024, width=768, heads=12),
    vit(depth=8, batch=256, context=256),
    llama(depth=4, batch=4, context=4096),
)
TINY_MODELS = (
    gpt(depth=2, batch=2, context=16, width=32, heads=2),
    llama(depth=1, batch=2, context=16, width=64, hidden=96, heads=4, kv_heads=2),
    vit(depth=1, batch=2, context=16, width=32, hidden=64, heads=2),
)


@app.command(help="Whole blocks in training: Llama-8B, ViT-H, and a GPT of width 768 with its optimizer step.")
def main(
    device: DeviceFlag = "cuda",
    seconds: SecondsFlag = 6.0,
    budget: BudgetFlag = 150.0,
    quick: QuickFlag = False,
    tiny: TinyFlag = False,
    output: OutputFlag = None,
    only: Annotated[str, typer.Option("--only", help="models whose name contains this")] = "",
    peers: Annotated[bool, typer.Option(help="torchao's layers too")] = True,
    whole: Annotated[bool, typer.Option("--whole", help="compile models, not blocks: some minutes more")] = False,
) -> None:
    bench = Bench(
        "bench_model",
        device=device,
        seconds=seconds,
        budget=budget,
        quick=quick,
        tiny=tiny,
        output=output,
        only=only,
        peers=peers,
        whole=whole,
    )
    models = [model for model in (TINY_MODELS if tiny else MODELS) if only in model.name]
    for model in bench.cases(models, models):
        new_step = model.new_step(model, bench.device)

        def build(name: str, mode: Mode, model: Model = model, new_step: Callable = new_step) -> Cycle:
            module = convert(new_on(bench.device, model.new, model.dtype), name)
            for part in [module] if whole or mode == "reduce-overhead" else module.blocks:
                compile_in_place(part, mode, tiny=tiny)
            return [new_step(module)]

        entries: list[tuple[str, Mode]] = [(name, "eager") for name in EAGER]
        entries += [(name, "compiled") for name in COMPILED if peers or name not in TORCHAO]
        if model.in_graphs:
            entries += [(name, "reduce-overhead") for name in (*EAGER, "int8-grad-weight")]
        records = bench.compare(
            [Contestant(name, partial(build, name, mode), mode, SUSTAINED_MS) for name, mode in entries],
            model=model.name,
            batch=model.batch,
            context=model.context,
        )
        rows = []
        for record in records:
            baseline = find(records, name="linear", mode=record["mode"])
            peak = record["peak_bytes"]
            record |= speed_up(record, baseline)
            record["tokens_per_s"] = ratio(model.tokens * 1e3, record["median_ms"])
            record["peak_over_linear"] = ratio(peak, baseline and baseline["peak_bytes"])
            rows.append(
                (
                    record["name"],
                    record["mode"],
                    text(record["median_ms"], "{:.2f}"),
                    text(record["speed_up"], "{:.2f} ×"),
                    spread(record),
                    text(record["tokens_per_s"], "{:,.0f}"),
                    text(None if peak is None else peak / 2**30, "{:.2f}"),
                    text(record["peak_over_linear"], "{:.2f}"),
                )
            )
        numbers = ("ms", "over\nnn.Linear", "10th to 90th\npercentile", "tokens/s", "peak,\nGiB", "over\nnn.Linear")
        bench.report(new_table(f"{model.name}, {model.tokens:,d} tokens", ("layers", "mode"), numbers, rows))
    bench.finish()


if __name__ == "__main__":
    app()
