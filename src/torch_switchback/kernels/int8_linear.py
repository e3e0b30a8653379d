"""The kernels of a matmul with a weight that is quantized or transposed first, one after the other."""

from typing import Any

import torch

from .device import empty
from .int8_matmul import plan_int8_matmul
from .launch import Plan
from .quantize_columnwise import plan_quantize_columnwise_and_transpose
from .quantize_folded_rowwise import plan_quantize_folded_rowwise
from .quantize_global import plan_quantize_global, plan_quantize_transpose_by_absmax
from .quantize_rowwise import plan_quantize_rowwise
from .transpose_int8 import plan_transpose_int8


def plan_int8_linear(
    x_int8: torch.Tensor,
    x_absmax: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rowwise: bool,
    out_dtype: torch.dtype,
    out: torch.Tensor,
    weight_absmax: torch.Tensor,
) -> Plan:
    shape = tuple(weight.shape)
    weight_int8 = empty(weight, shape, torch.int8)
    quantize = (plan_quantize_rowwise if rowwise else plan_quantize_global)(weight, weight_int8, weight_absmax)
    operands = x_int8, weight_int8.t(), x_absmax, weight_absmax, bias, out_dtype, out
    multiply = plan_int8_matmul(*operands, absmax_per_col=rowwise)

    def run(
        x_int8: Any, x_absmax: Any, weight: Any, bias: Any, rowwise: Any, out_dtype: Any, out: Any, weight_absmax: Any
    ) -> None:
        weight_int8 = empty(weight, shape, torch.int8)
        quantize(weight, weight_int8, weight_absmax)
        multiply(x_int8, weight_int8.t(), x_absmax, weight_absmax, bias, out_dtype, out)

    return run


def plan_int8_linear_grad_input(
    grad_int8: torch.Tensor,
    grad_absmax: torch.Tensor,
    weight: torch.Tensor,
    weight_absmax: torch.Tensor,
    rowwise: bool,
    out_dtype: torch.dtype,
    out: torch.Tensor,
) -> Plan:
    out_features, in_features = weight.shape
    shape = in_features, out_features
    transposed = empty(weight, shape, torch.int8)
    absmax = empty(weight, (in_features,), torch.float32) if rowwise else weight_absmax
    if rowwise:
        quantize = plan_quantize_columnwise_and_transpose(weight, transposed, absmax)
    else:
        quantize = plan_quantize_transpose_by_absmax(weight, absmax, transposed)
    operands = grad_int8, transposed.t(), grad_absmax, absmax, None, out_dtype, out
    multiply = plan_int8_matmul(*operands, absmax_per_col=rowwise)

    def run(
        grad_int8: Any, grad_absmax: Any, weight: Any, weight_absmax: Any, rowwise: bool, out_dtype: Any, out: Any
    ) -> None:
        transposed = empty(weight, shape, torch.int8)
        if rowwise:
            weight_absmax = empty(weight, (in_features,), torch.float32)
            quantize(weight, transposed, weight_absmax)
        else:
            quantize(weight, weight_absmax, transposed)
        multiply(grad_int8, transposed.t(), grad_absmax, weight_absmax, None, out_dtype, out)

    return run


def plan_prepared_grad_input(
    grad: torch.Tensor,
    weight_int8: torch.Tensor,
    weight_absmax: torch.Tensor,
    transposed: torch.Tensor | None,
    rowwise: bool,
    out_dtype: torch.dtype,
    out: torch.Tensor,
) -> Plan:
    out_features, in_features = weight_int8.shape
    transpose = None

    def new_transposed(weight_int8: torch.Tensor) -> torch.Tensor:
        return empty(weight_int8, (in_features, out_features), torch.int8)

    def new_quantized(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = grad.shape[0]
        return empty(grad, (tokens, out_features), torch.int8), empty(grad, (tokens,), torch.float32)

    if transposed is None:
        transposed = new_transposed(weight_int8)
        transpose = plan_transpose_int8(weight_int8, transposed)
    grad_int8, grad_absmax = new_quantized(grad)
    one = empty(grad, (1,), torch.float32) if rowwise else weight_absmax
    if rowwise:
        quantize = plan_quantize_folded_rowwise(grad, weight_absmax, grad_int8, grad_absmax, one)
    else:
        quantize = plan_quantize_rowwise(grad, grad_int8, grad_absmax)
    operands = grad_int8, transposed.t(), grad_absmax, one, None, out_dtype, out
    multiply = plan_int8_matmul(*operands, absmax_per_col=False)

    def run(
        grad: Any, weight_int8: Any, weight_absmax: Any, transposed: Any, rowwise: bool, out_dtype: Any, out: Any
    ) -> None:
        if transpose is not None:
            transposed = new_transposed(weight_int8)
            transpose(weight_int8, transposed)
        grad_int8, grad_absmax = new_quantized(grad)
        if rowwise:
            one = empty(grad, (1,), torch.float32)
            quantize(grad, weight_absmax, grad_int8, grad_absmax, one)
        else:
            one = weight_absmax
            quantize(grad, grad_int8, grad_absmax)
        multiply(grad_int8, transposed.t(), grad_absmax, one, None, out_dtype, out)

    return run
