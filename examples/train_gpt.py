"""Train one small GPT twice, with nn.Linear and with SwitchBack's INT8 layers, and compare.

    python examples/train_gpt.py
    python examples/train_gpt.py --recipe linear --recipe rowwise --steps 400
    python examples/train_gpt.py --resume runs/demo/checkpoint.pt

Every recipe starts from the same weights and reads the same data in the same order. Ctrl-C leaves a checkpoint.
"""

import gc
import math
import shlex
import signal
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from corpus import Corpus, CorpusError, load_corpus
from presets import PRESETS, RECIPES
from report import Result, environment, peak_memory_bytes, table, write_json, write_picture
from step_profile import linear_share
from training import DivergedError, Run, Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console()


class StopRequest:
    """The first Ctrl-C asks for a stop between two steps, the second interrupts at once."""

    def __init__(self) -> None:
        self.made = False
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.made = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


@app.command(help="Train one small GPT with nn.Linear and with SwitchBack's INT8 layers, and compare.")
def main(
    preset: Annotated[str | None, typer.Option(help="cpu or gpu; by default what this machine has")] = None,
    steps: Annotated[int | None, typer.Option(help="by default the preset's")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help=f"{', '.join(RECIPES)} or all; repeatable")] = None,
    seed: Annotated[int | None, typer.Option(help="of the weights and the data order; by default 0")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="peak; by default the preset's")] = None,
    compile: Annotated[bool | None, typer.Option(help="torch.compile; by default on the GPU only")] = None,
    resume: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="go on from a checkpoint, with its settings")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="by default runs/demo, or the checkpoint's directory", show_default=False),
    ] = None,
) -> None:
    if steps is not None and steps < 1:
        raise typer.BadParameter(f"steps must be at least 1, got {steps}")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise typer.BadParameter(f"learning rate must be positive, got {learning_rate}")
    flags = {
        "preset": preset,
        "recipes": None if recipe is None else expand_recipes(recipe),
        "steps": steps,
        "seed": seed,
        "learning_rate": learning_rate,
        "compile": compile,
    }
    checkpoint = None if resume is None else load_checkpoint(resume)
    settings = new_settings(flags) if checkpoint is None else resumed_settings(flags, checkpoint["settings"])
    if PRESETS[settings.preset].device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"preset {settings.preset} needs a CUDA device and there is none; try --preset cpu")
    try:
        corpus = load_corpus()
    except CorpusError as error:
        raise typer.BadParameter(str(error)) from error
    if checkpoint is not None and checkpoint["corpus_sha256"] != corpus.sha256:
        raise typer.BadParameter(f"{resume} was trained on the standard library of another Python; use that Python")
    if out is None:
        out = Path("runs/demo") if resume is None else resume.parent
    out.mkdir(parents=True, exist_ok=True)
    train_and_report(settings, corpus, checkpoint, out)


def expand_recipes(names: list[str]) -> list[str]:
    """The recipes once each, in the given order, `all` standing for every one."""
    for name in names:
        if name not in RECIPES and name != "all":
            raise typer.BadParameter(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}, all")
    expanded = [recipe for name in names for recipe in (RECIPES if name == "all" else [name])]
    return list(dict.fromkeys(expanded))


def new_settings(flags: dict[str, Any]) -> Settings:
    name = flags["preset"] or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in PRESETS:
        raise typer.BadParameter(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    defaults: dict[str, Any] = {
        "preset": name,
        "recipes": ["linear", "switchback"],
        "steps": preset.steps,
        "seed": 0,
        "learning_rate": preset.learning_rate,
        "compile": preset.compile,
    }
    return Settings(**{key: default if flags[key] is None else flags[key] for key, default in defaults.items()})


def resumed_settings(flags: dict[str, Any], saved: dict[str, Any]) -> Settings:
    for key, value in flags.items():
        if value is not None and value != saved[key]:
            raise typer.BadParameter(f"the checkpoint's run has {key} {saved[key]}, not {value}; leave that flag out")
    return Settings(**saved)


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can break the unpickler in any way
        raise typer.BadParameter(f"{path} is not a checkpoint: torch.load raised {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or "corpus_sha256" not in checkpoint:
        raise typer.BadParameter(f"{path} is not a checkpoint of this demo")
    return checkpoint


def save_checkpoint(path: Path, run: Run, results: list[Result]) -> None:
    checkpoint = {
        "settings": asdict(run.settings),
        "corpus_sha256": run.corpus.sha256,
        "results": [asdict(result) for result in results],
        "run": run.state_dict(),
    }
    # A second Ctrl-C while writing must not cost the checkpoint that is there.
    unfinished = path.with_suffix(".unfinished")
    torch.save(checkpoint, unfinished)
    unfinished.replace(path)


def train_and_report(settings: Settings, corpus: Corpus, checkpoint: dict[str, Any] | None, out: Path) -> None:
    stop = StopRequest()
    # What is left in fp32 runs alike for every recipe: in TF32 on a GPU, in fp32 proper on a CPU.
    torch.set_float32_matmul_precision("high" if PRESETS[settings.preset].device == "cuda" else "highest")
    console.print(f"{settings.preset} preset, {settings.steps} steps, {len(corpus.train):,} bytes of Python source")

    results: list[Result] = []
    recipes = settings.recipes
    if checkpoint is not None:
        results = [Result(**result) for result in checkpoint["results"]]
        recipes = recipes[recipes.index(checkpoint["run"]["recipe"]) :]
    failures = []
    for recipe in recipes:
        release_memory(settings)
        run = Run(recipe, settings, corpus)
        if checkpoint is not None:
            run.load_state_dict(checkpoint["run"])
            checkpoint = None
        try:
            if not train_with_progress(run, stop):
                stop_with_checkpoint(run, results, out / "checkpoint.pt")
            results.append(finish(run))
        except DivergedError as error:
            failures.append(f"{error}; try a lower --learning-rate than {settings.learning_rate:g}")
        finally:
            # Before the next one is built, or its peak memory would hold both.
            del run

    if results:
        console.print(table(results, settings))
        write_picture(results, settings, out / "loss.png")
        write_json(results, settings, corpus, out / "results.json")
        console.print(f"Wrote {out / 'results.json'} and {out / 'loss.png'}", soft_wrap=True)
    for failure in failures:
        console.print(failure, style="red", soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def release_memory(settings: Settings) -> None:
    """Let go of the last recipe's model, which compiled code and cycles still hold, and measure from here on."""
    if settings.compile:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def stop_with_checkpoint(run: Run, results: list[Result], path: Path) -> NoReturn:
    save_checkpoint(path, run, results)
    # The interpreter and its options as they were typed, up to the script's own arguments.
    command = [*sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1], "--resume", str(path)]
    console.print(f"Stopped {run.recipe} after {run.step} of {run.settings.steps} steps. To go on:")
    console.print(shlex.join(command), soft_wrap=True, markup=False, highlight=False)
    raise typer.Exit(130)


def train_with_progress(run: Run, stop: StopRequest) -> bool:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    tokens_per_step = run.preset.batch_size * run.preset.model.context
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(run.recipe, total=run.settings.steps, completed=run.step, loss="-", speed="-")

        def on_progress(run: Run) -> None:
            curve = run.curve
            speed = f"{tokens_per_step / curve.step_seconds[-1]:,.0f}" if curve.step_seconds else "-"
            progress.update(task, completed=run.step, loss=f"{curve.train_losses[-1]:.3f}", speed=speed)
            if curve.validation_losses and curve.validation_losses[-1][0] == run.step:
                loss = curve.validation_losses[-1][1]
                progress.console.print(f"{run.recipe}: validation loss {loss:.4f} after {run.step} steps")

        return run.train(lambda: stop.made, on_progress)


def finish(run: Run) -> Result:
    """Measure what the table shows of a run that has reached its last step."""
    peak = peak_memory_bytes(run.device)
    seconds = run.curve.step_seconds
    tokens_per_step = run.preset.batch_size * run.preset.model.context
    return Result(
        recipe=run.recipe,
        parameters=sum(p.numel() for p in run.model.parameters()),
        final_validation_loss=run.validation_loss(run.preset.final_validation_batches),
        tokens_per_second=tokens_per_step / statistics.median(seconds) if seconds else None,
        peak_memory_bytes=peak,
        curve=asdict(run.curve),
        # After the validation, since it trains on for a few steps.
        linear_share=linear_share(run.train_step, run.device),
        environment=environment(run.device),
    )


if __name__ == "__main__":
    app()
