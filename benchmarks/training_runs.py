"""The training runs that bench_training.py compares: a GPT on Python sources, a ViT on digits.

Everything but the linear layers is the same for all recipes: for each seed the initial weights, the data and their
order. Each function here runs in a process that has one device.
"""

import math
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blocks import Stack, ViTBlock
from demo import GPT, PRESETS, Corpus, Run, Settings, descend, learning_rate_at, new_optimizer
from demo import RECIPES as DEMO_RECIPES
from measure import SKIPPED, Record, reason_of
from peers import compile_in_place, convert
from torch_switchback import SwitchBackConfig

AGAIN = "linear, again"
FLOAT8 = "torchao float8 tensorwise"
OURS: dict[str, SwitchBackConfig | None] = {
    "linear": None,
    AGAIN: None,  # from weights a millionth larger: how far apart do runs of one recipe end by chance?
    **{name: DEMO_RECIPES[name] for name in ("switchback", "switchback-mem-efficient", "rowwise")},
    # The model's layers are small enough for "int8" to leave some of them at high precision.
    "all int8": SwitchBackConfig(grad_weight="int8_always"),
    "all int8, not rotated": SwitchBackConfig(grad_weight="int8_always", rotate_tokens=None),
}
RECIPES = (*OURS, FLOAT8)
TASKS = ("gpt", "digits")
SNR_SEED = 0
to_recipe = partial(convert, recipes=OURS)


class Plan(NamedTuple):
    """What all runs of one execution share."""

    device: str
    tiny: bool
    steps: int  # of the GPT
    digits_steps: int
    final_batches: int  # validation batches after the last step
    deadline: float  # of time.time(), which processes share

    @property
    def preset_name(self) -> str:
        return "tiny" if self.tiny else "gpu" if self.device == "cuda" else "cpu"

    def is_over(self) -> bool:
        return time.time() > self.deadline


class Job(NamedTuple):
    task: str  # of TASKS
    recipe: str
    seed: int


def save_corpus(corpus: Corpus, folder: Path) -> None:
    for name in ("train", "validation"):
        (folder / name).write_bytes(memoryview(getattr(corpus, name).numpy()))


@cache
def _mapped(folder: Path, name: str) -> Tensor:
    """A saved part of the corpus, which all processes map instead of reading it."""
    path = folder / name
    return torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)


def run_job(job: Job, plan: Plan, corpus_folder: Path) -> Record:
    """One run, as bench_training.json holds it. What goes wrong is a result: ``reason`` says what, else it is None."""
    start = time.perf_counter()
    record: Record = {"task": job.task, "name": job.recipe, "seed": job.seed, "reason": None}
    try:
        if job.task == "gpt":
            corpus = Corpus(_mapped(corpus_folder, "train"), _mapped(corpus_folder, "validation"), 0, "")
            record |= train_gpt(job, plan, corpus)
        else:
            record |= train_digits(job, plan)
    except Exception as error:  # a peer can fail in any way, and no run may end the others
        record["reason"] = reason_of(error)
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def train_gpt(job: Job, plan: Plan, corpus: Corpus) -> Record:
    preset = PRESETS[plan.preset_name]
    settings = Settings(plan.preset_name, [job.recipe], plan.steps, job.seed, preset.learning_rate, compile=False)
    run = Run(job.recipe, settings, corpus, convert=to_recipe)
    if job.recipe == AGAIN:
        perturb(run.model)
    for block in run.model.blocks:  # one by one: they share one graph, and so do the seeds
        compile_in_place(block, "compiled", tiny=plan.tiny)

    checkpoints = {0, settings.steps // 2 // preset.steps_per_sync * preset.steps_per_sync, settings.steps}
    snr: list[Record] = []

    def on_progress(run: Run) -> None:
        if (job.recipe, job.seed) == ("linear", SNR_SEED) and run.step in checkpoints:
            snr.extend({"step": run.step} | record for record in gradient_snr(run))

    on_progress(run)
    if not run.train(plan.is_over, on_progress):
        return {"reason": SKIPPED}
    losses = run.validation_losses(plan.final_batches)
    curve = run.curve
    return {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "tokens": settings.steps * preset.batch_size * preset.model.context,
        "final_validation_loss": losses.mean().item(),
        "final_validation_losses": rounded(losses),  # by batch, each of other text, the same for all
        "validation_losses": [(step, round(loss, 5)) for step, loss in curve.validation_losses],
        "train_losses": rounded(torch.tensor(curve.train_losses), mean_of=preset.steps_per_sync),
        "gradient_snr": snr,
    }


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-6)


def rounded(values: Tensor, mean_of: int = 1) -> list[float]:
    """So many values each as their mean, in digits that matter."""
    return [round(part.mean().item(), 5) for part in values.split(mean_of)]


def gradient_snr(run: Run) -> list[Record]:
    """The noise of the whole network's weight gradient, for each recipe.

    All take the gradient at the weights that a run has reached, on the batch that it will read next, under its
    autocast; the reference is nn.Linear's in float32.
    """
    batch = run.corpus.train_batch(
        run.preset.batch_size, run.preset.model.context, seed=run.settings.seed, step=run.step
    )
    inputs, targets = (part.to(run.device) for part in batch)

    def gradients(recipe: str, bf16: bool) -> dict[str, Tensor]:
        with run.device:
            model = GPT(run.preset.model)
        model.load_state_dict(run.model.state_dict())
        to_recipe(model, recipe)
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=bf16):
            F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    with sdpa_kernel(SDPBackend.MATH):  # others may round float32 to TF32
        exact = gradients("linear", bf16=False)
    signal = {name: gradient.double().square().sum() for name, gradient in exact.items()}
    records = []
    for recipe in RECIPES:
        if recipe == AGAIN:
            continue
        try:
            noise = {
                name: (gradient.double() - exact[name]).square().sum()
                for name, gradient in gradients(recipe, bf16=True).items()
            }
        except Exception as error:
            records.append({"name": recipe, "reason": reason_of(error)})
            continue
        matrices = {name: decibels(signal[name], noise[name]) for name in exact if exact[name].ndim == 2}
        worst = min(matrices, key=matrices.__getitem__)
        records.append(
            {
                "name": recipe,
                "reason": None,
                "snr": decibels(sum(signal.values()), sum(noise.values())),
                "worst_layer": worst,
                "worst_layer_snr": matrices[worst],
            }
        )
    return records


def decibels(signal: Tensor, noise: Tensor) -> float:
    return round((10 * torch.log10(signal / noise)).item(), 2)


class VisionTransformer(nn.Module):
    """Images [batch, 1, 8, 8] to logits [batch, 10], in patches of 2 × 2 pixels."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.position = nn.Parameter(torch.randn(16, width))
        self.stack = Stack(depth, lambda: ViTBlock(width, 4 * width, heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(16 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.stack(x)).flatten(1))


class Digits(NamedTuple):
    """scikit-learn's 1797 handwritten digits, split anew by each seed: a quarter to test on."""

    train: tuple[Tensor, Tensor]  # images [n, 1, 8, 8] float32 of mean 0 and deviation 1, classes [n]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, seed: int, device: torch.device) -> "Digits":
        from sklearn.datasets import load_digits

        pixels, classes = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
        images = ((pixels - pixels.mean()) / pixels.std()).float().view(-1, 1, 8, 8).to(device)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(device)
        classes = classes.long().to(device)
        test, train = order[: len(order) // 4], order[len(order) // 4 :]
        return cls((images[train], classes[train]), (images[test], classes[test]))

    def batches(self, seed: int, steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random training images."""
        images, classes = self.train
        draw = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(images), (size,), generator=draw).to(images.device)
            yield images[chosen], classes[chosen]


def train_digits(job: Job, plan: Plan) -> Record:
    device = torch.device(plan.device)
    width, depth, heads, batch = (64, 1, 2, 64) if plan.tiny else (512, 3, 8, 512)
    settings = Settings(plan.preset_name, [job.recipe], plan.digits_steps, job.seed, 1e-3, compile=False)
    digits = Digits.load(job.seed, device)
    torch.manual_seed(job.seed)
    model = to_recipe(VisionTransformer(width, depth, heads), job.recipe).to(device)
    if job.recipe == AGAIN:
        perturb(model)
    optimizer = new_optimizer(model)
    losses = []

    def loss_of(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(images)
        return F.cross_entropy(logits.float(), classes), logits

    for step, (images, classes) in enumerate(digits.batches(job.seed, plan.digits_steps, batch)):
        if plan.is_over():
            return {"reason": SKIPPED}
        loss, _ = loss_of(images, classes)
        losses.append(descend(loss, model, optimizer, learning_rate_at(step, settings)))
    with torch.no_grad():
        test_loss, logits = loss_of(*digits.test)
    if not math.isfinite(test_loss.item()):
        return {"reason": "the loss is not finite"}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images": plan.digits_steps * batch,
        "test_loss": test_loss.item(),
        "test_accuracy": (logits.argmax(1) == digits.test[1]).double().mean().item(),
        "train_losses": rounded(torch.stack(losses), mean_of=10),
    }
