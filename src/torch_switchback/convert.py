"""Turn a model's nn.Linear layers into SwitchBackLinear in place, and back."""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn

from . import extensions
from ._text import table
from .config import SwitchBackConfig, config_of
from .filters import default_filter, look_up, unmatched
from .nn import SwitchBackLinear

Model = TypeVar("Model", bound=nn.Module)
Config = SwitchBackConfig | str
ConfigOrMap = Config | Mapping[str, Config | None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of a layer."""

    fqn: str
    kind: str
    """Its class before."""
    in_features: int
    out_features: int
    config: SwitchBackConfig | None
    """None: it was left alone."""
    reason: str
    """Why it was left alone; empty if it was not."""


@dataclass(frozen=True)
class ConversionReport:
    """Every linear layer of a model, and every nn.MultiheadAttention, whose projections are no layers."""

    layers: tuple[ConvertedLayer, ...]

    @property
    def converted(self) -> tuple[ConvertedLayer, ...]:
        """The layers that are SwitchBackLinear now, those that were before too."""
        return tuple(layer for layer in self.layers if layer.config is not None)

    @property
    def left(self) -> tuple[ConvertedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.config is None)

    def to_json(self) -> str:
        """A list of the layers' fields."""
        return json.dumps([asdict(layer) for layer in self.layers])

    def __str__(self) -> str:
        rows = [
            (
                layer.fqn or "(the model)",
                str(layer.in_features),
                str(layer.out_features),
                "left" if layer.config is None else layer.config.strategy,
                layer.reason,
            )
            for layer in self.layers
        ]
        summary = f"{len(self.converted)} of {len(self.layers)} layers are SwitchBackLinear"
        return f"{summary}\n{table(('layer', 'in', 'out', 'strategy', 'why left'), rows)}"


def convert_to_switchback(
    model: Model,
    *,
    config: ConfigOrMap | None = None,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Model:
    """Make a model's exact nn.Linear layers SwitchBackLinear, in place. :func:`conversion_report` says which and why.

    Only the layer's class changes: parameters, hooks and state_dict keys stay the same objects, so optimizers
    and checkpoints stay valid. Subclasses of nn.Linear and layers that are converted already are left alone. Parameters
    in a dtype that the int8 products do not take (float64) are refused when the layer is called. If a model is refused,
    nothing of it has been changed.

    Args:
        model: any module, on any device; a bare nn.Linear becomes a SwitchBackLinear itself.
        config: how the layers compute: a SwitchBackConfig, the name of a recipe (:data:`RECIPES`), or a mapping from
            fully qualified names, as fnmatch patterns, to either or to None. A layer takes what stands under its very
            name, else under the first pattern that matches; under None, or under nothing, it stays nn.Linear. By
            default the paper's configuration.
        module_filter_fn: called with a linear layer and its fully qualified name (``""`` for the model itself);
            the layer is converted if it returns True, for each of its names if it has several. Without it, layers
            with too few features for int8 to win, the LM head and LoRA's matrices stay, unless they are the model
            itself or a mapping has their very name.

    Returns:
        The same model.

    Warns:
        UserWarning: no layer of the model is a SwitchBackLinear afterwards, though config asks for it; or a mapping has
            names or patterns that no linear layer of the model has.

    Raises:
        TypeError: config is something else.
        ValueError: there is no recipe of that name; a layer with several names gets several configurations; or
            all_gather is "int8" and a layer shares its weight with a module that needs it in full.
        RuntimeError: a layer to convert is in a compiled module; or all_gather is "int8" and fully_shard has been
            called already, or a weight is held by a view or by the graph of a forward.
    """
    patterns = _patterns(config)
    default = default_filter(model)

    def why_filtered(layer: nn.Linear, fqns: list[str]) -> str:
        if module_filter_fn is not None:
            return "" if all(module_filter_fn(layer, fqn) for fqn in fqns) else "module_filter_fn leaves it out"
        if layer is model or any(fqn in patterns for fqn in fqns):
            return ""
        return next(filter(None, (default(layer, fqn) for fqn in fqns)), "")

    rows: list[ConvertedLayer] = []
    chosen: dict[nn.Module, SwitchBackConfig] = {}
    names = module_names(model)
    for module, fqns in names.items():
        if isinstance(module, nn.MultiheadAttention):
            rows.append(_row(module, fqns[0], None, _ATTENTION))
        if not isinstance(module, nn.Linear):
            continue
        if isinstance(module, SwitchBackLinear):
            rows.append(_row(module, fqns[0], module.config, ""))
        elif type(module) is not nn.Linear:
            reason = f"{type(module).__name__} is a subclass of nn.Linear and computes in its own way"
            rows.append(_row(module, fqns[0], None, reason))
        elif (found := _config_of_layer(patterns, fqns)) is None:
            rows.append(_row(module, fqns[0], None, "config asks for nn.Linear"))
        elif reason := why_filtered(module, fqns):
            rows.append(_row(module, fqns[0], None, reason))
        elif "forward" in vars(module):
            reason = "its forward has been replaced on the instance, so another class would change nothing"
            warnings.warn(f"convert_to_switchback leaves {fqns[0]!r} alone: {reason}", stacklevel=2)
            rows.append(_row(module, fqns[0], None, reason))
        else:
            rows.append(_row(module, fqns[0], found, ""))
            chosen[module] = found
    refuse_compiled("convert_to_switchback", model, chosen)
    report = ConversionReport(tuple(rows))
    linear_fqns = {fqn for module, fqns in names.items() if isinstance(module, nn.Linear) for fqn in fqns}
    if isinstance(config, Mapping) and (keys := unmatched(config, linear_fqns)):
        called = " or ".join(map(repr, keys))
        warnings.warn(f"convert_to_switchback: config: no linear layer is called {called}", stacklevel=2)
    if not report.converted and any(patterns.values()):
        warnings.warn(_nothing_converted(report), stacklevel=2)
    if any(asked is not None and asked.all_gather == "int8" for asked in patterns.values()):
        extensions.distributed.use_int8_all_gather(model, chosen)
    for module, found in chosen.items():  # from here on nothing raises: a model that is refused is as it was
        module.__class__ = SwitchBackLinear
        module.config = found  # type: ignore[assignment]
    object.__setattr__(model, _REPORT, report)
    _log.info("%s", report)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What the last :func:`convert_to_switchback` did to a model, or to the first of its modules that it was called on.

    Args:
        model: any module.

    Returns:
        A row for every linear layer, converted or not. Printed, it is a table.

    Raises:
        ValueError: it was called on none of them.
    """
    for module in model.modules():
        if _REPORT in vars(module):
            return vars(module)[_REPORT]
    raise ValueError("conversion_report: model has not been through convert_to_switchback")


def revert_switchback(model: Model) -> Model:
    """Make every SwitchBackLinear of a model an nn.Linear again, in place, its parameters the same objects.

    A layer that was prepared for evaluation gets a new ``weight``, dequantized. Subclasses of SwitchBackLinear, such as
    torch.nn.utils.parametrize and fully_shard make, stay, with a warning each, but for those that set ``reverts_to``
    themselves.

    Args:
        model: any module, converted or built with SwitchBackLinear.

    Returns:
        The same model.

    Raises:
        RuntimeError: fully_shard has cut up weights that are gathered as int8, or one of those is held by a view or by
            the graph of a forward.
    """
    extensions.distributed.undo_int8_all_gather(model)
    for fqn, module in model.named_modules():
        vars(module).pop(_REPORT, None)
        if not isinstance(module, SwitchBackLinear):
            continue
        reverts_to = vars(type(module)).get("reverts_to")  # a subclass does not inherit it
        if reverts_to is None:
            reason = f"{type(module).__name__} is a subclass of SwitchBackLinear"
            warnings.warn(f"revert_switchback leaves {fqn!r} as it is: {reason}", stacklevel=2)
            continue
        module.prepare_for_training()
        del module.config
        module.__dict__.pop("_weight_cache", None)
        module.__class__ = reverts_to
    return model


_REPORT = "_switchback_report"
_ATTENTION = (
    "nn.MultiheadAttention multiplies by its projections' weights itself, out_proj's too; int8 needs an attention "
    "whose projections are nn.Linear layers that it calls"
)


def _patterns(config: Any) -> dict[str, SwitchBackConfig | None]:
    if config is None:
        config = SwitchBackConfig()
    if not isinstance(config, Mapping):
        return {"*": config_of(config)}
    return {pattern: None if value is None else config_of(value) for pattern, value in config.items()}


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all of its fully qualified names, several where it is shared."""
    names: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(fqn)
    return names


def _config_of_layer(patterns: Mapping[str, SwitchBackConfig | None], fqns: list[str]) -> SwitchBackConfig | None:
    found = {fqn: look_up(patterns, fqn) for fqn in fqns}
    if None in found.values():
        return None
    if len(set(found.values())) > 1:
        raise ValueError(f"config: {' and '.join(fqns)} are one layer and get different configurations")
    return found[fqns[0]]


def _nothing_converted(report: ConversionReport) -> str:
    reasons = Counter(layer.reason for layer in report.left).most_common()
    why = "; ".join(f"{count} × {reason}" for reason, count in reasons) or "it has no nn.Linear"
    return f"convert_to_switchback converts no layer of the model ({why}); conversion_report(model) lists them"


def _row(module: nn.Module, fqn: str, config: SwitchBackConfig | None, reason: str) -> ConvertedLayer:
    if isinstance(module, nn.MultiheadAttention):
        in_features, out_features = module.embed_dim, 3 * module.embed_dim
    else:
        assert isinstance(module, nn.Linear)
        in_features, out_features = module.in_features, module.out_features
    return ConvertedLayer(fqn, type(module).__name__, in_features, out_features, config, reason)


def refuse_compiled(caller: str, model: nn.Module, layers: Container[nn.Module]) -> None:
    """What torch.compile has traced keeps the class that a layer had.

    Raises:
        RuntimeError: one of the layers is in a compiled module.
    """
    for fqn, module in model.named_modules():
        compiled = module._compiled_call_impl is not None or "_orig_mod" in module._modules
        if compiled and any(part in layers for part in module.modules()):
            raise RuntimeError(
                f"{caller}: {fqn or 'the model'} is compiled already; {caller} goes before torch.compile"
            )
