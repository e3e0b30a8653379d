"""The operations: one file per family, each with its checks, schema, fake and reference in plain PyTorch.

What all of them have in common:

- ``x ≈ x_int8 * absmax / 127``, with int8 values in [-127, 127] and absmaxes in float32.
- An absmax over a NaN or an Inf is NaN or Inf, and its int8 values are 0. So are those of an absmax below 2**-121.
- Arguments may have any strides, results are contiguous.
- Errors name the argument: TypeError for another dtype, ValueError for another shape or another device.
- A rotation multiplies blocks of 16, 32, 64 or 128 rows or columns with an orthogonal Hadamard matrix before they are
  quantized; zeros fill the last block. Its sums are float32's, so values above 3.4e38 / block may become Inf. On a GPU
  they are in the hardware's order: the same from run to run, and a few int8 values one from the CPU's.
"""

from . import int8_linear, prepared_weight  # noqa: F401  (define their operations)
from ._flops import register_flop_formulas
from .int8_matmul import int8_matmul_mixed_dequantize, int8_matmul_rowwise_dequantize
from .quantize_by_absmax import quantize_by_absmax  # noqa: F401  (internal, as are all that __all__ does not list)
from .quantize_columnwise import quantize_columnwise_and_transpose, quantize_rowwise_and_rotated_columnwise  # noqa: F401
from .quantize_global import (
    quantize_global,
    quantize_global_transpose,
    quantize_global_with_transpose,  # noqa: F401
    quantize_transpose_by_absmax,  # noqa: F401
)
from .quantize_rowwise import dequantize_rowwise, quantize_rowwise

__all__ = [
    "dequantize_rowwise",
    "int8_matmul_mixed_dequantize",
    "int8_matmul_rowwise_dequantize",
    "quantize_columnwise_and_transpose",
    "quantize_global",
    "quantize_global_transpose",
    "quantize_rowwise",
    "register_flop_formulas",
]
