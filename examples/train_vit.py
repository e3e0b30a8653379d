"""Train a small vision transformer on generated images, nn.Linear beside SwitchBack.

    python examples/train_vit.py                    # a minute on two CPU cores; on a GPU a ViT-H's width
    python examples/train_vit.py --recipe rowwise

Every recipe starts from the same weights and sees the same images in the same order.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from presets import RECIPES
from torch_switchback import convert_to_switchback
from training import UNTIMED_STEPS, descend
from vit import ViT, ViTConfig, gratings


@dataclass(frozen=True)
class Preset:
    device: str
    model: ViTConfig
    batch_size: int
    steps: int
    learning_rate: float


PRESETS = {
    "cpu": Preset("cpu", ViTConfig(32, 8, width=128, depth=2, heads=4), batch_size=32, steps=120, learning_rate=1e-3),
    "gpu": Preset(
        "cuda", ViTConfig(224, 14, width=1280, depth=8, heads=16), batch_size=256, steps=300, learning_rate=2e-4
    ),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help="Train a small vision transformer on generated images.")
def main(
    preset: Annotated[str | None, typer.Option(help=", ".join(PRESETS) + "; by default what the machine can")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help=", ".join(RECIPES) + "; repeatable")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="by default the preset's")] = None,
    seed: Annotated[int, typer.Option(help="of the weights and the images")] = 0,
) -> None:
    name = preset or ("gpu" if torch.cuda.is_available() else "cpu")
    recipes = recipe or ["linear", "switchback"]
    for given, known in ((name, PRESETS), *((each, RECIPES) for each in recipes)):
        if given not in known:
            raise typer.BadParameter(f"unknown name {given!r}; known: {', '.join(known)}")
    chosen = PRESETS[name]
    for each in recipes:
        train(each, chosen, steps or chosen.steps, seed)


def train(recipe: str, preset: Preset, steps: int, seed: int) -> None:
    """One recipe, and a line about it."""
    device = torch.device(preset.device)
    is_cuda = device.type == "cuda"
    torch.manual_seed(seed)
    model = ViT(preset.model).to(device)
    config = RECIPES[recipe]
    if config is not None:
        # Three channels of a patch are few features, and sixteen classes fewer.
        convert_to_switchback(model, config=config, module_filter_fn=lambda module, fqn: fqn.startswith("blocks."))
    forward = torch.compile(model) if is_cuda else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    losses, seconds = [], []
    for step in range(steps):
        images, labels = gratings(preset.model, preset.batch_size, seed=seed + step, device=device)
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=is_cuda):
            loss = F.cross_entropy(forward(images).float(), labels)
        rate = preset.learning_rate * min(1.0, (step + 1) / 20)
        losses.append(descend(loss, model, optimizer, rate).item())  # which waits for the GPU
        seconds.append(time.perf_counter() - start)
    images, labels = gratings(preset.model, 4 * preset.batch_size, seed=seed - 1, device=device)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=is_cuda):
        accuracy = (forward(images).argmax(-1) == labels).float().mean().item()
    timed = seconds[UNTIMED_STEPS:]
    speed = f", {preset.batch_size / statistics.median(timed):,.0f} images/s" if timed else ""
    print(f"{recipe}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy:.1%} of new images{speed}")


if __name__ == "__main__":
    app()
