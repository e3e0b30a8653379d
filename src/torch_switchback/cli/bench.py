"""``torch-switchback bench``: layers' training steps, nn.Linear beside SwitchBack and what else is installed."""

import datetime
import importlib.util
import json as json_module
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import nn

from .. import __version__
from .._text import table
from ..analysis.explanation import describe
from ..analysis.layer_calls import layer_calls
from ..analysis.layer_steps import measure_layers
from ..analysis.recommendation import LINEAR
from ..config import RECIPES
from ..convert import convert_to_switchback
from .common import (
    DEFAULT_TOKENS,
    DeviceFlag,
    JsonFlag,
    chosen_device,
    load_model,
    needs,
    parse_shapes,
    stop,
)


class StepShape(NamedTuple):
    """All that a layer's training step is measured on."""

    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.tokens}, {self.in_features} → {self.out_features}"


DEFAULT_SHAPES: tuple[StepShape, ...] = (
    StepShape(16384, 4096, 4096),
    StepShape(16384, 4096, 14336),
    StepShape(65536, 1280, 5120),
)
FLOAT8 = ("tensorwise", "rowwise")


@dataclass(frozen=True)
class Result:
    """A layer's forward and backward."""

    shape: StepShape
    name: str
    milliseconds: float | None
    speed_up: float | None  # over nn.Linear
    saved_bytes: int | None  # for the backward
    reason: str  # why there is no result


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKENS,IN,OUT", help="A layer on its tokens; repeatable.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION|JSON",
            help="The distinct layers of a model instead: package.module:function, or a transformer's config.json.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --model: tokens that each layer sees in a step, by default 8192.", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Repeatable; by default all: {', '.join(RECIPES)}.", show_default=False),
    ] = None,
    peers: Annotated[
        bool, typer.Option(help="torchao's float8 layers too, compiled, if it is installed and there is a GPU.")
    ] = True,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Measure without the host's time, as in compiled models; no peers.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seconds: Annotated[float, typer.Option(min=0.0, help="For each shape, about, beside compiling.")] = 2.0,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the JSON here, too.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Draw the speed-ups here (.png, .svg, .pdf).", show_default=False),
    ] = None,
    device: DeviceFlag = None,
    json: JsonFlag = False,
) -> None:
    """Measure layers' training steps: nn.Linear, SwitchBack's recipes, and float8 where torchao is installed.

    A step is the forward, and the backward with all three gradients. Competitors take turns in one process, and only
    their ratios carry over: power and clocks move times by 15 % between runs.

    Examples:

    \b
      torch-switchback bench
      torch-switchback bench --shape 16384,4096,14336 --recipe switchback --picture layer.png
      torch-switchback bench --model Llama-3-8B/config.json --tokens 16384 --output llama.json
    """
    where = chosen_device(device)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"--dtype must be bfloat16, float16 or float32, got {dtype!r}")
    unknown = [name for name in recipe or () if name not in RECIPES]
    if unknown:
        raise typer.BadParameter(f"--recipe must be one of {', '.join(RECIPES)}, got {unknown[0]!r}")
    if shape and model:
        raise typer.BadParameter("give --shape or --model, not both")
    if tokens is not None and not model:
        raise typer.BadParameter("--tokens goes with --model; a shape names its own")
    if picture is not None:
        needs("bench", "matplotlib", "demo")
    shapes = parse_shapes(shape, "TOKENS,IN,OUT", StepShape) if shape else DEFAULT_SHAPES
    if model:
        layers = layer_calls(load_model(model)[0], tokens=tokens or DEFAULT_TOKENS)
        shapes = tuple(
            dict.fromkeys(
                StepShape(calls[0].tokens, layer.in_features, layer.out_features)
                for layer, calls in layers.values()
                if calls
            )
        )
    with_peers = peers and not cuda_graph and where.type == "cuda" and importlib.util.find_spec("torchao") is not None
    results: list[Result] = []
    for one in shapes:
        try:
            results += _measured(one, recipe or list(RECIPES), with_peers, where, dtype, seconds, cuda_graph)
        except RuntimeError as error:  # out of memory
            stop("bench", f"{one}: {error}")
    document = {
        "provenance": {
            "device": describe(where),
            "torch": str(torch.__version__),
            "torch_switchback": __version__,
            "date": datetime.date.today().isoformat(),
            "dtype": dtype,
            "cuda_graph": cuda_graph,
            "seconds": seconds,
        },
        "results": [asdict(result) for result in results],
    }
    text = json_module.dumps(document, indent=1, ensure_ascii=False)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if picture is not None:
        draw(results, describe(where), picture)
    typer.echo(text if json else f"{describe(where)}, {dtype}\n{as_table(results)}")


def competitors(shape: StepShape, recipes: list[str], peers: bool, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Names, and functions that build the layer on the current device or raise."""

    def linear() -> nn.Module:
        return nn.Linear(shape.in_features, shape.out_features, dtype=dtype)

    yield LINEAR, linear
    for recipe in recipes:
        yield recipe, lambda recipe=recipe: convert_to_switchback(linear(), config=recipe)
    for scaling in FLOAT8 if peers else ():
        yield f"torchao float8 {scaling}", lambda scaling=scaling: _float8(linear(), scaling)


def _float8(linear: nn.Module, scaling: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = nn.Sequential(linear)
    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(scaling))
    model.compile(dynamic=False)
    return model


def _measured(
    shape: StepShape,
    recipes: list[str],
    peers: bool,
    device: torch.device,
    dtype: str,
    seconds: float,
    cuda_graph: bool,
) -> list[Result]:
    dtype_: torch.dtype = getattr(torch, dtype)
    x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=dtype_, requires_grad=True)
    layers: dict[str, nn.Module] = {}
    failed: list[Result] = []
    build: Callable[[], nn.Module]
    for name, build in competitors(shape, recipes, peers, dtype_):
        try:
            with device:
                layers[name] = build()
            if name not in (LINEAR, *RECIPES):
                layers[name](x).sum().backward()
        except Exception as error:  # a peer can fail in any way
            layers.pop(name, None)
            failed.append(Result(shape, name, None, None, None, f"{type(error).__name__}: {str(error)[:200]}"))
    milliseconds, saved = measure_layers(layers, x, seconds=seconds, cuda_graph=cuda_graph)
    linear = milliseconds[LINEAR]
    return [Result(shape, name, ms, linear / ms, saved[name], "") for name, ms in milliseconds.items()] + failed


def as_table(results: list[Result]) -> str:
    rows = [
        (
            str(result.shape),
            result.name,
            "–" if result.milliseconds is None else f"{result.milliseconds:.3f}",
            "–" if result.speed_up is None else f"{result.speed_up:.2f} ×",
            "–" if result.saved_bytes is None else f"{result.saved_bytes / 2**20:.1f}",
            result.reason,
        )
        for result in results
    ]
    return table(("layer", "", "ms", f"over {LINEAR}", "kept, MiB", ""), rows)


def draw(results: list[Result], title: str, path: Path) -> None:
    """Bars of the speed-ups, a group for each shape."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(result.shape for result in results))
    names = [name for name in dict.fromkeys(result.name for result in results) if name != LINEAR]
    figure = Figure(figsize=(max(6.0, 3.0 * len(shapes)), 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel=f"times as fast as {LINEAR}", title=title)
    width = 0.86 / max(1, len(names))
    for index, name in enumerate(names):
        bars = {shapes.index(result.shape): result.speed_up for result in results if result.name == name}
        shown = {group + (index - (len(names) - 1) / 2) * width: height for group, height in bars.items() if height}
        axes.bar(list(shown), list(shown.values()), width, label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [str(shape).replace(", ", "\n") for shape in shapes])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)
