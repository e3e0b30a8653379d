"""Decide which layers convert_to_switchback converts, and from how many tokens on they take int8."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from .config import SwitchBackConfig
from .kernels.device import architecture
from .ops.int8_matmul import cpu_path
from .tuning.break_even import min_tokens, rates_of

Value = TypeVar("Value")


def default_filter(model: nn.Module) -> Callable[[nn.Linear, str], str]:
    """Return a function of a linear layer and its fully qualified name: why the layer should stay, or "".

    Left are the LM head, whose logits need more than eight bits, and LoRA's two matrices. A layer is taken for the LM
    head if it is, or is a part of, what Transformers' ``get_output_embeddings()`` returns or what is called
    ``lm_head``; if its weight is an embedding's too; or if it and its copies, which PEFT trains instead, are the only
    layers whose weight has the shape of an embedding's.
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


def with_min_tokens(config: SwitchBackConfig, layer: nn.Linear) -> SwitchBackConfig | str:
    """Return a layer's configuration with ``min_tokens`` filled in, or why int8 is never faster for it."""
    if config.min_tokens is not None:
        return config
    where = _where(layer.weight.device)
    if reason := never_faster(where):
        return reason
    found = _with_min_tokens(config, layer.in_features, layer.out_features, layer.weight.requires_grad, where)
    return found or "int8 is never faster: too few features (min_tokens=0 converts it all the same)"


@functools.cache  # equal configurations are one object, as compiled code's guards compare them
def _with_min_tokens(
    config: SwitchBackConfig, in_features: int, out_features: int, trains: bool, where: str
) -> SwitchBackConfig | None:
    tokens = min_tokens(rates_of(where), in_features, out_features, config, trains=trains)
    return None if tokens is None else replace(config, min_tokens=tokens)


def never_faster(where: str) -> str:
    """Return why int8 is faster for no layer on an architecture, such as ``"sm_75"``, or on ``"cpu"``; else ""."""
    if where == "cpu":
        reason = cpu_path(64)[1]
        return f"int8 is not faster on this CPU: {reason}" if reason else ""
    if where.startswith("sm_") and int(where[3:]) < 80:
        return f"Triton does not support {where}: its kernels need compute capability 8.0, so nn.Linear runs instead"
    rates = rates_of(where)
    if rates.int8_tops <= rates.high_precision_tflops:
        return f"{where} multiplies int8 more slowly than 16-bit values"
    return ""


def _where(device: torch.device) -> str:
    """Return the architecture that a layer on a device is taken to run on (see convert_to_switchback)."""
    if device.type == "cuda":
        return architecture(device)
    if torch.cuda.is_initialized():  # asking for the GPU before would keep the process from forking
        return architecture(torch.device("cuda", torch.cuda.current_device()))
    return "gfx942" if torch.version.hip else "sm_90" if torch.version.cuda else "cpu"
