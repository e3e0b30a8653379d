"""Quantization by absmaxes that are known already, as where they span the shards of several processes."""

import torch

from ..kernels.device import empty
from ._library import define
from ._numerics import quantize, row_blocks
from ._validation import check_2d, check_dtype, check_float, check_same_device


def quantize_by_absmax(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The int8 values of x for one absmax, or for one per row.

    With the absmax that :func:`quantize_global` or :func:`quantize_rowwise` returns they equal that function's;
    with the absmax of a larger tensor they are x's part of that tensor's int8 values.

    Args:
        x: [rows, cols], float16, bfloat16 or float32, any strides.
        absmax: float32 (1,) or (rows,), no smaller than any |x| that it covers.

    Returns:
        int8 values [rows, cols], contiguous.

    Raises:
        TypeError: x or absmax has another dtype.
        ValueError: x is not 2-D, absmax has another shape, or is on another device.
    """
    op = "quantize_by_absmax"
    check_float(op, "x", x)
    check_2d(op, "x", x)
    check_dtype(op, "absmax", absmax, torch.float32)
    if tuple(absmax.shape) not in ((1,), (x.shape[0],)):
        raise ValueError(f"{op}: absmax must have shape (1,) or ({x.shape[0]},), got {tuple(absmax.shape)}")
    check_same_device(op, x, absmax=absmax)
    return quantize_by_absmax_op(x, absmax)


def _quantize_by_absmax_reference(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    qdata = x.new_empty(x.shape, dtype=torch.int8)
    absmax = absmax.expand(x.shape[0])[:, None]
    for block in row_blocks(x):
        qdata[block] = quantize(x[block], absmax[block])
    return qdata


quantize_by_absmax_op = define(
    "quantize_by_absmax(Tensor x, Tensor absmax) -> Tensor",
    fake=lambda x, absmax: empty(x, x.shape, torch.int8),
    reference=_quantize_by_absmax_reference,
    kernels="quantize_by_absmax",
)
