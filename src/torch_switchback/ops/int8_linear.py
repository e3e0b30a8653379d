"""A weight's quantization and its matmul in one operation, because every operation costs CPU time.

The functions here are the references. The layer calls the operations of the same names.

The input's quantization stays an operation of its own, so that a compiler can share it among the layers of one input.
"""

import torch

from ..kernels.device import empty
from ._library import define, dispatched


def _fake_int8_linear(
    x_int8: torch.Tensor,
    x_absmax: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rowwise: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    out_features = weight.shape[0]
    scales = out_features if rowwise else 1
    return empty(x_int8, (x_int8.shape[0], out_features), out_dtype), empty(x_int8, (scales,), torch.float32)


def _int8_linear_reference(
    x_int8: torch.Tensor,
    x_absmax: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rowwise: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight, and multiply quantized rows with it: the reference.

    Args:
        x_int8: int8 [tokens, in].
        x_absmax: float32 [tokens].
        weight: [out, in], float.
        bias: [out], float, or None.
        rowwise: whether there is one absmax per row of the weight, or one for all of it.
        out_dtype: of the output.

    Returns:
        The output [tokens, out], and the weight's absmax: (out,) if rowwise, else (1,).
    """
    quantize = dispatched.quantize_rowwise if rowwise else dispatched.quantize_global
    matmul = dispatched.int8_matmul_rowwise_dequantize if rowwise else dispatched.int8_matmul_mixed_dequantize
    weight_int8, weight_absmax = quantize(weight)
    return matmul(x_int8, weight_int8.t(), x_absmax, weight_absmax, bias, out_dtype), weight_absmax


define(
    "int8_linear(Tensor x_int8, Tensor x_absmax, Tensor weight, Tensor? bias, bool rowwise, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
    fake=_fake_int8_linear,
    reference=_int8_linear_reference,
    kernels="int8_linear",
)


def _int8_linear_grad_input_reference(
    grad_int8: torch.Tensor,
    grad_absmax: torch.Tensor,
    weight: torch.Tensor,
    weight_absmax: torch.Tensor,
    rowwise: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Quantize the transpose of a weight, and multiply quantized rows of a gradient with it: the reference.

    Args:
        grad_int8: int8 [tokens, out].
        grad_absmax: float32 [tokens].
        weight: [out, in], float.
        weight_absmax: the absmax that :func:`int8_linear` returned.
        rowwise: whether there is one absmax per column of the weight, or one for all of it.
        out_dtype: of the input's gradient.

    Returns:
        The input's gradient [tokens, in].
    """
    if rowwise:
        transposed, absmax = dispatched.quantize_columnwise_and_transpose(weight)
        return dispatched.int8_matmul_rowwise_dequantize(
            grad_int8, transposed.t(), grad_absmax, absmax, None, out_dtype
        )
    transposed = dispatched.quantize_transpose_by_absmax(weight, weight_absmax)
    return dispatched.int8_matmul_mixed_dequantize(
        grad_int8, transposed.t(), grad_absmax, weight_absmax, None, out_dtype
    )


define(
    "int8_linear_grad_input("
    "Tensor grad_int8, Tensor grad_absmax, Tensor weight, Tensor weight_absmax, bool rowwise, ScalarType out_dtype)"
    " -> Tensor",
    fake=lambda grad_int8, grad_absmax, weight, weight_absmax, rowwise, out_dtype: empty(
        grad_int8, (grad_int8.shape[0], weight.shape[1]), out_dtype
    ),
    reference=_int8_linear_grad_input_reference,
    kernels="int8_linear",
)
