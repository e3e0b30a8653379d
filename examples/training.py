"""Training one recipe: everything but the linear layers is the same for all of them."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corpus import Corpus
from gpt import GPT
from presets import PRESETS, RECIPES
from torch_switchback import convert_to_switchback

# Steps after a start or a resume whose time is not counted: compilation and first allocations.
UNTIMED_STEPS = 10


@dataclass(frozen=True)
class Settings:
    """All that decides a run's numbers on one machine; a checkpoint carries them."""

    preset: str
    recipes: list[str]
    steps: int
    seed: int
    learning_rate: float
    compile: bool


@dataclass
class Curve:
    """The losses and times that a run has recorded so far."""

    train_losses: list[float] = field(default_factory=list)  # one per step, nats per byte
    validation_losses: list[tuple[int, float]] = field(default_factory=list)  # (steps done, nats per byte)
    step_seconds: list[float] = field(default_factory=list)  # without UNTIMED_STEPS, validation and checkpoints


class DivergedError(Exception):
    """The training loss is no longer finite."""


def learning_rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to zero: runs that end at rest scatter little."""
    warmup = max(1, settings.steps // 10)
    progress = max(0, step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * min((step + 1) / warmup, (1 + math.cos(math.pi * progress)) / 2)


def descend(loss: Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float) -> Tensor:
    """Backward and one optimizer step, the gradient clipped to norm 1. Returns the loss, detached."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def convert(model: torch.nn.Module, recipe: str) -> None:
    """Give a model the linear layers of a recipe, in place."""
    config = RECIPES[recipe]
    if config is not None:
        # The logits need more than eight bits, and 256 outputs are too few to gain speed.
        convert_to_switchback(model, config=config, module_filter_fn=lambda module, fqn: fqn != "head")


def new_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


class Run:
    """One recipe's model, optimizer, position and curve.

    convert: puts the recipe's layers into the model, in place; by default those of presets.RECIPES.
    """

    def __init__(
        self,
        recipe: str,
        settings: Settings,
        corpus: Corpus,
        convert: Callable[[torch.nn.Module, str], object] = convert,
    ) -> None:
        self.recipe, self.settings, self.corpus = recipe, settings, corpus
        self.preset = PRESETS[settings.preset]
        self.device = torch.device(self.preset.device)
        self.step = self.first_step = 0
        self.curve = Curve()

        torch.manual_seed(settings.seed)
        self.model = GPT(self.preset.model)
        convert(self.model, recipe)
        self.model.to(self.device)
        self.optimizer = new_optimizer(self.model)
        if settings.compile:
            self.model.compile()

    def train(
        self, should_stop: Callable[[], bool], on_progress: Callable[["Run"], None], until: int | None = None
    ) -> bool:
        """Train to the last step, or to step `until`. Returns False if `should_stop` ended it before.

        Raises DivergedError.
        """
        preset, curve = self.preset, self.curve
        last_step = self.settings.steps if until is None else min(until, self.settings.steps)
        while self.step < last_step:
            if should_stop():
                return False
            until_sync = preset.steps_per_sync - self.step % preset.steps_per_sync
            steps = min(until_sync, last_step - self.step)
            is_timed = self.step - self.first_step >= UNTIMED_STEPS
            start = time.perf_counter()
            losses = torch.stack([self.train_step() for _ in range(steps)]).tolist()
            if is_timed:
                curve.step_seconds.append((time.perf_counter() - start) / steps)
            curve.train_losses += losses
            if not math.isfinite(losses[-1]):
                raise DivergedError(f"{self.recipe}: the training loss is {losses[-1]} after {self.step} steps")
            if self.step % preset.validation_interval == 0 or self.step == self.settings.steps:
                curve.validation_losses.append((self.step, self.validation_loss(preset.validation_batches)))
            on_progress(self)
        return True

    def train_step(self) -> Tensor:
        """One optimizer step on the batch that belongs to it. Returns the loss, a scalar on the device."""
        batch = self.corpus.train_batch(
            self.preset.batch_size, self.preset.model.context, seed=self.settings.seed, step=self.step
        )
        loss = descend(self._loss(*batch), self.model, self.optimizer, learning_rate_at(self.step, self.settings))
        self.step += 1
        return loss

    def validation_loss(self, batches: int) -> float:
        """Mean loss in nats a byte over held-out text, the same for every recipe."""
        return self.validation_losses(batches).mean().item()

    @torch.no_grad()
    def validation_losses(self, batches: int) -> Tensor:
        """The mean loss of each batch, [batches] float64."""
        data = self.corpus.validation_batches(batches, self.preset.batch_size, self.preset.model.context)
        return torch.stack([self._loss(*batch) for batch in data]).double()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.preset.bf16):
            return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

    def state_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "step": self.step,
            "curve": asdict(self.curve),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = self.first_step = state["step"]
        self.curve = Curve(**state["curve"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
