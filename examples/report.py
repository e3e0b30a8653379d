"""Write what the demo leaves behind: a table, a picture of the loss curves and results.json."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

import torch_switchback
from corpus import Corpus
from pictures import color, draw_losses
from presets import PRESETS
from training import Settings


@dataclass
class Result:
    """One finished recipe."""

    recipe: str
    parameters: int
    final_validation_loss: float  # nats per byte
    tokens_per_second: float | None  # of the median step; None if every step was warm-up
    peak_memory_bytes: int | None
    linear_share: float  # of a step's time
    curve: dict[str, Any]  # training.Curve
    environment: dict[str, Any]


class PeakMemory:
    """The most memory that one of several models took that are on a GPU at once and are used in turns."""

    def __init__(self) -> None:
        self.peak: int | None = None  # bytes; None without a GPU, as a process's resident set is that of all models
        self._own = 0  # what the model holds between its turns

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure a turn of the model, or its construction."""
        if not torch.cuda.is_initialized():
            yield
            return
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield
        self.peak = max(self.peak or 0, self._own + torch.cuda.max_memory_allocated() - before)
        self._own += torch.cuda.memory_allocated() - before


def peak_memory_bytes(device: torch.device) -> int | None:
    """CUDA: the most that PyTorch had allocated since the last reset. CPU: the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(device: torch.device) -> dict[str, Any]:
    """Return where and with what a number was measured."""
    is_cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if is_cuda else _cpu_name(),
        "driver": _output(*"nvidia-smi --id=0 --query-gpu=driver_version --format=csv,noheader".split())
        if is_cuda
        else None,
        "cpu_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "torch_switchback": torch_switchback.__version__,
        **_git(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _git() -> dict[str, Any]:
    """The commit: what the variable GIT_COMMIT says, for copies whose history is another's; else this checkout's."""
    if "GIT_COMMIT" in os.environ:
        return {"git_commit": os.environ["GIT_COMMIT"], "git_dirty": None}
    commit, changes = _output("git", "rev-parse", "HEAD"), _output("git", "status", "--porcelain")
    return {"git_commit": commit, "git_dirty": None if commit is None else bool(changes)}


def _output(*command: str) -> str | None:
    """Run a command beside this file and return its output, or None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


COMPARED = ("validation\nloss", "to\nlinear", "tokens/s", "speed\nratio", "peak\nmemory")


def compared(result: Any, results: Sequence[Any]) -> tuple[str, ...]:
    """Return a row's cells under COMPARED: a recipe's result beside that of nn.Linear among all results."""
    loss, speed = result.final_validation_loss, result.tokens_per_second
    loss_ratio = speed_ratio = None
    linear = next((other for other in results if other.recipe == "linear"), None)
    if linear is not None and result.recipe != "linear":
        loss_ratio = loss / linear.final_validation_loss
        speed_ratio = speed / linear.tokens_per_second if speed and linear.tokens_per_second else None
    return (
        f"{loss:.4f}",
        "-" if loss_ratio is None else f"{loss_ratio - 1:+.2%}",
        "-" if speed is None else f"{speed:,.0f}",
        "-" if speed_ratio is None else f"{speed_ratio:.2f} ×",
        "-" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 2**30:.1f} GiB",
    )


def table(results: list[Result], settings: Settings) -> Table:
    """Return a table with one row per recipe, without columns for which there is nothing to say."""
    title = f"{settings.preset} preset, {settings.steps} steps, {results[0].environment['device']}"
    # Without inner padding the longest recipe name fits a terminal of 80 columns.
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("recipe", no_wrap=True)
    rows = [(*compared(result, results), f"{result.linear_share:.0%}") for result in results]
    headers = (*COMPARED, "time in\nlinear")
    shown = [column for column in range(len(headers)) if any(row[column] != "-" for row in rows)]
    for column in shown:
        table.add_column(headers[column], justify="right", no_wrap=True)
    for result, row in zip(results, rows, strict=True):
        table.add_row(result.recipe, *(row[column] for column in shown))
    return table


def draw_run(document: dict[str, Any]) -> Figure:
    """Draw the losses in a document, as as_document makes it, and how far they are from nn.Linear's."""
    settings, results = document["settings"], document["results"]
    precision = "bf16" if document["preset"]["bf16"] else "fp32"
    has_linear = any(result["recipe"] == "linear" for result in results)
    figure = Figure(figsize=(9, 7 if has_linear else 4), layout="constrained")
    losses, *others = figure.subplots(2 if has_linear else 1, 1, sharex=True, squeeze=False).flatten()
    for result in results:
        train_losses = result["curve"]["train_losses"]
        stride = -(-settings["steps"] // len(train_losses))  # committed results have only some of the losses
        steps = range(1, settings["steps"] + 1, stride)
        losses.plot(steps, smoothed(train_losses), linewidth=0.8, color=color(result["recipe"]), alpha=0.5)
    curves = {}
    for result in results:
        points = [point for point in result["curve"]["validation_losses"] if point[0] < settings["steps"]]
        curves[result["recipe"]] = [*points, (settings["steps"], result["final_validation_loss"])]
    draw_losses(losses, others[0] if others else None, curves, f"nn.Linear {precision}")
    losses.set_ylabel("loss, nats per byte")
    losses.set_title("dots: validation; pale: training, smoothed", fontsize=10)
    figure.suptitle(
        f"{settings['preset']} preset, {results[0]['parameters']:,} parameters, {settings['steps']} steps", fontsize=11
    )
    return figure


def smoothed(losses: list[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the run, without the bias of its start."""
    decay = 1 - 1 / max(1, len(losses) / 50)
    total = weight = 0.0
    averages = []
    for loss in losses:
        total, weight = decay * total + loss, decay * weight + 1
        averages.append(total / weight)
    return averages


def as_document(results: list[Result], settings: Settings, corpus: Corpus) -> dict[str, Any]:
    """Return what results.json holds."""
    return {
        "settings": asdict(settings),
        "preset": asdict(PRESETS[settings.preset]),
        "corpus": {
            "files": corpus.files,
            "train_bytes": len(corpus.train),
            "validation_bytes": len(corpus.validation),
            "sha256": corpus.sha256,
        },
        "results": [asdict(result) for result in results],
    }
