"""Column-wise quantization, stored transposed: for the row-wise scheme's Wᵀ and for an int8 weight gradient.

The weight gradient's inner dimension is the tokens, and one token with a large gradient would coarsen every column.
With R an orthogonal block Hadamard matrix, (R G)ᵀ (R X) = Gᵀ X, and R spreads each token over its block.
"""

import torch
from torch import Tensor

from ..kernels.device import empty
from ._hadamard import rotate
from ._library import define
from ._numerics import Quantized, absmax_of, quantize_transposed, row_blocks
from ._validation import check_matrix, check_rotation
from .quantize_rowwise import quantize_rowwise_op


def quantize_columnwise_and_transpose(x: Tensor, rotate_tokens: int | None = None) -> Quantized:
    """Quantize each column of x, rotated along the rows or as it is, by its own absmax and store it transposed.

    Args:
        x: [rows, cols], float16, bfloat16 or float32.
        rotate_tokens: None, or how many rows (16, 32, 64 or 128) a rotation mixes.

    Returns:
        int8 values [cols, rows], if rotated with rows up to a multiple of rotate_tokens; and their absmax [cols].
        Not rotated, both equal ``quantize_rowwise(x.t())``.

    Raises:
        TypeError: x has another dtype.
        ValueError: x is not 2-D, or rotate_tokens is another number.
    """
    check_matrix("quantize_columnwise_and_transpose", "x", x)
    if rotate_tokens is None:
        return quantize_columnwise_and_transpose_op(x)
    check_rotation("quantize_columnwise_and_transpose", "rotate_tokens", rotate_tokens)
    return quantize_rotated_columnwise_and_transpose_op(x, rotate_tokens)


def fake_quantize_columnwise(x: Tensor, rotate_tokens: int = 1) -> Quantized:
    rows, cols = x.shape
    padded_rows = (rows + rotate_tokens - 1) // rotate_tokens * rotate_tokens
    return empty(x, (cols, padded_rows), torch.int8), empty(x, (cols,), torch.float32)


def _quantize_columnwise_and_transpose_reference(x: Tensor) -> Quantized:
    absmax = x.new_zeros(x.shape[1], dtype=torch.float32)
    for block in row_blocks(x):
        absmax = torch.maximum(absmax, absmax_of(x[block], dim=0))
    return quantize_transposed(x, absmax), absmax


quantize_columnwise_and_transpose_op = define(
    "quantize_columnwise_and_transpose(Tensor x) -> (Tensor, Tensor)",
    fake=fake_quantize_columnwise,
    reference=_quantize_columnwise_and_transpose_reference,
    kernels="quantize_columnwise",
)


def _quantize_rotated_columnwise_and_transpose_reference(x: Tensor, rotate_tokens: int) -> Quantized:
    rows, cols = x.shape
    rotated = x.new_zeros((rows + -rows % rotate_tokens, cols), dtype=torch.float32)
    rotated[:rows] = x
    at_once = max(1, 2**18 // max(1, cols * rotate_tokens)) * rotate_tokens  # as row_blocks, in whole blocks
    for part in rotated.split(at_once):
        part.copy_(rotate(part, rotate_tokens))
    return _quantize_columnwise_and_transpose_reference(rotated)


quantize_rotated_columnwise_and_transpose_op = define(
    "quantize_rotated_columnwise_and_transpose(Tensor x, int rotate_tokens) -> (Tensor, Tensor)",
    fake=fake_quantize_columnwise,
    reference=_quantize_rotated_columnwise_and_transpose_reference,
    kernels="quantize_rotated",
)


quantize_rowwise_and_rotated_columnwise = define(
    "quantize_rowwise_and_rotated_columnwise(Tensor x, int rotate_tokens) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, rotate_tokens: (
        empty(x, x.shape, torch.int8),
        empty(x, (x.shape[0],), torch.float32),
        *fake_quantize_columnwise(x, rotate_tokens),
    ),
    reference=lambda x, rotate_tokens: (
        *quantize_rowwise_op(x),
        *_quantize_rotated_columnwise_and_transpose_reference(x, rotate_tokens),
    ),
    kernels="quantize_rotated",
)
"""Return what :func:`quantize_rowwise` and rotated :func:`quantize_columnwise_and_transpose` do, in two reads of x."""
