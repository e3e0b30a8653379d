"""Compute the backward of a layer whose weight is int8: transpose it, and have the gradient take on its scales.

With the weight W ≈ diag(s) Q / 127, Q int8 [out, in] and one absmax s per row, grad_input = G W = (G diag(s)) Q / 127.
The scales lie along the sum over the out features, so they go into G before it is quantized: both matmuls of such a
layer use the same int8 values.

The functions here are the references. The layer calls the operations of the same names.
"""

import torch
from torch import Tensor

from ..kernels.device import empty
from ._hadamard import rotate_features_back
from ._library import define, dispatched
from ._numerics import ONE_OVER_127, Quantized, row_blocks
from .quantize_columnwise import fake_quantize_columnwise
from .quantize_rowwise import fake_quantize_rowwise, quantize_rowwise_op

transpose_int8 = define(
    "transpose_int8(Tensor x) -> Tensor",
    fake=lambda x: empty(x, (x.shape[1], x.shape[0]), torch.int8),
    reference=lambda x: x.t().clone(memory_format=torch.contiguous_format),
    kernels="transpose_int8",
)
"""Return the transpose [cols, rows] of int8 values [rows, cols]."""


def _fake_quantize_folded_rowwise(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *fake_quantize_rowwise(x), empty(x, (1,), torch.float32)


def _quantize_folded_rowwise_reference(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the rows of ``x * scale``: the reference.

    Args:
        x: [rows, cols], float.
        scale: float32 [cols].

    Returns:
        int8 values [rows, cols]; their absmax [rows]; and what stands for scale in the matmul that follows, 1 in the
        shape (1,).
    """
    qdata, absmax, one = _fake_quantize_folded_rowwise(x, scale)
    for block in row_blocks(x):
        qdata[block], absmax[block] = quantize_rowwise_op(x[block].float() * scale)
    return qdata, absmax, one.fill_(1.0)


quantize_folded_rowwise = define(
    "quantize_folded_rowwise(Tensor x, Tensor scale) -> (Tensor, Tensor, Tensor)",
    fake=_fake_quantize_folded_rowwise,
    reference=_quantize_folded_rowwise_reference,
    kernels="quantize_folded_rowwise",
)


def dequantize_rotated(qdata: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Return float32 [rows, cols] of int8 values that :func:`quantize_rowwise` has rotated along the columns."""
    return rotate_features_back(qdata.float(), block) * (absmax * ONE_OVER_127)[:, None]


def _requantize_rotated_reference(qdata: Tensor, absmax: Tensor, rotate_features: int) -> Quantized:
    """Quantize the columns of a weight, rotated along the rows, given its rows rotated along the columns.

    Args:
        qdata: int8 [out, in], in a multiple of rotate_features.
        absmax: float32 [out].
        rotate_features: how many rows, and how many columns, a rotation mixes.

    Returns:
        int8 [in, out up to a multiple of rotate_features], and their absmax [in].
    """
    # bfloat16 adds about 1 % to the noise of grad_input, and is rotated in a third of float32's time.
    weight = dequantize_rotated(qdata, absmax, rotate_features).to(torch.bfloat16)
    return dispatched.quantize_rotated_columnwise_and_transpose(weight, rotate_features)


requantize_rotated = define(
    "requantize_rotated(Tensor qdata, Tensor absmax, int rotate_features) -> (Tensor, Tensor)",
    fake=lambda qdata, absmax, rotate_features: fake_quantize_columnwise(qdata, rotate_features),
    reference=_requantize_rotated_reference,
    kernels="quantize_rotated",
)


def _prepared_grad_input_reference(
    grad: Tensor,
    weight_int8: Tensor,
    weight_absmax: Tensor,
    transposed: Tensor | None,
    rowwise: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Compute the input's gradient from int8 values of the weight that are not rotated: the reference.

    Args:
        grad: [tokens, out], float.
        weight_int8: int8 [out, in].
        weight_absmax: float32, (out,) if rowwise, else (1,).
        transposed: int8 [in, out], the transpose of weight_int8 if it is kept. None: the operation transposes.
        rowwise: whether there is one absmax per row of the weight, or one for all of it.
        out_dtype: of the result.

    Returns:
        The input's gradient [tokens, in].
    """
    one = weight_absmax
    if rowwise:
        grad_int8, grad_absmax, one = dispatched.quantize_folded_rowwise(grad, weight_absmax)
    else:
        grad_int8, grad_absmax = dispatched.quantize_rowwise(grad)
    if transposed is None:
        transposed = dispatched.transpose_int8(weight_int8)
    return dispatched.int8_matmul_mixed_dequantize(grad_int8, transposed.t(), grad_absmax, one, None, out_dtype)


prepared_grad_input = define(
    "prepared_grad_input(Tensor grad, Tensor weight_int8, Tensor weight_absmax, Tensor? transposed, bool rowwise, "
    "ScalarType out_dtype) -> Tensor",
    fake=lambda grad, weight_int8, weight_absmax, transposed, rowwise, out_dtype: empty(
        grad, (grad.shape[0], weight_int8.shape[1]), out_dtype
    ),
    reference=_prepared_grad_input_reference,
    kernels="int8_linear",
)
