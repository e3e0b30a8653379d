"""How a SwitchBack layer computes its three products, as data."""

from dataclasses import dataclass
from typing import Literal, get_args

WeightScaling = Literal["global", "rowwise"]
AllGather = Literal["high_precision", "int8"]


@dataclass(frozen=True)
class SwitchBackConfig:
    """The choices of arXiv 2304.13013, section 2.2 and appendix A.

    Args:
        weight_scaling: what one absmax of the weight covers. ``"global"``: the whole weight (algorithm 1).
            ``"rowwise"``: one output feature in the forward product and one input feature in the
            input-gradient product (algorithm 3, bitsandbytes' "vector-wise").
        mem_efficient: keep the input for the backward as int8 and one absmax a row instead of in its own
            dtype (algorithm 2). It halves what the layer keeps of a 16-bit input; the weight gradient then
            sees the quantised input.
        cache_quantized_weight: keep the int8 weight, plain and transposed, until the weight changes: gradient
            accumulation then quantises it once an optimiser step instead of once a microbatch. It takes 2 bytes an
            element of the weight from the first forward and backward on. The layer keeps it, so the functional
            form does not; compiled code ignores it. A change is what the parameter's version counter or data pointer
            shows: optimisers, ``load_state_dict`` and in-place edits do; writing through ``weight.data`` (as merging a
            LoRA adapter does) and an optimiser inside a CUDA graph do not.
        all_gather: in what FSDP2 (``fully_shard``) gathers the weights. ``"high_precision"``: in the dtype of its
            policy. ``"int8"``: as the codes that the layer computes with, quantised from the shards by the absmax
            over all of them (docs/scaling.md). Without FSDP2 it makes no difference.

    Raises:
        ValueError: for a ``weight_scaling`` or ``all_gather`` that does not exist.
    """

    weight_scaling: WeightScaling = "global"
    mem_efficient: bool = False
    cache_quantized_weight: bool = False
    all_gather: AllGather = "high_precision"

    def __post_init__(self) -> None:
        for name, values in (("weight_scaling", WeightScaling), ("all_gather", AllGather)):
            if getattr(self, name) not in get_args(values):
                known = ", ".join(map(repr, get_args(values)))
                raise ValueError(f"SwitchBackConfig: {name} must be one of {known}, got {getattr(self, name)!r}")

    def scales_of(self, out_features: int) -> int:
        """How many absmaxes a weight [out_features, in_features] has in the forward product."""
        return 1 if self.weight_scaling == "global" else out_features

    @property
    def strategy(self) -> str:
        """The name a person would call it by, as in the README's table: ``"rowwise, mem_efficient"``."""
        return self.weight_scaling + (", mem_efficient" if self.mem_efficient else "")
