"""Train CLIP with open_clip's own program, its MLPs in SwitchBack, through bitsandbytes' old name for the layer.

    python examples/train_open_clip.py                   # colored squares and their names: half a minute on a CPU
    python examples/train_open_clip.py --model ViT-H-14  # a real model on generated data, for a GPU

Prints the command that it runs: with your data it is the same. Needs pip install 'open_clip_torch[training]>=3.3,<4'.
"""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

COLORS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black"]
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 32, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "layers": 2, "heads": 2},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help="Train CLIP with open_clip's own program and SwitchBack.")
def main(
    model: Annotated[str | None, typer.Option(help="of open_clip; by default a tiny one on colored squares")] = None,
    layer: Annotated[str, typer.Option(help="of bitsandbytes")] = "SwitchBackLinearGlobal",
    epochs: Annotated[int, typer.Option(min=1)] = 25,
    out: Annotated[Path, typer.Option(file_okay=False, help="data, log and checkpoints")] = Path("runs/open_clip"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data = tiny(out) if model is None else synthetic(model)
    name = "amp_bf16" if torch.cuda.is_available() else "fp32"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    program = ["-m", "torch_switchback.integrations.bitsandbytes", "-m", "open_clip_train.main"]
    arguments = [*program, "--use-bnb-linear", layer, "--precision", name, "--device", device, *data]
    arguments += ["--epochs", str(epochs), "--save-frequency", str(epochs), "--log-every-n-steps", "1"]
    arguments += ["--logs", str(out), "--name", "run"]
    print(shlex.join(["python", *arguments]), flush=True)
    raise typer.Exit(subprocess.run([sys.executable, *arguments]).returncode)


def tiny(path: Path) -> list[str]:
    """Eight colored squares with captions and a model of two small layers, and the flags that name them."""
    with open(path / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "caption"])
        for color in COLORS:
            image = path / f"{color}.png"
            Image.new("RGB", (32, 32), color).save(image)
            rows.writerow([image, f"a {color} square"])
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    data = ["--dataset-type", "csv", "--train-data", str(path / "pairs.csv"), "--csv-separator", ","]
    data += ["--csv-img-key", "path", "--csv-caption-key", "caption", "--workers", "0"]
    return ["--model", f"local-dir:{path}", *data, "--batch-size", "8", "--lr", "3e-3", "--warmup", "1"]


def synthetic(model: str) -> list[str]:
    """One image over and over: shows how fast a model trains, not that it learns."""
    data = ["--dataset-type", "synthetic", "--train-num-samples", "25600", "--workers", "8"]
    return ["--model", model, *data, "--batch-size", "256", "--grad-checkpointing"]


if __name__ == "__main__":
    app()
