"""Training steps of Llama-8B and ViT-H blocks in bfloat16, and of a GPT with its optimizer.

    python benchmarks/bench_model.py

Blocks are compiled one by one, as large models are trained: all blocks of a model share one graph.
"reduce-overhead", the mode of torch.compile that runs CUDA graphs, compiles the whole model. Peak
memory is that of a step: parameters, gradients, activations and, where there is one, the
optimizer's state.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import LlamaBlock, Stack, ViTBlock, new_on
from demo import GPT, GPTConfig
from measure import SPEED_UP, SUSTAINED_MS, Bench, Candidate, Cycle, Mode, find, ratio, run, speed_up
from peers import TORCHAO, compile_in_place, convert, gradients
from results_file import Record

EAGER = ("linear", "switchback", "switchback_memory_efficient")
IN_GRAPHS = (*EAGER, "switchback_int8_grad_weight")
COMPILED = (*IN_GRAPHS, *TORCHAO)
Step = Callable[[], object]


class Model(NamedTuple):
    """A model, what it is fed, and what a step of it is."""

    name: str
    batch: int
    context: int
    dtype: torch.dtype  # of the parameters
    new: Callable[[], nn.Module]
    new_step: Callable[["Model", torch.device], Callable[[nn.Module], Step]]  # makes the inputs, shared by all
    modes: tuple[tuple[Mode, tuple[str, ...]], ...] = (("eager", EAGER), ("compiled", COMPILED))

    def __str__(self) -> str:
        return self.name


def blocks_step(model: Model, device: torch.device, width: int) -> Callable[[nn.Module], Step]:
    """Return a step of forward and backward: the gradients of the input and of all parameters."""
    shape = (model.batch, model.context, width)
    x = torch.randn(shape, device=device, dtype=model.dtype, requires_grad=True)
    grad_output = torch.randn(shape, device=device, dtype=model.dtype)
    return lambda module: partial(gradients, module, x, grad_output)


def gpt_step(model: Model, device: torch.device) -> Callable[[nn.Module], Step]:
    """Return a training step: loss, backward, AdamW; fp32 weights under bfloat16 autocast."""
    inputs, targets = (torch.randint(256, (model.batch, model.context), device=device) for _ in range(2))

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


def stack(name: str, depth: int, batch: int, context: int, width: int, block: Callable[[], nn.Module]) -> Model:
    step = partial(blocks_step, width=width)
    return Model(f"{depth} {name} blocks", batch, context, torch.bfloat16, lambda: Stack(depth, block), step)


def gpt(depth: int, batch: int, context: int, width: int, heads: int) -> Model:
    modes = (("eager", EAGER), ("compiled", COMPILED), ("reduce-overhead", IN_GRAPHS))
    name, config = f"GPT of width {width}, with optimizer", GPTConfig(context, width, depth, heads)
    return Model(name, batch, context, torch.float32, lambda: GPT(config), gpt_step, modes)


MODELS = (
    gpt(depth=8, batch=32, context=1024, width=768, heads=12),
    stack("ViT-H", 8, batch=256, context=256, width=1280, block=ViTBlock),
    stack("Llama-8B", 4, batch=4, context=4096, width=4096, block=partial(LlamaBlock, 4096)),
)
TINY_MODELS = (
    gpt(depth=2, batch=2, context=16, width=32, heads=2),
    stack("ViT-H", 1, batch=2, context=16, width=32, block=partial(ViTBlock, 32, 64, 2)),
    stack("Llama-8B", 1, batch=2, context=16, width=64, block=partial(LlamaBlock, 16, 64, 96, 4, 2)),
)


def measure(bench: Bench, model: Model) -> list[Record]:
    new_step = model.new_step(model, bench.device)

    def build(name: str, mode: Mode, notes: Record) -> Cycle:
        allocated = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
        module = convert(new_on(bench.device, model.new, model.dtype), name)
        for part in [module] if mode == "reduce-overhead" else module.blocks:
            compile_in_place(part, mode, tiny=bench.tiny)
        step = new_step(module)
        if bench.device.type == "cuda":
            step()  # compiles
            torch.cuda.reset_peak_memory_stats()
            step()
            notes["peak_bytes"] = torch.cuda.max_memory_allocated() - allocated  # above the shared inputs
        return [step]

    candidates = []
    for mode, names in model.modes:
        for name in names:
            notes: Record = {}
            candidates.append(Candidate(name, partial(build, name, mode, notes), mode, SUSTAINED_MS, notes))
    records = bench.compare(candidates, model=model.name, batch=model.batch, context=model.context)
    for record in records:
        linear = find(records, name="linear", mode=record["mode"])
        record |= speed_up(record, linear)
        record["tokens_per_s"] = ratio(model.batch * model.context * 1e3, record.get("median_ms"))
        record["peak_over_linear"] = ratio(record.get("peak_bytes"), linear and linear.get("peak_bytes"))
    return records


COLUMNS = {
    "name": ("layers", "{}"),
    "mode": ("mode", "{}"),
    "median_ms": ("ms", "{:.2f}"),
    **SPEED_UP,
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "peak_bytes": ("peak, bytes", "{:,d}"),
    "peak_over_linear": ("over nn.Linear", "{:.2f}"),
}


def main(argv: list[str] | None = None) -> None:
    run("bench_model", measure, cases=MODELS, tiny=TINY_MODELS, columns=COLUMNS, seconds=6.0, budget=150.0, argv=argv)


if __name__ == "__main__":
    main()
