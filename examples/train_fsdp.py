"""Train the demo's GPT with FSDP2 on any number of processes, its weights gathered in 16 bit or in int8.

    torchrun --nproc-per-node 2 examples/train_fsdp.py
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \\
        torchrun --nproc-per-node 8 --max-restarts 3 examples/train_fsdp.py --checkpoint /shared/run

Every recipe starts from the same weights and reads the same data in the same order, whatever the number of
processes. With --checkpoint a run that is started again goes on where the last checkpoint was taken. (Without the
variable a restarted group may find the addresses of the one that died: pytorch issue 135712.)
"""

import gc
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from collectives import CollectiveBytes, total
from corpus import Corpus, load_corpus
from gpt import GPT
from presets import PRESETS, RECIPES
from report import COMPARED, compared, environment, peak_memory_bytes
from torch_switchback import convert_to_switchback
from torch_switchback.config import Precision
from torch_switchback.distributed import precompute_absmax_for_fsdp
from training import UNTIMED_STEPS, Curve, DivergedError, Settings, descend, learning_rate_at, new_optimizer

ALL_GATHERS: tuple[Precision, ...] = get_args(Precision)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass
class Result:
    """One finished recipe, of all ranks together."""

    recipe: str
    all_gather: Precision
    parameters: int
    final_validation_loss: float  # nats a byte
    tokens_per_second: float | None  # of the median step; None if every step was warm-up
    peak_memory_bytes: int | None  # of the rank that needed most
    bytes_per_step: dict[str, int]  # by collective and dtype, its larger side: what a gather gives, a scatter takes
    curve: dict[str, Any]  # training.Curve


class ShardedRun:
    """One recipe's model, optimizer, position and curve, sharded over all processes."""

    def __init__(
        self, recipe: str, all_gather: Precision, settings: Settings, corpus: Corpus, *, reshard: bool
    ) -> None:
        self.recipe, self.all_gather, self.settings, self.corpus = recipe, all_gather, settings, corpus
        self.preset = PRESETS[settings.preset]
        self.device = torch.device(self.preset.device)
        self.step, self.curve = 0, Curve()
        self.bytes_per_step: dict[str, int] = {}

        torch.manual_seed(settings.seed)
        self.model = GPT(self.preset.model).to(self.device)
        config = RECIPES[recipe]
        if config is not None:
            config = replace(config, all_gather=all_gather)
            if self.device.type == "cuda":  # where the speed matters: int8 only where it is faster
                config = replace(config, min_tokens=None)
            # The logits need more than eight bits, and 256 outputs are too few to gain speed.
            convert_to_switchback(self.model, config=config, module_filter_fn=lambda module, fqn: fqn != "head")
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        options: dict[str, Any] = {"mesh": mesh}
        if self.preset.bf16:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in self.model.blocks:
            if settings.compile:
                block.forward = torch.compile(block.forward)
            fully_shard(block, reshard_after_forward=reshard, **options)
        fully_shard(self.model, **options)
        self.optimizer = new_optimizer(self.model)

    def train(self, on_progress: Callable[["ShardedRun"], None]) -> None:
        """Train to the last step, whose bytes are counted. Raises DivergedError."""
        first_step = self.step
        while self.step < self.settings.steps:
            until_sync = self.preset.steps_per_sync - self.step % self.preset.steps_per_sync
            steps = min(until_sync, self.settings.steps - self.step)
            is_timed = self.step - first_step >= UNTIMED_STEPS and self.step + steps < self.settings.steps
            start = time.perf_counter()
            losses = torch.stack([self.counted_step() for _ in range(steps)])
            dist.all_reduce(losses, dist.ReduceOp.SUM)
            self.curve.train_losses += (losses / dist.get_world_size()).tolist()
            if is_timed:
                self.curve.step_seconds.append((time.perf_counter() - start) / steps)
            if not math.isfinite(self.curve.train_losses[-1]):
                loss = self.curve.train_losses[-1]
                raise DivergedError(f"{label(self)}: the training loss is {loss} after {self.step} steps")
            if self.step % self.preset.validation_interval == 0:
                self.curve.validation_losses.append((self.step, self.validation_loss(self.preset.validation_batches)))
            on_progress(self)

    def counted_step(self) -> Tensor:
        if self.step + 1 < self.settings.steps:
            return self.train_step()
        # Compiled code cannot run while they are counted, and must not be compiled anew for it.
        with torch.compiler.set_stance("force_eager"), CollectiveBytes() as counted:
            loss = self.train_step()
        self.bytes_per_step = dict(counted.bytes)
        return loss

    def train_step(self) -> Tensor:
        """One optimizer step on this rank's part of the step's batch. Returns that part's loss."""
        batch = self.corpus.train_batch(
            self.preset.batch_size, self.preset.model.context, seed=self.settings.seed, step=self.step
        )
        loss = descend(self.loss(*batch), self.model, self.optimizer, learning_rate_at(self.step, self.settings))
        if self.all_gather == "int8":
            precompute_absmax_for_fsdp(self.model)
        self.step += 1
        return loss

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        own = slice(dist.get_rank(), None, dist.get_world_size())
        logits = self.model(inputs[own].to(self.device, non_blocking=True))
        return F.cross_entropy(logits.float().flatten(0, 1), targets[own].to(self.device, non_blocking=True).flatten())

    @torch.no_grad()
    def validation_loss(self, batches: int) -> float:
        """Mean loss in nats a byte over held-out text, the same for every recipe and number of processes."""
        data = self.corpus.validation_batches(batches, self.preset.batch_size, self.preset.model.context)
        loss = torch.stack([self.loss(*batch) for batch in data]).mean()
        dist.all_reduce(loss, dist.ReduceOp.SUM)
        return loss.item() / dist.get_world_size()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        progress = {"step": self.step, "curve": asdict(self.curve), "bytes_per_step": self.bytes_per_step}
        return {"model": model, "optimizer": optimizer, "progress": progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step, self.bytes_per_step = state["progress"]["step"], state["progress"]["bytes_per_step"]
        self.curve = Curve(**state["progress"]["curve"])

    def save(self, directory: Path) -> None:
        """Write a checkpoint that any number of processes can load. The last one stays until this one is whole."""
        dcp.save({"run": self}, checkpoint_id=directory / f"step-{self.step}")
        if dist.get_rank() == 0:
            unfinished = directory / "latest.unfinished"
            unfinished.write_text(f"step-{self.step}")
            unfinished.replace(directory / "latest")
            for old in directory.glob("step-*"):
                if old.name != f"step-{self.step}":
                    shutil.rmtree(old)
        dist.barrier()

    def load(self, directory: Path) -> None:
        """Go on from the last checkpoint, if there is one."""
        latest = directory / "latest"
        if latest.exists():
            # What is stored as tensors is read into those that are there, the rest replaced.
            state = {"run": self.state_dict()}
            dcp.load(state, checkpoint_id=directory / latest.read_text())
            self.load_state_dict(state["run"])


@app.command(help="Train the demo's GPT with FSDP2. Start it with torchrun.")
def main(
    preset: Annotated[str | None, typer.Option(help=", ".join(PRESETS) + "; by default cpu or large")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help=f"{', '.join(RECIPES)}; repeatable")] = None,
    all_gather: Annotated[
        list[str] | None, typer.Option(help=f"{' or '.join(ALL_GATHERS)}; repeatable, by default each")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="by default the preset's")] = None,
    seed: Annotated[int, typer.Option(help="of the weights and the data order")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help="peak; by default the preset's")] = None,
    compile: Annotated[bool | None, typer.Option(help="torch.compile each block; by default on GPUs")] = None,
    reshard: Annotated[bool, typer.Option(help="free the gathered weights between forward and backward")] = True,
    checkpoint: Annotated[Path | None, typer.Option(file_okay=False, help="go on from here, and save here")] = None,
    checkpoint_interval: Annotated[int, typer.Option(min=1, help="steps")] = 100,
    out: Annotated[Path, typer.Option(dir_okay=False, help="the results")] = Path("runs/fsdp/results.json"),
) -> None:
    if "RANK" not in os.environ:
        raise typer.BadParameter("start it with torchrun --nproc-per-node N examples/train_fsdp.py")
    name = preset or ("large" if torch.cuda.is_available() else "cpu")
    recipes, all_gathers = recipe or ["linear", "switchback"], all_gather or list(ALL_GATHERS)
    names = (name, PRESETS), *((each, RECIPES) for each in recipes), *((each, ALL_GATHERS) for each in all_gathers)
    for given, known in names:
        if given not in known:
            raise typer.BadParameter(f"unknown name {given!r}; known: {', '.join(known)}")
    defaults = PRESETS[name]
    if defaults.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_float32_matmul_precision("high")
    dist.init_process_group("nccl" if defaults.device == "cuda" else "gloo", timeout=timedelta(minutes=5))
    if defaults.batch_size % dist.get_world_size():
        size = dist.get_world_size()
        raise typer.BadParameter(f"{defaults.batch_size} sequences cannot be shared by {size} processes")
    settings = Settings(
        preset=name,
        recipes=recipes,
        steps=steps or defaults.steps,
        seed=seed,
        learning_rate=learning_rate or defaults.learning_rate,
        compile=defaults.compile if compile is None else compile,
    )
    console = Console(quiet=dist.get_rank() != 0)
    corpus = load_corpus()
    results = []
    runs = [(each, gather) for each in recipes for gather in (all_gathers if RECIPES[each] else ["high_precision"])]
    for each, gather in runs:
        directory = None if checkpoint is None else checkpoint / f"{each}-{gather}"
        run = ShardedRun(each, gather, settings, corpus, reshard=reshard)
        train_with_progress(run, console, directory, checkpoint_interval)
        results.append(finish(run))
        del run
        release_memory()
    console.print(table(results, settings))
    if dist.get_rank() == 0:
        document = {
            "provenance": environment(torch.device(defaults.device))
            | {
                "script": "examples/train_fsdp.py",
                "processes": dist.get_world_size(),
                "reshard_after_forward": reshard,
            },
            "settings": asdict(settings) | {"all_gathers": all_gathers},
            "preset": asdict(defaults),
            "corpus": {"train_bytes": len(corpus.train), "sha256": corpus.sha256},
            "results": [asdict(result) for result in results],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"Wrote {out}", soft_wrap=True)
    dist.destroy_process_group()


def train_with_progress(run: ShardedRun, console: Console, directory: Path | None, interval: int) -> None:
    if directory is not None:
        run.load(directory)
        if run.step:
            console.print(f"{label(run)}: going on after {run.step} steps")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    tokens_per_step = run.preset.batch_size * run.preset.model.context
    saved_after = run.step
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        task = progress.add_task(label(run), total=run.settings.steps, completed=run.step, loss="-", speed="-")

        def on_progress(run: ShardedRun) -> None:
            nonlocal saved_after
            seconds = run.curve.step_seconds
            speed = f"{tokens_per_step / seconds[-1]:,.0f}" if seconds else "-"
            progress.update(task, completed=run.step, loss=f"{run.curve.train_losses[-1]:.3f}", speed=speed)
            if directory is not None and (run.step - saved_after >= interval or run.step == run.settings.steps):
                run.save(directory)
                saved_after = run.step

        run.train(on_progress)


def finish(run: ShardedRun) -> Result:
    seconds = run.curve.step_seconds
    tokens_per_step = run.preset.batch_size * run.preset.model.context
    return Result(
        recipe=run.recipe,
        all_gather=run.all_gather,
        parameters=sum(p.numel() for p in run.model.parameters()),
        final_validation_loss=run.validation_loss(run.preset.validation_batches),
        tokens_per_second=tokens_per_step / statistics.median(seconds) if seconds else None,
        peak_memory_bytes=largest_over_ranks(peak_memory_bytes(run.device), run.device),
        bytes_per_step=run.bytes_per_step,
        curve=asdict(run.curve),
    )


def label(run: ShardedRun | Result) -> str:
    return run.recipe + (", int8 gather" if run.all_gather == "int8" else "")


def largest_over_ranks(value: int | None, device: torch.device) -> int | None:
    if value is None:
        return None
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def release_memory() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def table(results: list[Result], settings: Settings) -> Table:
    """One row per run; the difference to nn.Linear is of the validation losses."""
    processes = dist.get_world_size()
    title = (
        f"{settings.preset} preset, {settings.steps} steps, {processes} processes, {results[0].parameters:,} parameters"
    )
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("recipe", no_wrap=True)
    for header in (*COMPARED, "gathered\na step", "reduced\na step"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            label(result),
            *compared(result, results),
            f"{total(result.bytes_per_step, 'all-gather') / 1e6:,.1f} MB",
            f"{total(result.bytes_per_step, 'reduce-scatter') / 1e6:,.1f} MB",
        )
    return table


if __name__ == "__main__":
    app()
