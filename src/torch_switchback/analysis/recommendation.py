"""Measure whether SwitchBack is faster for a model on this machine, and recommend a configuration."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import nn

from .._text import grouped, table
from .._timing import WORTH_CHANGING, Mode, Record, elapsed_ms, interleaved, speed_up
from ..config import SwitchBackConfig, config_of
from ..convert import _REPORT, convert_to_switchback, module_names, refuse_compiled, revert_switchback
from ..filters import default_filter, never_faster, with_min_tokens
from ..nn import SwitchBackLinear
from ..ops._validation import FLOAT_DTYPES
from ..tuning.break_even import cpu_us, rates_of
from .layer_calls import architecture_of, describe, device_of, dtype_name, every_layer_called, layer_calls, run
from .layer_steps import compare_layers, random_inputs, saved_bytes

LINEAR = "nn.Linear"
MEASURED = "measured"  # the choice of each layer's fastest recipe
DEFAULT = "default"  # the choice of convert_to_switchback without a config
MODEL_ROUNDS = 7  # in which the whole model is measured, as it is and converted
Measured = TypeVar("Measured")
Configs = dict[str, SwitchBackConfig | None]  # None for nn.Linear
WORDS = {
    MEASURED: "each layer's fastest recipe",
    DEFAULT: "convert_to_switchback's default",
    LINEAR: "nn.Linear everywhere",
}
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
        """Return an nn.Linear of this shape, or what a recipe makes of it, in int8 for any number of tokens."""
        dtype = getattr(torch, self.weight_dtype)
        layer = nn.Linear(self.in_features, self.out_features, self.bias, device=device, dtype=dtype)
        layer.requires_grad_(self.trains)
        if recipe == LINEAR:
            return layer
        return convert_to_switchback(layer, config=replace(config_of(recipe), min_tokens=0))


@dataclass(frozen=True)
class SpeedUp:
    """Holds the speed-ups over nn.Linear that were measured in several rounds."""

    median: float
    p10: float
    """10th percentile."""
    p90: float
    """90th percentile."""

    @property
    def is_noise(self) -> bool:
        """Return whether 1.0 lies within the spread."""
        return self.p10 <= 1 <= self.p90

    def __str__(self) -> str:
        return f"{self.median:.2f} × ({self.p10:.2f}–{self.p90:.2f})"


def _speed_up(record: Record) -> SpeedUp:
    return SpeedUp(record["speed_up"], record["speed_up_p10"], record["speed_up_p90"])


@dataclass(frozen=True)
class MeasuredLayer(LayerShape):
    """Holds a shape of layer, and what its training step takes: a forward, and a backward with the gradients wanted."""

    fqns: tuple[str, ...]
    """The layers that have it, once for each of their calls."""
    milliseconds: dict[str, float]
    """Time of a training step for each recipe, and for nn.Linear."""
    speed_ups: dict[str, SpeedUp]
    """Speed-up of each recipe."""
    saved_bytes: dict[str, int]
    """Bytes that one layer keeps for its backward, for each recipe and for nn.Linear."""
    recipe: str | None
    """The fastest recipe, if it is 2 % faster than nn.Linear beyond the spread."""
    reason: str
    """Why there is no such recipe; empty if there is one."""
    configs: Configs
    """Configuration by choice: "measured" for the recipe, and "default" for what convert_to_switchback takes."""

    @property
    def speed_up(self) -> float:
        """Return the speed-up of the fastest recipe over nn.Linear, recommended or not."""
        return self.milliseconds[LINEAR] / min(ms for name, ms in self.milliseconds.items() if name != LINEAR)


@dataclass(frozen=True)
class MeasuredModel:
    """Holds what a model's forward and backward take with nn.Linear, and by choice ("measured" and "default").

    A choice that converts nothing for the sample's number of tokens, or the same as another, is left out.
    """

    milliseconds: dict[str, float]
    speed_ups: dict[str, SpeedUp]
    saved_bytes: dict[str, int]
    """Bytes that all layers of the model together keep for the backward."""

    @property
    def recommended(self) -> str:
        """Return the choice that is fastest, if it is faster than nn.Linear beyond the spread, else "nn.Linear"."""
        faster = [choice for choice, gain in self.speed_ups.items() if gain.p10 > 1]
        return max(faster, key=lambda choice: self.speed_ups[choice].median, default=LINEAR)

    def __str__(self) -> str:
        lines = [f"the model's forward and backward: {self.milliseconds[LINEAR]:.2f} ms"]
        for choice, gain in self.speed_ups.items():
            noise = ", too noisy to tell" if gain.is_noise else ""
            kept = _kept(self.saved_bytes[LINEAR], self.saved_bytes[choice])
            lines.append(f"with {WORDS[choice]}: {gain}{noise}, {kept}")
        return "\n".join(lines)


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
    """None if there was no sample to run it on, or layers were measured in CUDA graphs."""

    @property
    def recommended(self) -> str:
        """Return the choice: "measured" (each layer's fastest recipe), "default", or "nn.Linear" everywhere."""
        if self.model is not None:
            return self.model.recommended
        return MEASURED if any(layer.recipe for layer in self.layers) else LINEAR

    @property
    def config(self) -> Configs:
        """Return configurations by the layers' names, for ``convert_to_switchback``; None for nn.Linear.

        The choice "measured" has ``min_tokens``: as many as were measured, or fewer if the shipped rule says so.
        """
        return self.config_of_choice(self.recommended)

    def config_of_choice(self, choice: str) -> Configs:
        """Return the configurations that a choice would be."""
        config: Configs = dict.fromkeys(self.left)
        for layer in sorted(self.layers, key=lambda layer: -layer.tokens):
            for fqn in layer.fqns:  # the smallest call decides, but None if that is best for one of them
                is_left = fqn in config and config[fqn] is None
                config[fqn] = None if is_left else layer.configs.get(choice)
        return config | {alias: config[fqn] for fqn, aliases in self.aliases.items() for alias in aliases}

    @property
    def linear_speed_up(self) -> float:
        """Return the speed-up of all measured linear layers together, each with its fastest recipe, over nn.Linear."""
        before, after = self._totals("milliseconds")
        return before / after

    @property
    def linear_saved_bytes(self) -> tuple[int, int]:
        """Return the bytes that they keep for the backward, as nn.Linear and with the fastest recipes.

        An input that several layers share counts once per layer.
        """
        return self._totals("saved_bytes")

    def _totals(self, quantity: str) -> tuple[Any, Any]:
        """Sum a quantity over the calls of all layers, as nn.Linear and with the fastest recipes."""
        values = [(layer, getattr(layer, quantity)) for layer in self.layers]
        before = sum(len(layer.fqns) * by_recipe[LINEAR] for layer, by_recipe in values)
        return before, sum(len(layer.fqns) * by_recipe[layer.recipe or LINEAR] for layer, by_recipe in values)

    def to_json(self) -> str:
        """Return the fields and properties as JSON. ``convert_to_switchback`` takes its "config"."""
        names = ("recommended", "config", "linear_speed_up", "linear_saved_bytes")
        properties = {name: getattr(self, name) for name in names}
        return json.dumps(dataclasses.asdict(self) | properties, default=dataclasses.asdict)

    def __str__(self) -> str:
        recipes = [name for name in self.layers[0].milliseconds if name != LINEAR]
        rows = []
        for layer in self.layers:
            times = layer.milliseconds
            sizes = (layer.tokens, layer.in_features, layer.out_features)
            fastest = layer.recipe or f"{LINEAR}: {layer.reason}"
            speed_ups = [layer.speed_ups[name] for name in recipes]
            rows.append((*sizes, layer.dtype, len(layer.fqns), f"{times[LINEAR]:.3f}", *speed_ups, fastest))
        headers = ("tokens", "in", "out", "dtype", "calls", f"{LINEAR}, ms", *recipes, "fastest")
        lines = [self.device, table(headers, rows)]
        left = grouped((fqn or "the model", reason) for fqn, reason in self.left.items())
        lines += [f"{fqn} stays nn.Linear: {reason}" for fqn, reason in left]
        lines.append(
            f"linear layers alone, each with its fastest: {self.linear_speed_up:.2f} ×, "
            f"{_kept(*self.linear_saved_bytes)} (an input of several layers counts for each)"
        )
        if self.model is not None:
            lines.append(str(self.model))
        lines.append(f"recommended: {WORDS[self.recommended]}{self._remark()}")
        return "\n".join(lines)

    def _remark(self) -> str:
        """Return why nn.Linear is recommended, or what was not measured."""
        gains = {} if self.model is None else self.model.speed_ups
        if self.recommended != LINEAR:
            takes = "; whether the whole model gains was not measured, which takes sample_input and not cuda_graph"
            return takes if self.model is None else ""
        if any(gain.is_noise for gain in gains.values()):
            return ", as the model's times are too noisy to tell whether int8 is faster"
        if MEASURED in gains:
            return (
                ", as int8 makes the model slower, though not its layers alone: on a GPU it is probably launch-bound, "
                "which more tokens or a CUDA graph change"
            )
        return ", as int8 makes no layer faster beyond the spread"


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
    """Measure each distinct layer shape of a model as nn.Linear and as SwitchBackLinear, and recommend a conversion.

    Layers are measured alone, in int8, with random values, interleaved. The choice "measured" gives a layer its fastest
    recipe if that is 2 % faster than nn.Linear beyond the spread. The LM head and LoRA's matrices stay. Given a sample,
    the model's forward and backward are then measured as they are, with this choice, and with the choice "default" of
    ``convert_to_switchback(model)``. The fastest is recommended; if no conversion is faster beyond the spread, it is
    nn.Linear everywhere. The model is nn.Linear again afterwards, and its gradients are untouched.

    Without a sample, or with cuda_graph, the whole model is not measured. Without a sample and without cuda_graph,
    layers stay nn.Linear whose step is shorter than the CPU time of an int8 step on a slow host, as a model whose GPU
    waits for the CPU gains nothing.

    Args:
        model: not converted yet. Of one that ``torch.compile`` has returned it is the original that is measured.
        sample_input: a tensor, a tuple of arguments or a mapping of keywords for the model, as large as in training.
            Under autocast, call this function under autocast too.
        tokens: instead of a sample, how many tokens each layer sees in a step; the model is not run then, and may be
            on the meta device.
        recipes: those to choose from (:data:`RECIPES`); by default the paper's and its memory-efficient variant, which
            leave the weight gradient in 16 bit. ``list(RECIPES)`` tries all.
        cuda_graph: measure layers in CUDA graphs, without the host's time, as for a model that will run in them.
        device: where the layers of a model on the meta device are measured: by default the GPU if there is one.
        dtype: what layers compute in if there is no sample; by default their weights' dtype.
        seconds: about so long for all layers' measurements, and for the model's, which runs seven times per choice at
            least; first calls, which compile kernels, come on top.
        progress: called before each measurement, with what was measured so far and what is measured next.

    Returns:
        The measurements; ``config`` is what follows, for ``convert_to_switchback``. Printed, it is a table.

    Raises:
        TypeError: model is no module, or sample_input is something else.
        ValueError: the model is converted, has no linear layer that could be measured, or returns no tensor that
            requires a gradient; int8 is faster for no layer on this GPU; there is no such recipe, recipes is empty, or
            not exactly one of sample_input and tokens is given.
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
    if where.type != "cpu" and (reason := never_faster(architecture_of(where))):
        raise ValueError(f"recommend: {reason}")
    found = Recommendation(describe(where), (), {}, {}, None)
    if sample_input is not None:
        progress(found, "the model on its sample")
    why_left = default_filter(model)
    names = module_names(model)
    left: dict[str, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    shapes: dict[LayerShape, list[str]] = {}
    linears = layer_calls(model, sample_input, tokens)
    for fqn, (layer, calls) in linears.items():
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

    found = replace(found, left=left, aliases=aliases)
    mode: Mode = "graph" if cuda_graph else "eager"
    is_checked, rates = sample_input is not None and not cuda_graph, rates_of(architecture_of(where))
    for number, (shape, fqns) in enumerate(shapes.items(), 1):
        progress(found, f"{number}/{len(shapes)}  {shape.tokens} tokens, {shape.in_features} → {shape.out_features}")
        records = _measure_shape(shape, recipes, where, seconds / len(shapes), mode)
        # Where the model is not measured, layers that may leave the GPU waiting for the CPU stay.
        least_ms = 0.0 if is_checked or cuda_graph else cpu_us(rates, trains=shape.trains) / 1e3
        measured = _choose(shape, fqns, records, linears[fqns[0]][0], least_ms)
        found = replace(found, layers=(*found.layers, measured))
    if is_checked:
        progress(found, "the model")
        found = replace(found, model=_measure_model(model, sample_input, _model_choices(found), where, seconds))
    return found


def _measure_shape(
    shape: LayerShape, recipes: Sequence[str], device: torch.device, seconds: float, mode: Mode
) -> list[Record]:
    """Return the records of nn.Linear and of the recipes.

    Raises:
        RuntimeError: one of them fails.
    """
    sizes = (shape.tokens, shape.in_features, shape.out_features)
    inputs = random_inputs(*sizes, copies=1, device=device, dtype=getattr(torch, shape.dtype))
    layers = {name: (partial(shape.new_layer, name, device), mode) for name in (LINEAR, *recipes)}
    records = compare_layers(layers, inputs, seconds=seconds)
    for record in records:
        if "reason" in record:
            raise RuntimeError(f"{record['name']}: {record['reason']}")
    return records


def _choose(
    shape: LayerShape, fqns: Sequence[str], records: Sequence[Record], layer: nn.Linear, least_ms: float
) -> MeasuredLayer:
    """Return what was measured of a shape, and the choices for its layers.

    Args:
        shape: of the calls.
        fqns: names of the layers.
        records: of nn.Linear and of the recipes.
        layer: one of the layers, which the shipped rule looks at.
        least_ms: a step of nn.Linear that is shorter stays as it is.
    """
    milliseconds = {record["name"]: record["median_ms"] for record in records}
    speed_ups = {record["name"]: _speed_up(record) for record in records if record["name"] != LINEAR}
    best, reason = min(speed_ups, key=milliseconds.__getitem__), ""
    if speed_ups[best].is_noise:
        reason = "too noisy to tell"
    elif milliseconds[best] * WORTH_CHANGING > milliseconds[LINEAR]:
        reason = "int8 is not faster"
    elif milliseconds[LINEAR] < least_ms:
        reason = f"shorter than the {least_ms:.2f} ms that an int8 step may cost the CPU"
    return MeasuredLayer(
        **dataclasses.asdict(shape),
        fqns=tuple(fqns),
        milliseconds=milliseconds,
        speed_ups=speed_ups,
        saved_bytes={record["name"]: record["saved_bytes"] for record in records},
        recipe=None if reason else best,
        reason=reason,
        configs={
            MEASURED: None if reason else _int8_from(shape.tokens, config_of(best), layer),
            DEFAULT: _by_rule(SwitchBackConfig(), layer),
        },
    )


def _by_rule(config: SwitchBackConfig, layer: nn.Linear) -> SwitchBackConfig | None:
    found = with_min_tokens(config, layer)
    return None if isinstance(found, str) else found


def _int8_from(tokens: int, config: SwitchBackConfig, layer: nn.Linear) -> SwitchBackConfig:
    """Return a configuration that takes int8 from a number of tokens on, or from fewer by the shipped rule."""
    by_rule = _by_rule(config, layer)
    return replace(config, min_tokens=tokens if by_rule is None else min(tokens, by_rule.min_tokens or 0))


def _model_choices(found: Recommendation) -> dict[str, Configs]:
    """Return the choices that make layers compute in int8, for as many tokens as were measured, and differ in that."""
    choices: dict[str, Configs] = {}
    effects: list[list[SwitchBackConfig | None]] = []
    for choice in (MEASURED, DEFAULT):
        configs = found.config_of_choice(choice)
        effect = [
            None if config is None or layer.tokens < (config.min_tokens or 0) else replace(config, min_tokens=0)
            for layer in found.layers
            for config in map(configs.get, layer.fqns)
        ]
        if any(effect) and effect not in effects:
            choices[choice] = configs
            effects.append(effect)
    return choices


def _measure_model(
    model: nn.Module, sample_input: Any, choices: Mapping[str, Configs], device: torch.device, seconds: float
) -> MeasuredModel:
    def forward() -> Any:
        with torch.enable_grad():
            return run(model, sample_input)

    def step() -> None:
        _gradients(model, sample_input)

    def converted(config: Configs, measurement: Callable[[], Measured]) -> Measured:
        reports = [(module, vars(module)[_REPORT]) for module in model.modules() if _REPORT in vars(module)]
        convert_to_switchback(model, config=config, module_filter_fn=lambda module, fqn: True)
        try:
            return measurement()
        finally:
            revert_switchback(model)  # drops the reports of earlier conversions, too
            for module, report in reports:
                object.__setattr__(module, _REPORT, report)

    def by_choice(measurement: Callable[[], Measured]) -> dict[str, Callable[[], Measured]]:
        after = {choice: partial(converted, config, measurement) for choice, config in choices.items()}
        return {LINEAR: measurement, **after}

    with every_layer_called(model):
        kept = {name: measurement() for name, measurement in by_choice(partial(saved_bytes, model, forward)).items()}
        step()
        times = max(1, int(seconds * 1e3 / (len(kept) * MODEL_ROUNDS * elapsed_ms(repeat(step), 1, device))))

        def clock() -> float:
            step()  # not counted: after a conversion the first one looks up its kernels
            return elapsed_ms(repeat(step), times, device) / times

        turns = interleaved(by_choice(clock), MODEL_ROUNDS)
    return MeasuredModel(
        {name: statistics.median(milliseconds) for name, milliseconds in turns.items()},
        {name: _speed_up(speed_up({"turns": turns[name]}, {"turns": turns[LINEAR]})) for name in choices},
        kept,
    )


def _gradients(model: nn.Module, sample_input: Any) -> None:
    """Compute the gradients of the sum of a model's outputs that its parameters and the sample want.

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
        inputs = [leaf for leaf in torch.utils._pytree.tree_leaves(sample_input) if isinstance(leaf, torch.Tensor)]
        wanted = [tensor for tensor in (*model.parameters(), *inputs) if tensor.requires_grad]
        torch.autograd.grad(torch.stack(losses).sum(), wanted, allow_unused=True)
