"""Column-wise quantisation, stored transposed: one absmax an input feature, for the row-wise strategy's Wᵀ."""

import torch

from ._library import define
from ._numerics import absmax_of, quantize_transposed, row_blocks
from ._validation import check_2d, check_float


def quantize_columnwise_and_transpose(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each column of x by its own absmax and store the codes transposed.

    Args:
        x: [rows, cols], float16, bfloat16 or float32, any strides.

    Returns:
        int8 codes [cols, rows], contiguous, and the float32 absmax [cols]; both equal
        ``quantize_rowwise(x.t())``.

    Raises:
        TypeError: x has another dtype.
        ValueError: x is not 2-D.
    """
    check_float("quantize_columnwise_and_transpose", "x", x)
    check_2d("quantize_columnwise_and_transpose", "x", x)
    return quantize_columnwise_and_transpose_op.dispatched(x)


def _allocate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape
    return x.new_empty((cols, rows), dtype=torch.int8), x.new_empty((cols,), dtype=torch.float32)


def _quantize_columnwise_and_transpose_cpu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = torch.zeros(x.shape[1], dtype=torch.float32)
    for block in row_blocks(x):
        absmax = torch.maximum(absmax, absmax_of(x[block], dim=0))
    return quantize_transposed(x, absmax), absmax


quantize_columnwise_and_transpose_op = define(
    "quantize_columnwise_and_transpose(Tensor x) -> (Tensor, Tensor)",
    allocate=_allocate,
    cpu=_quantize_columnwise_and_transpose_cpu,
    kernels="quantize_columnwise",
)
