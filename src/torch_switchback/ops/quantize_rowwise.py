"""Row-wise quantisation and its inverse: one absmax a row, as for activations and output gradients."""

import torch

from ._library import define
from ._numerics import ONE_OVER_127, absmax_of, quantize, row_blocks
from ._validation import check_2d, check_dtype, check_float, check_out_dtype, check_same_device, check_shape


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of x by its own absmax (arXiv 2304.13013, equation 1).

    Args:
        x: [rows, cols], float16, bfloat16 or float32, any strides.

    Returns:
        The int8 codes [rows, cols], contiguous, and the float32 absmax [rows]: ``x ≈ codes * absmax / 127``.
        A row with a NaN or an Inf has a NaN or Inf absmax and codes 0; a row whose absmax is below 2**-121
        has codes 0.

    Raises:
        TypeError: x has another dtype.
        ValueError: x is not 2-D.
    """
    check_float("quantize_rowwise", "x", x)
    check_2d("quantize_rowwise", "x", x)
    return quantize_rowwise_op.dispatched(x)


def _allocate_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape
    return x.new_empty((rows, cols), dtype=torch.int8), x.new_empty((rows,), dtype=torch.float32)


def _quantize_rowwise_in_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, absmax = _allocate_quantize(x)
    for block in row_blocks(x):
        absmax[block] = absmax_of(x[block], dim=1)
        codes[block] = quantize(x[block], absmax[block, None])
    return codes, absmax


quantize_rowwise_op = define(
    "quantize_rowwise(Tensor x) -> (Tensor, Tensor)",
    allocate=_allocate_quantize,
    meaning=_quantize_rowwise_in_torch,
    kernels="quantize_rowwise",
)


def dequantize_rowwise(x: torch.Tensor, absmax: torch.Tensor, out_dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """``x * absmax / 127`` row by row: the inverse of :func:`quantize_rowwise`.

    Args:
        x: int8 codes [rows, cols], any strides.
        absmax: float32 [rows].
        out_dtype: float16 (bitsandbytes' choice), bfloat16 or float32.

    Returns:
        [rows, cols] in out_dtype, contiguous; a row whose absmax is NaN or Inf is non-finite throughout.

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
    return dequantize_rowwise_op.dispatched(x, absmax, out_dtype)


def _allocate_dequantize(x: torch.Tensor, absmax: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def _dequantize_rowwise_in_torch(x: torch.Tensor, absmax: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    # contiguous(): a factor 0 * Inf or 0 * NaN is NaN, as it must be.
    return (x.contiguous().float() * (absmax * ONE_OVER_127)[:, None]).to(out_dtype)


dequantize_rowwise_op = define(
    "dequantize_rowwise(Tensor x, Tensor absmax, ScalarType out_dtype) -> Tensor",
    allocate=_allocate_dequantize,
    meaning=_dequantize_rowwise_in_torch,
    kernels="quantize_rowwise",
)
