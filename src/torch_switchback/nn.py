"""SwitchBackLinear, an nn.Linear whose forward and input-gradient matmuls run in int8, and its named variants."""

import warnings
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from .config import SwitchBackConfig, WeightScaling, config_of, strategy_of
from .functional import Prepared, linear
from .prepared import CACHES, PreparedWeight
from .weight_cache import WeightCache

torch.fx.wrap("linear")  # a node of its own in torch.fx's graphs where the layer is none


class SwitchBackLinear(PreparedWeight, nn.Linear):
    """A drop-in nn.Linear for INT8 training (SwitchBack, arXiv 2304.13013).

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether to add a learned bias.
        device: where the parameters live.
        dtype: the parameters' dtype: float16, bfloat16 or float32. The input may have another one.
        vector_wise_quantization: one absmax per row of the weight, per column in the backward, instead of one for all.
        mem_efficient: keep the input for the backward in int8 instead of its own dtype.
        config: a SwitchBackConfig or the name of a recipe, instead of the two before.

    Raises:
        ValueError: config comes with one of the two before, or there is no recipe of that name.
        TypeError: config is something else.

    Shape:
        input (*, in_features), output (*, out_features) in the input's dtype, or in autocast's.

    Its state_dict is nn.Linear's until :meth:`prepare_for_eval` replaces ``weight`` by ``weight_int8`` (int8 [out, in])
    and ``weight_absmax`` (float32, (1,) or (out,)). With ``rotate_features``, in is rounded up to whole blocks, and
    ``weight_rotation`` says of how many features.
    """

    reverts_to: ClassVar[type[nn.Linear]] = nn.Linear
    """Class that :func:`torch_switchback.revert_switchback` restores. It applies to exactly this class."""

    config: SwitchBackConfig
    _was_called: bool = False  # outside compiled code

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool = False,
        mem_efficient: bool = False,
        *,
        config: SwitchBackConfig | str | None = None,
    ) -> None:
        if config is None:
            scaling: WeightScaling = "rowwise" if vector_wise_quantization else "global"
            config = SwitchBackConfig(scaling, mem_efficient=mem_efficient)
        elif vector_wise_quantization or mem_efficient:
            raise ValueError(
                f"SwitchBackLinear: config={config!r} goes without vector_wise_quantization={vector_wise_quantization} "
                f"and mem_efficient={mem_efficient}: it says both itself"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.config = config_of(config)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (*, in_features) -> (*, out_features). Raises as :func:`switchback_linear` does."""
        if isinstance(input, torch.fx.Proxy) and self._is_leaf_of(input.tracer):
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        config = self.config
        if not torch.compiler.is_compiling():
            self.__dict__["_was_called"] = True  # conversion_report says which layers never were
        if self._weight_dtype is None and not config.cache_quantized_weight:
            return linear(input, self.weight, self.bias, config)
        prepared = cache = None
        if self.is_prepared:
            weight, absmax = self.weight_int8, self.weight_absmax
            transposed = self._transposed_for(input, weight, absmax) if config.cache_quantized_weight else None
            prepared = Prepared(absmax, transposed)
            if config.rotate_features is not None:
                self._check_width_of(input)
            if self.training and self._weight_requires_grad and torch.is_grad_enabled():
                if not torch.compiler.is_compiling():
                    _warn_that_it_does_not_train()
        else:
            weight = self.weight
            if isinstance(input, torch.Tensor) and not torch.compiler.is_compiling():
                if WeightCache.can_hold(weight):
                    cache = self.__dict__.setdefault("_weight_cache", WeightCache())
                else:  # it may be written to while it is frozen
                    self.__dict__.pop("_weight_cache", None)
        return linear(input, weight, self.bias, config, prepared, cache)

    def _check_width_of(self, input: torch.Tensor) -> None:
        """Raise ValueError if input's width is another: zeros fill up W's last rotated block, so the matmul fits many.

        torch.jit.trace cannot record this.
        """
        if isinstance(input, torch.Tensor) and not torch.jit.is_tracing() and input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"SwitchBackLinear: input must have shape (*, {self.in_features}), got {tuple(input.shape)}"
            )

    def _is_leaf_of(self, tracer: torch.fx.Tracer) -> bool:
        """Return whether torch.fx may record this layer as a module, as it records layers of torch.nn.

        What hooks and subclasses do around this forward is in the graph already, so they get a function's node.
        """
        has_hooks = self._forward_hooks or self._forward_pre_hooks
        return not has_hooks and self is not tracer.root and type(self).forward is SwitchBackLinear.forward

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":  # torch.ao.quantization gives one to all modules, and takes nn.Linear by its exact class
            warnings.warn(
                "torch.ao.quantization leaves SwitchBackLinear as it is: revert_switchback(model) first", stacklevel=2
            )
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which calls this."""
        raise NotImplementedError(
            "torch.jit.script cannot compile SwitchBackLinear: revert_switchback(model) makes its layers nn.Linear"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # without compiled code
        for name in CACHES:
            state.pop(name, None)
        if isinstance(self._former_weight, TensorWeakRef):  # which is not copied
            del state["_former_weight"]
        return state

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, strategy={strategy_of(self.config, is_prepared=self.is_prepared)}"


@cache
def _warn_that_it_does_not_train() -> None:
    warnings.warn(
        "SwitchBackLinear is prepared and called in training mode, with gradients: its weight does not train; call "
        "prepare_for_training(), or eval()",
        stacklevel=3,
    )


SwitchBackLinearGlobal = partial(SwitchBackLinear, vector_wise_quantization=False)
SwitchBackLinearGlobalMemEfficient = partial(SwitchBackLinear, vector_wise_quantization=False, mem_efficient=True)
SwitchBackLinearVectorwise = partial(SwitchBackLinear, vector_wise_quantization=True)
