"""Draw the results of the benchmarks.

    python benchmarks/draw.py                       # benchmarks/results/*/*.json
    python benchmarks/draw.py --results FOLDER

Each picture is written beside the JSON file that it shows.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import results_file
from measure import RESULTS, find
from results_file import Record, cases_of
from shapes import Shape
from training_statistics import BASELINES, effects, finished

# Greys for nn.Linear, blues for SwitchBack, greens where the weight gradient is INT8 or features are rotated, warm
# colors for float8, purple for the INT8 of others, pink for what recommend chooses.
COLORS = {
    "linear": "#8c8c8c",
    "linear, again": "#bdbdbd",
    "bf16": "#8c8c8c",
    "switchback": "#08519c",
    "switchback_memory_efficient": "#3182bd",
    "rowwise": "#6baed6",
    "all int8, not rotated": "#a6dba0",
    "torch._scaled_mm tensorwise": "#e6550d",
    "torchao float8 tensorwise": "#e6550d",
    "torch._scaled_mm rowwise": "#fd8d3c",
    "torchao float8 rowwise": "#fd8d3c",
    "torchao float8 rowwise_with_gw_hp": "#fdd0a2",
    "torch._int_mm": "#756bb1",
    "torchao int8": "#756bb1",
    "recommended": "#c51b8a",
}


def color(name: str) -> str:
    return COLORS.get(name, "#1b7837")


def draw_bars(
    axes: Axes, groups: Sequence[str], series: Sequence[str], height: Callable[[int, str], float | None]
) -> None:
    """Draw a bar for each series in each group. There is none where the height is None."""
    heights = {name: [height(group, name) for group in range(len(groups))] for name in dict.fromkeys(series)}
    shown = {name: values for name, values in heights.items() if any(value is not None for value in values)}
    width = 0.86 / max(1, len(shown))
    for index, (name, values) in enumerate(shown.items()):
        present = [group for group, value in enumerate(values) if value is not None]
        positions = [group + (index - (len(shown) - 1) / 2) * width for group in present]
        axes.bar(positions, [values[group] for group in present], width, label=name, color=color(name))
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def add_legend(axes: Axes) -> None:
    """Put the legend beside the bars, where it hides none."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def new_figure(
    document: Record, title: str, panels: int, height: float, columns: int = 1
) -> tuple[Figure, Sequence[Axes]]:
    run = document["runs"][-1]
    where = f"{run['device']}, torch {run['torch']}, Triton {run['triton']}, {run['date'][:10]}"
    figure = Figure(figsize=(12, height * panels), layout="constrained")
    figure.suptitle(f"{title}\n{where}", fontsize=11)
    return figure, figure.subplots(panels, columns, sharey=columns > 1, squeeze=False).flatten()


def draw_matmuls(document: Record) -> Figure:
    """Draw the speed of all matmuls by shape, interleaved and sustained."""
    figure, panels = new_figure(document, "Matmuls", 2, 4)
    shapes = cases_of(document["results"])
    for axes, pace in zip(panels, ("interleaved", "sustained"), strict=True):

        def tflops(group: int, name: str, pace: str = pace) -> float | None:
            record = find(document["results"], shape=shapes[group], name=name, pace=pace)
            return record and record["tflop_per_s"]

        labels = [str(Shape(*shape)).replace(" × ", "\n", 1) for shape in shapes]
        draw_bars(axes, labels, [record["name"] for record in document["results"]], tflops)
        axes.set_ylabel("TFLOP/s")
        axes.set_title(f"tokens; in → out (grad_input of out → in); {pace}", fontsize=10)
        add_legend(axes)
    return figure


def draw_models(document: Record) -> Figure:
    """Draw the speed-up over nn.Linear in the same mode, by model."""
    records = document["results"]
    models = cases_of(records)
    figure, panels = new_figure(document, "Training steps: speed-up over nn.Linear", 2, 3.6)
    for axes, mode in zip(panels, ("compiled", "eager"), strict=True):

        def speed_up(group: int, name: str, mode: str = mode) -> float | None:
            record = find(records, model=models[group], name=name, mode=mode)
            return record and record.get("speed_up")

        draw_bars(axes, models, [record["name"] for record in records if record["name"] != "linear"], speed_up)
        axes.axhline(1, color=COLORS["linear"])
        axes.set_ylabel("speed-up")
        axes.set_title(mode, fontsize=10)
        add_legend(axes)
    return figure


def draw_real_models(document: Record) -> Figure:
    """Draw a point for the speed-up of each variant of each model, with its spread, in one panel per mode."""
    records = [record for record in document["results"] if "speed_up" in record and record["name"] != "linear"]
    models = list(dict.fromkeys(record["model"] for record in records))
    names = list(dict.fromkeys(record["name"] for record in records))
    figure, panels = new_figure(document, "Training steps: speed-up over nn.Linear", 1, 2 + 0.36 * len(models), 2)
    for axes, mode in zip(panels, ("eager", "compiled"), strict=True):
        axes.axvline(1, color=COLORS["linear"])
        for index, name in enumerate(names):
            of = [record for record in records if (record["mode"], record["name"]) == (mode, name)]
            x, low, high = ([record[key] for record in of] for key in ("speed_up", "speed_up_p10", "speed_up_p90"))
            errors = [[a - b for a, b in zip(*pair, strict=True)] for pair in ((x, low), (high, x))]
            y = [models.index(record["model"]) + 0.16 * (index - (len(names) - 1) / 2) for record in of]
            axes.errorbar(x, y, xerr=errors, fmt="o", markersize=4, linewidth=1, label=name, color=color(name))
        axes.set_title(mode, fontsize=10)
        axes.set_xlabel("speed-up, with 10th and 90th percentile")
        axes.grid(alpha=0.3)
    axes.set_yticks(range(len(models)), models, fontsize=8)
    axes.set_ylim(len(models) - 0.5, -0.5)
    add_legend(axes)
    return figure


def draw_training(document: Record) -> Figure:
    """Draw the loss curves and the final losses of every run."""
    figure, (curves, losses) = new_figure(document, "Training a GPT", 2, 4)
    runs = finished(document["results"])
    for name in dict.fromkeys(run["recipe"] for run in runs):
        for label, run in enumerate(run for run in runs if run["recipe"] == name):
            points = zip(*run["validation_losses"], strict=True)
            curves.plot(*points, linewidth=0.8, color=color(name), label=None if label else name)
    curves.set_yscale("log")
    curves.set_xlabel("step")
    curves.set_ylabel("validation loss, nats per byte")
    curves.grid(alpha=0.3, which="both")
    draw_final_losses(losses, runs)

    for axes in (curves, losses):
        add_legend(axes)
    return figure


def draw_final_losses(axes: Axes, runs: list[Record]) -> None:
    """Draw each run's final loss relative to nn.Linear's of its seed, and each recipe's mean."""
    found = effects(runs, "final_validation_loss")
    linear: dict[int, list[float]] = {}
    for run in runs:
        if run["recipe"] in BASELINES:
            linear.setdefault(run["seed"], []).append(run["final_validation_loss"])
    names = list(dict.fromkeys(run["recipe"] for run in runs))
    for position, name in enumerate(names):
        own = [(run["final_validation_loss"], linear[run["seed"]]) for run in runs if run["recipe"] == name]
        percent = [100 * (loss * len(of_seed) / sum(of_seed) - 1) for loss, of_seed in own]
        axes.plot([position] * len(own), percent, "o", markersize=4, color=color(name), label=name)
        if name not in BASELINES:
            effect = found.by_recipe[name]
            mean, error = (100 * value / found.baseline for value in (effect.difference, 2 * effect.standard_error))
            axes.errorbar(position + 0.2, mean, error, fmt="_", color=color(name), capsize=3)
    axes.axhspan(-0.2, 0.2, color=COLORS["linear"], alpha=0.15)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8)
    axes.set_ylabel("final loss to nn.Linear, %")
    axes.set_title("runs; means with two standard errors; grey: ± 0.2 %", fontsize=10)
    axes.grid(axis="y", alpha=0.3)


PICTURES: dict[str, tuple[str, Callable[[Record], Figure]]] = {
    "matmuls": ("bench_matmul", draw_matmuls),
    "models": ("bench_model", draw_models),
    "real_models": ("bench_real_models", draw_real_models),
    "training": ("bench_training", draw_training),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the results of the benchmarks.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder with a folder for each device")
    arguments = parser.parse_args(argv)
    for picture, (script, draw) in PICTURES.items():
        for path in sorted(arguments.results.glob(f"*/{script}.json")):
            target = path.with_name(f"{picture}.png")
            draw(results_file.load(path)).savefig(target, dpi=100)
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
