"""Draw the results of the benchmarks.

    python benchmarks/draw.py benchmarks/results/h200

Writes products.png, layers.png, models.png and memory.png beside the JSON files that they show.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from measure import Record, new_app
from shapes import Shape

app = new_app()

IN_GRAPH = "switchback, both in a CUDA graph"
# Greys for nn.Linear, blues for SwitchBack, warm colours for float8, purple for the INT8 of others.
COLOURS = {
    "linear": "#8c8c8c",
    "bf16": "#8c8c8c",
    "switchback": "#08519c",
    IN_GRAPH: "#08306b",
    "switchback-mem-efficient": "#3182bd",
    "rowwise": "#6baed6",
    "rowwise-mem-efficient": "#9ecae1",
    "torch._scaled_mm tensorwise": "#e6550d",
    "torchao float8 tensorwise": "#e6550d",
    "torch._scaled_mm rowwise": "#fd8d3c",
    "torchao float8 rowwise": "#fd8d3c",
    "torchao float8 rowwise_with_gw_hp": "#fdd0a2",
    "torch._int_mm": "#756bb1",
    "torchao int8": "#756bb1",
}
PEAK_COLOURS = {"8 bit": "black", "bf16": COLOURS["bf16"]}


def draw_bars(
    axes: Axes,
    groups: Sequence[str],
    series: Sequence[str],
    height: Callable[[int, str], float | None],
    spread: Callable[[int, str], tuple[float, float]] | None = None,
) -> None:
    """A bar for each series in each group, none where the height is None; spread gives (lowest, highest)."""
    shown = [name for name in series if any(height(group, name) is not None for group in range(len(groups)))]
    width = 0.86 / max(1, len(shown))
    for index, name in enumerate(shown):
        present = [group for group in range(len(groups)) if height(group, name) is not None]
        heights = [height(group, name) or 0.0 for group in present]
        errors = None
        if spread is not None:
            bounds = [spread(group, name) for group in present]
            errors = [
                [max(0.0, top - low) for top, (low, _) in zip(heights, bounds, strict=True)],
                [max(0.0, high - top) for top, (_, high) in zip(heights, bounds, strict=True)],
            ]
        positions = [group + (index - (len(shown) - 1) / 2) * width for group in present]
        axes.bar(positions, heights, width, yerr=errors, label=name, color=COLOURS[name], error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def add_legend(axes: Axes) -> None:
    """Beside the bars, where it hides none."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def find(records: list[Record], **wanted: object) -> Record | None:
    """The record with these values, if it has a time."""
    for record in records:
        if record["median_ms"] is not None and all(record.get(key) == value for key, value in wanted.items()):
            return record
    return None


def distinct(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]


def shape_label(shape: Sequence[int]) -> str:
    tokens, in_features, out_features = shape
    return f"{tokens}\n{in_features} → {out_features}"


def new_figure(document: Record, title: str, panels: int = 1, height: float = 4.5) -> tuple[Figure, Sequence[Axes]]:
    origin = document["provenance"]
    figure = Figure(figsize=(12, height * panels), layout="constrained")
    figure.suptitle(
        f"{title}\n{origin['device']}, torch {origin['torch']}, Triton {origin['triton']}, {origin['date'][:10]}",
        fontsize=11,
    )
    return figure, figure.subplots(panels, squeeze=False)[:, 0]


def draw_products(products: Record) -> Figure:
    """TFLOP/s by shape under its roof: the tensor cores' peak, or what memory's measured bandwidth allows."""
    records = products["results"]
    shapes = distinct([record["shape"] for record in records])

    def tflops(group: int, name: str) -> float | None:
        record = find(records, shape=shapes[group], name=name)
        return record and record["tflop_per_s"]

    def spread(group: int, name: str) -> tuple[float, float]:
        record = find(records, shape=shapes[group], name=name)
        assert record is not None
        gflop = Shape(*shapes[group]).flop / 1e9
        return gflop / record["p90_ms"], gflop / record["p10_ms"]

    figure, (axes,) = new_figure(products, "Matrix products, median and 10th to 90th percentile")
    names = distinct([record["name"] for record in records])
    draw_bars(axes, [shape_label(shape) for shape in shapes], names, tflops, spread)
    for kind, peak in (products["datasheet_tflop_per_s"] or {}).items():
        for group, (tokens, inner, outer) in enumerate(shapes):
            operand_bytes = 1 if kind == "8 bit" else 2
            moved = operand_bytes * (tokens + outer) * inner + 2 * tokens * outer
            by_memory = Shape(tokens, inner, outer).flop / moved * products["copy_gb_per_s"] / 1e3
            label = f"roof, {kind}" if group == 0 else None
            axes.hlines(
                min(peak, by_memory), group - 0.45, group + 0.45, PEAK_COLOURS[kind], linestyles="--", label=label
            )
    axes.set_ylabel("TFLOP/s")
    axes.set_xlabel("tokens; in → out (grad_input of out → in)")
    add_legend(axes)
    return figure


def find_step(records: list[Record], shape: Sequence[int], name: str) -> Record | None:
    """torchao is meant to be compiled; everything else is shown in eager mode, our default in a CUDA graph as well."""
    if name == IN_GRAPH:
        return find(records, shape=shape, name="switchback", mode="graph")
    return find(records, shape=shape, name=name, mode="compiled" if name.startswith("torchao") else "eager")


def draw_layers(linear: Record) -> Figure:
    """A step's speed-up over nn.Linear by shape, with Amdahl's limit; below, prepared layers at inference."""
    records = [record for record in linear["results"] if record["name"] in COLOURS]
    steps = [record for record in records if record["what"] == "step"]
    inference = [record for record in records if record["what"] == "inference"]
    figure, (upper, lower) = new_figure(linear, "Layers: speed-up over nn.Linear in bfloat16", panels=2, height=4)
    for axes, part, select, title in (
        (upper, steps, find_step, "forward + backward; eager, torchao compiled"),
        (lower, inference, find, "inference after prepare_for_eval(), both in a CUDA graph"),
    ):
        shapes = distinct([record["shape"] for record in part])

        def speed_up(
            group: int, name: str, part: list[Record] = part, shapes: list[Any] = shapes, select: Any = select
        ) -> float | None:
            record = select(part, shape=shapes[group], name=name)
            return record and record["speed_up"]

        names = distinct([record["name"] for record in part])
        names = [*names[1:], IN_GRAPH]  # all but nn.Linear itself
        draw_bars(axes, [shape_label(shape) for shape in shapes], names, speed_up)
        axes.axhline(1, color=COLOURS["linear"])
        axes.set_ylabel("speed-up")
        axes.set_title(title, fontsize=10)
    for group, limit in enumerate(linear["limits"]):
        if limit["limit"] is not None:
            label = "limit of switchback: its parts alone" if group == 0 else None
            upper.hlines(limit["limit"], group - 0.45, group + 0.45, "black", linestyles="--", label=label)
    add_legend(upper)
    add_legend(lower)
    return figure


def draw_models(models: Record) -> Figure:
    """Speed-up over nn.Linear in the same mode, by model."""
    records = models["results"]
    names = distinct([record["model"] for record in records])
    modes = [mode for mode in ("compiled", "eager") if any(record["mode"] == mode for record in records)]
    figure, panels = new_figure(models, "Training steps: speed-up over nn.Linear", panels=len(modes), height=3.6)
    for axes, mode in zip(panels, modes, strict=True):

        def speed_up(group: int, name: str, mode: str = mode) -> float | None:
            record = find(records, model=names[group], name=name, mode=mode)
            return record and record["speed_up"]

        series = [name for name in distinct([record["name"] for record in records]) if name != "linear"]
        draw_bars(axes, names, series, speed_up)
        axes.axhline(1, color=COLOURS["linear"])
        axes.set_ylabel("speed-up")
        axes.set_title(mode, fontsize=10)
        add_legend(axes)
    return figure


def draw_memory(models: Record, linear: Record) -> Figure:
    """Peak memory of the compiled models, and what one layer keeps for its backward."""
    figure, (upper, lower) = new_figure(models, "Memory", panels=2, height=4)
    peaks = [record for record in models["results"] if record["mode"] == "compiled"]
    names = distinct([record["model"] for record in peaks])

    def peak_gib(group: int, name: str) -> float | None:
        record = find(peaks, model=names[group], name=name)
        return None if record is None or record["peak_bytes"] is None else record["peak_bytes"] / 2**30

    draw_bars(upper, names, distinct([record["name"] for record in peaks]), peak_gib)
    upper.set_ylabel("GiB")
    upper.set_title("peak of a training step, compiled: parameters, gradients, activations, optimizer", fontsize=10)
    add_legend(upper)

    steps = [record for record in linear["results"] if record["what"] == "step" and record["name"] in COLOURS]
    shapes = distinct([record["shape"] for record in steps])

    def kept_mib(group: int, name: str) -> float | None:
        record = find_step(steps, shape=shapes[group], name=name)
        return None if record is None or record["saved_bytes"] is None else record["saved_bytes"] / 2**20

    draw_bars(lower, [shape_label(s) for s in shapes], distinct([record["name"] for record in steps]), kept_mib)
    lower.set_ylabel("MiB")
    lower.set_title("kept by one layer for its backward, without parameters", fontsize=10)
    add_legend(lower)
    return figure


PICTURES: dict[str, tuple[Callable[..., Figure], tuple[str, ...]]] = {
    "products.png": (draw_products, ("bench_matmul",)),
    "layers.png": (draw_layers, ("bench_linear",)),
    "models.png": (draw_models, ("bench_model",)),
    "memory.png": (draw_memory, ("bench_model", "bench_linear")),
}


@app.command(help="Draw the JSON files of a folder: products, layers, models, memory.")
def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)] = Path(__file__).parent / "results/h200",
    out: Annotated[Path | None, typer.Option(file_okay=False, help="by default the folder itself")] = None,
) -> None:
    console = Console()
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    for name, (draw, scripts) in PICTURES.items():
        paths = [folder / f"{script}.json" for script in scripts]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            console.print(f"skipped {name}: {folder} has no {', '.join(missing)}", soft_wrap=True)
            continue
        figure = draw(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))
        figure.savefig(out / name, dpi=120)
        console.print(f"wrote {out / name}", soft_wrap=True)


if __name__ == "__main__":
    app()
