"""Global quantization: one absmax for the whole tensor, as for weights; plain, transposed or both.

The INT8 tensor cores want the inner dimension of both operands contiguous. The input gradient's inner dimension
is the weight's rows, so its int8 values are stored transposed.
"""

import torch
from torch import Tensor

from ..kernels.device import empty
from ._library import define
from ._numerics import Quantized, absmax_of, quantize_transposed
from ._validation import check_float, check_matrix
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


quantize_transpose_by_absmax = define(
    "quantize_transpose_by_absmax(Tensor x, Tensor absmax) -> Tensor",
    fake=lambda x, absmax: empty(x, x.shape[::-1], torch.int8),
    reference=quantize_transposed,
    kernels="quantize_global",
)
"""Quantize as :func:`quantize_global_transpose` does, by the absmax (1,) that the forward pass found."""


def _quantize_global_with_transpose_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qdata, absmax = _quantize_global_reference(x)
    return qdata, qdata.t().clone(memory_format=torch.contiguous_format), absmax


quantize_global_with_transpose = define(
    "quantize_global_with_transpose(Tensor x) -> (Tensor, Tensor, Tensor)",
    fake=lambda x: (
        empty(x, x.shape, torch.int8),
        empty(x, x.shape[::-1], torch.int8),
        empty(x, (1,), torch.float32),
    ),
    reference=_quantize_global_with_transpose_reference,
    kernels="quantize_global",
)
"""Return x's int8 values as :func:`quantize_global` does, the same transposed, and the absmax, in the reads of one."""
