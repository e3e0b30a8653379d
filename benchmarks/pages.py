"""Write the tables of the README and the documentation from the committed results.

    python benchmarks/pages.py
    python benchmarks/pages.py --check     # change nothing; fail if a table differs

Each table is between ``<!-- begin: name -->`` and ``<!-- end -->`` of its page. The prose around it
is left as it is. BLOCKS says which function writes which table from which file.
"""

import argparse
import functools
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import results_file
from measure import RESULTS, find
from results_file import Record, cases_of
from shapes import Matrix, Shape
from torch_switchback import RECIPES
from torch_switchback.tuning.break_even import min_tokens, rates_of
from training_statistics import BASELINE, effects, finished

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", RESULTS / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MISSING = "Not measured yet.\n"
TOLERANCE = 0.002  # relative to nn.Linear's loss: what counts as the same

OURS = ("switchback", "switchback_memory_efficient")
FLOAT8 = tuple(f"torchao float8 {recipe}" for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"))
TENSORWISE = FLOAT8[0]
INT8_GRAD_WEIGHT = "switchback_int8_grad_weight"
HEADLINE = {  # models of bench_real_models and bench_lora, and what the README calls them
    "Llama 4096 × 4, 4×4096 tokens": "Llama, 4 layers of 8B's size, 16384 tokens",
    "Llama 2048 × 12, 8×2048 tokens": "Llama, width 2048, 12 layers, 16384 tokens",
    "Llama 4096 × 4, 4×2048 tokens, bf16 adapters": "LoRA with bf16 adapters, 4 layers of 8B's size, 8192 tokens",
    "ViT-H × 12, 128 images": "ViT-H/14, 12 blocks, 128 images",
    "ViT-L × 12, 128 images": "ViT-L/16, 12 blocks, 128 images",
    "ViT-B × 12, 256 images": "ViT-B/16, 256 images",
    "Llama 2048 × 8, 1×1024 tokens": "Llama, width 2048, 8 layers, 1024 tokens",
}
ROWWISE_FP8 = "torch._scaled_mm rowwise"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ("---",) * len(header), *rows))


def text(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None or math.isnan(value) else form.format(value)


def field(record: Record | None, key: str = "speed_up", form: str = "{:.2f}") -> str:
    return text(record and record.get(key), form)


def steps(document: Record) -> str:
    """Speed-ups of layers beside float8's, and Amdahl's limit of the default."""
    names = (*OURS, INT8_GRAD_WEIGHT, "rowwise", "rowwise_rotated_features")
    rows = []
    for shape in cases_of(document["results"]):
        of = {"shape": shape}
        cells = [field(find(document["results"], **of, name=name, mode="eager")) for name in names]
        cells.append(field(find(document["results"], **of, name=TENSORWISE, mode="compiled")))
        default = find(document["results"], **of, name="switchback", mode="eager")
        if default and "speed_up" in default:
            rows.append((str(Shape(*shape)), *cells, field(default, "limit")))
    return markdown(("layer", *names, TENSORWISE, "Amdahl's limit of switchback"), rows)


def models(*names: str) -> Callable[[Record], str]:
    """Speed-up and peak memory of compiled models, over nn.Linear's."""

    def table(document: Record) -> str:
        rows = []
        for model in cases_of(document["results"]):
            for mode, remark in (("compiled", ""), ("reduce-overhead", ", reduce-overhead")):
                of = [find(document["results"], model=model, name=name, mode=mode) for name in names]
                cells = (f"{field(one)} ×, {field(one, 'peak_over_linear')}" if one else "–" for one in of)
                if any(of):
                    rows.append((model + remark, *cells))
        return markdown(("compiled", *names), rows)

    return table


def headline(*documents: Record) -> str:
    """Speed-ups of some models that many people train, compiled. A star marks those without an int8 layer."""
    names = (TENSORWISE, "switchback", INT8_GRAD_WEIGHT)
    results = [record for document in documents for record in document["results"]]
    rows = []
    for model, label in HEADLINE.items():
        cells = []
        for name in names:
            record = find(results, model=model, name=name, mode="compiled")
            star = "*" if record and record.get("int8_layers") == 0 else ""
            cells.append(f"{field(record)} ×{star}" if record else "–")
        rows.append((label, "1.00 ×", *cells))
    table = markdown(("training step, compiled", "nn.Linear bf16", *names), rows)
    return table + "\n\\* No layer in INT8.\n" if "×*" in table else table


def real_models(document: Record) -> str:
    """Whole training steps, eager / compiled: nn.Linear's time, and the speed-ups over it."""
    results = document["results"]
    found = {record["name"] for record in results}
    names = [name for name in ("switchback", INT8_GRAD_WEIGHT, "recommended", *FLOAT8) if name in found]
    rows = []
    for model in dict.fromkeys(record["model"] for record in results):

        def cell(name: str, key: str = "speed_up", form: str = "{:.2f}", model: str = model) -> str:
            modes = (find(results, model=model, name=name, mode=mode) for mode in ("eager", "compiled"))
            return "/".join(field(record, key, form) for record in modes)

        rows.append((model, cell("linear", "median_ms", "{:.1f}"), *map(cell, names)))
    return markdown(("eager/compiled", "nn.Linear, ms", *names), rows)


def lora(document: Record) -> str:
    """Training steps of LoRA over frozen bases in three modes: nn.Linear's time, the bound, and speed-ups."""
    results = document["results"]
    modes = "eager", "compiled", "reduce-overhead"
    rowwise, rotated = "rowwise", "rowwise_rotated_features"
    names = ("switchback", rowwise, f"{rowwise}, cached", rotated, f"{rotated}, cached", TENSORWISE)
    columns = [("linear", "median_ms", "{:.1f}"), ("linear", "bound", "{:.2f}")]
    columns += [(name, "speed_up", "{:.2f}") for name in names]
    rows = []
    for model in dict.fromkeys(record["model"] for record in results):
        cells = (
            "/".join(field(find(results, model=model, mode=mode, name=name), *how) for mode in modes)
            for name, *how in columns
        )
        rows.append((model, *cells))
    header = ("cached" if name.endswith(", cached") else name for name in names)  # beside the same recipe without
    return markdown(("eager/compiled/CUDA graphs", "nn.Linear, ms", "bound", *header), rows)


def min_tokens_by_gpu(_: Record) -> str:
    """From how many tokens on a layer takes int8 by default."""
    gpus = {"RTX 3090": "sm_86", "RTX 4090": "sm_89", "A100": "sm_80", "H200": "sm_90", "B200": "sm_100"}
    rows = []
    for sizes in ((768, 3072), (1024, 1024), (1024, 4096), (2048, 8192), (4096, 4096), (4096, 14336)):
        least = (min_tokens(rates_of(gpu), *sizes, RECIPES["switchback"]) for gpu in gpus.values())
        rows.append((f"{sizes[0]} → {sizes[1]}", *("never" if one is None else f"{one:,}" for one in least)))
    return markdown(("layer", *gpus), rows)


def matmuls(document: Record) -> str:
    """The INT8 matmul over its peers."""
    peers = ((ROWWISE_FP8, "interleaved"), (ROWWISE_FP8, "sustained"), ("bf16", "sustained"))
    rows = []
    for shape in cases_of(document["results"]):
        of = {"shape": shape}
        cells = [
            field(find(document["results"], **of, name=name, pace=pace), "switchback_speed_up") for name, pace in peers
        ]
        ours = find(document["results"], **of, name="switchback", pace="sustained")
        rows.append((str(Shape(*shape)), field(ours, "tflop_per_s", "{:.0f}"), *cells))
    header = ("matmul", "TOPS, sustained", "over fp8 row-wise, short turns", "sustained", "over bf16, sustained")
    return markdown(header, rows)


def quantizers(document: Record) -> str:
    """Shares of a large copy's bandwidth."""
    shapes = cases_of(document["results"])
    rows = []
    for name in dict.fromkeys(record["name"] for record in document["results"]):
        of = [find(document["results"], shape=shape, name=name) for shape in shapes]
        moved = next(record["bytes_per_element"] for record in of if record)
        rows.append((f"`{name}` ({moved:g})", *(field(record, "share_of_copy") for record in of)))
    return markdown(("kernel", *(str(Matrix(*shape)) for shape in shapes)), rows)


def few_tokens(document: Record) -> str:
    records = [record for record in document["results"] if record["name"] == "switchback"]
    cells = [str(record["shape"][0]) for record in records]
    return markdown(("tokens", *cells), [("over nn.Linear", *map(field, records))])


def overhead(document: Record, only: str | None = None) -> str:
    """The time per training step that the CPU needs, by code that was measured: all, or only one."""
    labels = [label for label in cases_of(document["results"]) if only in (None, label)]
    by_case: dict[tuple[str, ...], dict[str, str]] = {}
    for record in document["results"]:
        if "ratio" in record:
            case = (str(record["layers"]), record["tokens"], record["mode"])
            times = f"{record['switchback_us'][0]:.0f} / {record['linear_us'][0]:.0f} ({record['ratio'][0]:.2f})"
            by_case.setdefault(case, {})[record["label"]] = times
    rows = [(*case, *(cells.get(label, "–") for label in labels)) for case, cells in by_case.items()]
    return markdown(("layers", "tokens", "mode", *(["µs (ratio)"] if only else labels)), rows)


def launch_costs(document: Record) -> str:
    """The CPU time of an operation's parts."""
    rows = []
    for record in document["results"]:
        label = f"`{record['label']}`" if "[" in record["label"] else record["label"]  # else Markdown sees a link
        rows.append((label, *(text(value, "{:.1f}") for value in record["us"])))
    return markdown(("call", "µs, median", "lowest", "highest"), rows)


def shards(document: Record) -> str:
    """FSDP2 on two GPUs: speed, loss, memory and bytes per step."""
    results = document["results"]
    rows = []
    for label in cases_of(results):
        linear, *_ = runs = [record for record in results if record["label"] == label]
        for run in runs:
            gathered, reduced = (
                sum(size for name, size in run["bytes_per_step"].items() if name.startswith(collective)) / 1e6
                for collective in ("all-gather", "reduce-scatter")
            )
            spread = "" if run is linear else f" ({run['speed_up_p10']:.2f} to {run['speed_up_p90']:.2f})"
            loss = "–" if run is linear else f"{run['loss'] / linear['loss'] - 1:+.2%}"
            cells = f"{run['tokens_per_s']:,.0f}", f"{run['speed_up']:.2f}{spread}", f"{run['loss']:.4f}", loss
            moved = f"{gathered:,.1f} MB", f"{reduced:,.1f} MB"
            recipe = "nn.Linear" if run is linear else run["recipe"]
            recipe += ", int8 all-gather" * (run["all_gather"] == "int8")
            rows.append((label, recipe, *cells, f"{run['peak_bytes'] / 2**30:.2f} GiB", *moved))
    speeds = "tokens/s", "over nn.Linear (10th to 90th percentile)", "validation loss", "over nn.Linear's"
    header = "preset, mode", "recipe", *speeds, "peak memory per GPU", "gathered per step", "reduced per step"
    return markdown(header, rows)


def noise(document: Record) -> str:
    """Signal to noise of the output and of grad_input."""
    records = [record for record in document["results"] if record["matmul"] in ("output", "grad_input")]
    rows = []
    for record in records:
        cells = (f"{value:.1f} ({record['worst_rows'][name]:.1f})" for name, value in record["snr"].items())
        rows.append((record["data"], record["matmul"], f"{record['crest']:.1f}", *cells))
    return markdown(("data", "matmul", "absmax/rms", *records[0]["snr"]), rows)


def grad_weight(document: Record) -> str:
    """Signal to noise of grad_weight, for the largest number of tokens."""
    records = [record for record in document["results"] if record["matmul"] == "grad_weight"]
    most = max(record["tokens"] for record in records)
    rows = []
    for record in (record for record in records if record["tokens"] == most):
        cells = (f"{value:.1f}" for value in record["snr"].values())
        rows.append((record["x"], record["grad"], str(record["tokens"]), *cells))
    return markdown(("X", "G", "tokens", *records[0]["snr"]), rows)


def frozen_noise(document: Record) -> str:
    """Signal to noise of frozen layers, output / grad_input."""
    by_data: dict[str, list[Record]] = {}
    for record in document["results"]:
        if record["matmul"] in ("frozen output", "frozen grad_input"):
            by_data.setdefault(record["data"], []).append(record["snr"])
    recipes = list(next(iter(by_data.values()))[0])
    rows = (
        (data, *("/".join(f"{snr[name]:.1f}" for snr in matmuls) for name in recipes))
        for data, matmuls in by_data.items()
    )
    return markdown(("output/grad_input, dB", *recipes), rows)


def skipped(records: Iterable[Record]) -> str:
    """A line for what has no result, and why."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if "reason" in record:
            run = f"{record['recipe']} (seed {record['seed']})" if "seed" in record else record["recipe"]
            reasons.setdefault(record["reason"], []).append(run)
    return "".join(f"\nWithout {', '.join(dict.fromkeys(runs))}: {reason}.\n" for reason, runs in reasons.items())


def gpt(document: Record) -> str:
    """Final losses of the GPT."""
    runs, protocol = finished(document["results"]), document["runs"][-1]["protocol"]
    found = effects(runs, "final_validation_loss")
    rows = []
    for name, effect in found.by_recipe.items():
        relative, error = effect.difference / found.baseline, effect.standard_error / found.baseline
        mean, values = sum(effect.values) / len(effect.values), effect.values
        row = (name, str(len(values)), f"{mean:.4f}", f"{min(values):.4f} – {max(values):.4f}")
        difference = (f"{relative:+.2%} ± {text(error, '{:.2%}')}", verdict(relative, error))
        rows.append((*row, *(("–", "–") if name == BASELINE else difference)))
    table = markdown(("recipe", "runs", "final loss, mean", "lowest to highest", "to nn.Linear", "0.2 %"), rows)
    run = runs[0]
    validated = protocol["final_batches"] * run["tokens"] / protocol["steps"]
    sizes = (
        f"{run['parameters'] / 1e6:.1f} M parameters, {run['tokens'] / 1e6:.1f} M tokens (bytes) per run in "
        f"{protocol['steps']} steps, from {protocol['train_bytes'] / 1e6:.0f} MB of text in {protocol['files']} files; "
        f"validated on {validated / 1e6:.1f} M of {protocol['validation_bytes'] / 1e6:.1f} MB held out."
    )
    chance = (
        f"One run scatters by {text(found.scatter / found.baseline, '{:.2%}')} by chance ({found.degrees_of_freedom} "
        f"degrees of freedom), so a difference to nn.Linear below {text(found.resolution / found.baseline, '{:.2%}')} "
        "(two standard errors) is within noise."
    )
    fill_in = functools.partial(textwrap.fill, width=100)
    return f"{fill_in(sizes)}\n\n{table}\n{fill_in(chance)}\n{skipped(document['results'])}"


def verdict(relative: float, error: float) -> str:
    """Say if a difference is within TOLERANCE, and if its standard error allows to say so."""
    if math.isnan(error):
        return "–"
    if abs(relative) + 2 * error <= TOLERANCE:
        return "within"
    if abs(relative) - 2 * error > TOLERANCE:
        return "worse" if relative > 0 else "better"
    return f"{'within' if abs(relative) <= TOLERANCE else 'outside'}, not certain"


def gradient_snr(document: Record) -> str:
    """Noise of the whole network's gradient while it trains."""
    records = [one for run in finished(document["results"]) for one in run.get("gradient_snr", ())]
    checkpoints = sorted({record["step"] for record in records})
    rows = []
    for name in dict.fromkeys(record["recipe"] for record in records):
        own = {record["step"]: record for record in records if record["recipe"] == name and "snr" in record}
        found = (own.get(step) for step in checkpoints)
        rows.append((name, *(f"{one['snr']:.1f} ({one['worst_layer_snr']:.1f})" if one else "–" for one in found)))
    return markdown(("recipe", *(f"after {step} steps" for step in checkpoints)), rows) + skipped(records)


BLOCKS: dict[str, tuple[str | None, Callable[[Record], str]]] = {  # None: not of a results file
    "min_tokens": (None, min_tokens_by_gpu),
    "headline": (("h200/bench_real_models", "h200/bench_lora"), headline),
    "matmuls": ("h200/bench_matmul", matmuls),
    "matmuls_h100": ("h100/bench_matmul", matmuls),
    "quantizers": ("h200/bench_quantize", quantizers),
    "few_tokens": ("h200/bench_inference", few_tokens),
    "steps": ("h200/bench_linear", steps),
    "steps_h100": ("h100/bench_linear", steps),
    "all_models": ("h200/bench_model", models(*OURS, INT8_GRAD_WEIGHT, TENSORWISE)),
    "real_models": ("h200/bench_real_models", real_models),
    "lora": ("h200/bench_lora", lora),
    "overhead": ("h200/bench_overhead", functools.partial(overhead, only="this checkout")),
    "launch_costs": ("h200/bench_launch", launch_costs),
    "shards": ("h200/bench_fsdp", shards),
    "noise": ("cpu/signal_to_noise", noise),
    "grad_weight": ("cpu/signal_to_noise", grad_weight),
    "frozen_noise": ("cpu/signal_to_noise", frozen_noise),
    "gpt": ("h200/bench_training", gpt),
    "snr": ("h200/bench_training", gradient_snr),
}
load = functools.cache(results_file.load)  # some tables share a file


def origin(name: str, document: Record, folder: Path) -> str:
    """A line that links the file, which has all versions, from a page of a folder, and says what measured it."""
    days: dict[str, str] = {}
    for run in document["runs"]:
        machine = f"{run['device']}, torch {run['torch']}"
        days[machine] = max(days.get(machine, ""), run["date"][:10])
    where = "; ".join(f"{machine}, {day}" for machine, day in days.items())
    link = os.path.relpath(RESULTS / f"{name}.json", folder)
    return f"([{Path(name).name}.json]({link}): {where})\n"


def fill(page: str, folder: Path) -> str:
    """Return a page of a folder with every table written anew; MISSING stands for what has no results yet."""

    def write(match: re.Match[str]) -> str:
        files, block = BLOCKS[match[1]]
        if files is None:
            return f"<!-- begin: {match[1]} -->\n{block({})}<!-- end -->"
        names = (files,) if isinstance(files, str) else files
        paths = [RESULTS / f"{name}.json" for name in names]
        content = MISSING
        if all(path.exists() for path in paths):
            documents = [load(path) for path in paths]
            content = block(*documents)
            content += "\n" * ("|" in content) + "".join(map(origin, names, documents, [folder] * len(names)))
        return f"<!-- begin: {match[1]} -->\n{content}<!-- end -->"

    return re.sub(r"<!-- begin: (\w+) -->\n.*?<!-- end -->", write, page, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the tables of the documentation from the committed results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table differs")
    arguments = parser.parse_args(argv)
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (filled := fill(page, path.parent)) != page:
            stale.append(path.name)
            if not arguments.check:
                path.write_text(filled, encoding="utf-8")
    if stale:
        print(f"{'stale: run python benchmarks/pages.py for' if arguments.check else 'wrote'} {', '.join(stale)}")
    sys.exit(bool(stale) and arguments.check)


if __name__ == "__main__":
    main()
