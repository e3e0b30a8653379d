"""Training steps of LoRA on all linear layers of the blocks, whose base is nn.Linear, frozen int8 or torchao's float8.

    python benchmarks/bench_lora.py
    python benchmarks/bench_lora.py --adapters bfloat16
    python benchmarks/bench_lora.py --only "4×2048 tokens, compiled" --variants rowwise "rowwise, cached"

A step is a forward, the loss, a backward, a fused AdamW step of the adapters and ``zero_grad``, on one
random batch. Weights are in bfloat16, and adapters in float32, as PEFT makes them by default. The models
are a Llama of Transformers and a diffusion transformer of FLUX's width (examples/dit.py). An int8 base is
frozen (``freeze_base``); "cached" ones also keep the transposed int8 values. In mode "compiled" the blocks
are compiled one by one. "reduce-overhead", the mode of torch.compile that runs CUDA graphs, compiles the
whole model: it shows the gain without CPU overhead. torchao's float8 is compiled only, and leaves out the
modulations, as it cannot multiply a single token.

``bound`` is the speed-up over nn.Linear if both matmuls of each base layer, output and grad_input, were
twice as fast, and all else took the time that it takes with nn.Linear:

    bound = step / (step - matmuls / 2)

``step`` is nn.Linear's time. ``matmuls`` is the time of these matmuls alone: ``torch.mm`` in bfloat16 on
the same shapes, interleaved with the steps. Twice the speed is what ``bench_matmul`` measures for large
matmuls. A layer whose input needs no gradient, as in the first block, has one matmul.

``weight_bytes`` are the bytes per element of the base's weights that stay between steps: 2 for
nn.Linear, and as much less for the others as they keep less memory. ``backward_bytes`` are the bytes per
element that the backward of the largest layer needs on top, with so few tokens that only its weight
counts. ``step_bytes`` is what a step needs on top of what stays, ``extra_step_bytes`` the difference to
nn.Linear's. ``first_loss`` and ``loss`` are those of the first and the last of LOSS_STEPS steps, from the
same weights.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench_real_models import Batch, Model, llama, llama_4096, training_step
from blocks import new_on
from demo import FLUX, DiT, DiTConfig, flow
from measure import SPEED_UP, SUSTAINED_MS, Bench, Candidate, Cycle, Mode, free_memory, reason_of, run, speed_up
from peers import RECIPES, TORCHAO, compile_in_place, convert
from results_file import Record
from shapes import Shape

CACHED = ", cached"
INT8 = tuple(
    f"{name}{cached}" for name in ("switchback", "rowwise", "rowwise_rotated_features") for cached in ("", CACHED)
)
FLOAT8 = "torchao float8 tensorwise"
VARIANTS = ("linear", *INT8, FLOAT8)
MATMULS = "matmuls of the base"
RANK = 16
LOSS_STEPS = 10
FEW_TOKENS = 16


class Case(NamedTuple):
    """A model, and how its blocks run."""

    model: Model
    mode: Mode

    def __str__(self) -> str:
        return f"{self.model}, {self.mode}"


class Call(NamedTuple):
    """One call of a base layer in a step."""

    shape: Shape
    has_grad_input: bool


def velocity_loss(model: nn.Module, inputs: dict[str, Tensor], velocity: Tensor) -> Tensor:
    return F.mse_loss(model(**inputs).float(), velocity.float())


def new_noisy_images(device: torch.device, config: DiTConfig, batch: int) -> Batch:
    randn = partial(torch.randn, device=device, dtype=torch.bfloat16)
    images, noise = (randn(batch, config.channels, config.image_size, config.image_size) for _ in range(2))
    times = torch.rand(batch, device=device, dtype=torch.bfloat16)
    noisy, velocity = flow(images, noise, times)
    return {"images": noisy, "text": randn(batch, config.text_tokens, config.text_width), "times": times}, velocity


def dit(config: DiTConfig, batch: int = 1) -> Model:
    name = f"DiT {config.width} × {config.double_blocks + config.single_blocks}"
    name += f", {batch}×{config.patches + config.text_tokens} tokens"
    new_batch = partial(new_noisy_images, config=config, batch=batch)
    return Model(name, partial(DiT, config), ("Block",), new_batch, velocity_loss, torch.bfloat16)


MODELS = (llama_4096(batch=4, tokens=2048), llama_4096(batch=1, tokens=2048), dit(FLUX))
TINY_MODELS = (
    llama(64, 2, batch=2, tokens=16, intermediate=96, head_width=32, kv_heads=1, dtype=torch.bfloat16),
    dit(DiTConfig(8, 4, 2, 8, 32, width=64, hidden=96, heads=2, double_blocks=1, single_blocks=1)),
)


def cases(models: Sequence[Model]) -> list[Case]:
    """Return all cases. The eager ones come first: the time that they leave is for those that compile."""
    modes: tuple[Mode, ...] = ("eager", "compiled", "reduce-overhead")
    return [Case(model, mode) for mode in modes for model in models]


def runs_in(name: str, mode: Mode) -> bool:
    return name != FLOAT8 or mode != "eager"


def base_layers(model: Model, module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks by name, without those of adapters."""
    return {
        f"{fqn}.{name}": layer
        for fqn, block in model.blocks(module).items()
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and "lora_" not in name
    }


def compiled_parts(model: Model, module: nn.Module, mode: Mode) -> list[nn.Module]:
    """Return what is compiled by itself in a mode that compiles: the whole model for CUDA graphs, else its blocks."""
    return [module] if mode == "reduce-overhead" else list(model.blocks(module).values())


def with_adapters(model: Model, name: str, device: torch.device, adapter_dtype: str) -> nn.Module:
    """Return a model with adapters on all base layers, which are as a variant has them."""
    from peft import LoraConfig, get_peft_model

    from torch_switchback.integrations.peft import freeze_base

    torch.manual_seed(0)
    module = new_on(device, model.new, model.dtype)
    targets = [fqn for fqn in base_layers(model, module) if name not in TORCHAO or "modulation" not in fqn]
    recipe = name.removesuffix(CACHED)
    config = RECIPES.get(recipe)
    if config is not None and name != recipe:
        config = replace(config, cache_quantized_weight=True)
    convert(module, name, {name: config}, lambda _, fqn: fqn in targets)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(base_layers(model, module)))
    torch.manual_seed(0)
    adapted = get_peft_model(module, lora, autocast_adapter_dtype=adapter_dtype == "float32")
    return adapted if config is None else freeze_base(adapted)


def calls_of(layers: Sequence[nn.Linear], forward: Callable[[], Tensor]) -> list[Call]:
    """Run a forward, and return the calls of some layers."""
    calls: list[Call] = []

    def record(layer: nn.Linear, args: tuple[Tensor]) -> None:
        (x,) = args
        calls.append(Call(Shape(x.shape[:-1].numel(), layer.in_features, layer.out_features), x.requires_grad))

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    forward()
    for hook in hooks:
        hook.remove()
    return calls


def new_matmuls(calls: list[Call], device: torch.device) -> Cycle:
    """Return a function that multiplies in 16 bit as the base layers do in a step of nn.Linear."""
    randn = partial(torch.randn, device=device, dtype=torch.bfloat16)
    operands = {
        shape: (randn(tokens, inner), randn(outer, inner) / inner**0.5, randn(tokens, outer))
        for shape in {call.shape for call in calls}
        for tokens, inner, outer in [shape]
    }

    def multiply() -> None:
        for shape, has_grad_input in calls:
            x, weight, grad = operands[shape]
            torch.mm(x, weight.t())
            if has_grad_input:
                torch.mm(grad, weight)

    return [multiply]


def bound(step_ms: float, matmuls_ms: float) -> float:
    return step_ms / (step_ms - matmuls_ms / 2)


def allocated(device: torch.device) -> int:
    free_memory(device)
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak(device: torch.device, call: Callable[[], object]) -> int | None:
    """Return the bytes that a call needs on top of what was allocated, at most; None on the CPU."""
    if device.type == "cpu":
        return None
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def backward_bytes(layer: nn.Linear, device: torch.device) -> float | None:
    """Return the bytes per element of a weight that the backward of its layer needs on top."""
    x = torch.randn(FEW_TOKENS, layer.in_features, device=device, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # in the first one, a layer may fill its cache
        y = layer(x)
        found = peak(device, partial(y.backward, torch.randn_like(y)))
    return None if found is None else found / (layer.in_features * layer.out_features)


def measure(bench: Bench, case: Case) -> list[Record]:
    model, mode, device, options = case.model, case.mode, bench.device, bench.options
    torch.manual_seed(0)  # one batch for both modes
    inputs, labels = model.new_batch(device)
    calls: list[Call] = []

    def build(name: str, notes: Record) -> Cycle:
        start, before = time.monotonic(), allocated(device)
        module = with_adapters(model, name, device, options.adapters).train()
        layers = list(base_layers(model, module).values())
        loss = partial(model.loss, module, inputs, labels)
        if name == "linear":
            calls.extend(calls_of(layers, loss))
        for part in compiled_parts(model, module, mode):
            compile_in_place(part, mode, tiny=bench.tiny)
        step = training_step([p for p in module.parameters() if p.requires_grad], loss, learning_rate=1e-3)
        losses = [step().item() for _ in range(LOSS_STEPS)]
        notes |= {"first_loss": losses[0], "loss": losses[-1]}
        notes["elements"] = sum(layer.in_features * layer.out_features for layer in layers)
        if device.type == "cuda":
            notes["kept_bytes"] = allocated(device) - before
        else:
            notes["kept_bytes"] = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        notes["step_bytes"] = peak(device, step)
        largest = max(layers, key=lambda layer: layer.in_features * layer.out_features)
        notes["backward_bytes"] = backward_bytes(largest, device)
        print(f"{case}: {name} is built and trained after {time.monotonic() - start:.0f} s", flush=True)
        return [step]

    def try_to_build(name: str, notes: Record) -> Cycle:
        try:
            return new_matmuls(calls, device) if name == MATMULS else build(name, notes)
        except Exception as error:
            print(f"{case}: {name} fails: {reason_of(error)}", flush=True)
            raise

    chosen = [name for name in VARIANTS if name == "linear" or name in options.variants]
    candidates = []
    linear, *others = (name for name in chosen if runs_in(name, mode))
    for name in (linear, MATMULS, *others):
        notes: Record = {}
        candidates.append(Candidate(name, partial(try_to_build, name, notes), mode, SUSTAINED_MS, notes))
    adapters = "" if options.adapters == "float32" else ", bf16 adapters"
    baseline, matmuls, *records = bench.compare(candidates, label=f"{case}{adapters}", model=f"{model}{adapters}")
    for record in (baseline, *records):
        record |= compared(record, baseline)
    if "median_ms" in baseline and "median_ms" in matmuls:
        times = baseline["median_ms"], matmuls["median_ms"]
        baseline |= {"matmuls_ms": times[1], "bound": bound(*times)}
    return [baseline, *records]


def compared(record: Record, linear: Record) -> Record:
    """Return what a record says beside nn.Linear's: its speed-up, and the bytes of its weights and steps."""
    found: Record = speed_up(record, linear)
    if "kept_bytes" in record and "kept_bytes" in linear:
        element = torch.bfloat16.itemsize
        found["weight_bytes"] = element + (record["kept_bytes"] - linear["kept_bytes"]) / record["elements"]
    if record.get("step_bytes") is not None and linear.get("step_bytes") is not None:
        found["extra_step_bytes"] = record["step_bytes"] - linear["step_bytes"]
    return found


COLUMNS = {
    "name": ("base", "{}"),
    "median_ms": ("ms", "{:.2f}"),
    **SPEED_UP,
    "bound": ("bound", "{:.2f}"),
    "matmuls_ms": ("matmuls, ms", "{:.2f}"),
    "weight_bytes": ("weight, bytes/element", "{:.2f}"),
    "backward_bytes": ("+ in backward", "{:.2f}"),
    "step_bytes": ("step, bytes", "{:,d}"),
    "extra_step_bytes": ("over nn.Linear", "{:+,d}"),
    "first_loss": ("first loss", "{:.4f}"),
    "loss": ("loss", "{:.4f}"),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="beside linear; by default all"
    )
    options.add_argument(
        "--adapters", choices=("float32", "bfloat16"), default="float32", help="their dtype (%(default)s)"
    )
    run(
        "bench_lora",
        measure,
        cases=cases(MODELS),
        tiny=cases(TINY_MODELS),
        columns=COLUMNS,
        seconds=5.0,
        budget=350.0,
        options=options,
        libraries=("transformers", "peft"),
        argv=argv,
    )


if __name__ == "__main__":
    main()
