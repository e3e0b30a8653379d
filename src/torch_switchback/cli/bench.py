"""``torch-switchback bench``: training steps of layers, nn.Linear beside SwitchBack and torchao's float8."""

import datetime
import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import nn
from typer import BadParameter, Option

from .. import __version__
from .._text import table
from .._timing import Mode, Record, copies
from ..analysis.layer_calls import describe
from ..analysis.layer_steps import compare_layers, random_inputs
from ..analysis.recommendation import LINEAR
from ..config import RECIPES
from ..convert import convert_to_switchback
from . import common
from .common import CudaGraphFlag, DeviceFlag, JsonFlag, RecipesFlag, Shape, ShapesFlag, output_option

DEFAULT_SHAPES = {
    "cuda": [Shape(16384, 4096, 4096), Shape(16384, 4096, 14336), Shape(65536, 1280, 5120)],
    "cpu": [Shape(512, 1024, 1024), Shape(512, 1024, 4096)],
}
FLOAT8 = {f"torchao float8 {scaling}": scaling for scaling in ("tensorwise", "rowwise")}
PICTURES = (".pdf", ".png", ".svg")


def bench(
    shape: ShapesFlag = None,
    model: Annotated[str | None, Option(metavar="MODULE:FUNCTION|JSON", help="Its distinct layers instead.")] = None,
    tokens: Annotated[int | None, Option(min=1, help="With --model: per layer, by default 8192.")] = None,
    recipe: RecipesFlag = None,
    peers: Annotated[bool, Option(help="On a GPU torchao's float8 layers too, compiled, if it is installed.")] = True,
    cuda_graph: CudaGraphFlag = False,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of weights and inputs.")] = "bfloat16",
    seconds: Annotated[float, Option(min=0.0, help="Of measurement per shape, about, beside compiling.")] = 2.0,
    output: Annotated[Path | None, output_option(help="Write the JSON here, too.")] = None,
    picture: Annotated[Path | None, output_option(help="Draw speed-ups here: .pdf, .png or .svg.")] = None,
    device: DeviceFlag = None,
    json: JsonFlag = False,
) -> None:
    """Measure training steps of layers: nn.Linear, SwitchBack's recipes, and float8 where torchao is installed.

    A step is the forward, and the backward with all three gradients. Candidates are measured interleaved in one
    process, and only their ratios carry over: power and clocks move times by 15 % between runs. After Ctrl-C the
    shapes that were finished are printed and written.

    Examples:

    \b
      torch-switchback bench
      torch-switchback bench --shape 16384,4096,14336 --recipe switchback --picture layer.png
      torch-switchback bench --model Llama-3-8B/config.json --tokens 16384 --output llama.json
    """
    where, torch_dtype = common.chosen_device(device), getattr(torch, dtype)
    if shape and model:
        raise BadParameter("give --shape or --model, not both")
    if tokens is not None and not model:
        raise BadParameter("--tokens goes with --model; a shape names its own")
    if picture is not None:
        common.needs("matplotlib")
        if picture.suffix not in PICTURES:
            raise BadParameter(f"--picture must end in {', '.join(PICTURES)}, got {picture}")
    shapes = shape or DEFAULT_SHAPES[where.type]
    if model:
        module, _ = common.load_model(model, torch.device("cpu"))
        linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
        shapes = [Shape(tokens or common.DEFAULT_TOKENS, layer.in_features, layer.out_features) for layer in linears]
    shapes = list(dict.fromkeys(shapes))
    peers = peers and not cuda_graph and where.type == "cuda" and importlib.util.find_spec("torchao") is not None
    mode: Mode = "graph" if cuda_graph else "eager"
    results: list[Record] = []
    with common.Steps() as steps:
        for number, each in enumerate(shapes, 1):
            new = partial(new_layer, shape=each, device=where, dtype=torch_dtype)
            layers = {name: (partial(new, name), mode) for name in (LINEAR, *(recipe or RECIPES))}
            layers |= {name: (partial(new, name), "compiled") for name in FLOAT8 if peers}
            steps.begin(f"{number}/{len(shapes)}  {each}", total=len(layers))
            set_bytes = torch_dtype.itemsize * each.tokens * (each.in_features + each.out_features)
            inputs = random_inputs(*each, copies(set_bytes, where), where, torch_dtype)
            records = compare_layers(layers, inputs, seconds=seconds, advance=steps.advance_step)
            results += [{"shape": each} | {k: v for k, v in record.items() if k != "turns"} for record in records]
    provenance: Record = {"device": describe(where), "torch": str(torch.__version__), "torch_switchback": __version__}
    provenance |= {"date": datetime.date.today().isoformat(), "dtype": dtype}
    provenance |= {"cuda_graph": cuda_graph, "seconds": seconds}
    document = common.to_json({"provenance": provenance, "results": results})
    if output is not None:
        output.write_text(document + "\n", encoding="utf-8")
    if picture is not None:
        draw(results, describe(where), picture)
    typer.echo(document if json else f"{describe(where)}, {dtype}\n{as_table(results)}")
    if steps.stopped:
        raise typer.Exit(130)
    if any("reason" in result and result["name"] in (LINEAR, *RECIPES) for result in results):
        raise typer.Exit(1)


def new_layer(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return nn.Linear, what a recipe makes of it, or torchao's layer of that name, compiled."""
    linear = nn.Linear(shape.in_features, shape.out_features, device=device, dtype=dtype)
    if name not in FLOAT8:
        return linear if name == LINEAR else convert_to_switchback(linear, config=replace(RECIPES[name], min_tokens=0))
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = nn.Sequential(linear)
    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(FLOAT8[name]))
    model.compile(dynamic=False)
    return model


def as_table(results: list[Record]) -> str:
    columns = (("median_ms", "{:.3f}", 1), ("speed_up", "{:.2f} ×", 1), ("saved_bytes", "{:.1f}", 2**20))
    rows = []
    for result in results:
        values = [None if result.get(key) is None else form.format(result[key] / unit) for key, form, unit in columns]
        rows.append((result["shape"], result["name"], *values, result.get("reason", "")))
    return table(("layer", "", "ms", f"over {LINEAR}", "kept, MiB", ""), rows)


def draw(results: list[Record], title: str, path: Path) -> None:
    """Draw bars of the speed-ups, a group per shape."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(result["shape"] for result in results))
    names = [name for name in dict.fromkeys(result["name"] for result in results) if name != LINEAR]
    figure = Figure(figsize=(max(6.0, 3.0 * len(shapes)), 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel=f"times as fast as {LINEAR}", title=title)
    for index, name in enumerate(names):
        offset = (index + 0.5) / len(names) - 0.5
        bars = {shapes.index(r["shape"]): r["speed_up"] for r in results if r["name"] == name and "speed_up" in r}
        axes.bar([group + 0.86 * offset for group in bars], list(bars.values()), 0.86 / len(names), label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [str(shape).replace(", ", "\n") for shape in shapes])
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)
