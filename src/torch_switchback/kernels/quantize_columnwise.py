"""Column-wise quantisation: absmax of parts of the columns; then reduce the parts, quantise, store transposed."""

import torch

from ._absmax import partial_columnwise_absmax
from ._transpose import quantize_transpose


def quantize_columnwise_and_transpose(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    quantize_transpose(x, partial_columnwise_absmax(x), codes, absmax, columnwise=True)
