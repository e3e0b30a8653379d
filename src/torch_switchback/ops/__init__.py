"""The operations: one file a family, each with its check, schema, fake and reference in plain PyTorch."""

from . import int8_linear  # noqa: F401  (defines its operations)
from ._flops import register_flop_formulas
from .int8_matmul import int8_matmul_mixed_dequantize, int8_matmul_rowwise_dequantize
from .quantize_by_absmax import quantize_by_absmax
from .quantize_columnwise import quantize_columnwise_and_transpose, quantize_rowwise_and_rotated_columnwise
from .quantize_global import (
    quantize_global,
    quantize_global_transpose,
    quantize_global_with_transpose,
    quantize_transpose_by_absmax,
)
from .quantize_rowwise import dequantize_rowwise, quantize_rowwise

__all__ = [
    "dequantize_rowwise",
    "int8_matmul_mixed_dequantize",
    "int8_matmul_rowwise_dequantize",
    "quantize_by_absmax",
    "quantize_columnwise_and_transpose",
    "quantize_global",
    "quantize_global_transpose",
    "quantize_global_with_transpose",
    "quantize_rowwise",
    "quantize_rowwise_and_rotated_columnwise",
    "quantize_transpose_by_absmax",
    "register_flop_formulas",
]
