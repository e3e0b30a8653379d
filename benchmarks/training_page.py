"""Write the figures of docs/training.md from the committed results.

    python benchmarks/training_page.py

Each table stands in the page between ``<!-- begin: name -->`` and ``<!-- end -->``; the prose around them stays.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from grad_weight_snr import FORMATS
from measure import Record, new_app, text
from pages import fill_blocks, load
from summary import markdown
from training_statistics import BASELINE, Effects, effects, finished, repeated_scatter, text_error

app = new_app()
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "training.md"
RESULTS = ROOT / "benchmarks" / "results"
TRAINING = "h200/bench_training.json"
GRAD_WEIGHT = "cpu/grad_weight_snr.json"
MISSING = "Not measured yet.\n"
TOLERANCE = 0.002  # of nn.Linear's loss: what "as well" is taken to mean


def number(value: float, form: str) -> str:
    return text(None if math.isnan(value) else value, form)


def skipped(records: list[Record]) -> str:
    """A line for what has no result, and why."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record["reason"] is not None:
            run = f"{record['name']} (seed {record['seed']})" if "seed" in record else record["name"]
            reasons.setdefault(record["reason"], []).append(run)
    return "".join(f"\nWithout {', '.join(dict.fromkeys(runs))}: {reason}.\n" for reason, runs in reasons.items())


def origin(document: Record) -> str:
    source = document["provenance"]
    driver = source["driver"] and source["driver"].splitlines()[0]
    used = {"driver": driver, "torch": source["torch"], "Triton": source["triton"], "torchao": source["torchao"]}
    versions = ", ".join(f"{name} {version}" for name, version in used.items() if version is not None)
    return f"\n{source['device']}, {versions}, commit {str(source['git_commit'])[:7]}, {source['date'][:10]}.\n"


def picture(title: str, name: str) -> str:
    return f"\n![{title}](../benchmarks/results/{name}.png)\n"


def gpt(document: Record) -> str:
    runs = finished(document["results"], "gpt")
    if not runs:
        return MISSING
    found = effects(runs, "final_validation_loss")
    protocol, corpus = document["protocol"], document["protocol"]["corpus"]
    rows = []
    for name, effect in found.by_recipe.items():
        relative, error = effect.difference / found.baseline, effect.standard_error / found.baseline
        row = (f"{sum(effect.values) / len(effect.values):.4f}", spread(effect.values, "{:.4f}"))
        if name == BASELINE:
            rows.append((name, str(len(effect.values)), *row, "–", "–"))
        else:
            signed = f"{relative:+.2%} ± {number(error, '{:.2%}')}"
            rows.append((name, str(len(effect.values)), *row, signed, verdict(relative, error)))
    lines = markdown(("recipe", "runs", "final loss, mean", "lowest to highest", "to nn.Linear", "0.2 %"), rows)
    again = repeated_scatter(runs, "final_validation_loss") / found.baseline
    text_share = text_error(runs) / found.baseline
    run = runs[0]
    validated = protocol["final_batches"] * run["tokens"] / protocol["steps"]
    return (
        f"{run['parameters'] / 1e6:.1f} M parameters, {run['tokens'] / 1e6:.1f} M tokens (bytes) a run in "
        f"{protocol['steps']} steps, from {corpus['train_bytes'] / 1e6:.0f} MB of text in {corpus['files']} files; "
        f"validated on {validated / 1e6:.1f} M of {corpus['validation_bytes'] / 1e6:.1f} MB held out.\n\n{lines}\n"
        f"{scatter_line(found)} Repeated runs of nn.Linear alone: {number(again, '{:.2%}')}. The choice of the "
        f"validation text: ± {number(text_share, '{:.2%}')} of a paired difference.\n"
        f"{skipped(gpt_records(document))}{origin(document)}"
        f"{picture('Validation losses, final losses, noise of the gradient', 'h200/training')}"
    )


def gpt_records(document: Record) -> list[Record]:
    return [record for record in document["results"] if record["task"] == "gpt"]


def scatter_line(found: Effects) -> str:
    scatter, resolution = found.scatter / found.baseline, found.resolution / found.baseline
    return (
        f"One run scatters by {number(scatter, '{:.2%}')} by chance ({found.degrees_of_freedom} degrees of freedom), "
        f"so a difference to nn.Linear below {number(resolution, '{:.2%}')} (two standard errors) cannot be told "
        "from none."
    )


def spread(values: list[float], form: str) -> str:
    return f"{form.format(min(values))} – {form.format(max(values))}"


def verdict(relative: float, error: float) -> str:
    """Whether a difference is within TOLERANCE, and whether two standard errors allow to say so."""
    if math.isnan(error):
        return "–"
    if abs(relative) + 2 * error <= TOLERANCE:
        return "within"
    if abs(relative) - 2 * error > TOLERANCE:
        return "worse" if relative > 0 else "better"
    return f"{'within' if abs(relative) <= TOLERANCE else 'outside'}, not certain"


def digits(document: Record) -> str:
    records = [record for record in document["results"] if record["task"] == "digits"]
    runs = finished(records, "digits")
    if not runs:
        return MISSING
    loss, accuracy = effects(runs, "test_loss"), effects(runs, "test_accuracy")
    rows = []
    for name in loss.by_recipe:
        cells = []
        for found, form, difference_form in ((loss, "{:.4f}", "{:+.4f}"), (accuracy, "{:.2%}", "{:+.2%}")):
            effect = found.by_recipe[name]
            cells.append(form.format(sum(effect.values) / len(effect.values)))
            difference = difference_form.format(effect.difference)
            cells.append("–" if name == BASELINE else f"{difference} ± {number(effect.standard_error, form)}")
        rows.append((name, str(len(loss.by_recipe[name].values)), *cells))
    header = ("recipe", "runs", "test loss, mean", "to nn.Linear", "test accuracy, mean", "to nn.Linear")
    return (
        f"{runs[0]['parameters'] / 1e6:.1f} M parameters, {runs[0]['images']:,} images a run.\n\n"
        f"{markdown(header, rows)}{skipped(records)}{origin(document)}"
    )


def snr(document: Record) -> str:
    records = [record for run in finished(document["results"], "gpt") for record in run["gradient_snr"]]
    if not records:
        return MISSING
    steps = sorted({record["step"] for record in records})
    rows = []
    for name in dict.fromkeys(record["name"] for record in records):
        cells = []
        for step in steps:
            record = next(one for one in records if (one["name"], one["step"]) == (name, step))
            failed = record["reason"] is not None
            cells.append("–" if failed else f"{record['snr']:.1f} ({record['worst_layer_snr']:.1f})")
        rows.append((name, *cells))
    return markdown(("recipe", *(f"after {step} steps" for step in steps)), rows) + skipped(records) + origin(document)


def grad_weight(document: Record) -> str:
    rows = []
    for record in document["results"]:
        cells = (f"{record['snr'][name]:.1f}" for name in FORMATS)
        rows.append((record["x"], record["grad"], str(record["tokens"]), *cells))
    table = markdown(("X", "G", "tokens", *FORMATS), rows)
    return table + origin(document) + picture("Signal to noise of the weight gradient", "cpu/grad_weight_snr")


BLOCKS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "gpt": (TRAINING, gpt),
    "snr": (TRAINING, snr),
    "digits": (TRAINING, digits),
    "grad_weight": (GRAD_WEIGHT, grad_weight),
}


def fill(page: str, results: Path) -> str:
    """A page with every block written anew from the results of a folder; MISSING where there are none."""

    def content_of(name: str) -> str:
        file, block = BLOCKS[name]
        path = results / file
        return block(load(path)) if path.is_file() else MISSING

    return fill_blocks(page, content_of)


@app.command(help="Write the figures of docs/training.md from the committed results.")
def main(
    page: Annotated[Path, typer.Option(exists=True, dir_okay=False)] = PAGE,
    results: Annotated[Path, typer.Option(exists=True, file_okay=False)] = RESULTS,
) -> None:
    page.write_text(fill(page.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    app()
