"""Quantization by absmaxes that are known already, as where they span the shards of several processes."""

import torch
from torch import Tensor

from ..kernels.device import empty
from ._library import define
from ._numerics import quantize, row_blocks


def quantize_by_absmax_reference(x: Tensor, absmax: Tensor) -> Tensor:
    qdata = x.new_empty(x.shape, dtype=torch.int8)
    absmax = absmax.expand(x.shape[0])[:, None]
    for block in row_blocks(x):
        qdata[block] = quantize(x[block], absmax[block])
    return qdata


quantize_by_absmax = define(
    "quantize_by_absmax(Tensor x, Tensor absmax) -> Tensor",
    fake=lambda x, absmax: empty(x, x.shape, torch.int8),
    reference=quantize_by_absmax_reference,
    kernels="quantize_by_absmax",
)
"""Quantize x [rows, cols] by an absmax (1,) or (rows,), no smaller than any |x| that it covers: int8 [rows, cols].

With the absmax of a larger tensor the result is x's part of that tensor's int8 values.
"""
