"""Column-wise quantisation: the absmax of each column; then quantise and store transposed."""

import torch

from . import _absmax
from ._absmax import columnwise_absmax
from ._transpose import quantize_transpose


def quantize_columnwise_and_transpose(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    if x.numel() <= _absmax.MAX_SMALL:
        quantize_transpose(x, x, codes, absmax, columnwise=True)
    else:
        columnwise_absmax(x, absmax)
        quantize_transpose(x, absmax[None], codes, None, columnwise=True)
