"""Turn a model's nn.Linear layers into SwitchBackLinear in place, and back."""

import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from . import extensions
from ._text import table
from .config import SwitchBackConfig, config_of, strategy_of
from .filters import default_filter, look_up, with_min_tokens
from .nn import SwitchBackLinear
from .prepared import CACHES, INT8_STATE, refuse_to_train_wrapped
from .weight_readers import weights_read_by_parents

Model = TypeVar("Model", bound=nn.Module)
Asked = SwitchBackConfig | str | Mapping[str, Any] | None
ConfigOrMap = SwitchBackConfig | str | Mapping[str, Asked]

_log = logging.getLogger(__name__)
_REPORT = "_switchback_report"  # of a model that was converted, as it was then
_ATTENTION = (
    "nn.MultiheadAttention multiplies by its projections' weights itself, out_proj's too; int8 needs an attention "
    "whose projections are nn.Linear layers that it calls"
)
_SINCE = "added, renamed, replaced or reverted after the conversion"
_UNCALLED = "no call seen yet outside compiled code: a module that multiplies by the weight itself gets no int8"
# What has matrices but does not multiply by them, or is a convolution.
_UNLISTED = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.LayerNorm, nn.RMSNorm)
_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.utils.parametrize.ParametrizationList)
# What a SwitchBackLinear has beside nn.Linear's attributes.
_OURS = {*dir(SwitchBackLinear), "config", "_weight_requires_grad", *INT8_STATE, *CACHES} - {*dir(nn.Linear)}


@dataclass(frozen=True)
class ConvertedLayer:
    """Records what happened to a layer of class ``kind``.

    If the layer was not converted, ``config`` is None and ``reason`` says why. A converted layer has a reason if others
    have been called and it has not. For a module that is not a linear layer, ``in_features`` is the last dimension of
    its largest matrix, and ``out_features`` is the number of such rows.
    """

    fqn: str
    kind: str
    in_features: int
    out_features: int
    config: SwitchBackConfig | None
    reason: str
    is_prepared: bool = False


@dataclass(frozen=True)
class ConversionReport:
    """Every linear layer of a model, and every module that has matrices of its own, which no layer multiplies by.

    The latter are nn.MultiheadAttention, recurrent layers, Transformers' Conv1D, packed experts, and whatever else has
    matrices but no parts with parameters. Embeddings, norms and convolutions are not listed.
    """

    layers: tuple[ConvertedLayer, ...]

    @property
    def converted(self) -> tuple[ConvertedLayer, ...]:
        """Return the layers that are SwitchBackLinear, whether this conversion or another one made them so."""
        return tuple(layer for layer in self.layers if layer.config is not None)

    @property
    def left(self) -> tuple[ConvertedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.config is None)

    @property
    def summary(self) -> str:
        """Return how many layers are converted, and the share of the parameters that they have."""
        total, converted = (
            sum(layer.in_features * layer.out_features for layer in layers) for layers in (self.layers, self.converted)
        )
        share = 100 * converted / max(total, 1)
        return f"{len(self.converted)} of {len(self.layers)} linear layers, {share:.0f} % of their parameters"

    def to_json(self) -> str:
        """Return a list of the layers' fields."""
        return json.dumps([asdict(layer) for layer in self.layers])

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            strategy = "left" if layer.config is None else strategy_of(layer.config, is_prepared=layer.is_prepared)
            sizes = str(layer.in_features), str(layer.out_features)
            rows.append((layer.fqn or "(the model)", *sizes, strategy, layer.reason))
        return f"{self.summary}\n{table(('layer', 'in', 'out', 'strategy', 'why left, or not called'), rows)}"


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

    A configuration without ``min_tokens`` gets one for each layer: from so many tokens on int8 is faster than nn.Linear
    on the layer's GPU (docs/tuning.md). A layer for which int8 is never faster stays nn.Linear. For a model on the CPU,
    that GPU is the current one if CUDA is initialized, else an H200 (MI300 with ROCm). With a CPU build of PyTorch the
    CPU counts.

    The first process logs one line, at level INFO: how many layers are converted, and the share of the parameters that
    they have. A later call logs again only if it leaves other layers, or for other reasons.

    Args:
        model: any module, on any device; a bare nn.Linear becomes a SwitchBackLinear itself.
        config: a SwitchBackConfig, the name of a recipe (:data:`RECIPES`), or a mapping from fully qualified names, as
            fnmatch patterns, to either, to a mapping of SwitchBackConfig's fields, or to None. A layer takes what
            stands under its very name, else under the first pattern that matches; under None, or under nothing, it
            stays nn.Linear. By default the paper's.
        module_filter_fn: called with a linear layer and its fully qualified name (``""`` for the model itself);
            the layer is converted if it returns True, for each of its names if it has several, and int8 can be faster
            for it (``min_tokens=0`` converts it all the same). Without it, the LM head and LoRA's matrices stay, unless
            they are the model itself or a mapping has their very name.

    Returns:
        The same model.

    Warns:
        UserWarning: no layer of the model is a SwitchBackLinear afterwards, though config asks for it; config asks for
            another configuration of a layer that is converted already, which keeps its own; a layer is left alone since
            its forward has been replaced or it has an attribute ``config`` of its own; or a mapping has names or
            patterns that no linear layer of the model has.

    Raises:
        TypeError: model, config or module_filter_fn is something else.
        ValueError: there is no recipe of that name; a layer with several names gets several configurations; or
            all_gather is "int8" and a layer shares its weight with a module that needs it in full.
        RuntimeError: a layer to convert is in a compiled module; or all_gather is "int8" and fully_shard has been
            called already, or a weight is held by a view or by the graph of a forward.
    """
    _check_module("convert_to_switchback", model)
    if module_filter_fn is not None and not callable(module_filter_fn):
        raise TypeError(f"convert_to_switchback: module_filter_fn must be a function, got {module_filter_fn!r}")
    patterns = _patterns_of(config)
    names = module_names(model)
    rule = _Rule(model, patterns, config is not None, module_filter_fn)
    reasons: dict[str, str] = {}
    chosen: dict[nn.Module, SwitchBackConfig] = {}
    for module, fqns in names.items():
        if _sizes(module) is None:
            continue
        choice = rule.choose(module, fqns)
        reasons[fqns[0]] = choice if isinstance(choice, str) else ""
        if not isinstance(choice, str) and not isinstance(module, SwitchBackLinear):
            chosen[module] = choice
    refuse_compiled("convert_to_switchback", model, chosen)
    if isinstance(config, Mapping):
        _warn_of_unmatched(
            patterns, {fqn for module in names if isinstance(module, nn.Linear) for fqn in names[module]}
        )
    if rule.kept:
        some = " and ".join(map(repr, rule.kept[:3])) + " and others" * (len(rule.kept) > 3)
        warnings.warn(
            f"convert_to_switchback: config: {some} are converted already and keep their configuration; "
            "revert_switchback(model) before gives them another",
            stacklevel=2,
        )
    before = vars(model).get(_REPORT)
    is_news = before is None or reasons != {layer.fqn: layer.reason for layer in before.layers}
    if is_news and any(patterns.values()) and all(reasons.values()):
        counted = Counter(reasons.values()).most_common()
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
    report = _report(model, reasons)
    object.__setattr__(model, _REPORT, report)
    extensions.layers_changed(model)
    if is_news and _is_first_process():
        _log.info("SwitchBack: %s", report.summary)
    return model


def _patterns_of(config: ConfigOrMap | None) -> dict[str, SwitchBackConfig | None]:
    """Return what convert_to_switchback's config asks for, by name or pattern."""
    by_pattern = config if isinstance(config, Mapping) else {"*": SwitchBackConfig() if config is None else config}
    for pattern in by_pattern:
        if not isinstance(pattern, str):
            raise TypeError(f"convert_to_switchback: config must map layers' names, which are strings, got {pattern!r}")
    return {pattern: None if asked is None else config_of(asked) for pattern, asked in by_pattern.items()}


def _warn_of_unmatched(patterns: Iterable[str], linear_fqns: Collection[str]) -> None:
    """Warn of the names and patterns that no linear layer has."""
    unmatched = [
        pattern
        for pattern in patterns
        if pattern not in linear_fqns and not any(fnmatchcase(fqn, pattern) for fqn in linear_fqns)
    ]
    if unmatched:
        called = " or ".join(map(repr, unmatched))
        warnings.warn(f"convert_to_switchback: config: no linear layer is called {called}", stacklevel=3)


class _Rule:
    """Decides which layers of a model are converted, and how."""

    def __init__(
        self,
        model: nn.Module,
        patterns: Mapping[str, SwitchBackConfig | None],
        has_config: bool,
        module_filter_fn: Callable[[nn.Module, str], bool] | None,
    ) -> None:
        self._model, self._patterns, self._has_config, self._filter = model, patterns, has_config, module_filter_fn
        # Only where it decides: it asks the model for its output embeddings.
        self._default = default_filter(model) if module_filter_fn is None else None
        self.kept: list[str] = []
        """Names of converted layers that have another configuration than config asks for."""

    def choose(self, layer: nn.Module, fqns: list[str]) -> SwitchBackConfig | str:
        """Return a layer's configuration, or why it is left alone."""
        if isinstance(layer, SwitchBackLinear):
            wanted = {look_up(self._patterns, fqn, layer.config) for fqn in fqns}
            is_another = self._has_config and not wanted <= {layer.config, replace(layer.config, min_tokens=None)}
            if is_another and self._passes_filter(layer, fqns):
                self.kept.append(fqns[0])
            return layer.config
        if reason := _why_never(layer):
            return reason
        assert isinstance(layer, nn.Linear)
        found = {look_up(self._patterns, fqn) for fqn in fqns}
        asked = found.pop()
        if asked is None or None in found:
            return "config asks for nn.Linear"
        if found:
            raise ValueError(f"config: {' and '.join(fqns)} are one layer and get different configurations")
        if not self._passes_filter(layer, fqns):
            return "module_filter_fn leaves it out"
        if reason := self._default_reason(layer, fqns):
            return reason
        if reason := _why_it_cannot_change(layer):
            warnings.warn(f"convert_to_switchback leaves {fqns[0]!r} alone: {reason}", stacklevel=3)
            return reason
        return with_min_tokens(asked, layer)

    def _passes_filter(self, layer: nn.Module, fqns: list[str]) -> bool:
        return self._filter is None or all(self._filter(layer, fqn) for fqn in fqns)

    def _default_reason(self, layer: nn.Linear, fqns: list[str]) -> str:
        """Return why a layer is left unless the caller chooses it: by a filter, by its very name, or as the model."""
        if self._default is None or layer is self._model or any(fqn in self._patterns for fqn in fqns):
            return ""
        return next(filter(None, (self._default(layer, fqn) for fqn in fqns)), "")


def _why_it_cannot_change(layer: nn.Linear) -> str:
    """Return why another class would change nothing of a layer, or break it; or ""."""
    if "forward" in vars(layer):
        return "its forward has been replaced on the instance, so another class would change nothing"
    if own := sorted(name for name in _OURS if hasattr(layer, name)):
        return f"it has an attribute {own[0]!r} of its own, and SwitchBackLinear needs that name"
    return ""


def conversion_report(model: nn.Module) -> ConversionReport:
    """Return which layers of a model are SwitchBackLinear, and why :func:`convert_to_switchback` left the others.

    The report is of the model as it is: layers that were replaced after the conversion, as
    ``resize_token_embeddings`` replaces the LM head, are among those that are left.

    Args:
        model: the converted model, or a module that contains it. Of several converted ones, the first counts.

    Returns:
        A row for every linear layer, converted or not. Printed, it is a table.

    Raises:
        ValueError: it was called on none of them.
        TypeError: model is something else.
    """
    _check_module("conversion_report", model)
    for owner in model.modules():
        if _REPORT in vars(owner):
            reasons = {layer.fqn: layer.reason for layer in vars(owner)[_REPORT].layers}
            compiled = {part for _, module in compiled_modules(model) for part in module.modules()}
            return _report(owner, reasons, compiled)
    raise ValueError("conversion_report: model has not been through convert_to_switchback")


def _report(
    owner: nn.Module, reasons: Mapping[str, str], compiled: Container[nn.Module] | None = None
) -> ConversionReport:
    """Return the report of a model, given why layers were left, and which parts are compiled; None: just converted."""
    listed = [(fqn, module, sizes) for fqn, module in owner.named_modules() if (sizes := _sizes(module))]
    is_run = any(isinstance(module, SwitchBackLinear) and module._was_called for _, module, _ in listed)
    readers = weights_read_by_parents(owner) if is_run and compiled is not None else {}
    rows: list[ConvertedLayer] = []
    for fqn, module, sizes in listed:
        known = reasons.get(fqn) or reasons.get(fqn.removesuffix(".base_layer"))  # PEFT's name for what it wraps
        config, reason = None, _why_never(module) or known or _SINCE
        if isinstance(module, SwitchBackLinear):
            is_missed = is_run and compiled is not None and not module._was_called and module not in compiled
            config, reason = module.config, _UNCALLED if is_missed else ""
            if is_missed and module in readers:
                reason += f" ({readers[module]} reads it)"
        is_prepared = isinstance(module, SwitchBackLinear) and module.is_prepared
        rows.append(ConvertedLayer(fqn, type(module).__name__, *sizes, config, reason, is_prepared))
    return ConversionReport(tuple(rows))


def revert_switchback(model: Model) -> Model:
    """Make every SwitchBackLinear of a model an nn.Linear again, in place, its parameters the same objects.

    A layer that was prepared for evaluation gets its ``weight`` back, dequantized. A subclass of SwitchBackLinear, as
    torch.nn.utils.parametrize and fully_shard make one, is not reverted, and causes a warning. A subclass that sets
    ``reverts_to`` itself is reverted.

    Args:
        model: any module, converted or built with SwitchBackLinear.

    Returns:
        The same model.

    Raises:
        RuntimeError: fully_shard has cut up weights that are gathered as int8, or one of those is held by a view or by
            the graph of a forward; or a prepared layer's weight is to train, and in the model DistributedDataParallel
            or FSDP holds the layer.
        TypeError: model is something else.
    """
    _check_module("revert_switchback", model)
    layers = {
        fqn: module
        for fqn, module in model.named_modules()
        if isinstance(module, SwitchBackLinear) and "reverts_to" in vars(type(module))  # which no subclass inherits
    }
    refuse_to_train_wrapped("revert_switchback", model, layers)
    for layer in layers.values():
        layer.prepare_for_training()
    extensions.distributed.undo_int8_all_gather(model)  # of the weights that are back as well
    for fqn, module in model.named_modules():
        vars(module).pop(_REPORT, None)
        if not isinstance(module, SwitchBackLinear):
            continue
        reverts_to = vars(type(module)).get("reverts_to")  # a subclass does not inherit it
        if reverts_to is None:
            reason = f"{type(module).__name__} is a subclass of SwitchBackLinear"
            warnings.warn(f"revert_switchback leaves {fqn!r} as it is: {reason}", stacklevel=2)
            continue
        del module.config
        for name in (*CACHES, "_was_called"):
            vars(module).pop(name, None)
        module.__class__ = reverts_to
    extensions.layers_changed(model)
    return model


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all of its fully qualified names, several where it is shared."""
    names: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(fqn)
    return names


def refuse_compiled(caller: str, model: nn.Module, layers: Container[nn.Module]) -> None:
    """Raise RuntimeError if a layer is in a compiled module: what is traced keeps the class that the layer had."""
    for fqn, module in compiled_modules(model):
        if any(part in layers for part in module.modules()):
            raise RuntimeError(
                f"{caller}: {fqn or 'the model'} is compiled already; {caller} goes before torch.compile"
            )


def compiled_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model that are compiled, by name."""
    for fqn, module in model.named_modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            yield fqn, module


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return in_features and out_features of what has a row in the report, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    has_parts = any(True for part in module.children() for _ in part.parameters())
    if has_parts or isinstance(module, _UNLISTED + _CONTAINERS):
        return None
    own = (each for each in module.parameters(recurse=False) if not nn.parameter.is_lazy(each))
    matrices = [each for each in own if each.numel() and sum(size > 1 for size in each.shape) > 1]
    if not matrices:
        return None
    columns = max(matrices, key=torch.numel).shape[-1]
    return columns, sum(map(torch.numel, matrices)) // columns


def _why_never(module: nn.Module) -> str:
    """Return why no layer of this class can be converted, or ""."""
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} holds its weights itself: only nn.Linear layers are converted"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear and computes in its own way"
    return ""


def _is_first_process() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # torchrun's


def _check_module(caller: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {model!r}")
