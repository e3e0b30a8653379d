"""SwitchBackConfig, which says how a layer computes its three matmuls, and RECIPES, the named ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

WeightScaling = Literal["global", "rowwise"]
Precision = Literal["high_precision", "int8"]
ROTATIONS = (16, 32, 64, 128)  # rows or columns that a block Hadamard rotation mixes


@dataclass(frozen=True)
class SwitchBackConfig:
    """Says how a layer computes its three matmuls (arXiv 2304.13013, section 2.2 and appendix A).

    Args:
        weight_scaling: what one absmax of the weight covers. ``"global"``: the whole weight (algorithm 1).
            ``"rowwise"``: one output feature in the forward's matmul and one input feature in the input gradient's
            (algorithm 3, bitsandbytes' "vector-wise").
        mem_efficient: keep the input for the backward as int8 instead of in its own dtype (algorithm 2), half as much
            of a 16-bit one. The weight gradient then sees the quantized input. ``torch.compile`` keeps not even that
            where it can compute it again from what is kept anyway, as after a GELU or a norm.
        cache_quantized_weight: keep the int8 weight and its transpose, 2 bytes per element, until the weight changes:
            gradient accumulation then quantizes it once per optimizer step. The functional form ignores it, and so do
            compiled code and frozen weights unless the layer is prepared. A change is seen by the parameter's version
            counter and data pointer, and by the ``step`` of any ``torch.optim.Optimizer``. Between optimizer steps a
            broadcast of a trainable weight must be announced, as must all that writes through ``weight.data`` or raw
            memory (merging a LoRA adapter, DeepSpeed's engine, an optimizer inside a CUDA graph):
            ``torch.autograd.graph.increment_version(weight)``. A prepared layer keeps only the transpose, 1 more byte
            per element. ``freeze_base``, ``adapters_over_int8`` and eager calls with a backward compute it where it is
            missing or outdated; compiled code only uses it. All code notices ``load_state_dict`` and other tensors in
            the place of the int8 values. What writes into the int8 values, as torch.distributed.checkpoint's load and
            DistributedDataParallel's wrapping do, reaches compiled code only after one of these three.
        grad_weight: the dtype of the weight gradient's operands. ``"high_precision"``: the input's (the paper's
            choice). ``"int8"``: one absmax per column of X and of G, both rotated along the tokens. The layer then
            keeps the rotated int8 values of X, which are as small as mem_efficient's. Not for tensor-parallel layers.
        rotate_tokens: how many tokens (16, 32, 64 or 128) an orthogonal Hadamard matrix mixes before they are quantized
            for an int8 weight gradient; None: no rotation, which loses 10 dB where some tokens' gradients are large.
        all_gather: in what FSDP2 (``fully_shard``) gathers the weights. ``"high_precision"``: in the dtype of its
            policy. ``"int8"``: as the int8 values that the layer computes with, quantized from the shards by the absmax
            over all of them (docs/scaling.md). Without FSDP2 it makes no difference.
        rotate_features: how many features (16, 32, 64 or 128) an orthogonal Hadamard matrix mixes in both operands of
            the output and of the input gradient before they are quantized; None: no rotation. It spreads channels that
            are much larger than the others and would leave those a handful of int8 levels (docs/architecture.md). With
            ``weight_scaling="rowwise"`` only, in layers that are not tensor-parallel.
        min_tokens: with fewer tokens in a call the layer computes as nn.Linear does, with W and b cast to x's dtype,
            and has nn.Linear's own bits and gradients. None: :func:`convert_to_switchback` fills in from how many
            tokens on int8 is faster; a layer that is built directly takes 0, always int8. Prepared and tensor-parallel
            layers and weights that are gathered as int8 ignore it, as do ``torch.export``, ``torch.jit.trace`` and
            compiled code with a symbolic token count.

    Raises:
        ValueError: a value does not exist; min_tokens is negative; or ``rotate_features`` comes with
            ``weight_scaling="global"``, ``mem_efficient`` or ``all_gather="int8"``.
    """

    weight_scaling: WeightScaling = "global"
    mem_efficient: bool = False
    cache_quantized_weight: bool = False
    grad_weight: Precision = "high_precision"
    rotate_tokens: int | None = 64
    all_gather: Precision = "high_precision"
    rotate_features: int | None = None
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        choices = {"weight_scaling": get_args(WeightScaling)}
        choices |= dict.fromkeys(("grad_weight", "all_gather"), get_args(Precision))
        choices |= dict.fromkeys(("rotate_tokens", "rotate_features"), (None, *ROTATIONS))
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                one_of = ", ".join(map(repr, known))
                is_recipe = isinstance(value, str) and value in RECIPES
                hint = f"; RECIPES[{value!r}] is a whole SwitchBackConfig" if is_recipe else ""
                raise ValueError(f"SwitchBackConfig: {name} must be one of {one_of}, got {value!r}{hint}")
        if self.min_tokens is not None and (type(self.min_tokens) is not int or self.min_tokens < 0):
            raise ValueError(f"SwitchBackConfig: min_tokens must be None or an int from 0 on, got {self.min_tokens!r}")
        if self.rotate_features is not None:
            needs = {"weight_scaling": "rowwise", "mem_efficient": False, "all_gather": "high_precision"}
            for name, needed in needs.items():
                if (value := getattr(self, name)) != needed:
                    rotation = f"rotate_features={self.rotate_features}"
                    raise ValueError(f"SwitchBackConfig: {rotation} needs {name}={needed!r}, got {value!r}")

    def scales_of(self, out_features: int) -> int:
        """Return how many elements the absmax of a weight [out_features, in_features] has in the forward."""
        return 1 if self.weight_scaling == "global" else out_features

    @property
    def strategy(self) -> str:
        """Return a few words for tables and reprs, such as ``"rowwise, mem_efficient"``, which are no recipe's name."""
        parts: list[str] = [self.weight_scaling]
        if self.mem_efficient:
            parts.append("mem_efficient")
        if self.cache_quantized_weight:
            parts.append("cached")
        if self.rotate_features is not None:
            parts.append(f"features rotated by {self.rotate_features}")
        if self.grad_weight == "int8":
            parts.append("grad_weight int8" + (f" rotated by {self.rotate_tokens}" if self.rotate_tokens else ""))
        if self.min_tokens:
            parts.append(f"from {self.min_tokens} tokens")
        return ", ".join(parts)


def strategy_of(config: SwitchBackConfig, *, is_prepared: bool) -> str:
    """Return a layer's strategy in a few words. A prepared layer is int8 for any number of tokens."""
    if not is_prepared:
        return config.strategy
    left = replace(config, min_tokens=None, mem_efficient=False, grad_weight="high_precision")  # it trains nothing
    return f"{left.strategy}, prepared"


RECIPES = {
    "switchback": SwitchBackConfig(),
    "switchback_memory_efficient": SwitchBackConfig(mem_efficient=True),
    "switchback_int8_grad_weight": SwitchBackConfig(grad_weight="int8"),
    "rowwise": SwitchBackConfig("rowwise"),
    "rowwise_memory_efficient": SwitchBackConfig("rowwise", mem_efficient=True),
    "rowwise_int8_grad_weight": SwitchBackConfig("rowwise", grad_weight="int8"),
    "rowwise_rotated_features": SwitchBackConfig("rowwise", rotate_features=64),
}


def config_of(config: SwitchBackConfig | str | Mapping[str, Any]) -> SwitchBackConfig:
    """Return a configuration itself, the one of a recipe, or the one with these fields, as JSON keeps them.

    Raises:
        ValueError: there is no recipe of that name, or a field's value does not exist.
        TypeError: config is something else, or there is no such field.
    """
    if isinstance(config, Mapping):
        return SwitchBackConfig(**config)
    if isinstance(config, str):
        if config not in RECIPES:
            raise ValueError(f"config: the recipes are {', '.join(RECIPES)}; got {config!r}")
        return RECIPES[config]
    if not isinstance(config, SwitchBackConfig):
        raise TypeError(f"config must be a SwitchBackConfig or the name of a recipe, got {config!r}")
    return config
