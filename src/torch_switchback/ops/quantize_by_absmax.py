"""Quantization by absmaxes that are known already, as where they span the shards of several processes."""

import torch
from torch import Tensor

from ..kernels.device import empty
from ._library import define
from ._numerics import quantize, row_blocks
from ._validation import check_dtype, check_matrix, check_same_device


def quantize_by_absmax(x: Tensor, absmax: Tensor) -> Tensor:
    """Quantize x by one absmax, or by one per row.

    With the absmax that :func:`quantize_global` or :func:`quantize_rowwise` returns, the result is that function's;
    with the absmax of a larger tensor it is x's part of that tensor's int8 values.

    Args:
        x: [rows, cols], float16, bfloat16 or float32.
        absmax: float32 (1,) or (rows,), no smaller than any |x| that it covers.

    Returns:
        int8 values [rows, cols].

    Raises:
        TypeError: x or absmax has another dtype.
        ValueError: x is not 2-D, absmax has another shape, or is on another device.
    """
    check_matrix("quantize_by_absmax", "x", x)
    check_dtype("quantize_by_absmax", "absmax", absmax, torch.float32)
    if tuple(absmax.shape) not in ((1,), (x.shape[0],)):
        raise ValueError(
            f"quantize_by_absmax: absmax must have shape (1,) or ({x.shape[0]},), got {tuple(absmax.shape)}"
        )
    check_same_device("quantize_by_absmax", x, absmax=absmax)
    return quantize_by_absmax_op(x, absmax)


def quantize_by_absmax_reference(x: Tensor, absmax: Tensor) -> Tensor:
    qdata = x.new_empty(x.shape, dtype=torch.int8)
    absmax = absmax.expand(x.shape[0])[:, None]
    for block in row_blocks(x):
        qdata[block] = quantize(x[block], absmax[block])
    return qdata


quantize_by_absmax_op = define(
    "quantize_by_absmax(Tensor x, Tensor absmax) -> Tensor",
    fake=lambda x, absmax: empty(x, x.shape, torch.int8),
    reference=quantize_by_absmax_reference,
    kernels="quantize_by_absmax",
)
