"""Global quantization: one absmax for the whole tensor, as for weights; plain, transposed or both.

The INT8 tensor cores want the inner dimension of both operands contiguous. The input gradient's inner dimension
is the weight's rows, so its int8 values are stored transposed.
"""

import torch

from ..kernels.device import empty
from ._library import define
from ._numerics import absmax_of, quantize, quantize_transposed, row_blocks
from ._validation import check_2d, check_dtype, check_float, check_same_device, check_shape


def quantize_global(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x by the absmax of all its elements (arXiv 2304.13013, equation 2).

    Args:
        x: any shape, float16, bfloat16 or float32, any strides.

    Returns:
        The int8 values, contiguous, of x's shape, and the float32 absmax (1,): ``x ≈ qdata * absmax / 127``.
        One NaN or Inf in x makes the absmax NaN or Inf and all int8 values 0. They are also 0 for an absmax below
        2**-121.

    Raises:
        TypeError: x has another dtype.
    """
    check_float("quantize_global", "x", x)
    return quantize_global_op(x)


def _fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return empty(x, x.shape, torch.int8), empty(x, (1,), torch.float32)


def _quantize_global_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = absmax_of(x)
    rows = x.flatten(0, -2) if x.dim() > 1 else x.flatten()
    qdata = x.new_empty(rows.shape, dtype=torch.int8)
    for block in row_blocks(rows):
        qdata[block] = quantize(rows[block], absmax)
    return qdata.view(x.shape), absmax


quantize_global_op = define(
    "quantize_global(Tensor x) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_quantize_global_reference,
    kernels="quantize_global",
)


def quantize_global_transpose(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_global` with the int8 values stored transposed, in the same pass.

    Args:
        input: [rows, cols], float16, bfloat16 or float32, any strides.

    Returns:
        int8 values [cols, rows], contiguous, equal to ``quantize_global(input)[0].t()``, and the absmax (1,).

    Raises:
        TypeError: input has another dtype.
        ValueError: input is not 2-D.
    """
    check_float("quantize_global_transpose", "input", input)
    check_2d("quantize_global_transpose", "input", input)
    return quantize_global_transpose_op(input)


def _fake_transpose(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = input.shape
    return empty(input, (cols, rows), torch.int8), empty(input, (1,), torch.float32)


def _quantize_global_transpose_reference(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = absmax_of(input)
    return quantize_transposed(input, absmax), absmax


quantize_global_transpose_op = define(
    "quantize_global_transpose(Tensor input) -> (Tensor, Tensor)",
    fake=_fake_transpose,
    reference=_quantize_global_transpose_reference,
    kernels="quantize_global",
)


def quantize_transpose_by_absmax(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The int8 values of :func:`quantize_global_transpose` when x's global absmax is known already.

    The backward pass uses it with the absmax that the forward pass found.

    Args:
        x: [rows, cols], float16, bfloat16 or float32, any strides.
        absmax: float32 (1,), no smaller than any |x|.

    Returns:
        int8 values [cols, rows], contiguous.

    Raises:
        TypeError: x or absmax has another dtype.
        ValueError: x is not 2-D, absmax is not of shape (1,), or is on another device.
    """
    check_float("quantize_transpose_by_absmax", "x", x)
    check_2d("quantize_transpose_by_absmax", "x", x)
    check_dtype("quantize_transpose_by_absmax", "absmax", absmax, torch.float32)
    check_shape("quantize_transpose_by_absmax", "absmax", absmax, 1)
    check_same_device("quantize_transpose_by_absmax", x, absmax=absmax)
    return quantize_transpose_by_absmax_op(x, absmax)


quantize_transpose_by_absmax_op = define(
    "quantize_transpose_by_absmax(Tensor x, Tensor absmax) -> Tensor",
    fake=lambda x, absmax: empty(x, (x.shape[1], x.shape[0]), torch.int8),
    reference=quantize_transposed,
    kernels="quantize_global",
)


def quantize_global_with_transpose(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize x as :func:`quantize_global` and as :func:`quantize_global_transpose`, in the reads of one of them.

    Args:
        x: [rows, cols], float16, bfloat16 or float32, any strides.

    Returns:
        The int8 values [rows, cols] and, transposed, [cols, rows], both contiguous, and the absmax (1,).

    Raises:
        TypeError: x has another dtype.
        ValueError: x is not 2-D.
    """
    check_float("quantize_global_with_transpose", "x", x)
    check_2d("quantize_global_with_transpose", "x", x)
    return quantize_global_with_transpose_op(x)


def _fake_with_transpose(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    qdata, absmax = _fake(x)
    return qdata, empty(x, (x.shape[1], x.shape[0]), torch.int8), absmax


def _quantize_global_with_transpose_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    qdata, absmax = _quantize_global_reference(x)
    return qdata, qdata.t().clone(memory_format=torch.contiguous_format), absmax


quantize_global_with_transpose_op = define(
    "quantize_global_with_transpose(Tensor x) -> (Tensor, Tensor, Tensor)",
    fake=_fake_with_transpose,
    reference=_quantize_global_with_transpose_reference,
    kernels="quantize_global",
)
