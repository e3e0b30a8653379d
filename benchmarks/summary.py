"""The goals for one H200 beside what the results say, as a Markdown table.

    python benchmarks/summary.py benchmarks/results/h200

A goal is reached if its worst case reaches it. GOALS names the file and the field that each is read from.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from collect import collect
from measure import Mode, Record, find, new_app, ratio
from shapes import PRODUCTS, SMALL, Shape

app = new_app()
Cases = Iterator[tuple[str, float | None]]  # what it is of, and the value

VIT, LLAMA = PRODUCTS[:2], PRODUCTS[2:5]
FEWEST_ELEMENTS = 64 * 1024 * 1024


class Goal(NamedTuple):
    what: str
    reach: float
    script: str
    cases: Callable[[Record], Cases]
    at_most: bool = False
    form: str = "{:.2f}"

    def is_reached(self, value: float) -> bool:
        return value <= self.reach if self.at_most else value >= self.reach


def by_shape(value: str, /, shapes: tuple[Shape, ...] | None = None, **wanted: object) -> Callable[[Record], Cases]:
    """A field of the results with these other fields, of all shapes or of some."""

    def cases(document: Record) -> Cases:
        for record in document["results"]:
            if all(record.get(key) == wish for key, wish in wanted.items()):
                if shapes is None or tuple(record["shape"]) in shapes:
                    yield shape(record), record[value]

    return cases


def shape(record: Record) -> str:
    return str(Shape(*record["shape"]))


def share_of_copy(*operations: str) -> Callable[[Record], Cases]:
    def cases(document: Record) -> Cases:
        for record in document["results"]:
            rows, cols = record["shape"]
            if record["name"] in operations and rows * cols >= FEWEST_ELEMENTS:
                yield f"{rows} × {cols}", record["share_of_copy"]

    return cases


def share_of_limit(document: Record) -> Cases:
    for limit in document["limits"]:
        shown = "share_reached_in_a_graph" if tuple(limit["shape"]) == SMALL else "share_reached"
        yield f"{shape(limit)}, {limit['name']}", limit[shown]


def over(peer: str, peer_mode: str, name: str, mode: str) -> Callable[[Record], Cases]:
    """How many times as fast as a peer one of ours is, of each shape."""

    def cases(document: Record) -> Cases:
        for ours in document["results"]:
            if (ours["name"], ours["mode"]) == (name, mode) and tuple(ours["shape"]) in LLAMA + VIT:
                theirs = find(document["results"], name=peer, mode=peer_mode, shape=ours["shape"])
                yield shape(ours), ratio(theirs and theirs["median_ms"], ours["median_ms"])

    return cases


def model(name: str, value: str, competitor: str = "switchback", mode: Mode = "compiled") -> Callable[[Record], Cases]:
    return lambda document: (
        (record["model"], record[value])
        for record in document["results"]
        if name in record["model"] and record["name"] == competitor and record["mode"] == mode
    )


PEER = "torch._scaled_mm rowwise"
GOALS = (
    *(
        Goal(
            f"product over fp8 rowwise, forward and grad_input, {pace}",
            1.0,
            "bench_matmul",
            by_shape("switchback_speed_up", name=PEER, pace=pace),
        )
        for pace in ("interleaved", "sustained")
    ),
    *(
        Goal(f"{name}, share of copy bandwidth, ≥ 64 M elements", 0.92, "bench_quantize", share_of_copy(name))
        for name in (
            "quantize_rowwise",
            "quantize_global",
            "quantize_global_transpose",
            "quantize_global_with_transpose",
            "quantize_columnwise_and_transpose",
            "dequantize_rowwise",
        )
    ),
    Goal(
        "layer step, Llama shapes", 1.45, "bench_linear", by_shape("speed_up", LLAMA, name="switchback", mode="eager")
    ),
    Goal("layer step, ViT shapes", 1.30, "bench_linear", by_shape("speed_up", VIT, name="switchback", mode="eager")),
    Goal(
        "layer step, memory-efficient",
        1.38,
        "bench_linear",
        by_shape("speed_up", LLAMA + VIT, name="switchback-mem-efficient", mode="eager"),
    ),
    Goal(
        "bytes kept for the backward, memory-efficient, over nn.Linear",
        0.51,
        "bench_linear",
        by_shape("saved_over_linear", LLAMA + VIT, name="switchback-mem-efficient", mode="eager"),
        at_most=True,
        form="{:.3f}",
    ),
    Goal(
        "layer step, int8 grad_weight, 4096 ↔ 14336",
        1.65,
        "bench_linear",
        by_shape("speed_up", LLAMA[1:], name="int8-grad-weight", mode="eager"),
    ),
    Goal(
        "layer step, int8 grad_weight, ViT shapes",
        1.40,
        "bench_linear",
        by_shape("speed_up", VIT, name="int8-grad-weight", mode="eager"),
    ),
    Goal(
        "layer step, int8 grad_weight, over torchao float8 tensorwise, compiled",
        1.03,
        "bench_linear",
        over("torchao float8 tensorwise", "compiled", "int8-grad-weight", "eager"),
    ),
    Goal("layer step, share of Amdahl's limit", 0.95, "bench_linear", share_of_limit),
    Goal(
        "peak memory of the ViT-H blocks, memory-efficient, over nn.Linear",
        0.75,
        "bench_model",
        model("ViT", "peak_over_linear", "switchback-mem-efficient"),
        at_most=True,
    ),
    Goal("Llama blocks, compiled", 1.36, "bench_model", model("Llama", "speed_up")),
    Goal("ViT-H blocks, compiled", 1.20, "bench_model", model("ViT", "speed_up")),
    Goal(
        "Llama blocks, compiled, int8 grad_weight", 1.47, "bench_model", model("Llama", "speed_up", "int8-grad-weight")
    ),
    Goal("ViT-H blocks, compiled, int8 grad_weight", 1.27, "bench_model", model("ViT", "speed_up", "int8-grad-weight")),
    Goal("GPT of width 768, compiled, tokens/s", 1.05, "bench_model", model("GPT", "speed_up")),
    Goal(
        "GPT of width 768, compiled into CUDA graphs, tokens/s",
        1.05,
        "bench_model",
        model("GPT", "speed_up", mode="reduce-overhead"),
    ),
    Goal("prepared layer, few tokens", 1.6, "bench_inference", by_shape("speed_up", name="switchback")),
)


def row(goal: Goal, document: Record | None) -> tuple[str, ...]:
    """what, reach, the worst case, whether it is reached, and all cases."""
    reach = ("≤ " if goal.at_most else "≥ ") + goal.form.format(goal.reach)
    cases = [] if document is None else list(goal.cases(document))
    values = [value for _, value in cases if value is not None]
    if not values:
        return goal.what, reach, "–", "not measured", ""
    worst = max(values) if goal.at_most else min(values)
    reached = sum(goal.is_reached(value) for value in values)
    verdict = "yes" if reached == len(cases) else f"no ({reached} of {len(cases)})"
    listed = "; ".join(f"{name}: {'–' if value is None else goal.form.format(value)}" for name, value in cases)
    return goal.what, reach, goal.form.format(worst), verdict, listed


def table(documents: dict[str, Record]) -> str:
    header = ("goal", "reach", "worst case", "reached", "cases")
    return markdown(header, (row(goal, documents.get(goal.script)) for goal in GOALS))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ("---",) * len(header), *rows))


@app.command(help="The goals beside the results of a folder, as Markdown.")
def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)] = Path(__file__).parent / "results/h200",
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="a file to write instead")] = None,
) -> None:
    documents = collect(folder)
    text = table(documents)
    for script in documents:
        for name, origin in documents[script]["runs"].items():
            text += f"\n{name}: {origin['device']}, torch {origin['torch']}, Triton {origin['triton']}, "
            text += f"commit {str(origin['git_commit'])[:7]}, {origin['date'][:10]}"
            text += " (partial: `--quick`)\n" if origin["arguments"]["quick"] else "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()
