"""Draw the results of the benchmarks.

    python benchmarks/draw.py benchmarks/results/h200

Writes products.png, layers.png, models.png, memory.png, training.png and grad_weight_snr.png beside the JSON files that
they show, each from whichever of its files exist.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from collect import collect
from measure import Record, find, new_app
from shapes import ODD, Shape
from training_statistics import BASELINES, effects, finished

app = new_app()

IN_GRAPH = "switchback, both in a CUDA graph"
# Greys for nn.Linear, blues for SwitchBack, greens where it rotates or all is int8, warm colours for float8, purple for
# the INT8 of others.
COLOURS = {
    "linear": "#8c8c8c",
    "bf16": "#8c8c8c",
    "switchback": "#08519c",
    IN_GRAPH: "#08306b",
    "switchback-mem-efficient": "#3182bd",
    "rowwise": "#6baed6",
    "rowwise-mem-efficient": "#9ecae1",
    "rowwise-rotated-features": "#a6dba0",
    "torch._scaled_mm tensorwise": "#e6550d",
    "torchao float8 tensorwise": "#e6550d",
    "torch._scaled_mm rowwise": "#fd8d3c",
    "torchao float8 rowwise": "#fd8d3c",
    "torchao float8 rowwise_with_gw_hp": "#fdd0a2",
    "torch._int_mm": "#756bb1",
    "torchao int8": "#756bb1",
    "float8 tensorwise": "#e6550d",
    "float8 columnwise": "#fd8d3c",
    "linear, again": "#bdbdbd",
    "all int8": "#1b7837",
    "all int8, not rotated": "#a6dba0",
    "int8, 64 tokens rotated": "#1b7837",
    "int8, 128 tokens rotated": "#00441b",
    "int8, not rotated": "#a6dba0",
}
PEAK_COLOURS = {"8 bit": "black", "bf16": COLOURS["bf16"]}


def colour(name: str) -> str:
    return COLOURS.get(name, "#1b7837")


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
        axes.bar(positions, heights, width, yerr=errors, label=name, color=colour(name), error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def add_legend(axes: Axes) -> None:
    """Beside the bars, where it hides none."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def distinct(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]


def of_usual_widths(records: Iterable[Record]) -> list[Record]:
    """Without odd widths, which are in the tables of docs/performance.md: their bars would dwarf the others'."""
    return [record for record in records if tuple(record["shape"]) not in ODD]


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


def moved_bytes(shape: Sequence[int], operand_bytes: int) -> int:
    """What a product must read and write, with a 16-bit output."""
    tokens, inner, outer = shape
    return operand_bytes * (tokens + outer) * inner + 2 * tokens * outer


def draw_products(documents: dict[str, Record]) -> Figure:
    """The roofline with all products on it, those of inference too; and TFLOP/s by shape."""
    products = documents["bench_matmul"]
    records = [record for record in products["results"] if record.get("pace", "interleaved") == "interleaved"]
    figure, (upper, lower) = new_figure(products, "Matrix products", panels=2)
    draw_roofline(upper, products, records, documents.get("bench_inference"))
    shapes = distinct([record["shape"] for record in records])

    def tflops(group: int, name: str) -> float | None:
        record = find(records, shape=shapes[group], name=name)
        return record and record["tflop_per_s"]

    def spread(group: int, name: str) -> tuple[float, float]:
        record = find(records, shape=shapes[group], name=name)
        assert record is not None
        gflop = Shape(*shapes[group]).flop / 1e9
        return gflop / record["p90_ms"], gflop / record["p10_ms"]

    names = distinct([record["name"] for record in records])
    draw_bars(lower, [shape_label(shape) for shape in shapes], names, tflops, spread)
    lower.set_ylabel("TFLOP/s")
    lower.set_xlabel("tokens; in → out (grad_input of out → in)")
    lower.set_title("in turns, median and 10th to 90th percentile", fontsize=10)
    add_legend(lower)
    return figure


def draw_roofline(axes: Axes, products: Record, records: list[Record], inference: Record | None) -> None:
    """Speed over arithmetic intensity, under the measured bandwidth and the tensor cores' peak."""
    points: dict[str, list[tuple[float, float]]] = {}

    def add(label: str, shape: Sequence[int], operand_bytes: int, milliseconds: float | None) -> None:
        if milliseconds is not None:
            flop = Shape(*shape).flop
            points.setdefault(label, []).append((flop / moved_bytes(shape, operand_bytes), flop / milliseconds / 1e9))

    for record in records:
        add(record["name"], record["shape"], 2 if record["name"] == "bf16" else 1, record["median_ms"])
    for record in [] if inference is None else inference["results"]:
        add(record["name"], record["shape"], 2 if record["name"] == "linear" else 1, record["median_ms"])
    points["bf16"] = points.get("bf16", []) + points.pop("linear", [])
    for name, found in points.items():
        if found:
            axes.scatter(*zip(*found, strict=True), s=24, label=name, color=colour(name), zorder=3)

    bandwidth = products["copy_gb_per_s"] / 1e3  # TFLOP/s at an intensity of 1
    everything = [intensity for found in points.values() for intensity, _ in found]
    if everything:
        low, high = min(everything) / 2, max(everything) * 2
        for kind, peak in (products["datasheet_tflop_per_s"] or {"": float("inf")}).items():
            ridge = min(high, max(low, peak / bandwidth))
            roof = [min(peak, bandwidth * at) for at in (low, ridge, high)]
            label = f"measured copy bandwidth, {kind} datasheet peak" if kind else "measured copy bandwidth"
            axes.plot([low, ridge, high], roof, "--", color=PEAK_COLOURS.get(kind, "black"), label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("roofline; with few tokens: whole prepared layers at inference", fontsize=10)
    axes.grid(alpha=0.3)
    add_legend(axes)


def find_step(records: list[Record], shape: Sequence[int], name: str) -> Record | None:
    """torchao is meant to be compiled; everything else is shown in eager mode, our default in a CUDA graph as well."""
    if name == IN_GRAPH:
        return find(records, shape=shape, name="switchback", mode="graph")
    return find(records, shape=shape, name=name, mode="compiled" if name.startswith("torchao") else "eager")


def layers_of(document: Record) -> list[Record]:
    """What was measured of whole layers."""
    return [record for record in of_usual_widths(document["results"]) if not record["name"].startswith("part: ")]


def draw_layers(documents: dict[str, Record]) -> Figure:
    """A step's speed-up over nn.Linear by shape, with Amdahl's limit; below, prepared layers at inference."""
    figure, panels = new_figure(
        next(iter(documents.values())), "Layers: speed-up over nn.Linear in bfloat16", panels=len(documents), height=4
    )
    titles = {
        "bench_linear": "forward + backward; eager, torchao compiled",
        "bench_inference": "inference after prepare_for_eval(), both in a CUDA graph",
    }
    for axes, (script, document) in zip(panels, documents.items(), strict=True):
        records = layers_of(document)
        select = find_step if script == "bench_linear" else find
        shapes = distinct([record["shape"] for record in records])

        def speed_up(
            group: int, name: str, records: list[Record] = records, shapes: list[Any] = shapes, select: Any = select
        ) -> float | None:
            record = select(records, shape=shapes[group], name=name)
            return record and record["speed_up"]

        names = [name for name in distinct([record["name"] for record in records]) if name != "linear"]
        if script == "bench_linear":
            names.append(IN_GRAPH)
        draw_bars(axes, [shape_label(shape) for shape in shapes], names, speed_up)
        axes.axhline(1, color=COLOURS["linear"])
        axes.set_ylabel("speed-up")
        axes.set_title(titles[script], fontsize=10)
        limits = [limit for limit in of_usual_widths(document.get("limits", ())) if limit["name"] == "switchback"]
        for limit in limits:
            if limit["limit"] is not None:
                group = shapes.index(limit["shape"])
                label = "limit of switchback: its parts alone" if limit is limits[0] else None
                axes.hlines(limit["limit"], group - 0.45, group + 0.45, "black", linestyles="--", label=label)
        add_legend(axes)
    return figure


def draw_models(documents: dict[str, Record]) -> Figure:
    """Speed-up over nn.Linear in the same mode, by model."""
    models = documents["bench_model"]
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


def draw_memory(documents: dict[str, Record]) -> Figure:
    """Peak memory of the compiled models, and what one layer keeps for its backward."""
    figure, panels = new_figure(next(iter(documents.values())), "Memory", panels=len(documents), height=4)
    for axes, (script, document) in zip(panels, documents.items(), strict=True):
        if script == "bench_model":
            draw_peaks(axes, document["results"])
        else:
            draw_kept(axes, layers_of(document))
        add_legend(axes)
    return figure


def draw_peaks(axes: Axes, records: list[Record]) -> None:
    records = [record for record in records if record["mode"] == "compiled"]
    names = distinct([record["model"] for record in records])

    def peak_gib(group: int, name: str) -> float | None:
        record = find(records, model=names[group], name=name)
        return None if record is None or record["peak_bytes"] is None else record["peak_bytes"] / 2**30

    draw_bars(axes, names, distinct([record["name"] for record in records]), peak_gib)
    axes.set_ylabel("GiB")
    axes.set_title("peak of a training step, compiled: parameters, gradients, activations, optimizer", fontsize=10)


def draw_kept(axes: Axes, records: list[Record]) -> None:
    shapes = distinct([record["shape"] for record in records])

    def kept_mib(group: int, name: str) -> float | None:
        record = find_step(records, shape=shapes[group], name=name)
        return None if record is None or record["saved_bytes"] is None else record["saved_bytes"] / 2**20

    draw_bars(axes, [shape_label(s) for s in shapes], distinct([record["name"] for record in records]), kept_mib)
    axes.set_ylabel("MiB")
    axes.set_title("kept by one layer for its backward, without parameters", fontsize=10)


def draw_training(documents: dict[str, Record]) -> Figure:
    """Loss curves, final losses of every run, and the whole network's gradient."""
    document = documents["bench_training"]
    figure, (curves, losses, gradients) = new_figure(document, "Training a GPT", panels=3, height=4)
    runs = finished(document["results"], "gpt")
    draw_curves(curves, runs)
    draw_final_losses(losses, runs)
    draw_gradient_snr(gradients, [record for run in runs for record in run["gradient_snr"]])
    for axes in (curves, losses, gradients):
        add_legend(axes)
    return figure


def draw_curves(axes: Axes, runs: list[Record]) -> None:
    """The validation loss of each run on its way."""
    for name in distinct([run["name"] for run in runs]):
        for label, run in enumerate(run for run in runs if run["name"] == name):
            points = zip(*run["validation_losses"], strict=True)
            axes.plot(*points, linewidth=0.8, color=colour(name), label=None if label else name)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats a byte")
    axes.grid(alpha=0.3, which="both")


def draw_final_losses(axes: Axes, runs: list[Record]) -> None:
    """Every run's final loss beside nn.Linear's mean of its seed, and the mean of a recipe with two standard errors."""
    if not runs:
        return
    found = effects(runs, "final_validation_loss")
    of_seed = {
        seed: [run["final_validation_loss"] for run in runs if run["seed"] == seed and run["name"] in BASELINES]
        for seed in {run["seed"] for run in runs}
    }
    names = distinct([run["name"] for run in runs])
    for position, name in enumerate(names):
        own = [run for run in runs if run["name"] == name and of_seed[run["seed"]]]
        means = [sum(of_seed[run["seed"]]) / len(of_seed[run["seed"]]) for run in own]
        percent = [100 * (run["final_validation_loss"] / mean - 1) for run, mean in zip(own, means, strict=True)]
        axes.plot([position] * len(own), percent, "o", markersize=4, color=colour(name), label=name)
        if name not in BASELINES:
            effect = found.by_recipe[name]
            mean, error = (100 * value / found.baseline for value in (effect.difference, 2 * effect.standard_error))
            axes.errorbar(position + 0.2, mean, error, fmt="_", color=colour(name), capsize=3)
    axes.axhspan(-0.2, 0.2, color=COLOURS["linear"], alpha=0.15)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8)
    axes.set_ylabel("final loss to nn.Linear, %")
    axes.set_title("runs; means with two standard errors; grey: ± 0.2 %", fontsize=10)
    axes.grid(axis="y", alpha=0.3)


def draw_gradient_snr(axes: Axes, records: list[Record]) -> None:
    steps = distinct([record["step"] for record in records])

    def snr(group: int, name: str) -> float | None:
        found = (one for one in records if (one["step"], one["name"]) == (steps[group], name))
        return next((one["snr"] for one in found if one["reason"] is None), None)

    names = distinct([record["name"] for record in records])
    draw_bars(axes, [f"after {step} steps" for step in steps], names, snr)
    axes.set_ylabel("dB")
    axes.set_title("gradient of the whole network against float32", fontsize=10)


def draw_grad_weight_snr(documents: dict[str, Record]) -> Figure:
    """The weight gradient of one layer: for each kind of data, int8 beside float8."""
    document = documents["grad_weight_snr"]
    most = max(record["tokens"] for record in document["results"])
    records = [record for record in document["results"] if record["tokens"] == most]
    figure, panels = new_figure(document, "Signal to noise of grad_weight", panels=3, height=3)
    names = [name for name in records[0]["snr"] if name != "bf16"]
    for axes, grad in zip(panels, distinct([record["grad"] for record in records]), strict=False):
        shown = [record for record in records if record["grad"] == grad]

        def snr(group: int, name: str, shown: list[Record] = shown) -> float:
            return shown[group]["snr"][name]

        draw_bars(axes, [record["x"] for record in shown], names, snr)
        axes.axhline(33, color="black", linestyle="--", linewidth=0.8)
        axes.set_ylim(bottom=20)
        axes.set_ylabel("dB")
        axes.set_title(f"G: {grad}; by X, {most} tokens", fontsize=10)
        add_legend(axes)
    return figure


class Picture(NamedTuple):
    draw: Callable[[dict[str, Record]], Figure]
    scripts: tuple[str, ...]  # whose results it shows, those that exist
    needs: int = 1  # how many of these it cannot do without, the first ones


PICTURES = {
    "products.png": Picture(draw_products, ("bench_matmul", "bench_inference")),
    "layers.png": Picture(draw_layers, ("bench_linear", "bench_inference"), needs=0),
    "models.png": Picture(draw_models, ("bench_model",)),
    "memory.png": Picture(draw_memory, ("bench_model", "bench_linear"), needs=0),
    "training.png": Picture(draw_training, ("bench_training",)),
    "grad_weight_snr.png": Picture(draw_grad_weight_snr, ("grad_weight_snr",)),
}


@app.command(help="Draw the JSON files of a folder.")
def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)] = Path(__file__).parent / "results/h200",
    out: Annotated[Path | None, typer.Option(file_okay=False, help="by default the folder itself")] = None,
) -> None:
    console = Console()
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    available = collect(folder)
    for name, picture in PICTURES.items():
        missing = [f"{script}.json" for script in picture.scripts if script not in available]
        documents = {script: available[script] for script in picture.scripts if script in available}
        if not documents or any(f"{script}.json" in missing for script in picture.scripts[: picture.needs]):
            console.print(f"skipped {name}: {folder} has no {', '.join(missing)}", soft_wrap=True)
            continue
        picture.draw(documents).savefig(out / name, dpi=120)
        without = f" without {', '.join(missing)}, which {folder} lacks" if missing else ""
        console.print(f"wrote {out / name}{without}", soft_wrap=True)


if __name__ == "__main__":
    app()
