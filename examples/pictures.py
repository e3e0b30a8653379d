"""Share the look of all pictures: a color for each recipe, and names beside what they name."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

BASELINE = "nn.Linear bf16"
DARK = "#222222"
GREY = "#777777"
LABEL_HEIGHT = 0.075  # of a name, as a share of its panel

# Okabe and Ito's colors, which color-blind readers tell apart. No picture has two series of one color.
COLORS = {
    "linear": GREY,
    "linear, again": "#000000",
    "bf16": GREY,
    "switchback": "#0072b2",
    "switchback_memory_efficient": "#56b4e9",
    "switchback_int8_grad_weight": "#009e73",
    "all int8": "#009e73",
    "all int8, not rotated": "#8b5a2b",
    "rowwise": "#cc79a7",
    "rowwise_memory_efficient": "#e69f00",
    "recommended": "#cc79a7",
    "torch._scaled_mm tensorwise": "#d55e00",
    "torchao float8 tensorwise": "#d55e00",
    "torch._scaled_mm rowwise": "#e69f00",
    "torchao float8 rowwise": "#e69f00",
    "torch._int_mm": "#cc79a7",
    "torchao int8": "#cc79a7",
}
Points = Sequence[tuple[int, float]]  # (steps done, loss)


def color(name: str) -> str:
    return COLORS.get(name, DARK)


def draw_losses(losses: Axes, differences: Axes | None, curves: Mapping[str, Points], baseline: str = BASELINE) -> None:
    """Draw validation losses, and how far they are from those of nn.Linear.

    Args:
        losses: where the losses go.
        differences: where the differences go, in percent. None draws the losses alone.
        curves: per recipe its losses, after the same steps for all recipes.
        baseline: the label of "linear".
    """
    linear = curves.get("linear")
    labels = {name: baseline if name == "linear" else name for name in curves}
    style = {"marker": "o", "markersize": 3, "linewidth": 1.2}
    lines = {
        labels[name]: losses.plot(*zip(*curves[name], strict=True), color=color(name), **style)[0] for name in curves
    }
    finish(losses, lines)
    if differences is None or linear is None:
        return
    lines = {}
    for name, points in curves.items():
        steps, percent = [], []
        for (step, ours), (_, theirs) in zip(points, linear, strict=True):
            steps.append(step)
            percent.append(100 * (ours / theirs - 1))
        lines[labels[name]] = differences.plot(steps, percent, color=color(name), **style)[0]
    differences.set_ylabel(f"difference to {baseline}, %")
    finish(differences, lines)


def finish(axes: Axes, lines: Mapping[str, Line2D]) -> None:
    """Write each curve's name beside its right end, far enough apart to be read."""
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    ends = {name: line.get_xydata()[-1] for name, line in lines.items()}
    low, high = axes.get_ylim()
    gap = (high - low) * LABEL_HEIGHT
    heights: dict[str, float] = {}
    for name in sorted(ends, key=lambda name: ends[name][1]):
        heights[name] = max([ends[name][1], *(height + gap for height in heights.values())])
    shift = sum(heights[name] - ends[name][1] for name in ends) / len(ends)
    shift = min(shift, min(heights.values()) - low)
    for name, line in lines.items():
        axes.annotate(
            name,
            xy=ends[name],
            xytext=(1.06, heights[name] - shift),
            textcoords=axes.get_yaxis_transform(),
            verticalalignment="center",
            fontsize=9,
            color=DARK,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 1.2, "relpos": (0, 0.5)},
        )
