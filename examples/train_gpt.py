"""Train one small GPT with nn.Linear and with SwitchBack's INT8 layers, and compare.

    python examples/train_gpt.py
    python examples/train_gpt.py --recipe linear --recipe rowwise --steps 400
    python examples/train_gpt.py --resume runs/demo/checkpoint.pt

Every recipe starts from the same weights and reads the same data in the same order. The recipes take turns of some
steps, so that other work on the machine slows all of them. Ctrl-C leaves a checkpoint, which the next run continues.
"""

import json
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
from report import PeakMemory, Result, as_document, draw_run, environment, table
from step_profile import linear_share
from training import DivergedError, Run, Settings

CHECKPOINT = "checkpoint.pt"
SYNCS_PER_TURN = 5  # a recipe takes so many times the preset's steps_per_sync before the next one's turn
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
    fresh: Annotated[bool, typer.Option("--fresh", help="ignore a checkpoint that an earlier run has left")] = False,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="by default runs/demo, or the checkpoint's directory", show_default=False),
    ] = None,
) -> None:
    if steps is not None and steps < 1:
        raise typer.BadParameter(f"steps must be at least 1, got {steps}")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise typer.BadParameter(f"learning rate must be positive, got {learning_rate}")
    if fresh and resume is not None:
        raise typer.BadParameter("--fresh ignores checkpoints, --resume goes on from one; leave one out")
    flags = {
        "preset": preset,
        "recipes": None if recipe is None else expand_recipes(recipe),
        "steps": steps,
        "seed": seed,
        "learning_rate": learning_rate,
        "compile": compile,
    }
    if out is None:
        out = Path("runs/demo") if resume is None else resume.parent
    left = out / CHECKPOINT
    path = resume or (left if left.exists() and not fresh else None)
    try:
        corpus = load_corpus()
    except CorpusError as error:
        raise typer.BadParameter(str(error)) from error
    checkpoint = None
    if path is not None:
        try:
            checkpoint = load_checkpoint(path, flags, corpus)
        except typer.BadParameter as error:
            if resume is None:
                raise typer.BadParameter(f"{path} is left of an earlier run: {error}; --fresh ignores it") from error
            raise
        if resume is None and not go_on(path, checkpoint):
            checkpoint = None
    settings = new_settings(flags) if checkpoint is None else Settings(**checkpoint["settings"])
    if PRESETS[settings.preset].device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"preset {settings.preset} needs a CUDA device and there is none; try --preset cpu")
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


def load_checkpoint(path: Path, flags: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """Return a checkpoint that save_checkpoint wrote. Raises typer.BadParameter if flags or corpus differ from its."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can break the unpickler in any way
        raise typer.BadParameter(f"{path} is not a checkpoint: torch.load raised {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"settings", "corpus_sha256", "failures", "runs"}:
        raise typer.BadParameter(f"{path} is not a checkpoint of this demo")
    for key, value in flags.items():
        saved = checkpoint["settings"][key]
        if value is not None and value != saved:
            raise typer.BadParameter(f"the checkpoint's run has {key} {saved}, not {value}; leave that flag out")
    if checkpoint["corpus_sha256"] != corpus.sha256:
        raise typer.BadParameter(f"{path} was trained on the standard library of another Python; use that Python")
    return checkpoint


def go_on(path: Path, checkpoint: dict[str, Any]) -> bool:
    """Ask whether to go on from a checkpoint that is there. Without a terminal, say that the run goes on from it."""
    settings = checkpoint["settings"]
    steps = ", ".join(f"{recipe} after {state['step']}" for recipe, state in checkpoint["runs"].items())
    found = f"{path} holds a run of {settings['steps']} steps, preset {settings['preset']}: {steps}"
    if is_interactive():
        return typer.confirm(f"{found}. Go on from it?", default=True)
    console.print(f"{found}. Going on from it; --fresh starts again.", soft_wrap=True, highlight=False)
    return True


def is_interactive() -> bool:
    return sys.stdin.isatty() and console.is_terminal


def save_checkpoint(path: Path, runs: dict[str, Run], failures: dict[str, str]) -> None:
    run = next(iter(runs.values()))
    checkpoint = {
        "settings": asdict(run.settings),
        "corpus_sha256": run.corpus.sha256,
        "failures": failures,
        "runs": {recipe: run.state_dict() for recipe, run in runs.items()},
    }
    # A second Ctrl-C while writing must not cost the checkpoint that is there.
    unfinished = path.with_suffix(".unfinished")
    torch.save(checkpoint, unfinished)
    unfinished.replace(path)


def train_and_report(settings: Settings, corpus: Corpus, checkpoint: dict[str, Any] | None, out: Path) -> None:
    stop = StopRequest()
    # What is left in fp32 runs alike for every recipe: in TF32 on a GPU, in fp32 proper on a CPU.
    torch.set_float32_matmul_precision("high" if PRESETS[settings.preset].device == "cuda" else "highest")
    torch._dynamo.config.recompile_limit = 64  # the recipes share the code of their modules
    console.print(f"{settings.preset} preset, {settings.steps} steps, {len(corpus.train):,} bytes of Python source")

    failures: dict[str, str] = {} if checkpoint is None else checkpoint["failures"]
    memory = {recipe: PeakMemory() for recipe in settings.recipes}
    runs = {}
    for recipe in settings.recipes:
        if recipe not in failures:
            with memory[recipe].measured():
                runs[recipe] = Run(recipe, settings, corpus)
                if checkpoint is not None:
                    runs[recipe].load_state_dict(checkpoint["runs"][recipe])
    del checkpoint
    if not train_in_turns(runs, memory, failures, stop):
        stop_with_checkpoint(runs, failures, out / CHECKPOINT)

    results = [finish(run, memory[recipe].peak) for recipe, run in runs.items()]
    if results:
        document = as_document(results, settings, corpus)
        console.print(table(results, settings))
        draw_run(document).savefig(out / "loss.png", dpi=150)
        (out / "results.json").write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"Wrote {out / 'results.json'} and {out / 'loss.png'}", soft_wrap=True)
    (out / CHECKPOINT).unlink(missing_ok=True)  # of a run that has ended
    for failure in failures.values():
        console.print(failure, style="red", soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def stop_with_checkpoint(runs: dict[str, Run], failures: dict[str, str], path: Path) -> NoReturn:
    save_checkpoint(path, runs, failures)
    # The interpreter and its options as they were typed, up to the script's own arguments.
    command = [*sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1], "--resume", str(path)]
    steps = ", ".join(f"{recipe} after {run.step}" for recipe, run in runs.items())
    console.print(f"Stopped: {steps} steps. To go on:", soft_wrap=True)
    console.print(shlex.join(command), soft_wrap=True, markup=False, highlight=False)
    raise typer.Exit(130)


def train_in_turns(
    runs: dict[str, Run], memory: dict[str, PeakMemory], failures: dict[str, str], stop: StopRequest
) -> bool:
    """Train every run to its last step, a few steps of each in turn. Returns False if `stop` ended it before.

    A run that diverges moves from runs to failures.
    """
    first = next(iter(runs.values()))
    settings, turn = first.settings, SYNCS_PER_TURN * first.preset.steps_per_sync
    tokens_per_step = first.preset.batch_size * first.preset.model.context
    width = max(map(len, runs))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=settings.steps * len(runs), loss="-", speed="-")

        def on_progress(run: Run) -> None:
            curve = run.curve
            progress.update(
                task,
                description=f"{run.recipe:{width}}",
                completed=sum(each.step for each in runs.values()),
                total=settings.steps * len(runs),
                loss=f"{curve.train_losses[-1]:.3f}",
                speed=f"{tokens_per_step / curve.step_seconds[-1]:,.0f}" if curve.step_seconds else "-",
            )
            if curve.validation_losses and curve.validation_losses[-1][0] == run.step:
                loss = curve.validation_losses[-1][1]
                progress.console.print(f"{run.recipe}: validation loss {loss:.4f} after {run.step} steps")

        while unfinished := [run for run in runs.values() if run.step < settings.steps]:
            run = min(unfinished, key=lambda run: run.step // turn)
            try:
                with memory[run.recipe].measured():
                    if not run.train(lambda: stop.made, on_progress, until=(run.step // turn + 1) * turn):
                        return False
            except DivergedError as error:
                failures[run.recipe] = f"{error}; try a lower --learning-rate than {settings.learning_rate:g}"
                del runs[run.recipe]
    return True


def finish(run: Run, peak: int | None) -> Result:
    """Return what the table shows of a run that has reached its last step."""
    seconds = run.curve.step_seconds
    tokens_per_step = run.preset.batch_size * run.preset.model.context
    return Result(
        recipe=run.recipe,
        parameters=sum(p.numel() for p in run.model.parameters()),
        final_validation_loss=run.curve.validation_losses[-1][1],
        tokens_per_second=tokens_per_step / statistics.median(seconds) if seconds else None,
        peak_memory_bytes=peak,
        curve=asdict(run.curve),
        linear_share=linear_share(run.train_step, run.device),  # trains on for a few steps
        environment=environment(run.device),
    )


if __name__ == "__main__":
    app()
