"""Draw the results of the benchmarks.

    python benchmarks/draw.py                       # benchmarks/results/*/*.json
    python benchmarks/draw.py --results FOLDER

Each picture is written beside the JSON file that it shows.
"""

import argparse
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import results_file
from demo import BASELINE, DARK, GREY, color, draw_losses, draw_run
from measure import RESULTS, find
from results_file import Record, cases_of
from training_statistics import AGAIN, BASELINES, effects, finished

WIDTH = 9.0  # inches, of every picture: about the column of the documentation's site
# The series of each picture, at most five. Others are in the tables.
MODEL_SERIES = (
    "switchback",
    "switchback_int8_grad_weight",
    "switchback_memory_efficient",
    "torchao float8 tensorwise",
    "torchao float8 rowwise",
)
REAL_MODEL_SERIES = ("switchback", "switchback_int8_grad_weight", "recommended", "torchao float8 tensorwise")
MATMUL_SERIES = ("bf16", "switchback", "torch._int_mm", "torch._scaled_mm tensorwise", "torch._scaled_mm rowwise")
TRAINING_SERIES = ("linear", AGAIN, "switchback", "all int8", "torchao float8 tensorwise")
MARKERS = "osD^v"


def new_figure(document: Record, title: str, height: float) -> Figure:
    run = document["runs"][-1]
    where = f"{run['device']}, torch {run['torch']}, Triton {run['triton']}, {run['date'][:10]}"
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(f"{title}\n{where}", fontsize=10)
    return figure


def draw_bars(
    axes: Axes, groups: Sequence[str], series: Sequence[str], value: Callable[[int, str], float | None]
) -> None:
    """Draw groups of horizontal bars, each with its name and value. Nothing was measured where the value is None."""
    values = {name: [value(group, name) for group in range(len(groups))] for name in series}
    shown = [name for name in series if any(number is not None for number in values[name])]
    longest = max((number for name in shown for number in values[name] if number is not None), default=1.0)
    form = "{:.2f}" if longest < 10 else "{:.0f}"
    height = 0.86 / max(3, len(shown))
    for index, name in enumerate(shown):
        for group, number in enumerate(values[name]):
            y = group + (index - (len(shown) - 1) / 2) * height
            if number is None:
                write(axes, 0.015 * longest, y, f"{name}: not measured", GREY, size=7)
                continue
            axes.barh(y, number, 0.94 * height, color=color(name))
            write(axes, 0.015 * longest, y, name, text_color(color(name)))
            write(axes, number + 0.015 * longest, y, form.format(number), DARK)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.15 * longest))
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def write(axes: Axes, x: float, y: float, text: str, ink: str, size: float = 8) -> None:
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5} if ink in (DARK, GREY) else None
    axes.text(x, y, text, color=ink, fontsize=size, verticalalignment="center_baseline", bbox=background)


def text_color(background: str) -> str:
    """Return white or black, whichever is easier to read."""
    red, green, blue = (int(background[index : index + 2], 16) for index in (1, 3, 5))
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 130 else "black"


def mark_baseline(axes: Axes) -> None:
    axes.axvline(1, color=DARK, linewidth=1)
    axes.annotate(
        BASELINE,
        (1, 1),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        horizontalalignment="center",
        fontsize=8,
    )


def note_absent(axes: Axes, unit: str, series: Sequence[str], records: Iterable[Record]) -> None:
    """Write the unit under a panel, which series have no result for it, and which results it does not show."""
    found = dict.fromkeys(record["name"] for record in records if "reason" not in record)
    notes = {
        "not measured": [name for name in series if name not in found],
        "measured, not drawn": [name for name in found if name not in series],
    }
    lines = [textwrap.fill(f"{note}: {', '.join(names)}", 56) for note, names in notes.items() if names]
    axes.set_xlabel("\n".join([unit, *lines]), fontsize=8)


def draw_matmuls(document: Record) -> Figure:
    """Draw the speed of all matmuls by shape, interleaved and sustained."""
    records = document["results"]
    shapes = cases_of(records)
    figure = new_figure(document, "Matmuls: X Wᵀ, and grad_input of the layer with in and out swapped", 8)
    for axes, pace in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("interleaved", "sustained"), strict=True):

        def tflops(group: int, name: str, pace: str = pace) -> float | None:
            record = find(records, shape=shapes[group], name=name, pace=pace)
            return record and record.get("tflop_per_s")

        labels = [f"{shape[0]} tokens\n{shape[1]} → {shape[2]}" for shape in shapes]
        draw_bars(axes, labels, MATMUL_SERIES, tflops)
        axes.set_title(pace, fontsize=10)
        note_absent(axes, "TFLOP/s", MATMUL_SERIES, [record for record in records if record["pace"] == pace])
    return figure


def draw_models(document: Record) -> Figure:
    """Draw the speed-up over nn.Linear in the same mode, by model."""
    records = [record for record in document["results"] if record["name"] != "linear"]
    fastest = {
        model: max(r.get("speed_up", 0.0) for r in records if r["model"] == model) for model in cases_of(records)
    }
    models = sorted(fastest, key=lambda model: -fastest[model])
    series = [name for name in MODEL_SERIES if any(record["name"] == name for record in records)]
    figure = new_figure(document, "Training steps: speed-up over nn.Linear", 2 + 1.2 * len(models))
    for axes, mode in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("compiled", "eager"), strict=True):

        def speed_up(group: int, name: str, mode: str = mode) -> float | None:
            record = find(records, model=models[group], name=name, mode=mode)
            return record and record.get("speed_up")

        draw_bars(axes, [textwrap.fill(model, 14) for model in models], series, speed_up)
        mark_baseline(axes)
        axes.set_title(mode, fontsize=10, pad=16)
        note_absent(
            axes, "times as fast as nn.Linear", series, [record for record in records if record["mode"] == mode]
        )
    return figure


def draw_real_models(document: Record) -> Figure:
    """Draw a point for the speed-up of each variant of each model, with its spread, in one panel per mode."""
    records = [record for record in document["results"] if record["name"] != "linear"]
    models = list(dict.fromkeys(record["model"] for record in records))
    series = [name for name in REAL_MODEL_SERIES if any(record["name"] == name for record in records)]
    figure = new_figure(document, "Training steps: speed-up over nn.Linear", 3 + 0.5 * len(models))
    for axes, mode in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("compiled", "eager"), strict=True):
        of_mode = [record for record in records if record["mode"] == mode]
        measured = [record for record in of_mode if "speed_up" in record and record["name"] in series]
        for record in measured:
            y = models.index(record["model"]) + offset(record, series)
            x, low, high = (record[key] for key in ("speed_up", "speed_up_p10", "speed_up_p90"))
            marker, ink = MARKERS[series.index(record["name"])], color(record["name"])
            axes.errorbar(x, y, xerr=[[x - low], [high - x]], fmt=marker, markersize=4.5, linewidth=1.2, color=ink)
        mark_baseline(axes)
        axes.set_title(mode, fontsize=10, pad=16)
        axes.grid(alpha=0.3, axis="x")
        for between in range(1, len(models)):
            axes.axhline(between - 0.5, color=GREY, alpha=0.3, linewidth=0.8)
        name_points(axes, [record for record in measured if record["model"] == models[0]], series)
        found = {record["name"] for record in measured}
        left, _ = axes.get_xlim()
        for record in of_mode:
            if "reason" in record and record["name"] in found:
                y = models.index(record["model"]) + offset(record, series)
                write(axes, left, y, f" {record['name']}: not measured", GREY, size=6.5)
        note_absent(axes, "times as fast as nn.Linear; line: 10th to 90th percentile", series, of_mode)
    axes.set_yticks(range(len(models)), [textwrap.fill(model, 24) for model in models], fontsize=8)
    axes.set_ylim(len(models) - 0.5, -0.9 - 0.4 * len(series))
    return figure


def offset(record: Record, series: Sequence[str]) -> float:
    """Return where the point of a record is in the row of its model."""
    return 0.2 * (series.index(record["name"]) - (len(series) - 1) / 2)


def name_points(axes: Axes, records: Sequence[Record], series: Sequence[str]) -> None:
    """Write the names of the first row's points above it, each on a line that leads to its point."""
    by_speed = sorted(records, key=lambda record: record["speed_up"])
    for height, record in enumerate(by_speed, start=1):  # the fastest highest: so no line crosses a name
        axes.annotate(
            record["name"],
            (record["speed_up"], offset(record, series)),
            (record["speed_up"], -0.4 - 0.4 * height),
            horizontalalignment="right",
            fontsize=8,
            color=DARK,
            arrowprops={"arrowstyle": "-", "color": color(record["name"]), "linewidth": 1, "relpos": (1, 0)},
        )


def draw_training(document: Record) -> Figure:
    """Draw loss curves, how far they are from nn.Linear's, and the final losses of every run."""
    runs = finished(document["results"])
    figure = new_figure(document, "Training a GPT", 10)
    losses, differences, final = figure.subplots(3, 1)
    curves = {}
    for name in TRAINING_SERIES:
        of = [run["validation_losses"] for run in runs if run["recipe"] == name]
        if of:  # the mean of the seeds, after each number of steps
            curves[name] = [(at[0][0], sum(loss for _, loss in at) / len(of)) for at in zip(*of, strict=True)]
    draw_losses(losses, differences, curves)
    losses.set_ylabel("validation loss, nats per byte")
    losses.set_title("mean of the seeds", fontsize=10)
    draw_final_losses(final, runs)
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
        axes.plot(percent, [position - 0.12] * len(own), "o", markersize=4, color=color(name))
        if name not in BASELINES:
            effect = found.by_recipe[name]
            mean, error = (100 * value / found.baseline for value in (effect.difference, 2 * effect.standard_error))
            axes.errorbar(mean, position + 0.16, xerr=error, fmt="|", color=color(name), capsize=3)
    axes.axvspan(-0.2, 0.2, color=GREY, alpha=0.15)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("final loss to nn.Linear, %")
    axes.set_title("dots: runs; bars: means with two standard errors; gray: ± 0.2 %", fontsize=10)
    axes.grid(axis="x", alpha=0.3)


PICTURES: dict[str, tuple[str, Callable[[Record], Figure]]] = {
    "matmuls": ("bench_matmul", draw_matmuls),
    "models": ("bench_model", draw_models),
    "real_models": ("bench_real_models", draw_real_models),
    "training": ("bench_training", draw_training),
    "loss": ("demo/results", draw_run),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the results of the benchmarks.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder with a folder for each device")
    arguments = parser.parse_args(argv)
    for picture, (script, draw) in PICTURES.items():
        for path in sorted(arguments.results.glob(f"*/{script}.json")):
            target = path.with_name(f"{picture}.png")
            draw(results_file.load(path)).savefig(target, dpi=160)
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
