"""Row-wise quantization and its inverse: one absmax per row, as for activations and output gradients."""

import torch
from torch import Tensor

from ..kernels.device import empty
from ._hadamard import rotate_features as rotated
from ._library import define
from ._numerics import ONE_OVER_127, Quantized, absmax_of, quantize, row_blocks
from ._validation import (
    check_2d,
    check_dtype,
    check_matrix,
    check_out_dtype,
    check_rotation,
    check_same_device,
    check_shape,
)


def quantize_rowwise(x: Tensor, rotate_features: int | None = None) -> Quantized:
    """Quantize each row of x, rotated along the columns or as it is, by its own absmax (arXiv 2304.13013, equation 1).

    Args:
        x: [rows, cols], float16, bfloat16 or float32.
        rotate_features: None, or how many columns (16, 32, 64 or 128) a rotation mixes.

    Returns:
        int8 values [rows, cols], if rotated with cols up to a multiple of rotate_features; and their absmax [rows].

    Raises:
        TypeError: x has another dtype.
        ValueError: x is not 2-D, or rotate_features is another number.
    """
    check_matrix("quantize_rowwise", "x", x)
    if rotate_features is None:
        return quantize_rowwise_op(x)
    check_rotation("quantize_rowwise", "rotate_features", rotate_features)
    return quantize_rotated_rowwise_op(x, rotate_features)


def fake_quantize_rowwise(x: Tensor, rotate_features: int = 1) -> Quantized:
    rows, cols = x.shape
    padded_cols = (cols + rotate_features - 1) // rotate_features * rotate_features
    return empty(x, (rows, padded_cols), torch.int8), empty(x, (rows,), torch.float32)


def _quantize_rowwise_reference(x: Tensor) -> Quantized:
    qdata, absmax = fake_quantize_rowwise(x)
    for block in row_blocks(x):
        absmax[block] = absmax_of(x[block], dim=1)
        qdata[block] = quantize(x[block], absmax[block, None])
    return qdata, absmax


quantize_rowwise_op = define(
    "quantize_rowwise(Tensor x) -> (Tensor, Tensor)",
    fake=fake_quantize_rowwise,
    reference=_quantize_rowwise_reference,
    kernels="quantize_rowwise",
)


def _quantize_rotated_rowwise_reference(x: Tensor, rotate_features: int) -> Quantized:
    qdata, absmax = fake_quantize_rowwise(x, rotate_features)
    for block in row_blocks(x):
        qdata[block], absmax[block] = _quantize_rowwise_reference(rotated(x[block], rotate_features))
    return qdata, absmax


quantize_rotated_rowwise_op = define(
    "quantize_rotated_rowwise(Tensor x, int rotate_features) -> (Tensor, Tensor)",
    fake=fake_quantize_rowwise,
    reference=_quantize_rotated_rowwise_reference,
    kernels="quantize_rotated_rowwise",
)


def dequantize_rowwise(x: Tensor, absmax: Tensor, out_dtype: torch.dtype = torch.float16) -> Tensor:
    """Return ``x * absmax / 127`` row by row: the inverse of :func:`quantize_rowwise`.

    Args:
        x: int8 values [rows, cols].
        absmax: float32 [rows].
        out_dtype: float16 (bitsandbytes' choice), bfloat16 or float32.

    Returns:
        [rows, cols] in out_dtype; a row whose absmax is NaN or Inf is non-finite throughout.

    Raises:
        TypeError: x is not int8, absmax not float32, or out_dtype another dtype.
        ValueError: x is not 2-D, absmax not of shape (rows,), or on another device.
    """
    check_dtype("dequantize_rowwise", "x", x, torch.int8)
    check_2d("dequantize_rowwise", "x", x)
    check_dtype("dequantize_rowwise", "absmax", absmax, torch.float32)
    check_shape("dequantize_rowwise", "absmax", absmax, x.shape[0])
    check_out_dtype("dequantize_rowwise", out_dtype)
    check_same_device("dequantize_rowwise", x, absmax=absmax)
    return dequantize_rowwise_op(x, absmax, out_dtype)


def _dequantize_rowwise_reference(x: Tensor, absmax: Tensor, out_dtype: torch.dtype) -> Tensor:
    # contiguous(): a factor 0 * Inf or 0 * NaN is NaN, as it must be.
    return (x.contiguous().float() * (absmax * ONE_OVER_127)[:, None]).to(out_dtype)


dequantize_rowwise_op = define(
    "dequantize_rowwise(Tensor x, Tensor absmax, ScalarType out_dtype) -> Tensor",
    fake=lambda x, absmax, out_dtype: empty(x, x.shape, out_dtype),
    reference=_dequantize_rowwise_reference,
    kernels="quantize_rowwise",
)
