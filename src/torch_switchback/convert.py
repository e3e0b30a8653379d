"""Turn a model's nn.Linear layers into SwitchBackLinear in place, and back."""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from . import extensions
from ._text import table
from .config import SwitchBackConfig, config_of
from .filters import default_filter, look_up
from .nn import SwitchBackLinear

Model = TypeVar("Model", bound=nn.Module)
ConfigOrMap = SwitchBackConfig | str | Mapping[str, SwitchBackConfig | str | None]

_log = logging.getLogger(__name__)
_REPORT = "_switchback_report"
_ATTENTION = (
    "nn.MultiheadAttention multiplies by its projections' weights itself, out_proj's too; int8 needs an attention "
    "whose projections are nn.Linear layers that it calls"
)


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of a layer, of class ``kind``. If it was left alone, ``config`` is None and ``reason`` says why."""

    fqn: str
    kind: str
    in_features: int
    out_features: int
    config: SwitchBackConfig | None
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """Every linear layer of a model, and every nn.MultiheadAttention, whose projections are no layers."""

    layers: tuple[ConvertedLayer, ...]

    @property
    def converted(self) -> tuple[ConvertedLayer, ...]:
        """Return the layers that are SwitchBackLinear, whether this conversion or another one made them so."""
        return tuple(layer for layer in self.layers if layer.config is not None)

    @property
    def left(self) -> tuple[ConvertedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.config is None)

    def to_json(self) -> str:
        """Return a list of the layers' fields."""
        return json.dumps([asdict(layer) for layer in self.layers])

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            strategy = "left" if layer.config is None else layer.config.strategy
            sizes = str(layer.in_features), str(layer.out_features)
            rows.append((layer.fqn or "(the model)", *sizes, strategy, layer.reason))
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
    in float64 are refused when the layer is called. If a model is refused, nothing of it has been changed.

    Args:
        model: any module, on any device; a bare nn.Linear becomes a SwitchBackLinear itself.
        config: a SwitchBackConfig, the name of a recipe (:data:`RECIPES`), or a mapping from fully qualified names, as
            fnmatch patterns, to either or to None. A layer takes what stands under its very name, else under the first
            pattern that matches; under None, or under nothing, it stays nn.Linear. By default the paper's.
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
    if config is None:
        config = SwitchBackConfig()
    by_pattern = config if isinstance(config, Mapping) else {"*": config}
    patterns = {pattern: None if asked is None else config_of(asked) for pattern, asked in by_pattern.items()}
    default = default_filter(model)
    names = module_names(model)

    def choose(layer: nn.Module, fqns: list[str]) -> SwitchBackConfig | str:
        """Return a layer's configuration, or why it is left alone."""
        if isinstance(layer, nn.MultiheadAttention):
            return _ATTENTION
        if isinstance(layer, SwitchBackLinear):
            return layer.config
        if type(layer) is not nn.Linear:
            return f"{type(layer).__name__} is a subclass of nn.Linear and computes in its own way"
        found = {look_up(patterns, fqn) for fqn in fqns}
        asked = found.pop()
        if asked is None or None in found:
            return "config asks for nn.Linear"
        if found:
            raise ValueError(f"config: {' and '.join(fqns)} are one layer and get different configurations")
        if module_filter_fn is not None:
            if not all(module_filter_fn(layer, fqn) for fqn in fqns):
                return "module_filter_fn leaves it out"
        elif layer is not model and not any(fqn in patterns for fqn in fqns):
            for fqn in fqns:
                if reason := default(layer, fqn):
                    return reason
        if "forward" in vars(layer):
            reason = "its forward has been replaced on the instance, so another class would change nothing"
            warnings.warn(f"convert_to_switchback leaves {fqns[0]!r} alone: {reason}", stacklevel=3)
            return reason
        return asked

    rows: list[ConvertedLayer] = []
    chosen: dict[nn.Module, SwitchBackConfig] = {}
    for module, fqns in names.items():
        if isinstance(module, nn.MultiheadAttention):
            sizes = module.embed_dim, 3 * module.embed_dim
        elif isinstance(module, nn.Linear):
            sizes = module.in_features, module.out_features
        else:
            continue
        choice = choose(module, fqns)
        outcome = (None, choice) if isinstance(choice, str) else (choice, "")
        rows.append(ConvertedLayer(fqns[0], type(module).__name__, *sizes, *outcome))
        if not isinstance(choice, str) and not isinstance(module, SwitchBackLinear):
            chosen[module] = choice
    refuse_compiled("convert_to_switchback", model, chosen)
    report = ConversionReport(tuple(rows))
    linear_fqns = {fqn for module, fqns in names.items() if isinstance(module, nn.Linear) for fqn in fqns}
    unmatched = [p for p in patterns if p not in linear_fqns and not any(fnmatchcase(fqn, p) for fqn in linear_fqns)]
    if unmatched and isinstance(config, Mapping):
        called = " or ".join(map(repr, unmatched))
        warnings.warn(f"convert_to_switchback: config: no linear layer is called {called}", stacklevel=2)
    if not report.converted and any(patterns.values()):
        counted = Counter(layer.reason for layer in report.left).most_common()
        why = "; ".join(f"{count} × {reason}" for reason, count in counted) or "it has no nn.Linear"
        warnings.warn(
            f"convert_to_switchback converts no layer of the model ({why}); conversion_report(model) lists them",
            stacklevel=2,
        )
    if any(asked is not None and asked.all_gather == "int8" for asked in patterns.values()):
        extensions.distributed.use_int8_all_gather(model, chosen)
    for module, layer_config in chosen.items():  # from here on nothing raises: a model that is refused is as it was
        module.__class__ = SwitchBackLinear
        module.config = layer_config  # type: ignore[assignment]
    object.__setattr__(model, _REPORT, report)
    _log.info("%s", report)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """Return what :func:`convert_to_switchback` last did to a model, or to the first of its modules it was called on.

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


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all of its fully qualified names, several where it is shared."""
    names: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(fqn)
    return names


def refuse_compiled(caller: str, model: nn.Module, layers: Container[nn.Module]) -> None:
    """Raise RuntimeError if a layer is in a compiled module: what is traced keeps the class that the layer had."""
    for fqn, module in model.named_modules():
        compiled = module._compiled_call_impl is not None or "_orig_mod" in module._modules
        if compiled and any(part in layers for part in module.modules()):
            raise RuntimeError(
                f"{caller}: {fqn or 'the model'} is compiled already; {caller} goes before torch.compile"
            )
