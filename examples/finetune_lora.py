"""Train LoRA adapters over a base that is kept in int8 alone: a Llama, or a diffusion transformer.

    python examples/finetune_lora.py                  # a minute on two CPU cores; on a GPU the width of an 8B model
    python examples/finetune_lora.py --model dit      # image and text tokens, adaptive norms; on a GPU FLUX's width
    python examples/finetune_lora.py --base path/to/llama --recipe rowwise_rotated_features
    python examples/finetune_lora.py --recipe linear  # the base in 16 bit, to compare with
    python examples/finetune_lora.py --cuda-graphs    # as fast as the GPU, also where a step has few tokens

The base has random weights, unless --base names a Llama of from_pretrained.
Needs pip install 'transformers>=5,<6' peft.
"""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from corpus import load_corpus
from dit import FLUX, DiT, DiTConfig, flow
from torch_switchback import RECIPES, convert_to_switchback
from torch_switchback.integrations.peft import freeze_base
from training import UNTIMED_STEPS, descend
from vit import ViTConfig, gratings

SMALL_LLAMA = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE_LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32}
SMALL_DIT = DiTConfig(32, 3, 4, 8, 64, width=128, hidden=512, heads=4, double_blocks=1, single_blocks=2)
LARGE_DIT = replace(FLUX, channels=3)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Task(NamedTuple):
    """Hold a model and its data."""

    new_base: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]  # of a model on the batch of a step
    unit: str
    units: int  # in a batch
    learning_rate: float


def llama_task(base: str | None, device: torch.device, seed: int) -> Task:
    """Return a language model on bytes of text."""
    is_cuda = device.type == "cuda"
    batch, context = (4, 2048) if is_cuda else (8, 64)
    corpus = load_corpus()

    def new_base() -> nn.Module:
        if base is not None:
            return AutoModelForCausalLM.from_pretrained(base)
        sizes = LARGE_LLAMA | {"num_key_value_heads": 8} if is_cuda else SMALL_LLAMA
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=context, use_cache=False, **sizes))

    def loss(model: nn.Module, step: int) -> Tensor:
        ids = corpus.train_batch(batch, context, seed=seed, step=step)[0].to(device)
        return model(input_ids=ids, labels=ids).loss

    return Task(new_base, loss, "tokens", batch * context, 1e-3 if is_cuda else 1e-2)


def dit_task(device: torch.device, seed: int) -> Task:
    """Return a diffusion transformer on striped images. Stripes of one direction have the same random text."""
    is_cuda = device.type == "cuda"
    config, batch = (LARGE_DIT, 1) if is_cuda else (SMALL_DIT, 16)
    stripes = ViTConfig(config.image_size, config.patch_size, width=config.width, depth=0, heads=config.heads)
    generator = torch.Generator(device).manual_seed(seed)
    texts = torch.randn(stripes.classes, config.text_tokens, config.text_width, generator=generator, device=device)

    def loss(model: nn.Module, step: int) -> Tensor:
        images, labels = gratings(stripes, batch, seed=seed + step, device=device)
        draw = torch.Generator(device).manual_seed(seed + step)
        noise = torch.randn(images.shape, generator=draw, device=device)
        times = torch.rand(batch, generator=draw, device=device)
        noisy, velocity = flow(images, noise, times)
        dtype = next(model.parameters()).dtype
        return F.mse_loss(model(noisy.to(dtype), texts[labels].to(dtype), times).float(), velocity)

    return Task(lambda: DiT(config), loss, "images", batch, 1e-3 if is_cuda else 5e-3)


def in_blocks(module: nn.Module, fqn: str) -> bool:
    """Return whether a layer is a linear one in a block, neither an embedding nor the head."""
    return isinstance(module, nn.Linear) and re.search(r"\b(layers|blocks)\.", fqn) is not None


def with_adapters(base: nn.Module, recipe: str, saved: Path | None = None) -> nn.Module:
    """Return a model whose base is frozen as a recipe says, with new adapters or with saved ones."""
    targets = [fqn for fqn, module in base.named_modules() if in_blocks(module, fqn)]
    if recipe != "linear":
        config = replace(RECIPES[recipe], min_tokens=0)  # int8 also where a small model gains nothing
        convert_to_switchback(base, config=config, module_filter_fn=in_blocks)
    if saved is None:
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    else:
        model = PeftModel.from_pretrained(base, saved)
    return model if recipe == "linear" else freeze_base(model)


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of all that does not train."""
    frozen = (p.nbytes for p in model.parameters() if not p.requires_grad)
    return sum(frozen) + sum(buffer.nbytes for buffer in model.buffers())


@app.command(help="Train LoRA adapters over a base that is kept in int8 alone.")
def main(
    model: Annotated[str, typer.Option(help="llama or dit")] = "llama",
    base: Annotated[str | None, typer.Option(help="a Llama of from_pretrained; by default a random one")] = None,
    recipe: Annotated[str, typer.Option(help=f"linear, {', '.join(RECIPES)}")] = "rowwise",
    steps: Annotated[int, typer.Option(min=1)] = 60,
    compile: Annotated[bool, typer.Option(help="compile the blocks")] = False,
    cuda_graphs: Annotated[bool, typer.Option(help="compile the whole model, and run it as CUDA graphs")] = False,
    seed: Annotated[int, typer.Option(help="of the weights and the data")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="the adapters")] = Path("runs/lora"),
) -> None:
    for given, known in ((model, ["llama", "dit"]), (recipe, ["linear", *RECIPES])):
        if given not in known:
            raise typer.BadParameter(f"unknown name {given!r}; known: {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = llama_task(base, device, seed) if model == "llama" else dit_task(device, seed)

    def new_base() -> nn.Module:
        torch.manual_seed(seed)
        with device:
            return task.new_base().to(torch.bfloat16 if device.type == "cuda" else torch.float32)

    adapted = new_base().requires_grad_(False)
    before = base_bytes(adapted)
    adapted = with_adapters(adapted, recipe)
    print(f"base: {before / 2**20:,.1f} -> {base_bytes(adapted) / 2**20:,.1f} MiB with {recipe}")
    if cuda_graphs:
        adapted.compile(mode="reduce-overhead", dynamic=False)
    elif compile:
        for name, block in adapted.named_modules():
            if re.search(r"\b(layers|blocks)\.\d+$", name):
                block.compile()
    train(adapted, task, steps)
    adapted.save_pretrained(out)
    with torch.no_grad():
        trained = task.loss(adapted.eval(), steps).item()
        del adapted  # which would take twice the memory
        reloaded = task.loss(with_adapters(new_base(), recipe, saved=out).eval(), steps).item()
    print(f"adapters in {out}: loss {trained:.4f} on new data, {reloaded:.4f} once reloaded")


def train(model: nn.Module, task: Task, steps: int) -> None:
    """Train the adapters, and print the losses and the speed."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    losses, seconds = [], []
    for step in range(steps):
        start = time.perf_counter()
        rate = task.learning_rate * min(1.0, (step + 1) / 10)
        losses.append(descend(task.loss(model, step), model, optimizer, rate).item())  # which waits for the GPU
        seconds.append(time.perf_counter() - start)
    timed = seconds[UNTIMED_STEPS:]
    speed = f", {task.units / statistics.median(timed):,.1f} {task.unit}/s" if timed else ""
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}{speed}")


if __name__ == "__main__":
    app()
