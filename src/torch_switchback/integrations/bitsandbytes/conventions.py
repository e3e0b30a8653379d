"""bitsandbytes' names and calling conventions, up to 0.49, for this library's layer and operations."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor, nn

from ... import ops
from ...nn import SwitchBackLinear as _SwitchBackLinear
from ...ops import quantize_columnwise_and_transpose, quantize_global, quantize_global_transpose, quantize_rowwise

__all__ = [
    "StandardLinear",
    "StandardLinearFunction",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "dequantize_rowwise",
    "int8_matmul_mixed_dequanitze",
    "int8_matmul_mixed_dequantize",
    "int8_matmul_rowwise_dequantize",
    "is_triton_available",
    "quantize_columnwise_and_transpose",
    "quantize_global",
    "quantize_global_transpose",
    "quantize_rowwise",
]


class SwitchBackLinear(_SwitchBackLinear):
    """A :class:`torch_switchback.SwitchBackLinear` that calls its input ``x`` and says how it was made."""

    reverts_to = nn.Linear

    @property
    def vector_wise_quantization(self) -> bool:
        return self.config.weight_scaling == "rowwise"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


SwitchBackLinearGlobal = partial(SwitchBackLinear, vector_wise_quantization=False)
SwitchBackLinearGlobalMemEfficient = partial(SwitchBackLinear, vector_wise_quantization=False, mem_efficient=True)
SwitchBackLinearVectorwise = partial(SwitchBackLinear, vector_wise_quantization=True)


class StandardLinear(nn.Linear):
    """An nn.Linear that calls its input ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class StandardLinearFunction:
    """Has ``apply(input, weight, bias=None)``, as an autograd Function would."""

    apply = staticmethod(nn.functional.linear)


def is_triton_available() -> bool:
    """Return whether Triton is installed. The layer and all operations work without it, too."""
    return importlib.util.find_spec("triton") is not None


def dequantize_rowwise(x: Tensor, state_x: Tensor) -> Tensor:
    """Return :func:`torch_switchback.ops.dequantize_rowwise` in float16."""
    return ops.dequantize_rowwise(x, _absmax("dequantize_rowwise", "state_x", state_x, x.shape[0]))


def _with_states(matmul: Callable[..., Tensor], one_per_column: bool) -> Callable[..., Tensor]:
    """Return a matmul of :mod:`torch_switchback.ops` that takes states of any dtype and shape."""

    @wraps(matmul)
    def call(
        a: Tensor,
        b: Tensor,
        state_x: Tensor,
        state_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float16,
    ) -> Tensor:
        state_x = _absmax(matmul.__name__, "state_x", state_x, a.shape[0])
        state_w = _absmax(matmul.__name__, "state_w", state_w, b.shape[1] if one_per_column else 1)
        return matmul(a, b, state_x, state_w, bias, out_dtype)

    return call


int8_matmul_mixed_dequantize = _with_states(ops.int8_matmul_mixed_dequantize, one_per_column=False)
int8_matmul_mixed_dequanitze = int8_matmul_mixed_dequantize  # spelled so up to 0.41
int8_matmul_rowwise_dequantize = _with_states(ops.int8_matmul_rowwise_dequantize, one_per_column=True)


def _absmax(op: str, name: str, state: Tensor, count: int) -> Tensor:
    """Return as float32 [count] what bitsandbytes' kernels read of a state, whatever its dtype and shape.

    They read past the end of a short one, as bitsandbytes' own benchmark makes them do. Here NaN stands there.
    """
    absmax = state.reshape(-1)[:count].float()
    missing = count - absmax.numel()
    if missing:
        warnings.warn(f"{op}: {name} has {absmax.numel()} values for {count}; the others are NaN", stacklevel=3)
        absmax = nn.functional.pad(absmax, (0, missing), value=float("nan"))
    return absmax
