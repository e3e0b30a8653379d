"""Measure whether SwitchBack is faster for a model on this machine, and recommend a configuration."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import nn

from .._text import grouped, table
from .._timing import WORTH_CHANGING, Mode, elapsed_ms, interleaved
from ..config import config_of
from ..convert import convert_to_switchback, module_names, refuse_compiled, revert_switchback
from ..filters import default_filter
from ..nn import SwitchBackLinear
from ..ops._validation import FLOAT_DTYPES
from .layer_calls import describe, device_of, dtype_name, every_layer_called, layer_calls, run
from .layer_steps import compare_layers, random_inputs, saved_bytes

LINEAR = "nn.Linear"
MODEL_ROUNDS = 3  # in which the whole model is measured, as it is and converted
Measured = TypeVar("Measured")
# The paper's default and the variant that saves memory: the recipes between which only speed and memory decide.
CANDIDATES = ("switchback", "switchback_memory_efficient")


@dataclass(frozen=True)
class LayerShape:
    """Holds the properties of a layer's call that decide how long it takes."""

    tokens: int
    in_features: int
    out_features: int
    bias: bool
    dtype: str
    """Dtype of the computation, such as "bfloat16"."""
    weight_dtype: str
    trains: bool
    """True if the weight requires a gradient. The backward of a frozen weight has one matmul instead of two."""

    def new_layer(self, recipe: str, device: torch.device) -> nn.Linear:
        """Return an nn.Linear of this shape, or what a recipe makes of it."""
        dtype = getattr(torch, self.weight_dtype)
        layer = nn.Linear(self.in_features, self.out_features, self.bias, device=device, dtype=dtype)
        layer.requires_grad_(self.trains)
        return layer if recipe == LINEAR else convert_to_switchback(layer, config=recipe)


@dataclass(frozen=True)
class MeasuredLayer(LayerShape):
    """A shape of layer, with what its training step takes: the forward, and the backward with the gradients wanted."""

    fqns: tuple[str, ...]
    """The layers that have it, once for each of their calls."""
    milliseconds: dict[str, float]
    """Time of a training step for each recipe, and for nn.Linear."""
    saved_bytes: dict[str, int]
    """Bytes that one layer keeps for its backward, for each recipe and for nn.Linear."""
    recipe: str | None
    """The fastest, if it is 2 % faster than nn.Linear."""

    @property
    def speed_up(self) -> float:
        """Return the speed-up of the fastest recipe over nn.Linear, recommended or not."""
        return self.milliseconds[LINEAR] / min(ms for name, ms in self.milliseconds.items() if name != LINEAR)


@dataclass(frozen=True)
class MeasuredModel:
    """A model's forward and backward as it is and converted as recommended."""

    milliseconds: float
    milliseconds_converted: float
    saved_bytes: int
    """Bytes that all layers of the model together keep for the backward."""
    saved_bytes_converted: int

    @property
    def speed_up(self) -> float:
        return self.milliseconds / self.milliseconds_converted


@dataclass(frozen=True)
class Recommendation:
    """Holds the measurements and the recommended configuration. Printed, it is a table."""

    device: str
    layers: tuple[MeasuredLayer, ...]
    left: dict[str, str]
    """Layers that were not measured, and why."""
    aliases: dict[str, tuple[str, ...]]
    """The further names of a layer that has several, by the one that stands for it here."""
    model: MeasuredModel | None
    """None if there was no sample to run it on."""

    @property
    def config(self) -> dict[str, str | None]:
        """Recipes by the layers' names: what ``convert_to_switchback`` takes as config, and JSON keeps."""
        config: dict[str, str | None] = dict.fromkeys(self.left)
        for layer in self.layers:
            for fqn in layer.fqns:  # None if that is best for one of its shapes
                config[fqn] = layer.recipe if config.get(fqn, "") is not None else None
        return config | {alias: config[fqn] for fqn, aliases in self.aliases.items() for alias in aliases}

    @property
    def linear_speed_up(self) -> float:
        """Return the speed-up of all measured linear layers together, as recommended over nn.Linear."""
        before, after = self._totals("milliseconds")
        return before / after

    @property
    def linear_saved_bytes(self) -> tuple[int, int]:
        """Return the bytes that they keep for the backward, as nn.Linear and as recommended.

        An input that several layers share counts once per layer.
        """
        return self._totals("saved_bytes")

    def _totals(self, quantity: str) -> tuple[Any, Any]:
        """Sum a quantity over the calls of all layers, as nn.Linear and as recommended."""
        values = [(layer, getattr(layer, quantity)) for layer in self.layers]
        before = sum(len(layer.fqns) * by_recipe[LINEAR] for layer, by_recipe in values)
        return before, sum(len(layer.fqns) * by_recipe[layer.recipe or LINEAR] for layer, by_recipe in values)

    def to_json(self) -> str:
        """Return the fields and properties as JSON."""
        properties = {name: getattr(self, name) for name in ("config", "linear_speed_up", "linear_saved_bytes")}
        return json.dumps(dataclasses.asdict(self) | properties)

    def __str__(self) -> str:
        recipes = [name for name in self.layers[0].milliseconds if name != LINEAR]
        rows = []
        for layer in self.layers:
            times = layer.milliseconds
            speed_ups = [f"{times[LINEAR] / times[name]:.2f} ×" for name in recipes]
            sizes = (layer.tokens, layer.in_features, layer.out_features)
            rows.append(
                (*sizes, layer.dtype, len(layer.fqns), f"{times[LINEAR]:.3f}", *speed_ups, layer.recipe or LINEAR)
            )
        headers = ("tokens", "in", "out", "dtype", "calls", f"{LINEAR}, ms", *recipes, "recommended")
        lines = [self.device, table(headers, rows)]
        left = grouped((fqn or "the model", reason) for fqn, reason in self.left.items())
        lines += [f"{fqn} stays nn.Linear: {reason}" for fqn, reason in left]
        lines.append(
            f"linear layers: {self.linear_speed_up:.2f} ×, {_kept(*self.linear_saved_bytes)} "
            "(an input of several layers counts for each)"
        )
        if (model := self.model) is not None:
            times_of_model = f"{model.milliseconds:.2f} → {model.milliseconds_converted:.2f} ms"
            kept = _kept(model.saved_bytes, model.saved_bytes_converted)
            lines.append(f"the model's forward and backward: {model.speed_up:.2f} × ({times_of_model}), {kept}")
        return "\n".join(lines)


def _kept(before: int, after: int) -> str:
    return f"kept for the backward: {before / 2**20:.1f} → {after / 2**20:.1f} MiB"


def recommend(
    model: nn.Module,
    sample_input: Any = None,
    *,
    tokens: int | None = None,
    recipes: Sequence[str] = CANDIDATES,
    cuda_graph: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seconds: float = 2.0,
    progress: Callable[[Recommendation, str], object] = lambda found, following: None,
) -> Recommendation:
    """Measure each distinct layer shape of a model as nn.Linear and as SwitchBackLinear, and choose for each layer.

    Layers are measured alone, with random values, in turns. A layer gets the fastest recipe if that is 2 % faster than
    nn.Linear. The LM head and LoRA's matrices stay. Given a sample, the model is then run forward and backward as it is
    and as recommended; it is nn.Linear again afterwards, and its gradients are untouched.

    Args:
        model: not converted yet. Of one that ``torch.compile`` has returned it is the original that is measured.
        sample_input: a tensor, a tuple of arguments or a mapping of keywords for the model, as large as in training.
            Under autocast, call this function under autocast too.
        tokens: instead of a sample, how many tokens each layer sees in a step; the model is not run then, and may be
            on the meta device.
        recipes: those to choose from (:data:`RECIPES`); by default the paper's and its memory-efficient variant.
        cuda_graph: measure layers in CUDA graphs, without the host's time, as for a model that will be compiled.
        device: where the layers of a model on the meta device are measured: by default the GPU if there is one.
        dtype: what layers compute in if there is no sample; by default their weights' dtype.
        seconds: about so long for all layers' measurements; first calls, which compile kernels, come on top.
        progress: called before each measurement, with what was measured so far and what is measured next.

    Returns:
        The measurements; ``config`` is what follows, for ``convert_to_switchback``. Printed, it is a table.

    Raises:
        TypeError: model is no module, or sample_input is something else.
        ValueError: the model is converted, has no linear layer that could be measured, or returns no tensor that
            requires a gradient; there is no such recipe, recipes is empty, or not exactly one of sample_input and
            tokens is given.
        RuntimeError: ``compile()`` has been called on the model or a part of it, or a part is wrapped by torch.compile;
            or a layer's step fails.
    """
    where = device_of(model, device)
    model = model._modules.get("_orig_mod") or model
    refuse_compiled("recommend", model, {module for module in model.modules() if isinstance(module, nn.Linear)})
    if any(isinstance(module, SwitchBackLinear) for module in model.modules()):
        raise ValueError("recommend: model is converted already; revert_switchback(model) first")
    if not recipes:
        raise ValueError("recommend: recipes is empty")
    for recipe in recipes:
        config_of(recipe)  # refuses an unknown one
    found = Recommendation(describe(where), (), {}, {}, None)
    if sample_input is not None:
        progress(found, "the model on its sample")
    why_left = default_filter(model)
    names = module_names(model)
    left: dict[str, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    shapes: dict[LayerShape, list[str]] = {}
    for fqn, (layer, calls) in layer_calls(model, sample_input, tokens).items():
        if others := names[layer][1:]:
            aliases[fqn] = tuple(others)
        reason = next(filter(None, (why_left(layer, name) for name in names[layer])), "")
        if type(layer) is not nn.Linear:
            reason = "a subclass of nn.Linear"
        if not calls:
            reason = "the model did not call it"
        if odd := [call.dtype for call in calls if getattr(torch, call.dtype) not in FLOAT_DTYPES]:
            reason = f"it computes in {odd[0]}"
        if reason:
            left[fqn] = reason
            continue
        for call in calls:
            computes_in = dtype_name(dtype) if dtype is not None and tokens is not None else call.dtype
            sizes = (call.tokens, layer.in_features, layer.out_features)
            dtypes = (computes_in, dtype_name(layer.weight.dtype))
            shape = LayerShape(*sizes, layer.bias is not None, *dtypes, layer.weight.requires_grad)
            shapes.setdefault(shape, []).append(fqn)
    if not shapes:
        raise ValueError("recommend: model calls no linear layer that could be converted")
    if sample_input is not None:
        with every_layer_called(model):
            _gradients(model, sample_input)  # refuses a model whose backward could not be measured

    found = dataclasses.replace(found, left=left, aliases=aliases)
    mode: Mode = "graph" if cuda_graph else "eager"
    for number, (shape, fqns) in enumerate(shapes.items(), 1):
        progress(found, f"{number}/{len(shapes)}  {shape.tokens} tokens, {shape.in_features} → {shape.out_features}")
        measured = _measure_shape(shape, fqns, recipes, where, seconds / len(shapes), mode)
        found = dataclasses.replace(found, layers=(*found.layers, measured))
    if sample_input is not None:
        progress(found, "the model")
        found = dataclasses.replace(found, model=_measure_model(model, sample_input, found.config, where, seconds))
    return found


def _measure_shape(
    shape: LayerShape, fqns: Sequence[str], recipes: Sequence[str], device: torch.device, seconds: float, mode: Mode
) -> MeasuredLayer:
    sizes = (shape.tokens, shape.in_features, shape.out_features)
    inputs = random_inputs(*sizes, copies=1, device=device, dtype=getattr(torch, shape.dtype))
    layers = {name: (partial(shape.new_layer, name, device), mode) for name in (LINEAR, *recipes)}
    records = compare_layers(layers, inputs, seconds=seconds)
    for record in records:
        if "reason" in record:
            raise RuntimeError(f"{record['name']}: {record['reason']}")
    milliseconds = {record["name"]: record["median_ms"] for record in records}
    best = min(recipes, key=milliseconds.__getitem__)
    return MeasuredLayer(
        **dataclasses.asdict(shape),
        fqns=tuple(fqns),
        milliseconds=milliseconds,
        saved_bytes={record["name"]: record["saved_bytes"] for record in records},
        recipe=best if milliseconds[best] * WORTH_CHANGING <= milliseconds[LINEAR] else None,
    )


def _measure_model(
    model: nn.Module, sample_input: Any, config: dict[str, str | None], device: torch.device, seconds: float
) -> MeasuredModel:
    def forward() -> Any:
        with torch.enable_grad():
            return run(model, sample_input)

    def step() -> None:
        _gradients(model, sample_input)

    def as_recommended(measurement: Callable[[], Measured]) -> Measured:
        convert_to_switchback(model, config=config, module_filter_fn=lambda module, fqn: True)
        try:
            return measurement()
        finally:
            revert_switchback(model)

    with every_layer_called(model):
        kept = saved_bytes(model, forward), as_recommended(partial(saved_bytes, model, forward))
        step()
        times = max(1, int(seconds * 1e3 / (2 * MODEL_ROUNDS * elapsed_ms(repeat(step), 1, device))))

        def clock() -> float:
            step()  # not counted: after a conversion the first one looks up its kernels
            return elapsed_ms(repeat(step), times, device) / times

        clocks: dict[str, Callable[[], float]] = {"before": clock, "after": partial(as_recommended, clock)}
        milliseconds = interleaved(clocks, MODEL_ROUNDS)
    return MeasuredModel(statistics.median(milliseconds["before"]), statistics.median(milliseconds["after"]), *kept)


def _gradients(model: nn.Module, sample_input: Any) -> None:
    """Compute the gradients that a model's parameters want of the sum of its outputs.

    Raises:
        ValueError: none of the outputs requires a gradient.
    """
    with torch.enable_grad():
        leaves = torch.utils._pytree.tree_leaves(run(model, sample_input))
        losses = [leaf.float().sum() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if not losses:
            kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
            raise ValueError(
                f"recommend: model returns no tensor that requires a gradient (it returns {kinds}), so its backward "
                "cannot be measured; tokens= instead of sample_input measures its layers only"
            )
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(torch.stack(losses).sum(), wanted, allow_unused=True)
