"""Global quantization: one absmax for the whole tensor, as for weights; plain, transposed or both.

The INT8 tensor cores want the inner dimension of both operands contiguous. The input gradient's inner dimension
is the weight's rows, so its int8 values are stored transposed.
"""

import torch
from torch import Tensor

from ..kernels.device import empty
from ._library import define
from ._numerics import Quantized, absmax_of, quantize_transposed
from ._validation import check_dtype, check_float, check_matrix, check_same_device, check_shape
from .quantize_by_absmax import quantize_by_absmax_reference


def quantize_global(x: Tensor) -> Quantized:
    """Quantize x by the absmax of all its elements (arXiv 2304.13013, equation 2).

    Args:
        x: any shape, float16, bfloat16 or float32.

    Returns:
        int8 values of x's shape, and the absmax (1,).

    Raises:
        TypeError: x has another dtype.
    """
    check_float("quantize_global", "x", x)
    return quantize_global_op(x)


def _quantize_global_reference(x: Tensor) -> Quantized:
    absmax = absmax_of(x)
    return quantize_by_absmax_reference(torch.atleast_2d(x).flatten(0, -2), absmax).view(x.shape), absmax


quantize_global_op = define(
    "quantize_global(Tensor x) -> (Tensor, Tensor)",
    fake=lambda x: (empty(x, x.shape, torch.int8), empty(x, (1,), torch.float32)),
    reference=_quantize_global_reference,
    kernels="quantize_global",
)


def quantize_global_transpose(input: Tensor) -> Quantized:
    """Quantize as :func:`quantize_global` does, and store the int8 values transposed in the same pass.

    Args:
        input: [rows, cols], float16, bfloat16 or float32.

    Returns:
        int8 values [cols, rows], equal to ``quantize_global(input)[0].t()``, and the absmax (1,).

    Raises:
        TypeError: input has another dtype.
        ValueError: input is not 2-D.
    """
    check_matrix("quantize_global_transpose", "input", input)
    return quantize_global_transpose_op(input)


def _quantize_global_transpose_reference(input: Tensor) -> Quantized:
    absmax = absmax_of(input)
    return quantize_transposed(input, absmax), absmax


quantize_global_transpose_op = define(
    "quantize_global_transpose(Tensor input) -> (Tensor, Tensor)",
    fake=lambda input: (empty(input, input.shape[::-1], torch.int8), empty(input, (1,), torch.float32)),
    reference=_quantize_global_transpose_reference,
    kernels="quantize_global",
)


def quantize_transpose_by_absmax(x: Tensor, absmax: Tensor) -> Tensor:
    """Quantize as :func:`quantize_global_transpose` does, by the absmax that the forward pass found.

    Args:
        x: [rows, cols], float16, bfloat16 or float32.
        absmax: float32 (1,), no smaller than any |x|.

    Returns:
        int8 values [cols, rows].

    Raises:
        TypeError: x or absmax has another dtype.
        ValueError: x is not 2-D, absmax is not of shape (1,), or is on another device.
    """
    check_matrix("quantize_transpose_by_absmax", "x", x)
    check_dtype("quantize_transpose_by_absmax", "absmax", absmax, torch.float32)
    check_shape("quantize_transpose_by_absmax", "absmax", absmax, 1)
    check_same_device("quantize_transpose_by_absmax", x, absmax=absmax)
    return quantize_transpose_by_absmax_op(x, absmax)


quantize_transpose_by_absmax_op = define(
    "quantize_transpose_by_absmax(Tensor x, Tensor absmax) -> Tensor",
    fake=lambda x, absmax: empty(x, x.shape[::-1], torch.int8),
    reference=quantize_transposed,
    kernels="quantize_global",
)


def quantize_global_with_transpose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize as :func:`quantize_global` and :func:`quantize_global_transpose` do, in the reads of one of them.

    Args:
        x: [rows, cols], float16, bfloat16 or float32.

    Returns:
        int8 values [rows, cols], the same transposed, [cols, rows], and the absmax (1,).

    Raises:
        TypeError: x has another dtype.
        ValueError: x is not 2-D.
    """
    check_matrix("quantize_global_with_transpose", "x", x)
    return quantize_global_with_transpose_op(x)


def _quantize_global_with_transpose_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qdata, absmax = _quantize_global_reference(x)
    return qdata, qdata.t().clone(memory_format=torch.contiguous_format), absmax


quantize_global_with_transpose_op = define(
    "quantize_global_with_transpose(Tensor x) -> (Tensor, Tensor, Tensor)",
    fake=lambda x: (
        empty(x, x.shape, torch.int8),
        empty(x, x.shape[::-1], torch.int8),
        empty(x, (1,), torch.float32),
    ),
    reference=_quantize_global_with_transpose_reference,
    kernels="quantize_global",
)
