"""Write the tables of the documentation's pages from the committed results.

python benchmarks/pages.py

Each table stands in its page between ``<!-- begin: name -->`` and ``<!-- end -->``; the prose around them stays.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from collect import collect
from measure import Record, find, new_app
from shapes import Shape
from summary import GOALS, markdown, row

app = new_app()
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"

OURS = ("switchback", "switchback-mem-efficient")
ROWWISE_FP8 = "torch._scaled_mm rowwise"
FLOAT8 = tuple(f"torchao float8 {recipe}" for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"))


def times(record: Record | None, key: str = "speed_up") -> str:
    return "–" if record is None or record[key] is None else f"{record[key]:.2f}"


def layers(document: Record) -> str:
    names = ("switchback", "rowwise", "switchback-mem-efficient", "rowwise-mem-efficient", "int8-grad-weight")
    rows = []
    for shape in dict.fromkeys(tuple(record["shape"]) for record in document["results"]):
        cells = []
        for name in names:
            found = [find(document["results"], shape=list(shape), name=name, mode=mode) for mode in ("eager", "graph")]
            cells.append(times(found[0]) + (f" ({times(found[1])})" if found[1] else ""))
        if any(cell != "–" for cell in cells):
            rows.append((str(Shape(*shape)), *cells))
    return markdown(("layer", *names), rows)


def kept(document: Record) -> str:
    """The bytes that memory-efficient layers keep."""
    shares = [
        record["saved_over_linear"]
        for record in document["results"]
        if record["name"].endswith("mem-efficient") and record.get("saved_over_linear") is not None
    ]
    return f"Memory-efficient layers keep {min(shares):.3f} to {max(shares):.3f} of nn.Linear's bytes.\n"


def models(*names: str) -> Callable[[Record], str]:
    """Speed-up and peak memory of compiled models, over nn.Linear's."""

    def table(document: Record) -> str:
        rows = []
        for model in dict.fromkeys(record["model"] for record in document["results"]):
            for mode, remark in (("compiled", ""), ("reduce-overhead", ", reduce-overhead")):
                of = [find(document["results"], model=model, name=name, mode=mode) for name in names]
                cells = (f"{times(one)} ×, {times(one, 'peak_over_linear')}" if one else "–" for one in of)
                if any(of):
                    rows.append((model + remark, *cells))
        return markdown(("compiled", *names), rows)

    return table


def losers(documents: Record) -> Iterator[tuple[str, ...]]:
    for record in documents["bench_model"]["results"] + documents["bench_linear"]["results"]:
        if record["name"] in OURS and record["speed_up"] is not None and record["speed_up"] < 1:
            what = record["model"] if "model" in record else str(Shape(*record["shape"]))
            yield what, record["name"], record["mode"], times(record)


def lost(documents: Record) -> str:
    return markdown(("model or layer", "strategy", "mode", "over nn.Linear"), losers(documents))


def shards(document: Record) -> str:
    by_recipe = {run["recipe"]: run for run in document["results"]}
    linear = by_recipe["linear"]["tokens_per_second"]
    rows = [
        (name, f"{run['tokens_per_second']:,.0f}", f"{run['tokens_per_second'] / linear:.2f}")
        for name, run in by_recipe.items()
    ]
    return markdown(("recipe", "tokens/s", "over nn.Linear"), rows)


def linear_share(document: Record) -> str:
    """Amdahl's bound on the demo's step."""
    share = next(run["linear_share"] for run in document["results"] if run["recipe"] == "linear")
    rows = [(f"{gain:.1f} ×", f"{1 / (1 - share + share / gain):.2f} ×") for gain in (1.2, 1.4, 1.6)]
    return markdown(("linear layers alone", f"a step of which they are {share:.0%}"), rows)


def noise(document: Record) -> str:
    formats = tuple(document["results"][0]["decibels"])
    rows = []
    for record in document["results"]:
        cells = (f"{found['snr']:.1f} ({found['worst_rows']:.1f})" for found in record["decibels"].values())
        rows.append((record["name"], record["product"], f"{record['crest']:.1f}", *cells))
    return markdown(("data", "product", "absmax/rms", *formats), rows)


def goals(documents: Record) -> str:
    rows = [row(goal, documents.get(goal.script))[:4] for goal in GOALS]
    return markdown(("goal", "reach", "worst case", "reached"), rows)


def products(document: Record) -> str:
    """The INT8 product over its peers."""
    peers = ((ROWWISE_FP8, "interleaved"), (ROWWISE_FP8, "sustained"), ("bf16", "sustained"))
    rows = []
    for shape in dict.fromkeys(tuple(record["shape"]) for record in document["results"]):
        of = {"shape": list(shape)}
        cells = (
            times(find(document["results"], **of, name=name, pace=pace), "switchback_speed_up") for name, pace in peers
        )
        fastest = find(document["results"], **of, name="switchback", pace="sustained")
        rows.append((str(Shape(*shape)), f"{fastest['tflop_per_s']:.0f}" if fastest else "–", *cells))
    header = ("product", "TOPS, sustained", "over fp8 row-wise, short turns", "sustained", "over bf16, sustained")
    return markdown(header, rows)


def quantisers(document: Record) -> str:
    """Shares of a large copy's bandwidth."""
    shapes = list(dict.fromkeys(tuple(record["shape"]) for record in document["results"]))
    rows = []
    for name in dict.fromkeys(record["name"] for record in document["results"]):
        of = [find(document["results"], shape=list(shape), name=name) for shape in shapes]
        moved = next(record["bytes_an_element"] for record in of if record)
        rows.append((f"`{name}` ({moved:g})", *(times(record, "share_of_copy") for record in of)))
    return markdown(("quantiser", *(f"{rows} × {cols}" for rows, cols in shapes)), rows)


def few_tokens(document: Record) -> str:
    records = [record for record in document["results"] if record["name"] == "switchback"]
    cells = [f"{record['shape'][0]}" for record in records]
    return markdown(("tokens", *cells), [("over nn.Linear", *map(times, records))])


def steps(document: Record) -> str:
    """Layers' steps beside float8's, and Amdahl's limit of the default."""
    names = (*OURS, "int8-grad-weight", "rowwise", "rowwise-rotated-features")
    rows = []
    for shape in dict.fromkeys(tuple(record["shape"]) for record in document["results"]):
        of = {"shape": list(shape)}
        cells = [times(find(document["results"], **of, name=name, mode="eager")) for name in names]
        cells += [times(find(document["results"], **of, name=name, mode="compiled")) for name in FLOAT8]
        bound = next(each for each in document["limits"] if each["shape"] == of["shape"] and each["name"] == names[0])
        reached = bound["share_reached"] and f"{bound['share_reached']:.0%}"
        rows.append((str(Shape(*shape)), *cells, times(bound, "limit"), reached or "–"))
    return markdown(("layer", *names, *FLOAT8, "Amdahl's limit of switchback", "reached"), rows)


BLOCKS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "goals": ("h200", goals),
    "products": ("h200/bench_matmul", products),
    "products_h100": ("h100/bench_matmul", products),
    "quantisers": ("h200/bench_quantize", quantisers),
    "few_tokens": ("h200/bench_inference", few_tokens),
    "steps": ("h200/bench_linear", steps),
    "all_models": ("h200/bench_model", models(*OURS, "int8-grad-weight", *FLOAT8, "torchao int8")),
    "layers": ("h200/bench_linear", layers),
    "layers_h100": ("h100/bench_linear", layers),
    "kept": ("h200/bench_linear", kept),
    "models": ("h200/bench_model", models(*OURS)),
    "models_and_float8": ("h200/bench_model", models("switchback", *FLOAT8)),
    "lost": ("h200", lost),
    "shards_narrow": ("h200/fsdp/large.json", shards),
    "shards_wide": ("h200/fsdp/wide.json", shards),
    "linear_share": ("h200/demo/results.json", linear_share),
    "noise": ("cpu/signal_to_noise.json", noise),
}


def load(place: Path) -> Record:
    """A results file; without suffix, of all files that a benchmark left in its folder; of a folder all benchmarks'."""
    if place.is_dir():
        return _collected(place)
    if place.suffix:
        return json.loads(place.read_text(encoding="utf-8"))
    return _collected(place.parent)[place.name]


_collected = functools.cache(collect)  # most tables are of one folder


def origin(path: str, document: Record) -> str:
    """A line that links the files and says what measured them; a folder's say it themselves."""
    if "results" not in document:
        return f"([results](../benchmarks/results/{path}))\n"
    runs = document.get("runs") or {
        Path(path).name: document.get("provenance") or document["results"][0]["environment"]
    }
    folder = path.rpartition("/")[0]
    links: dict[str, list[str]] = {}
    for name, source in runs.items():
        versions = [source["device"], f"torch {source['torch']}", f"Triton {source['triton']}"]
        if any("torchao" in record.get("name", "") and record.get("median_ms") for record in document["results"]):
            versions.append(f"torchao {source['torchao']}")
        link = f"[{name}](../benchmarks/results/{folder}/{name}) of commit {source['git_commit'][:7]}"
        links.setdefault(", ".join([*versions, source["date"][:10]]), []).append(link)
    return "(" + "; ".join(f"{', '.join(files)}: {where}" for where, files in links.items()) + ")\n"


def fill_blocks(page: str, content_of: Callable[[str], str | None]) -> str:
    """A page with each block written anew, by its name; None leaves it as it is."""

    def write(match: re.Match[str]) -> str:
        content = content_of(match[1])
        return match[0] if content is None else f"<!-- begin: {match[1]} -->\n{content}<!-- end -->"

    return re.sub(r"<!-- begin: (\w+) -->\n.*?<!-- end -->", write, page, flags=re.DOTALL)


def fill(page: str) -> str:
    """A page with its tables written anew; those of other scripts stay."""

    def content_of(name: str) -> str | None:
        if name not in BLOCKS:
            return None
        path, block = BLOCKS[name]
        document = load(RESULTS / path)
        content = block(document)
        return content + ("\n" if content.startswith("|") else "") + origin(path, document)

    return fill_blocks(page, content_of)


@app.command(help="Write the tables of the documentation's pages from the committed results.")
def main(docs: Annotated[Path, typer.Option(exists=True, file_okay=False)] = DOCS) -> None:
    for path in sorted(docs.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            path.write_text(filled, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    app()
