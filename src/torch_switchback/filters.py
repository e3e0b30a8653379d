"""Decide which layers convert_to_switchback leaves alone by default, and why; look layers up by name."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

Value = TypeVar("Value")

# The narrower side of the narrowest layers that have been seen to gain: trained on an H200 and compiled, a GPT whose
# layers have 1024 features and more gains, one of 768 gains or loses with the speed of the host (docs/performance.md).
# Quantizing costs in proportion to in + out, the products gain in proportion to in * out.
LEAST_FEATURES = 1024


def default_filter(model: nn.Module, least_features: int = LEAST_FEATURES) -> Callable[[nn.Linear, str], str]:
    """Return a function of a linear layer and its fully qualified name: why the layer should stay, or "".

    Left are the LM head, whose logits need more than eight bits; LoRA's two matrices; and layers with too few features
    for int8 to win. A layer is taken for the LM head if it is, or is a part of, what Transformers'
    ``get_output_embeddings()`` returns or what is called ``lm_head``; if its weight is an embedding's too; or if it and
    its copies, which PEFT trains instead, are the only layers whose weight has the shape of an embedding's.
    """
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    outputs = {part for module in model.modules() for part in _output_embeddings(module)}
    linears = {
        (fqn.partition(".modules_to_save.")[0].removesuffix(".original_module"), layer.out_features, layer.in_features)
        for fqn, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    shapes = Counter(tuple(shape) for _, *shape in linears)
    heads = [tuple(weight.shape) for weight in embeddings if shapes[tuple(weight.shape)] == 1]

    def why_left(layer: nn.Linear, fqn: str) -> str:
        names = fqn.lower().split(".")
        if "lora_a" in names or "lora_b" in names:
            return "LoRA's matrices are too thin for int8 to win"
        named = layer in outputs or "lm_head" in names
        tied = any(layer.weight is weight for weight in embeddings)
        if named or tied or (layer.out_features, layer.in_features) in heads:
            return "the LM head: its logits need more than eight bits"
        narrower = min(layer.in_features, layer.out_features)
        if narrower < least_features:
            return f"too few features: {narrower}, and below {least_features} int8 does not win"
        return ""

    return why_left


def _output_embeddings(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what Transformers has for a model's LM head (a layer, a list of them or a wrapper) with all its parts."""
    method = getattr(module, "get_output_embeddings", None)
    try:
        found = method() if callable(method) else None
    except Exception:  # a model without a head can inherit the method of one that has it, or mean something else by it
        return
    several = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else (found,)
    for head in several:
        if isinstance(head, nn.Module):
            yield from head.modules()


def look_up(patterns: Mapping[str, Value], fqn: str, default: Value | None = None) -> Value | None:
    """Return what stands under a layer's very name, else under the first fnmatch pattern that matches it."""
    if fqn in patterns:
        return patterns[fqn]
    return next((value for pattern, value in patterns.items() if fnmatchcase(fqn, pattern)), default)
