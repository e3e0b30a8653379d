"""SwitchBackLinear, an nn.Linear whose forward and input-gradient products run in int8, and its named variants."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .autograd import WeightCache, quantize_weight, switchback_linear
from .config import SwitchBackConfig
from .ops import dequantize_rowwise


class SwitchBackLinear(nn.Linear):
    """A drop-in nn.Linear for INT8 training (SwitchBack, arXiv 2304.13013).

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether to add a learnt bias.
        device: where the parameters live.
        dtype: the parameters' dtype: float16, bfloat16 or float32. The input may have another one.
        vector_wise_quantization: one absmax a row of the weight (and a column, in the backward) instead of one
            for all of it.
        mem_efficient: keep the input for the backward in int8 instead of its own dtype.

    Shape:
        input (*, in_features), output (*, out_features) in the input's dtype (autocast's under autocast).

    Its state_dict is nn.Linear's until :meth:`prepare_for_eval` replaces ``weight`` by ``weight_int8``
    (int8 [out, in]) and ``weight_absmax`` (float32, (1,) or (out,)).
    """

    config: SwitchBackConfig
    weight_int8: torch.Tensor  # while prepared, as are the next three
    weight_absmax: torch.Tensor
    _weight_dtype: torch.dtype
    _weight_requires_grad: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool = False,
        mem_efficient: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.config = SwitchBackConfig(
            weight_scaling="rowwise" if vector_wise_quantization else "global", mem_efficient=mem_efficient
        )

    @property
    def is_prepared(self) -> bool:
        """Whether the weight has been replaced by its int8 codes."""
        return self.weight is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (*, in_features) -> (*, out_features). Raises as :func:`switchback_linear` does."""
        if self.is_prepared:
            return switchback_linear(x, self.weight_int8, self.bias, self.config, weight_absmax=self.weight_absmax)
        cache = None
        if self.config.cache_quantized_weight and not torch.compiler.is_compiling():
            cache = self.__dict__.setdefault("_weight_cache", WeightCache())
        return switchback_linear(x, self.weight, self.bias, self.config, weight_cache=cache)

    def prepare_for_eval(self) -> None:
        """Quantise the weight for good and free it: the same output bit for bit, less time and memory.

        The input still gets its gradient, the weight none. Calling it again does nothing.
        :meth:`prepare_for_training` undoes it.
        """
        if self.is_prepared:
            return
        weight = self.weight
        with torch.no_grad():
            codes, absmax = quantize_weight(weight, self.config)
        self._become_prepared(codes, absmax)

    def prepare_for_training(self) -> None:
        """Undo :meth:`prepare_for_eval`: a new ``weight`` parameter, dequantised, in the dtype it had.

        What was rounded away stays away (at most absmax / 254 an element), and an optimiser must be given the
        new parameter. On an unprepared layer it does nothing.
        """
        if not self.is_prepared:
            return
        absmax = self.weight_absmax.expand(self.out_features).contiguous()
        weight = dequantize_rowwise(self.weight_int8, absmax, self._weight_dtype)
        self._become_unprepared(weight)

    def _become_prepared(self, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        self._weight_dtype, self._weight_requires_grad = self.weight.dtype, self.weight.requires_grad
        self.weight = None  # type: ignore[assignment]
        self.__dict__.pop("_weight_cache", None)
        self.register_buffer("weight_int8", codes)
        self.register_buffer("weight_absmax", absmax)

    def _become_unprepared(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=self._weight_requires_grad)
        del self.weight_int8, self.weight_absmax, self._weight_dtype, self._weight_requires_grad

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SwitchBackLinear":
        """Move buffers between devices, but keep the absmax in float32 through ``.half()`` and ``.bfloat16()``."""
        absmax = self._buffers.get("weight_absmax")
        super()._apply(fn, recurse)
        if absmax is not None:
            self._weight_dtype = fn(absmax.new_empty(0, dtype=self._weight_dtype)).dtype
            if self.weight_absmax.dtype != torch.float32:
                self.weight_absmax = absmax.to(self.weight_absmax.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a training state_dict or a prepared one, whichever of the two this layer is."""
        prepared_keys = {f"{prefix}weight_int8", f"{prefix}weight_absmax"}
        if prepared_keys <= state_dict.keys() and not self.is_prepared:
            scales = 1 if self.config.weight_scaling == "global" else self.out_features
            self._become_prepared(
                torch.empty_like(self.weight, dtype=torch.int8, requires_grad=False),
                torch.empty(scales, dtype=torch.float32, device=self.weight.device),
            )
        elif f"{prefix}weight" in state_dict and self.is_prepared:
            self._become_unprepared(torch.empty_like(self.weight_int8, dtype=self._weight_dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, strategy={self.config.strategy}" + (", prepared" if self.is_prepared else "")


SwitchBackLinearGlobal = partial(SwitchBackLinear, vector_wise_quantization=False)
SwitchBackLinearGlobalMemEfficient = partial(SwitchBackLinear, vector_wise_quantization=False, mem_efficient=True)
SwitchBackLinearVectorwise = partial(SwitchBackLinear, vector_wise_quantization=True)
